"""The compute-optimal frontier of a fitted law: its best shape at each of a ladder of budgets. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sovit import UserError
from sovit.law.read import Fit
from sovit.predict.law_at_budget import FAR_DECADES, budgets_run
from sovit.predict.recommend import best_shape
from sovit.spec.design import geometric

MAX_POINTS = 200
KEPT = (
    *("train_flops", "decades", "optimum", "optimum_size", "optimum_loss", "shape", "num_params", "num_examples"),
    *("loss", "loss_low", "loss_high", "loss_pairs_low", "loss_pairs_high", "rounding_regret", "regret", "warnings"),
)


def frontier(fit: Fit, budgets: Sequence[float], **rules) -> list[dict]:
    """The law's best shape at each budget (training FLOPs, in the order given), one row a budget.

    A row has the fields KEPT of `predict.Recommendation`, and flat: {count, exact, surveyed, ranges} of the shapes within
    one noise s.d. Its intervals are both of `fit.level`. Raises UserError as `best_shape` does, and for no budget.
    """
    if not len(budgets):
        raise UserError("a frontier needs at least one budget")
    rows = []
    for budget in budgets:
        found = best_shape(fit, budget, **rules).to_dict()
        flat = {name: found["flat_region"][name] for name in ("count", "exact", "surveyed", "ranges")}
        rows.append({name: found[name] for name in KEPT} | dict(flat=flat))
    return rows


def ladder(fit: Fit, low: float | None = None, high: float | None = None, points: int = 9) -> list[float]:
    """`points` budgets in equal ratios; from the least budget run to FAR_DECADES beyond the largest unless said.

    Raises UserError for ends that are not positive numbers in rising order, and for points out of 2 to MAX_POINTS.
    """
    ends = budgets_run(fit)
    low, high = (ends[0] if low is None else low), (ends[1] * 10**FAR_DECADES if high is None else high)
    if not (np.isfinite(low) and np.isfinite(high) and 0 < low < high):
        raise UserError(f"budgets from {low:g} to {high:g}: both must be positive FLOPs, the second the larger")
    if not 2 <= points <= MAX_POINTS:
        raise UserError(f"{points} points; give 2 to {MAX_POINTS}")
    return geometric(float(low), float(high), points)
