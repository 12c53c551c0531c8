"""MLflow, filled from the ledger and never written by training: `sovit track STUDY`.

One experiment a study, one flat run a row of its ledger: a shape at a budget with a seed. What stands in a run:

    params        what was chosen: shape, recipe, seeds, data; encoder, language model, projector, stages
    final/...     what came out, once, at step 0; skill/... the same for each skill; a column like probe/error as it is
    size/...      parameters and FLOPs of one image; compute/... what the run cost
    train/loss    the row's own curve: the trunk up to where its branch leaves it, then that branch's cooldown. A step is
                  an image seen; the training FLOPs, and their log10, stand at the same steps, for the x-axis
    tags          where the row comes from; `shape` and `budget` to group and to filter by

To compare runs in MLflow, select them on the experiment's page and press Compare: it opens parallel coordinates, scatter
plots and a table of differences.

The store can be deleted: it is made again. A second fill adds only what is new, and the next fill completes one that was
killed. A row that changed (a failed run that was tried again) gets a new run; a row that left the ledger loses its own.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from sovit import UserError
from sovit.files import locked
from sovit.ledger.ledger import read_exclusions, read_ledger, study_ledger
from sovit.ledger.measurements import levels
from sovit.ledger.schema import is_number
from sovit.spec.run import Recipe
from sovit.spec.shape import Shape
from sovit.sweep.status import row_label

LEDGER = (
    "sovit.ledger.ledger"  # tag of an experiment: the ledger that it shows, as seen from the store's folder, so that a
)
# repository may be moved as a whole
LAYOUT = 2  # of what is written for a row; another number makes the next fill write every run again
RUN_ID, FILLED = "run_id", "sovit.filled"  # tags: the row that a run shows; what it was filled from, written last
STATED = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")  # the rest of a shape only where
# it is not the default
BASE = ("base", "trained", "base_image_size", "base_patch_size", "base_examples")  # of a fine-tuning
# of a vision-language model; what its stages train stands in params of their own, under the names that overrides have
READER = (
    *("encoder", "language_model", "projector", "layer", "norm", "layout", "families", "template", "max_length"),
    *("num_image_tokens", "final_lr", "lora_rank", "lora_alpha", "num_val", "encoder_width", "encoder_depth"),
)
STAGES = "stages."
PARAMS = (
    *dict.fromkeys((*(f.name for kind in (Shape, Recipe) for f in dataclasses.fields(kind)), *READER)),
    *("init_seed", "data_seed", "data", "preset", "num_classes", "objective", *BASE),
)
GROUPS = {  # of metrics, in the order that MLflow offers them; val_loss and its like are final, their parts are skills
    "final": ("zero_line", "shuffled_loss", "shuffled_error"),
    "skill": (),
    "other": (),
    "size": ("num_params", "trained_params", "stored_bytes", "head_params", "num_heads", "forward_flops", "head_flops"),
    "parts": ("vision_params", "projector_params", "language_model_params"),
    "compute": (
        *("compute", "train_flops", "spent_flops", "base_train_flops", "num_examples", "trunk_examples"),
        *("cooldown_examples", "seconds", "spent_seconds"),
    ),
}
GROUP_OF = {column: group for group, columns in GROUPS.items() for column in columns}
CURVE = LOSS, FLOPS, LOG_FLOPS = ("train/loss", "compute/train_flops", "compute/log10_train_flops")
EXPLAINED = """One run is one row of the ledger {ledger}: a shape trained up to one budget with one seed. `train/loss` is
its own curve, cooldown included, over images seen; `compute/train_flops` and its log10 stand at the same steps, for the
x-axis. Group by the tag `shape` or `budget` to average seeds; `tags.budget = "1e12"` keeps one budget. Select runs and
press Compare for parallel coordinates. MLflow shows 100 runs until more are loaded."""


def fill(study: str, results: Path | None = None, runs: Path = Path("runs"), store: Path | None = None) -> dict:
    """Make the store agree with a study's ledger. Returns what was done, as plain data.

    `study`: a name, whose ledger `ledger.study_ledger` finds, or the path of a ledger. Curves are read from
    RUNS/<trunk_id>/metrics.jsonl where there is one. The store is RUNS/mlflow.db unless said otherwise.
    Raises UserError for a ledger or a store that cannot be read, and for a store that shows another ledger of that name.
    """
    ledger = study_ledger(study, results, runs)
    rows, reasons = read_ledger(ledger), read_exclusions(ledger.parent / "exclusions.csv")
    for row in rows:
        if not is_number(row["num_examples"]) or row["num_examples"] < 1:
            raise UserError(
                f"{ledger}: row {row['run_id']} has num_examples={row['num_examples']!r}; give a whole number from 1"
            )
    store, name, started = store_path(store, runs), ledger.stem, time.monotonic()
    done = dict.fromkeys(("runs_added", "runs_updated", "runs_removed", "points_added"), 0)
    with locked(beside(store, ".lock")):
        client = open_store(store)
        experiment = _experiment(client, name, ledger, store)
        present = _runs(client, experiment)
        for i, shown in enumerate(describe(name, rows, reasons), 1):
            along = curve(shown.row, runs / shown.row["trunk_id"] / "metrics.jsonl")
            run, mark = present.pop(shown.row["run_id"], None), _mark(shown, along)
            if run and run.data.tags[FILLED] == mark:
                continue
            if run:  # what MLflow holds of a run cannot be changed: it is made anew
                client.delete_run(run.info.run_id)
            done["runs_updated" if run else "runs_added"] += 1
            done["points_added"] += _write(client, experiment, shown, along, mark)
            _progress(f"{i}/{len(rows)} runs")
        _progress("")
        for run in present.values():
            client.delete_run(run.info.run_id)
        done["runs_removed"] = len(present)
    place = dict(study=name, ledger=str(ledger), store=str(store), experiment_id=experiment, rows=len(rows))
    return place | done | dict(seconds=round(time.monotonic() - started, 2))


def fill_text(done: dict) -> str:
    """What `fill` did, in one line."""
    words = {"runs_added": "runs added", "runs_updated": "runs updated", "runs_removed": "runs removed"}
    said = [f"{done[key]:,} {word}" for key, word in words.items() if done[key]]
    said = [*said, f"{done['points_added']:,} points"] if said else ["nothing new"]
    return f"{done['study']}: {done['rows']} rows in {done['store']}: {', '.join(said)}, {done['seconds']:.1f} s"


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def store_path(store: Path | None, runs: Path) -> Path:
    return store or runs / "mlflow.db"


def beside(store: Path, suffix: str) -> Path:
    """A file that belongs to a store, under a name that no sweep, and no other store, gives to its own."""
    return store.with_name(store.name + suffix)


# a row as MLflow shows it ---------------------------------------------------------------------------------------------


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
    said = {column for row in rows for column in row}
    defaults = {f.name: f.default for f in dataclasses.fields(Shape) if f.name in said - set(STATED)}
    return _told_apart([_shown(study, row, defaults, b, reasons) for row, b in zip(rows, _budgets(rows))])


def _shown(study: str, row: Mapping[str, Any], defaults: dict, budget: str | None, reasons: dict[str, str]) -> ShownRow:
    params: dict = {column: None for column in PARAMS}  # which gives them their order
    metrics: dict[str, float] = {}
    tags: dict = {"status": row["status"], "shape": row_label(row), "budget": budget, "study": study}
    tags |= {column: row.get(column) for column in ("data", "preset")}  # params too: to filter by one or the other
    tags["excluded"] = reasons.get(row["run_id"])
    if row["status"] != "ok":
        tags["mlflow.note.content"] = f"{row['status']}: {row.get('error') or 'no reason given'}"
    tags["mlflow.source.name"], tags["mlflow.source.git.commit"] = study, row.get("commit")
    for column, value in (row if row.get("kind") == "vlm" else defaults | dict(row)).items():
        if column in PARAMS or column.startswith(STAGES):
            params[column] = value
        elif is_number(value) and column not in ("schema", "train_flops"):  # the curve ends at the training FLOPs
            metrics[_free(_grouped(column), metrics)] = float(value)
        elif not is_number(value) and column not in tags:
            tags[_free(column, tags)] = value
    how = f" {row['trained']} {row.get('image_size')} px" if row.get("base") else ""
    upto = budget or f"{int(row['num_examples'])} images"
    name = f"{tags['shape']}{how} @{upto} s{row.get('init_seed', 0)}"
    order = [*GROUPS, *sorted({metric.partition("/")[0] for metric in metrics} - set(GROUPS))]
    metrics = dict(sorted(metrics.items(), key=lambda item: order.index(item[0].partition("/")[0])))
    return ShownRow(name, row, _texts(params), metrics, _texts(tags))


def curve(row: Mapping[str, Any], metrics_file: Path) -> list[tuple[int, float | None, dict[str, float]]]:
    """(images seen, seconds, {metric: value}) along a row: its part of the trunk, then its own cooldown.

    A row that is ok ends at its budget, with or without a file; a line that a kill cut short is passed over. FLOPs are in
    proportion to images, which they are not quite where stages train different parts.
    """
    n, flops = int(row["num_examples"]), _number(row, "train_flops")
    points: dict[int, tuple] = {}
    leaves = _number(row, "trunk_examples") or n
    with contextlib.suppress(FileNotFoundError):
        for line in metrics_file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                point = json.loads(line)
                if point["branch"] == n or (point["branch"] is None and point["examples"] <= leaves):
                    points[point["examples"]] = point["seconds"], {LOSS: point["train_loss"]}
    if row["status"] == "ok":
        points.setdefault(n, (_number(row, "seconds"), {}))
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
    return f"{GROUP_OF.get(column, 'final' if column.startswith('val_') else 'other')}/{column}"


def _free(name: str, taken: dict) -> str:
    """The name in the characters that MLflow takes, and not one that is taken."""
    parts = re.sub(r"[^\w.\- :/]", "_", name).split("/")
    name = "/".join(part for part in parts if part.strip(".")) or "_"
    return _free(f"{name}_", taken) if name in taken else name


def _texts(values: dict) -> dict[str, str]:
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items() if v is not None}


def _number(row: Mapping[str, Any], column: str) -> float | None:
    return row[column] if is_number(row.get(column)) else None


def _budgets(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The training FLOPs of each row to two digits, the same for rows that whole batches alone keep apart: 3.2e11."""
    known = [row for row in rows if (_number(row, "train_flops") or 0) > 0]
    if not known:
        return [None] * len(rows)
    group, centres = levels(np.array([row["train_flops"] for row in known]))
    labels = {row["run_id"]: _short(centres[g]) for row, g in zip(known, group)}
    return [labels.get(row["run_id"]) for row in rows]


def _short(number: float) -> str:
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _told_apart(found: list[ShownRow]) -> list[ShownRow]:
    """Names that several rows have say in which params these rows differ."""
    by_name: dict[str, list[ShownRow]] = {}
    for shown in found:
        by_name.setdefault(shown.name, []).append(shown)
    names = [*PARAMS, *sorted({p for shown in found for p in shown.params if p.startswith(STAGES)})]
    differing = {
        name: [p for p in names if len({shown.params.get(p) for shown in group}) > 1] for name, group in by_name.items()
    }
    return [
        dataclasses.replace(s, name=" ".join([s.name, *(f"{p} {s.params.get(p, '-')}" for p in differing[s.name])]))
        for s in found
    ]


# the store ------------------------------------------------------------------------------------------------------------


def open_store(store: Path):
    """MLflow's client on an SQLite file, made if absent. Raises UserError for a file that is no such store."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if store.exists():
            with open(store, "rb") as file:  # what is no database at all, MLflow would try for minutes to open
                if file.read(16) not in (b"", b"SQLite format 3\0"):
                    raise OSError("not an SQLite file")
        client = MlflowClient(store_uri(store))
        client.search_experiments(max_results=1)
    except Exception as error:  # SQLAlchemy, sqlite3 and MLflow raise many kinds
        raise UserError(
            f"{store} cannot be used as a store ({str(error).splitlines()[0]}); give another store, or delete it: it is"
            " made again from the ledger"
        ) from None
    return client


def store_uri(store: Path) -> str:
    return f"sqlite:///{store.resolve()}"


def _experiment(client, name: str, ledger: Path, store: Path) -> str:
    experiment = client.get_experiment_by_name(name)
    folder, own = store.resolve().parent, ledger.resolve()
    theirs = Path(os.path.normpath(folder / experiment.tags.get(LEDGER, own))) if experiment else own
    if theirs != own:
        raise UserError(
            f"{store} shows {theirs} under the name {name!r}, and would lose its runs to {own}; give another store, or"
            f" delete {store} if that ledger has moved: it is made again from the ledgers"
        )
    if experiment is None:
        artifacts = folder / "mlartifacts" / name
        experiment = client.get_experiment(client.create_experiment(name, artifact_location=artifacts.as_uri()))
    elif experiment.lifecycle_stage != "active":
        client.restore_experiment(experiment.experiment_id)
    note = "\n\n".join(filter(None, [_question(name), EXPLAINED.format(ledger=ledger)]))
    tags = {LEDGER: os.path.relpath(own, folder)}
    tags |= {"mlflow.note.content": note, "mlflow.experimentKind": "custom_model_development"}
    for key, value in tags.items():
        if key not in experiment.tags:  # a user may have rewritten it
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def _question(study: str) -> str | None:
    """The docstring of studies/<study>.py where there is such a file: what the study asks."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        return ast.get_docstring(ast.parse((Path("studies") / f"{study}.py").read_text()))
    return None


def _runs(client, experiment: str) -> dict:
    """run_id of a row -> the run that shows it. Runs that others have put there are left alone."""
    found: dict = {}
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        found |= {run.data.tags[RUN_ID]: run for run in page if FILLED in run.data.tags}
        token = page.token
        if not token:
            return found


def _mark(shown: ShownRow, along: list[tuple]) -> str:
    """Changes when anything that a run is filled from does."""
    source = [LAYOUT, dataclasses.asdict(shown), along]
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def _write(client, experiment: str, shown: ShownRow, along: list[tuple], mark: str) -> int:
    """Write a row as a new run, its mark last; return the number of points."""
    from mlflow.entities import Metric, Param, RunTag

    row = shown.row
    end = _milliseconds(row.get("date"))
    start = end - int(1000 * (_number(row, "seconds") or 0))
    tags = {RUN_ID: row["run_id"], FILLED: "not yet"}
    run_id = client.create_run(experiment, start_time=start, tags=tags, run_name=shown.name).info.run_id
    points = [Metric(key, value, end, 0) for key, value in shown.metrics.items()]
    for examples, seconds, values in along:
        at = end if seconds is None else start + int(1000 * seconds)
        points += [Metric(key, value, at, examples) for key, value in values.items()]
    params = [Param(key, value) for key, value in shown.params.items()]
    # which sends no more than MLflow takes at once, 1000 points or 100 params
    client.log_batch(run_id, points, params, [RunTag(key, value) for key, value in shown.tags.items()])
    client.set_terminated(run_id, "FINISHED" if row["status"] == "ok" else "FAILED", end_time=end)
    client.set_tag(run_id, FILLED, mark)
    return len(points)


def _milliseconds(date: str | None) -> int:
    with contextlib.suppress(ValueError, TypeError):
        return int(1000 * datetime.fromisoformat(date or "").timestamp())
    return int(1000 * time.time())
