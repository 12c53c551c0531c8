"""The decision rule for paired seeds, fixed before any run: a difference, its 90 % interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sovit import UserError

LEVEL = 0.90
MIN_SEEDS = 3


def paired(differences: Sequence[float] | np.ndarray) -> dict:
    """Mean of d = ln loss(ours) - ln loss(theirs) over seeds [S] with its 90 % Student t interval, and the verdict.

    `better` if the interval lies below 0, `worse` if above, else `not distinguishable`. Fewer than MIN_SEEDS seeds have
    no interval, and cannot be told apart. Raises UserError without a seed.
    """
    d = np.asarray(differences, float)
    n = len(d)
    if not n:
        raise UserError("no seed was run in both arms; run both with the same init_seed and data_seed")
    mean, sd = float(d.mean()), float(d.std(ddof=1)) if n > 1 else None
    low = high = None
    if sd is not None and n >= MIN_SEEDS:
        half = student_t(n - 1) * sd / math.sqrt(n)
        low, high = mean - half, mean + half
    return {"mean": mean, "sd": sd, "n": n, "low": low, "high": high, "level": LEVEL, "verdict": verdict_of(low, high)}


def verdict_of(low: float | None, high: float | None) -> str:
    """The verdict that an interval of d gives; None: there is none."""
    if low is None or high is None:
        return "not distinguishable"
    return "better" if high < 0 else "worse" if low > 0 else "not distinguishable"


def student_t(degrees: int) -> float:
    """The 95 % point of Student's t, that is, the half-width of a two-sided 90 % interval in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
