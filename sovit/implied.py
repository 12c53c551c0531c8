"""How much more compute the growth exponents say lies between two shapes, asked of each dimension.

Dimensions that answer differently contradict the exponents, or the claim that one shape was grown from the other by them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sovit import UserError

AGREE = 2.0  # implied compute ratios nearer to each other than this factor tell one story


def implied_compute(
    start: Mapping[str, float],
    end: Mapping[str, float],
    exponents: Mapping[str, float],
    steps: Mapping[str, float] | None = None,
) -> dict:
    """The compute ratio tau = (x / x0)^(1/s) that each dimension says lies between two shapes.

    exponents: s of x* ~ compute^s by dimension. steps: the grid on which a dimension was rounded, none where left out; a
    shape may be off by half a step. Returns {dimensions: {dim: {start, end, exponent, tau, low, high}}, spread, agree}: low
    and high are what rounding allows, spread is the largest tau over the smallest, and agree says whether that is below
    AGREE, or one ratio lies within what rounding allows in all dimensions. Raises UserError for an exponent that is not
    positive.
    """
    out = {}
    for dim, s in exponents.items():
        if not s > 0:
            raise UserError(f"the exponent of {dim} is {s:g}; only a dimension that grows implies a compute")
        half = (steps or {}).get(dim, 0.0) / 2
        x0, x = float(start[dim]), float(end[dim])
        low, tau, high = (
            float(np.exp(np.clip(np.log(ratio) / s, -700, 700)))
            for ratio in (max(x - half, 1e-9) / (x0 + half), x / x0, (x + half) / max(x0 - half, 1e-9))
        )
        out[dim] = dict(start=x0, end=x, exponent=float(s), tau=tau, low=low, high=high)
    taus = [v["tau"] for v in out.values()]
    spread = max(taus) / min(taus)
    common = max(v["low"] for v in out.values()) <= min(v["high"] for v in out.values())
    return dict(dimensions=out, spread=float(spread), agree=bool(spread < AGREE or common))


def implied_exponents(start: Mapping[str, float], end: Mapping[str, float], compute_ratio: float) -> dict[str, float]:
    """The exponents s that would take `start` to `end` over a compute ratio: ln(x / x0) / ln(tau), by dimension."""
    return {dim: float(np.log(end[dim] / start[dim]) / np.log(compute_ratio)) for dim in start}
