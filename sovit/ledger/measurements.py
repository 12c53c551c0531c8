"""Ledgers -> the columns that a law is fitted to, and an account of what was left out and why.

Rows may come from anyone: what a row does not say (FLOPs, parameters) is counted from its shape, where it says that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.ledger.bad_rows import (
    COUNTED,
    WHOLE,
    bad_counts,
    bad_numbers,
    check_alike,
    column_numbers,
    count_ratios,
    foreign_counts,
    odd_trunks,
    tokens_of,
    unfit,
    with_metric,
)
from sovit.ledger.few_shot_columns import about, probe_of
from sovit.ledger.ledger import merge, read_exclusions, read_rows
from sovit.ledger.tables import Reading
from sovit.ledger.trained_on import TrainedOn, trained_on
from sovit.spec.shape import DIMENSIONS, Shape

# columns handed to a law where every row has them
COLUMNS = (*DIMENSIONS, "head_dim", "num_classes", "num_examples", *COUNTED, "peak_lr", "init_seed", "data_seed")
LEVEL_WIDTH = 0.03  # training FLOPs within 3 % of each other are one budget: whole batches never meet it exactly
LEVEL_SPAN = 0.2  # of ln; values that follow each other without a gap over more than this are no level


@dataclass(frozen=True)
class Measurements:
    """The rows of one metric. columns: name -> [n]; y [n]; rows: the n ledger rows; left_out: (run_id, reason), where
    the run_id of a line that could not be read is FILE:LINE. notes: what was taken as it is but should be known.
    """

    metric: str
    columns: dict
    y: np.ndarray
    rows: list
    left_out: list
    statuses: dict
    paths: list
    notes: list = field(default_factory=list)

    @property
    def zero_line(self) -> float | None:
        """Loss of knowing nothing: the rows' own `zero_line`, else ln(num_classes), the largest plausible one.

        Of a few-shot error, the error of a guess. None for another metric, or where the rows do not say how many classes
        there are.
        """
        probed = probe_of(self.metric)
        if self.metric not in ("val_loss", "val_cell_loss") and not probed:
            return None
        name = about(probed)[1] if probed else "zero_line"
        known = [row[name] for row in self.rows if row.get(name)]
        classes = 0 if probed else self.rows[0].get("num_classes") or 0
        return float(max(known)) if known else math.log(classes) if classes > 1 else None

    @property
    def identity(self) -> dict:
        """What tells these measurements from others: a report is a function of it alone, its options apart."""
        content = hashlib.sha256()  # of json.dumps([rows, left_out, statuses]), a row at a time
        for i, row in enumerate(self.rows):
            content.update(((", " if i else "[[") + json.dumps(row, sort_keys=True)).encode())
        rest = f"], {json.dumps(self.left_out)}, {json.dumps(self.statuses, sort_keys=True)}]"
        content.update(rest.encode())
        return {"ledgers": [Path(p).name for p in self.paths], "metric": self.metric, "sha256": content.hexdigest()}

    @cached_property
    def trained_on(self) -> TrainedOn | None:
        """The data and the recipe that all rows share: dear to tell, and the same for every form."""
        return trained_on(self.rows)

    def shapes(self) -> list[tuple]:
        """Each row's shape as the tuple of the shape columns there are."""
        names = [n for n in DIMENSIONS if n in self.columns]
        return list(zip(*(self.columns[n].tolist() for n in names))) if names else [()] * len(self.y)


def measurements(
    ledgers: Sequence[Path | str], metric: str = "val_loss", *, skip_bad: bool = False, reading: Reading | None = None
) -> Measurements:
    """Read and merge ledgers; leave out excluded rows and rows that are not ok; complete what can be counted.

    `exclusions.csv` beside a ledger is applied. Raises UserError for unreadable or mixed ledgers, for the first bad row
    (malformed, without the metric, conflicting with another, with a number that cannot be) and where no row is left.
    skip_bad: leave bad rows out, each with its reason, instead. reading: names and units of tables that others wrote.
    """
    reading = reading or Reading(metric=metric)
    paths = [Path(p) for p in ledgers]
    if not paths:
        raise UserError("no ledger given; name at least one file of rows")
    bad: list[tuple[str, str]] = []
    rows = [row for path in paths for row in read_rows(path, bad if skip_bad else None, reading)]
    reasons: dict[str, str] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        reasons |= read_exclusions(folder / "exclusions.csv")
    where, names = ", ".join(p.name for p in paths), [str(p) for p in paths]
    return measurements_of(rows, metric, Source(where, names, reasons, bad, skip_bad))


@dataclass(frozen=True)
class Source:
    """Where rows come from, for messages; which are excluded, by run_id; the lines refused before; see `measurements`."""

    where: str = "the rows"
    paths: Sequence[str] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    refused: Sequence[tuple[str, str]] = ()
    skip_bad: bool = False


def measurements_of(read: Sequence[dict], metric: str = "val_loss", source: Source = Source()) -> Measurements:
    """Measurements of ledger rows in memory, as `measurements` makes them of files."""
    where, reasons, skip_bad, left_out = source.where, source.excluded, source.skip_bad, list(source.refused)
    num_bad = len(left_out)
    rows = merge(list(read), where, left_out if skip_bad else None)
    notes = foreign_notes(rows)
    if repeats := len(read) - len(rows) - len(left_out) + num_bad:
        notes.append(f"{repeats} of {len(read)} rows repeat the run_id of another, with which they agree: counted once")
    unused = {row["run_id"]: why for row in rows if (why := unfit(row, reasons))}
    left_out += unused.items()
    kept = [row for row in rows if row["run_id"] not in unused]
    if not kept:
        why = "all excluded, diverged, failed, fine-tuned or vision-language models"
        raise UserError(f"{where}: none of the {len(rows)} rows is usable ({why}); run more")
    statuses = dict(Counter(row["status"] for row in rows))
    check_alike(kept, where)
    kept = with_metric(kept, metric, where, notes)

    def sound(rows: list[dict], wrong: dict[int, str]) -> list[dict]:
        """The rows that are not wrong, the others being refused or left out."""
        for i in sorted(wrong):
            if not skip_bad:
                remedy = "mend the row, name it in exclusions.csv, or leave out all such rows with --skip-bad"
                raise UserError(f"row {rows[i]['run_id']} {wrong[i]}; {remedy}")
            left_out.append((rows[i]["run_id"], wrong[i]))
        if len(wrong) == len(rows):
            run_id, reason = left_out[-1]
            raise UserError(f"{where}: no row is left, each being bad; the last is {run_id}, which {reason}")
        return [row for i, row in enumerate(rows) if i not in wrong]

    kept = sound(kept, bad_numbers(kept, metric))
    found = _shapes(kept)
    impossible = {i: f"has no possible shape: {s}" for i, s in enumerate(found) if isinstance(s, UserError)}
    kept, shapes = sound(kept, impossible), [s for s in found if not isinstance(s, UserError)]
    ratios = count_ratios(kept, shapes)
    mistaken = bad_counts(kept, shapes, ratios)
    kept, right = sound(kept, mistaken), [i for i in range(len(kept)) if i not in mistaken]
    shapes = [shapes[i] for i in right]
    notes += foreign_counts({name: ratio[right] for name, ratio in ratios.items()}) + odd_trunks(kept, shapes, metric)
    kept = [_counted(row, shape) for row, shape in zip(kept, shapes)]
    columns = {name: column for name in COLUMNS if (column := _column(kept, name)) is not None}
    if any(row.get("num_registers") for row in kept):  # said by a row only where it is not 0
        columns["num_registers"] = np.array([row.get("num_registers") or 0 for row in kept], np.int64)
    columns |= {n: np.array([row[n] for row in kept]) for n in ("pool", "trunk_id") if all(row.get(n) for row in kept)}
    y = np.array([row[metric] for row in kept], float)
    return Measurements(metric, columns, y, kept, left_out, statuses, list(source.paths), notes)


def foreign_notes(rows: Sequence[dict]) -> list[str]:
    """What was derived of rows whose run_id is a place in a table: their status, trunks, tokens an example; repeats."""
    derived = [row for row in rows if ":" in row["run_id"]]
    if not derived:
        return []
    trunks = len({row["trunk_id"] for row in derived})
    notes = [
        f"{len(derived)} rows name no run: each counts as one that ended well, and rows that agree in shape, rate and"
        f" seeds as one training run ({trunks} of them)"
    ]
    contents = Counter(repr([value for name, value in row.items() if name != "run_id"]) for row in derived)
    if repeats := len(derived) - len(contents):
        notes.append(f"{repeats} rows repeat another in every column, and count as measured again; remove copies")
    if not any(row.get("forward_flops") or row.get("width") for row in derived) and (tokens := tokens_of(derived)) != 1:
        notes.append(
            f"FLOPs are {tokens:.4g} x those of num_params x num_examples: right for so many tokens an example"
        )
    return notes


def _column(rows: list[dict], name: str) -> np.ndarray | None:
    """Whole numbers stay whole, so that a shape can be rebuilt from the column. None where a row lacks it."""
    values, _ = column_numbers(rows, name)
    if not np.isfinite(values).all():
        return None
    return values.astype(np.int64) if (values == values.round()).all() and np.abs(values).max() < 2**53 else values


def _shapes(rows: list[dict]) -> list:
    """The Shape of each row, None where it says too little for one, or the UserError that says why there can be none.

    Equal shapes are one object. No count needs head_dim: a row may lack it.
    """
    made: dict = {}
    out: list = []
    for row in rows:
        if not row.get("pool") or any(row.get(name) is None for name in DIMENSIONS):
            out.append(None)
            continue
        more: dict = {name: int(row[name]) for name in WHOLE if row.get(name) is not None}
        more |= {name: row[name] for name in ("pool", "qkv_bias", "layer_scale") if row.get(name) is not None}
        more |= {
            name: bool(more[name]) for name in ("qkv_bias", "layer_scale") if more.get(name) in (0, 1)
        }  # of a table
        key = repr(more)
        if key not in made:
            try:
                made[key] = Shape(**{"head_dim": more["width"]} | more)
            except UserError as error:
                made[key] = error
        out.append(made[key])
    return out


def _counted(row: dict, shape: Shape | None) -> dict:
    """The row with `COUNTED` filled in where it lacks them and its shape is known."""
    more = {}
    if shape is not None:
        more = {name: getattr(shape, name) for name in ("forward_flops", "num_params") if row.get(name) is None}
        if row.get("head_flops") is None and row.get("num_classes"):
            scale = row["forward_flops"] / shape.forward_flops if row.get("forward_flops") else 1.0  # in the row's unit
            head = shape.head_flops(int(row["num_classes"]))
            more["head_flops"] = head if abs(scale - 1) < 1e-6 else head * scale
    forward = row.get("forward_flops") or more.get("forward_flops")
    if forward is not None:
        images = row["num_examples"]
        if row.get("compute") is None:
            more["compute"] = forward * images
        if row.get("train_flops") is None:
            head = row.get("head_flops") or more.get("head_flops") or 0
            more["train_flops"] = 3 * (forward + head) * images
    return row | more if more else row


def levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group positive values [n] that differ by less than 3 %: each value's group [n], rising, and the groups' means.

    Values without gaps, such as budgets drawn at random, would all be one group: where a group spans more than
    LEVEL_SPAN it is cut into groups of 3 %.
    """
    logs = np.log(np.asarray(values, float))
    order = np.argsort(logs, kind="stable")
    rising = logs[order]
    new = np.concatenate([[True], np.diff(rising) > LEVEL_WIDTH])
    for part in np.split(np.arange(len(rising)), np.flatnonzero(new)[1:]):
        if rising[part[-1]] - rising[part[0]] > LEVEL_SPAN:
            bins = ((rising[part] - rising[part[0]]) / LEVEL_WIDTH).astype(int)
            new[part[1:]] = np.diff(bins) > 0
    group = np.empty(len(logs), int)
    group[order] = np.cumsum(new) - 1
    ends = np.flatnonzero(np.diff(group[order])) + 1
    centres = np.array([np.exp(logs[np.sort(part)].mean()) for part in np.split(order, ends)])
    return group, centres
