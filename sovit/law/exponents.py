"""Where a law has its optimum, and the growth exponents of x* ~ compute^s with their status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit.law.bootstrap import interval
from sovit.law.compute_optimum import Family, optimum
from sovit.law.form import FALLING, Form
from sovit.law.forms import facing
from sovit.spec.shape import DIMENSIONS

MAX_RATIO = 10.0  # high / low of an exponent's interval beyond which it is not determined
MAX_ABSENT = 0.25  # share of draws without the dimension's amplitude beyond which it is not determined
EXPONENT_FLOOR = 1e-3  # stands for "does not grow" on the log scale
MIN_SPAN = 1.5  # ratio of largest to smallest compute below which nothing is said of growth or extrapolation
BOX_BELOW, BOX_ABOVE = 30.0, 1e3  # how far the optimum may go below and above the values run
BOX_FEW_TOKENS = 4.0  # and how far where that leaves fewer tokens: beyond, an image is less than one
NO_SIDES: dict = dict.fromkeys(("low", "high", "pairs_low", "pairs_high"))
NO_DRAWS = "no interval: fitted with bootstrap=0"

Range = Sequence[float]  # smallest and largest


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 90 % interval by the parametric bootstrap (the headline) and by the cluster bootstrap (pairs)."""

    low: float
    high: float
    pairs_low: float
    pairs_high: float


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The exponent s of the optimal x* ~ compute^s of one dimension; no estimate where `status` is unidentified."""

    estimate: float | None
    kind: str  # marginal: of this dimension alone; joint: of all together
    compute_range: Range | None
    status: str  # ok, edge, unidentified
    note: str
    low: float | None
    high: float | None
    pairs_low: float | None
    pairs_high: float | None


def box(grid: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """The box of the optimum in ln x, from the values run of each dimension."""
    ends = np.array([[min(values), max(values)] for values in grid.values()], float)
    below = [BOX_FEW_TOKENS if name == "image_size" else BOX_BELOW for name in grid]
    above = [BOX_FEW_TOKENS if name == "patch_size" else BOX_ABOVE for name in grid]
    return np.log(ends[:, 0] / below), np.log(ends[:, 1] * above)


def optimum_of(
    family: Family,
    theta: np.ndarray,
    log_compute: np.ndarray | float,
    head: bool = False,
    held: Mapping[str, float] | None = None,
) -> np.ndarray:
    """ln x of the optimal dimensions [R, K] at ln compute (a number, or [R]), for each theta [R, P].

    held: dimension -> value, those that are not free (of a form by arm there is no such thing).
    For `sovit` each dimension has its own, x* = (alpha a t^c / (beta b))^(1/(a+b)) (Eq. 4), the others at the centre.
    """
    form, centre = family.form, family.centre
    low, high = box(family.grid)
    for k, name in enumerate(family.grid):
        if name in (held or {}):
            low[k] = high[k] = np.log(held[name])  # type: ignore[index]
    if form.arms:
        num = len(form.arms)
        alpha, beta, _, _, a, b = (theta[:, i * num : (i + 1) * num] for i in range(6))
        above = np.broadcast_to(np.asarray(log_compute, float), (len(theta),))[:, None] - centre[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = (np.log(alpha * a) - np.log(beta * b) + theta[:, 6 * num :] * above) / (a + b)
        shift = np.where(alpha <= 0, -np.inf, np.where(beta <= 0, np.inf, shift))
        return np.clip(facing(form.arms) * (centre[:-1] + shift), low, high)
    return optimum(family, theta, log_compute, (low, high), head)


def growth(family: Family, theta: np.ndarray, ends: Sequence[float]) -> np.ndarray:
    """Exponent s of x* ~ compute^s between the two computes `ends`, for each theta: [R, K]."""
    low, high = np.log(ends)
    if family.form.arms:
        num = len(family.form.arms)
        a, b = theta[:, 4 * num : 5 * num], theta[:, 5 * num : 6 * num]
        absent = (theta[:, :num] <= 0) | (theta[:, num : 2 * num] <= 0)
        return np.where(absent, 0.0, facing(family.form.arms) * theta[:, 6 * num :] / (a + b))
    at = [optimum_of(family, theta, t) for t in (low, high)]
    return (at[1] - at[0]) / (high - low)


def amplitudes(form: Form, theta: np.ndarray) -> np.ndarray:
    """The size amplitude of each dimension [R, K], or the parameter count's; 0 = the loss does not depend on it."""
    if form.arms:
        return theta[:, : len(form.arms)]
    own = theta[:, [i for i, term in enumerate(form.terms) if term in DIMENSIONS]]
    return np.maximum(own, theta[:, [form.terms.index("num_params")]]) if "num_params" in form.terms else own


def exponents(
    family: Family,
    theta: np.ndarray,
    draws: Mapping[str, np.ndarray],
    widen: tuple[float, float],
    ends: Sequence[float],
) -> dict[str, Growth]:
    """`exponents` of law.json. theta [P]; draws: [R, P] by kind, or {}.

    widen: of the percentiles of random_effects (t / z) and of pairs.
    """
    form, grid = family.form, family.grid
    common: dict = dict(kind="marginal" if form.arms else "joint", compute_range=list(ends))
    if ends[1] < MIN_SPAN * ends[0]:
        note = f"the rows span a factor {ends[1] / ends[0]:.3g} in compute; growth needs budgets further apart"
        nothing = Growth(estimate=None, status="unidentified", note=note, **common, **NO_SIDES)
        return dict.fromkeys(grid, nothing)
    point = growth(family, theta[None], ends)[0]
    present = amplitudes(form, theta[None])[0] > 0
    computes = np.sqrt(ends[0] * ends[1]), ends[1]
    at = np.exp([optimum_of(family, theta[None], np.log(compute))[0] for compute in computes])
    many = {kind: growth(family, theta_of, ends) for kind, theta_of in draws.items()}
    absent = (amplitudes(form, draws["random_effects"]) <= 0).mean(0) if many else np.zeros(len(grid))
    out = {}
    for k, name in enumerate(grid):
        sign = -1 if name in FALLING else 1  # the best patch shrinks as compute grows
        sides = _sides({kind: sign * grown[:, k] for kind, grown in many.items()}, widen, sign)
        status, note = _edge(min(grid[name]), max(grid[name]), computes, at[:, k])
        if not present[k]:
            status, note = "unidentified", "the fitted amplitude is 0: these data show no gain from this dimension"
        elif absent[k] > MAX_ABSENT:
            status, note = "unidentified", f"no gain from this dimension in {absent[k]:.0%} of the draws"
        elif many and (ratio := max(sides["high"] / sides["low"], sides["low"] / sides["high"])) > MAX_RATIO:
            status, note = "unidentified", f"the interval spans a factor {ratio:.3g}, above {MAX_RATIO:g}"
        note = "; ".join(filter(None, [note, "" if many else NO_DRAWS]))
        estimate = None if status == "unidentified" else float(point[k])
        out[name] = Growth(estimate=estimate, status=status, note=note, **common, **sides)
    return out


def _sides(draws: Mapping[str, np.ndarray], widen: tuple[float, float], sign: int = 1) -> dict:
    """Ends of `Growth` from the positive draws [R] by kind; sign: of the exponent."""
    sides: dict = dict(NO_SIDES)
    for (kind, values), by in zip(draws.items(), widen):
        side = "pairs_" if kind == "pairs" else ""
        sides[side + "low"], sides[side + "high"] = sorted(sign * end for end in interval(values, by, EXPONENT_FLOOR))
    return sides


def _edge(low: float, high: float, computes: Sequence[float], optima: np.ndarray) -> tuple[str, str]:
    """Status and note of a dimension with these optima at these computes, run from `low` to `high`."""
    status, note = "ok", ""
    for compute, x in zip(computes, optima):
        if not low < x < high:
            end = f"smallest value run ({low:g})" if x <= low else f"largest value run ({high:g})"
            note = f"at compute {compute:.3g} the optimum {x:.4g} is at or beyond the {end}; extend that arm"
            status = "edge"
    return status, note


def size_growth(theta: np.ndarray, draws: Mapping, widen: tuple[float, float], compute_range: Range | None) -> Growth:
    """Chinchilla: N* ~ (N D)^s with s = beta / (alpha + beta); its compute is N D, not exact FLOPs."""
    sides = _sides({kind: many[:, 4] / (many[:, 3] + many[:, 4]) for kind, many in draws.items()}, widen)
    absent = min(theta[:2]) <= 0
    return Growth(
        estimate=None if absent else float(theta[4] / (theta[3] + theta[4])),
        kind="joint",
        compute_range=compute_range,
        status="unidentified" if absent else "ok",
        note="an amplitude is 0" if absent else "" if draws else NO_DRAWS,
        **sides,
    )
