"""Checks that leave a row out of a fit, each with its reason."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from sovit import UserError
from sovit.ledger.few_shot_columns import is_spread
from sovit.ledger.schema import is_number, is_vlm
from sovit.spec.shape import DIMENSIONS, Shape

COUNTED = ("forward_flops", "num_params", "compute", "train_flops")
WHOLE = (*DIMENSIONS, "head_dim", "num_registers")
# what a usable row may lack but not hold as text: above 0, and at least 0
ABOVE_ZERO = (*DIMENSIONS, "head_dim", "num_examples", *COUNTED)
NOT_BELOW = ("num_registers", "num_classes", "head_flops", "zero_line", "peak_lr", "weight_decay", "batch_size")
SAME = ("data", "preset", "objective", "num_classes")  # losses of different ones cannot be compared
ONE_PATCH = {"val_cell_loss": "val_loss", "val_cell_error": "val_error"}  # the same where a cell is one patch
CONVENTION = 0.05  # counts further apart than this (of ln) were made by different rules
RULES = {  # counted column -> what it is compared with
    "forward_flops": "what its shape counts",
    "num_params": "what its shape counts",
    "compute": "forward_flops x num_examples",
    "train_flops": "3 x (forward_flops + head_flops) x num_examples",
}
# what a count may be of ours by another convention: a multiply-add counted once (2), training counted as forward (3), both
# (6), without attention or embeddings; further off it is of another unit
SAME_UNIT = 7.0
MAX_TOKENS = 1e5  # of one example: a ratio above it is a matter of units
UNITS = {1e3: "thousands", 1e6: "millions", 1e9: "billions (G)", 1e12: "trillions (T)", 1e15: "P", 2e9: "GMACs"}
UNITS |= {1e18: "E", 1e21: "Z", 8.64e19: "PF-days"}


def column_numbers(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column as floats [n], nan where a row has no number there; and whether the row says anything [n]."""
    values = [row.get(name) for row in rows]
    said = np.array([value is not None for value in values])
    if set(map(type, values)) <= {int, float, type(None)}:
        with contextlib.suppress(OverflowError):  # a whole number beyond 1e308
            return np.array(values, float), said
    return np.array([value if is_number(value) else np.nan for value in values], float), said


def bad_numbers(rows: list[dict], metric: str) -> dict[int, str]:
    """Rows with a number that cannot be, by their place: why."""
    out: dict[int, str] = {}
    for name in (*ABOVE_ZERO, *NOT_BELOW):
        column, said = column_numbers(rows, name)
        above = name in ABOVE_ZERO
        for i in np.flatnonzero(said & ~(np.isfinite(column) & ((column > 0) if above else (column >= 0)))):
            value = rows[i][name]
            what = f"not a number{_separated(value)}" if not is_number(value) else "not above 0" if above else "below 0"
            out.setdefault(int(i), f"has {name}={value!r}, which is {what}")
        if name in WHOLE:
            for i in np.flatnonzero(np.isfinite(column) & (column != np.round(column))):
                out.setdefault(int(i), f"has {name}={rows[i][name]!r}, which is not a whole number")
    column, _ = column_numbers(rows, metric)
    for i in np.flatnonzero(~(np.isfinite(column) & (column > 0))):
        value = rows[i].get(metric)
        out.setdefault(int(i), f"has {metric}={value!r}; a power law needs a number above 0{_separated(value)}")
    return out


def _separated(value: object) -> str:
    """The remedy for a number with a comma, a space or an apostrophe in it, whose meaning differs by country."""
    like = isinstance(value, str) and re.fullmatch(r"-?\d+([ ,.'\u00a0\u202f]\d+)+", value)
    return " (write it without separators, decimals after a point)" if like else ""


def count_ratios(rows: list[dict], shapes: list[Shape | None]) -> dict[str, np.ndarray]:
    """By counted column: what the rows give over what their own shape and numbers say, nan where either is not said."""
    given = {name: column_numbers(rows, name)[0] for name in (*RULES, "num_examples", "head_flops", "text_flops")}
    count = {id(s): (s.forward_flops, s.num_params) for s in {id(s): s for s in shapes if s is not None}.values()}
    forward, params = np.array([count.get(id(s), (np.nan, np.nan)) for s in shapes], float).T
    own = np.where(np.isfinite(given["forward_flops"]), given["forward_flops"], forward)
    own = np.where(np.isfinite(own), own, 2 * given["num_params"] * tokens_of(rows))
    head = np.where(np.isfinite(given["head_flops"]), given["head_flops"], 0.0)
    trained = 3 * (own + head) * np.where(np.isfinite(given["text_flops"]), np.nan, given["num_examples"])
    counted = dict(forward_flops=forward, num_params=params, compute=own * given["num_examples"], train_flops=trained)
    return {name: given[name] / counted[name] for name in RULES}


def tokens_of(rows: list[dict]) -> float:
    """Tokens of an example by the rows' own FLOPs, 2 num_params each: 1 where one example is one, or where units differ."""
    size, images, compute, train = (
        column_numbers(rows, name)[0] for name in ("num_params", "num_examples", "compute", "train_flops")
    )
    ratio = np.where(np.isfinite(compute), compute, train / 3) / (2 * size * images)
    typical = np.median(ratio[np.isfinite(ratio)]) if np.isfinite(ratio).any() else 1.0
    return float(typical) if SAME_UNIT < typical < MAX_TOKENS else 1.0


def bad_counts(rows: list[dict], shapes: list[Shape | None], ratios: dict[str, np.ndarray]) -> dict[int, str]:
    """Rows whose counts were made by another rule than those of the same shape, or in another unit than most rows."""
    by_shape: dict[int, list[int]] = {}
    for i, shape in enumerate(shapes):  # equal shapes are one object
        by_shape.setdefault(id(shape), []).append(i)
    by_shape.pop(id(None), None)
    out: dict[int, str] = {}
    for name, ratio in ratios.items():
        for alike in by_shape.values():
            members = [i for i in alike if np.isfinite(ratio[i])]
            known = ratio[members]
            if not members or known.max() / known.min() < 1 + CONVENTION:
                continue
            typical = np.median(known)  # of two equal camps it is neither's: both are bad
            for i in members:
                if abs(np.log(ratio[i] / typical)) > CONVENTION / 2:
                    own = f"has {name}={rows[i][name]!r}, {ratio[i]:.4g} x {RULES[name]}"
                    out.setdefault(i, f"{own}, where the median of the same shape has {typical:.4g} x")
        known = np.flatnonzero(np.isfinite(ratio))
        typical = np.median(ratio[known]) if len(known) else 1.0
        for i in known[np.abs(np.log(ratio[known] / typical)) > np.log(SAME_UNIT)].tolist():
            own = f"has {name}={rows[i][name]!r}, {ratio[i]:.4g} x {RULES[name]}"
            out.setdefault(i, f"{own}, where the median of all rows has {typical:.4g} x: another unit")
    return out


def foreign_counts(ratios: dict[str, np.ndarray]) -> list[str]:
    """What to know of counts that are not ours: legitimate, where one rule of counting made them all.

    Raises UserError for a count of another unit, which a rule of counting does not explain.
    """
    out = []
    for name, ratio in ratios.items():
        off = np.abs(np.log(ratio[np.isfinite(ratio)]))
        if (off > CONVENTION).any():
            low, high = f"{np.nanmin(ratio):.4g}", f"{np.nanmax(ratio):.4g}"
            span = low if low == high else f"{low} to {high}"
            if (off > np.log(SAME_UNIT)).any():
                raise UserError(
                    f"{name} is {span} x {RULES[name]}: another unit, {_unit(name, float(np.nanmedian(ratio)))}"
                )
            one_rule = np.nanmax(ratio) / np.nanmin(ratio) < 1 + CONVENTION
            kept = "another convention, and kept"
            several = "kept, but rows counted by different rules cannot be compared"
            out.append(f"{name} is {span} x {RULES[name]}: {kept if one_rule else several}")
    return out


def _unit(name: str, ratio: float) -> str:
    """What may have been meant, as a remedy."""
    factor = min(UNITS, key=lambda unit: abs(np.log(ratio * unit)))
    if abs(np.log(ratio * factor)) < np.log(SAME_UNIT):
        return f"maybe {UNITS[factor]}: then add --units {name}={factor:g}; else mend the column"
    factor = min(UNITS, key=lambda unit: abs(np.log(ratio / unit)))
    other = "num_examples" if name in ("compute", "train_flops") else name
    if abs(np.log(ratio / factor)) < np.log(SAME_UNIT) and other != name:
        return (
            f"maybe num_examples is in {UNITS[factor]}: then add --units num_examples={factor:g}; else mend the column"
        )
    return f"convert it with --units {name}=FACTOR, or mend the column"


def odd_trunks(rows: list[dict], shapes: list[Shape | None], metric: str) -> list[str]:
    """Trunk ids that cannot be those of one training run each, and measurements that stand twice."""
    sizes: dict[str, set] = {}
    names: dict[tuple, list[str]] = {}
    for row, shape in zip(rows, shapes):
        sizes.setdefault(row["trunk_id"], set()).add(row.get("num_params") if shape is None else id(shape))
        names.setdefault((row["trunk_id"], row["num_examples"], row[metric]), []).append(row["run_id"])
    several = [trunk_id for trunk_id, found in sizes.items() if len(found) > 1]
    twice = [run_ids for run_ids in names.values() if len(run_ids) > 1]
    out = []
    if several:
        what = f"{len(several)} trunk_id (such as {several[0]}) stand for several shapes each"
        out.append(f"{what}; a trunk is one training run, and intervals are by trunk")
    if twice:
        what = f"{len(twice)} measurements stand under several names (such as {twice[0][0]} and {twice[0][1]})"
        out.append(f"{what}: same trunk, images and {metric} to the last digit; each counts as often as it stands")
    return out


def unfit(row: Mapping, excluded: Mapping[str, str]) -> str:
    """Say why a row takes no part in a shape law; "" where it does. excluded: run_id -> reason."""
    if row["run_id"] in excluded:
        return f"excluded: {excluded[row['run_id']]}"
    if row["status"] != "ok":
        return f"status {row['status']}"
    if is_vlm(row):
        return "a vision-language model: no shape's own loss"
    if row.get("base"):
        return f"fine-tuned from {row['base']}: not this shape alone from its beginning"
    return "trained at several patch sizes: not this shape alone from its beginning" if row.get("patch_sizes") else ""


def check_alike(rows: Sequence[Mapping], where: str) -> None:
    """Raise UserError where rows mix data, presets or objectives, whose losses cannot be compared."""
    for name in SAME:
        count = Counter(str(row.get(name)) for row in rows)
        if len(count) > 1:
            (one, n), (other, m) = sorted(count.items())[:2]
            raise UserError(
                f"{where}: the rows mix {name}={one} ({n} rows) and {name}={other} ({m} rows), whose losses cannot be"
                " compared; give ledgers of one"
            )


def with_metric(rows: list[dict], metric: str, where: str, notes: list[str]) -> list[dict]:
    """Give rows of one patch a cell the metric of cells too. Raises UserError where no row has the metric."""
    if metric in ONE_PATCH and any(row.get(metric) is not None for row in rows):
        lacking = [row.get(metric) is None and row.get(ONE_PATCH[metric]) is not None for row in rows]
        if any(lacking):
            notes.append(f"{sum(lacking)} rows have one patch a cell: their {ONE_PATCH[metric]} is taken as {metric}")
        rows = [row | {metric: row[ONE_PATCH[metric]]} if lack else row for row, lack in zip(rows, lacking)]
    if all(row.get(metric) is None for row in rows):
        known = sorted(k for k, v in rows[0].items() if k.startswith("val_") and is_number(v) and not is_spread(k))
        raise UserError(f"{where}: no row has metric={metric!r}; the rows have {', '.join(known) or 'no val_ column'}")
    return rows
