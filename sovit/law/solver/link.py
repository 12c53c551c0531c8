"""How a form's terms make a loss: plain sum or power mean, bounded by the chance loss or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sovit.law.form import Form

BOUND_POWER = 4.0  # sharpness of the bound; fixed, not fitted


def link(form: Form, part: Sequence[np.ndarray], s: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], Any]:
    """ln f and d ln f / d term of the terms `part` [R, n] each, and d ln f / ds; s [R, 1, n or 1], [R, 0, ...] of none."""
    sides: list[Any] = [
        sum(p for p, t, data in zip(part, form.formula, form.data) if t.factors and data == side)
        for side in (False, True)
    ]
    floor = sum(p for p, t in zip(part, form.formula) if not t.factors)
    by: list[Any] = [1.0, 1.0]  # d mean / d side
    if form.power_mean:
        s = s[:, 0]
        # the floor keeps ln 0 out where every amplitude of one side is zero; it is far below any loss
        ln_c, ln_d = (np.log(side + 1e-12) for side in sides)
        top = np.maximum(ln_c, ln_d)
        ln_m = top + np.log(np.exp(s * (ln_c - top)) + np.exp(s * (ln_d - top))) / s
        mean = np.exp(ln_m)
        by = [np.exp((s - 1) * (ln - ln_m)) for ln in (ln_c, ln_d)]  # (C/M)^(s-1)
        share_c, share_d = np.exp(s * (ln_c - ln_m)), np.exp(s * (ln_d - ln_m))  # C^s / M^s, D^s / M^s
        bent = share_c * ln_c + share_d * ln_d - ln_m  # s d ln M / ds
    else:
        mean = sides[0] + sides[1]
    loss = mean + floor
    value, slope = loss, 1 / loss  # slope = d ln f / d loss
    if form.zero_line is not None:
        value = (form.zero_line**-BOUND_POWER + loss**-BOUND_POWER) ** (-1 / BOUND_POWER)
        slope = (value / loss) ** BOUND_POWER / loss  # in this order it does not overflow
    slopes = [slope * by[data] if t.factors else slope for t, data in zip(form.formula, form.data)]
    return np.log(value), slopes, slope * mean * bent / s if form.power_mean else None


def unbounded(form: Form, y: np.ndarray) -> np.ndarray:
    """The losses that the zero line bends to y [n]."""
    if form.zero_line is None:
        return y
    capped = np.minimum(y, 0.98 * form.zero_line)
    return (capped**-BOUND_POWER - form.zero_line**-BOUND_POWER) ** (-1 / BOUND_POWER)
