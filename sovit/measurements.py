"""Ledgers -> the columns that a law is fitted to, and an account of what was left out and why.

Rows may come from anyone: what a row does not say (FLOPs, parameters) is counted from its shape, where it says that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.fewshot import about, is_spread, noise_of, probe_of
from sovit.forms import LAWS
from sovit.ledger import merge, read_exclusions, read_ledger
from sovit.shape import DIMENSIONS, Shape

COUNTED = ("forward_flops", "num_params", "compute", "train_flops")
# columns handed to a law where every row has them
COLUMNS = (*DIMENSIONS, "head_dim", "num_classes", "num_examples", *COUNTED, "peak_lr", "init_seed", "data_seed")
# what a usable row may lack but not hold as text
NUMBERS = (
    *(*DIMENSIONS, "head_dim", "num_registers", "num_classes", "num_examples", *COUNTED, "head_flops", "zero_line"),
    *("peak_lr", "weight_decay", "batch_size"),
)
SAME = ("data", "preset", "objective", "num_classes")  # losses of different ones cannot be compared
WHOLE_SHAPE = tuple(name for name, entry in LAWS.items() if entry.ranks_shapes)  # forms that describe every row
LEVEL_WIDTH = 0.03  # training FLOPs within 3 % of each other are one budget: whole batches never meet it exactly


@dataclass(frozen=True)
class Measurements:
    """The rows of one metric. columns: name -> [n]; y [n]; rows: the n ledger rows; left_out: (run_id, reason).

    For a few-shot error, measurement_sd [n] is what is known of the noise of each y, and support says how
    (`fewshot.support_noise`).
    """

    metric: str
    columns: dict
    y: np.ndarray
    rows: list
    left_out: list
    statuses: dict
    paths: list
    measurement_sd: np.ndarray | None = None
    support: dict | None = None

    @property
    def zero_line(self) -> float | None:
        """Loss of knowing nothing: the rows' own `zero_line`, else ln(num_classes), the largest plausible one.

        Of a few-shot error, the error of a guess. None for another metric, or where the rows do not say how many classes
        there are.
        """
        probed = probe_of(self.metric)
        if self.metric != "val_loss" and not probed:
            return None
        name = about(probed)[1] if probed else "zero_line"
        known = [row[name] for row in self.rows if row.get(name)]
        if known or probed:
            return float(max(known)) if known else None
        classes = self.rows[0].get("num_classes")
        return math.log(classes) if classes and classes > 1 else None

    @property
    def identity(self) -> dict:
        """What tells these measurements from others: a report is a function of it alone, its options apart."""
        content = json.dumps([self.rows, self.left_out, self.statuses], sort_keys=True)
        names = [Path(p).name for p in self.paths]
        return {"ledgers": names, "metric": self.metric, "sha256": hashlib.sha256(content.encode()).hexdigest()}

    def shapes(self) -> list[tuple]:
        """Each row's shape as the tuple of the shape columns there are."""
        names = [n for n in DIMENSIONS if n in self.columns]
        return [tuple(self.columns[n][i].item() for n in names) for i in range(len(self.y))]


def measurements(ledgers: Sequence[Path | str], metric: str = "val_loss") -> Measurements:
    """Read and merge ledgers; leave out excluded rows and rows that are not ok; complete what can be counted.

    `exclusions.csv` beside a ledger is applied. Raises UserError for unreadable, conflicting or mixed ledgers, for a
    row without the metric, and where no row is left.
    """
    paths = [Path(p) for p in ledgers]
    if not paths:
        raise UserError("no ledger given; name at least one file of rows")
    where = ", ".join(p.name for p in paths)
    rows = merge([row for path in paths for row in read_ledger(path)], where)
    reasons: dict[str, str] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        reasons |= read_exclusions(folder / "exclusions.csv")
    kept, left_out = [], []
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
        if row["run_id"] in reasons:
            left_out.append((row["run_id"], f"excluded: {reasons[row['run_id']]}"))
        elif row["status"] != "ok":
            left_out.append((row["run_id"], f"status {row['status']}"))
        else:
            kept.append(row)
    if not kept:
        raise UserError(f"{where}: none of the {len(rows)} rows is usable (all excluded, diverged or failed); run more")
    for name in SAME:
        values = sorted({str(row.get(name)) for row in kept})
        if len(values) > 1:
            raise UserError(
                f"{where}: the rows mix {name}={values[0]} and {name}={values[1]}, whose losses cannot be compared;"
                " give ledgers of one"
            )
    for row in kept:
        for name in NUMBERS:
            if row.get(name) is not None and not _is_number(row[name]):
                raise UserError(
                    f"row {row['run_id']} has {name}={row[name]!r}, which is not a number; give one or leave it empty"
                )
        value = row.get(metric)
        if value is None and all(other.get(metric) is None for other in kept):
            known = sorted(k for k, v in row.items() if k.startswith("val_") and v is not None and not is_spread(k))
            raise UserError(
                f"{where}: no row has metric={metric!r}; the rows have {', '.join(known) or 'no val_ column'}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(
                f"row {row['run_id']} has {metric}={value!r}; a power law needs a number above 0: complete the row or"
                " name it in exclusions.csv"
            )
    kept = [_counted(row) for row in kept]
    columns = {name: _column(kept, name) for name in COLUMNS if all(_is_number(row.get(name)) for row in kept)}
    if any(row.get("num_registers") for row in kept):  # said by a row only where it is not 0
        columns["num_registers"] = np.array([row.get("num_registers") or 0 for row in kept], np.int64)
    columns |= {n: np.array([row[n] for row in kept]) for n in ("pool", "trunk_id") if all(row.get(n) for row in kept)}
    y = np.array([row[metric] for row in kept], float)
    noise, support = noise_of(kept, metric) or (None, None)
    measurement_sd = noise * y if noise is not None and noise.any() else None
    names = [str(p) for p in paths]
    return Measurements(metric, columns, y, kept, left_out, statuses, names, measurement_sd, support)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _column(rows: list[dict], name: str) -> np.ndarray:
    """Whole numbers stay whole, so that a shape can be rebuilt from the column."""
    values = np.array([row[name] for row in rows], float)
    return values.astype(np.int64) if (values == values.round()).all() and np.abs(values).max() < 2**53 else values


def _counted(row: dict) -> dict:
    """The row with `COUNTED` filled in where it lacks them and its shape is known. No count needs head_dim."""
    row = dict(row)
    if all(_is_number(row.get(name)) for name in DIMENSIONS) and row.get("pool"):
        more: dict = {name: int(row[name]) for name in DIMENSIONS}
        more |= {n: row[n] for n in ("num_registers", "qkv_bias", "layer_scale") if row.get(n) is not None}
        try:
            shape = Shape(**more, head_dim=int(row.get("head_dim") or row["width"]), pool=row["pool"])
        except UserError as error:
            raise UserError(f"row {row['run_id']}: {error}") from None
        for name in ("forward_flops", "num_params"):
            if row.get(name) is None:
                row[name] = getattr(shape, name)
        if row.get("head_flops") is None and row.get("num_classes"):
            row["head_flops"] = shape.head_flops(int(row["num_classes"]))
    if row.get("forward_flops") is not None:
        images = row["num_examples"]
        if row.get("compute") is None:
            row["compute"] = row["forward_flops"] * images
        if row.get("train_flops") is None:
            row["train_flops"] = 3 * (row["forward_flops"] + (row.get("head_flops") or 0)) * images
    return row


def levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group positive values [n] that differ by less than 3 %: each value's group [n], rising, and the groups' means."""
    logs = np.log(np.asarray(values, float))
    order = np.argsort(logs, kind="stable")
    group = np.empty(len(logs), int)
    group[order] = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > LEVEL_WIDTH)])
    centres = np.array([np.exp(logs[group == g].mean()) for g in range(group.max() + 1)])
    return group, centres
