"""Checks that leave a row out of a fit, each with its reason."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from sovit import UserError
from sovit.ledger.few_shot_columns import is_spread
from sovit.ledger.schema import is_number, is_vlm
from sovit.spec.shape import DIMENSIONS, Shape

COUNTED = ("forward_flops", "num_params", "compute", "train_flops")
# what a usable row may lack but not hold as text: above 0, and at least 0
ABOVE_ZERO = (*DIMENSIONS, "head_dim", "num_examples", *COUNTED)
NUMBERS = (
    *ABOVE_ZERO,
    *("num_registers", "num_classes", "head_flops", "zero_line", "peak_lr", "weight_decay", "batch_size"),
)


WHOLE = (*DIMENSIONS, "head_dim", "num_registers")
SAME = ("data", "preset", "objective", "num_classes")  # losses of different ones cannot be compared
ONE_PATCH = {"val_cell_loss": "val_loss", "val_cell_error": "val_error"}  # the same where a cell is one patch
CONVENTION = 0.05  # counts further apart than this (of ln) were made by different rules


def column_numbers(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column as floats [n], nan where a row has no number there; and whether the row says anything [n]."""
    values = [row.get(name) for row in rows]
    said = np.array([value is not None for value in values])
    if set(map(type, values)) <= {int, float, type(None)}:
        with contextlib.suppress(OverflowError):  # a whole number beyond 1e308
            return np.array(values, float), said
    return np.array([value if is_number(value) else np.nan for value in values], float), said


def bad_numbers(rows: list[dict], metric: str) -> dict[int, str]:
    out: dict[int, str] = {}
    for name in NUMBERS:
        column, said = column_numbers(rows, name)
        above = name in ABOVE_ZERO
        for i in np.flatnonzero(said & ~(np.isfinite(column) & ((column > 0) if above else (column >= 0)))):
            value = rows[i][name]
            what = "not a number" if not is_number(value) else "not above 0" if above else "below 0"
            out.setdefault(int(i), f"has {name}={value!r}, which is {what}")
        if name in WHOLE:
            for i in np.flatnonzero(np.isfinite(column) & (column != np.round(column))):
                out.setdefault(int(i), f"has {name}={rows[i][name]!r}, which is not a whole number")
    column, _ = column_numbers(rows, metric)
    for i in np.flatnonzero(~(np.isfinite(column) & (column > 0))):
        out.setdefault(int(i), f"has {metric}={rows[i].get(metric)!r}; a power law needs a number above 0")
    return out


def count_ratios(rows: list[dict], shapes: list[Shape | None]) -> dict[str, tuple[np.ndarray, str]]:
    """By counted column: what the rows give over what their own shape and numbers say, nan where either is not said."""
    given = {name: column_numbers(rows, name)[0] for name in ("forward_flops", "num_params", "compute", "num_examples")}
    count = {id(s): (s.forward_flops, s.num_params) for s in {id(s): s for s in shapes if s is not None}.values()}
    forward, params = np.array([count.get(id(s), (np.nan, np.nan)) for s in shapes], float).T
    own = np.where(np.isfinite(given["forward_flops"]), given["forward_flops"], forward)
    return dict(
        forward_flops=(given["forward_flops"] / forward, "what its shape counts"),
        num_params=(given["num_params"] / params, "what its shape counts"),
        compute=(given["compute"] / (own * given["num_examples"]), "forward_flops x num_examples"),
    )


def bad_counts(rows: list[dict], shapes: list[Shape | None], ratios: dict) -> dict[int, str]:
    """Rows whose counts were made by another rule than those of the same shape: these can only be a mistake."""
    group = np.array([0 if s is None else id(s) for s in shapes])  # `_shapes` makes equal ones one
    out: dict[int, str] = {}
    for name, (ratio, rule) in ratios.items():
        use = np.flatnonzero(np.isfinite(ratio) & (group > 0))
        order = use[np.lexsort((ratio[use], group[use]))]
        for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else ():
            low, high = members[0], members[-1]
            if ratio[high] / ratio[low] < 1 + CONVENTION:
                continue
            typical = np.median(ratio[members])  # of two equal camps it is neither's, and both are left out
            for i in members[np.abs(np.log(ratio[members] / typical)) > CONVENTION / 2]:
                other = low if ratio[i] > typical else high
                out.setdefault(
                    int(i),
                    f"has {name}={rows[i][name]!r}, {ratio[i]:.4g} x {rule}, where row {rows[other]['run_id']} of the"
                    f" same shape has {ratio[other]:.4g} x",
                )
    return out


def foreign_counts(rows: list[dict], ratios: dict) -> list[str]:
    """What to know of counts that are not ours: legitimate, where one rule made them all."""
    out = []
    for name, (ratio, rule) in ratios.items():
        off = np.flatnonzero(np.abs(np.log(ratio)) > CONVENTION)  # False for nan
        if not len(off):
            continue
        known = ratio[np.isfinite(ratio)]
        low, high = known.min(), known.max()
        if high / low < 1 + CONVENTION:
            how = f"{np.median(known):.4g} x {rule} in all rows: another convention, and kept"
        else:
            i = off[np.abs(np.log(ratio[off])).argmax()]
            how = (
                f"{low:.4g} to {high:.4g} x {rule}, off by more than {CONVENTION:.0%} in {len(off)} of {len(known)} rows"
                f" (most in {rows[i]['run_id']}): kept, but rows counted by different rules cannot be compared"
            )
        out.append(f"{name} is {how}")
    return out


def odd_trunks(rows: list[dict], shapes: list[Shape | None], metric: str) -> list[str]:
    """Trunk ids that cannot be those of one training run each."""
    size: dict = {}
    names: dict = {}
    several, twice = [], []
    for row, shape in zip(rows, shapes):
        own = row.get("num_params") if shape is None else id(shape)
        if size.setdefault(row["trunk_id"], own) != own:
            several.append(row["trunk_id"])
        other = names.setdefault((row["trunk_id"], row["num_examples"], row[metric]), row["run_id"])
        if other != row["run_id"]:
            twice.append((other, row["run_id"]))
    out = []
    if several:
        out.append(
            f"{len(set(several))} trunk_id (such as {several[0]}) stand for several shapes each; a trunk is one training"
            " run, and intervals are by trunk"
        )
    if twice:
        out.append(
            f"{len(twice)} rows agree with another row in trunk_id, num_examples and {metric} to the last digit (such as"
            f" {twice[0][0]} and {twice[0][1]}): one measurement under two names counts twice"
        )
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
        known = sorted(k for k, v in rows[0].items() if k.startswith("val_") and v is not None and not is_spread(k))
        raise UserError(f"{where}: no row has metric={metric!r}; the rows have {', '.join(known) or 'no val_ column'}")
    return rows
