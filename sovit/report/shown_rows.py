"""A row of a ledger as a tracker shows it (MLflow, wandb, trackio): params, metrics, tags, and its own training curve."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit.ledger.measurements import levels
from sovit.ledger.schema import is_number, row_label
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.spec.vlm_run import VlmRun

NOTE = "mlflow.note.content"  # tag: what MLflow's pages say of an experiment or a run
STAGES = "stages."  # what the stages of a vision-language model train, under the names that overrides have
CHOSEN = {f.name for kind in (Shape, Recipe, Run, VlmRun) for f in dataclasses.fields(kind)}
CHOSEN |= {"num_classes", "base_image_size", "base_patch_size", "base_examples"}
CHOSEN -= {"budgets", "stages", "study"}
RESULT = {"zero_line", "shuffled_loss", "shuffled_error"}  # val_loss and its like besides
SIZE = {"num_heads", "forward_flops", "head_flops", "text_flops", "stored_bytes"}  # and all *_params
COMPUTE = {"compute", "spent_flops", "base_train_flops", "num_examples", "trunk_examples", "cooldown_examples"}
COMPUTE |= {"seconds", "spent_seconds"}
CURVE = LOSS, FLOPS, LOG_FLOPS = ("train/loss", "compute/train_flops", "compute/log10_train_flops")


@dataclass(frozen=True)
class ShownRow:
    """A row of a ledger as a run: params and tags are text, metrics finite numbers."""

    name: str
    row: Mapping[str, Any]
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def describe(study: str, rows: Sequence[Mapping[str, Any]], reasons: dict[str, str]) -> list[ShownRow]:
    """Show each row as a run. reasons: run_id -> why the row is excluded.

    A column that is not known here becomes a metric where it holds a number, in the group of its own name where it has
    one (probe/error) and else in other/; anything else becomes a tag. A missing value (null) is left out.
    """
    said = {column for row in rows for column in row} - {"head_dim", "patch_size", "image_size", "pool"}
    defaults = {
        f.name: f.default for f in dataclasses.fields(Shape) if f.name in said and f.default != dataclasses.MISSING
    }
    return _told_apart([_shown(study, row, defaults, b, reasons) for row, b in zip(rows, _budgets(rows))])


def _shown(study: str, row: Mapping[str, Any], defaults: dict, budget: str | None, reasons: dict[str, str]) -> ShownRow:
    params: dict = {}
    metrics: dict[str, float] = {}
    tags: dict = {"status": row["status"], "shape": row_label(row), "budget": budget, "study": study}
    tags |= {column: row.get(column) for column in ("data", "preset")}  # params too: to filter by one or the other
    tags["excluded"] = reasons.get(row["run_id"])
    if row["status"] != "ok":
        tags[NOTE] = f"{row['status']}: {row.get('error') or 'no reason given'}"
    tags["mlflow.source.name"], tags["mlflow.source.git.commit"] = study, row.get("commit")
    for column, value in (row if row.get("kind") == "vlm" else defaults | dict(row)).items():
        if column in CHOSEN or column.startswith(STAGES):
            params[column] = value
        elif is_number(value) and column not in ("schema", "train_flops"):  # the curve ends at the training FLOPs
            metrics[_free(_grouped(column), metrics)] = float(value)
        elif not is_number(value) and column not in tags:
            tags[_free(column, tags)] = value
    how = f" {row['trained']} {row.get('image_size')} px" if row.get("base") else ""
    upto = budget or f"{int(row['num_examples'])} images"
    name = f"{tags['shape']}{how} @{upto} s{row.get('init_seed', 0)}"
    return ShownRow(name, row, _texts(params), metrics, _texts(tags))


def curve(row: Mapping[str, Any], metrics_file: Path) -> list[tuple[int, float | None, dict[str, float]]]:
    """(images seen, seconds, {metric: value}) along a row: its part of the trunk, then its own cooldown.

    A row that is ok ends at its budget, with or without a file; a line that a kill cut short is passed over. FLOPs are in
    proportion to images, which they are not quite where stages train different parts.
    """
    n, flops = int(row["num_examples"]), number_of(row, "train_flops")
    points: dict[int, tuple] = {}
    leaves = number_of(row, "trunk_examples") or n
    with contextlib.suppress(FileNotFoundError):
        for line in metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                point = json.loads(line)
                if point["branch"] == n or (point["branch"] is None and point["examples"] <= leaves):
                    points[point["examples"]] = point["seconds"], {LOSS: point["train_loss"]}
    if row["status"] == "ok":
        points.setdefault(n, (number_of(row, "seconds"), {}))
    if flops:
        for examples, (_, values) in points.items():
            values |= {FLOPS: flops * examples / n, LOG_FLOPS: math.log10(flops * examples / n)}
    return [
        (examples, seconds, {k: float(v) for k, v in values.items() if is_number(v)})
        for examples, (seconds, values) in sorted(points.items())
    ]


def _grouped(column: str) -> str:
    kind, slash, _ = column.partition("/")
    if slash:
        return f"skill/{column}" if kind in ("val_loss", "val_error", "shuffled_loss", "shuffled_error") else column
    if column in RESULT or column.startswith("val_"):
        return f"final/{column}"
    if column in SIZE or column.endswith("_params"):
        return f"size/{column}"
    return f"{'compute' if column in COMPUTE else 'other'}/{column}"


def _free(name: str, taken: dict) -> str:
    """The name in the characters that MLflow takes, and not one that is taken."""
    parts = re.sub(r"[^\w.\- :/]", "_", name).split("/")
    name = "/".join(part for part in parts if part.strip(".")) or "_"
    return _free(f"{name}_", taken) if name in taken else name


def _texts(values: dict) -> dict[str, str]:
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items() if v is not None}


def number_of(row: Mapping[str, Any], column: str) -> float | None:
    """What a row says in a column, where that is a number."""
    return row[column] if is_number(row.get(column)) else None


def _budgets(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The training FLOPs of each row to two digits, the same for rows that whole batches alone keep apart: 3.2e11."""
    known = [row for row in rows if (number_of(row, "train_flops") or 0) > 0]
    if not known:
        return [None] * len(rows)
    group, centres = levels(np.array([row["train_flops"] for row in known]))
    shown = [f"{centre:.2g}".replace("e+0", "e").replace("e+", "e") for centre in centres]
    labels = {row["run_id"]: shown[g] for row, g in zip(known, group)}
    return [labels.get(row["run_id"]) for row in rows]


def _told_apart(found: list[ShownRow]) -> list[ShownRow]:
    """Names that several rows have say in which params these rows differ."""
    by_name: dict[str, list[ShownRow]] = {}
    for shown in found:
        by_name.setdefault(shown.name, []).append(shown)
    out = {}
    for alike in by_name.values():
        names = dict.fromkeys(param for shown in alike for param in shown.params)
        differing = [p for p in names if len({shown.params.get(p) for shown in alike}) > 1]
        for shown in alike:
            name = " ".join([shown.name, *(f"{p} {shown.params.get(p, '-')}" for p in differing)])
            out[shown.row["run_id"]] = dataclasses.replace(shown, name=name)
    return [out[shown.row["run_id"]] for shown in found]
