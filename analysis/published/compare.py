"""Compare two sets of residuals by the ratio of their RMSEs, with an interval over trunks."""

from __future__ import annotations

import numpy as np

from sovit.predict.paired_test import verdict_of

BASELINES = ("chinchilla", "compute_only", "nearest")
MIN_TRUNKS = 3
NUM_DRAWS, LEVEL = 2000, 0.90


def compare(ours: np.ndarray, theirs: np.ndarray, trunks: np.ndarray, seed: int = 0) -> dict:
    """Ratio of our RMSE to theirs over the rows that both predict, with an interval from resampling whole trunks.

    ours, theirs [n]: residuals; trunks [n]. The verdict is `better` or `worse` where the interval leaves 1 out.
    """
    both = np.isfinite(ours) & np.isfinite(theirs)
    index = np.unique(trunks[both], return_inverse=True)[1]
    sums = np.stack([np.bincount(index, residual[both] ** 2) for residual in (ours, theirs)])  # [2, G]
    num = sums.shape[1]
    ratio = float(np.sqrt(sums[0].sum() / sums[1].sum()))
    if num < MIN_TRUNKS:
        return dict(ratio=ratio, low=None, high=None, num_trunks=num, verdict="too few trunks")
    weights = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), NUM_DRAWS)
    drawn = np.sqrt((weights @ sums[0]) / (weights @ sums[1]))
    low, high = (float(q) for q in np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]))
    verdict = verdict_of(low - 1, high - 1)
    return dict(ratio=ratio, low=low, high=high, num_trunks=num, verdict=verdict)
