"""How often the intervals hold the truth, by simulation from planted laws.

A set is one simulated data set: fitted, its two intervals made, and asked whether they hold the true value of each
quantity: the growth exponent of each dimension over the design's range of compute, and ln x of the best shape at
REACHES. Nominal is LEVEL for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sovit.law.bootstrap import interval, pairs, pairs_stretch, random_effects, stretch
from sovit.law.checks import simulate as planted
from sovit.law.compute_optimum import Family
from sovit.law.design_matrix import prepare_fit, star
from sovit.law.exponents import EXPONENT_FLOOR, optimum_of
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Rows, solve

KINDS = ("random_effects", "pairs")
REACHES = (10.0, 100.0)  # multiples of the largest compute at which the best shape is asked for


@dataclass(frozen=True)
class Setup:
    """What all sets of one simulation share: a form and a design."""

    rows: Rows
    strata: np.ndarray  # [G]
    family: Family
    ends: tuple[float, float]  # smallest and largest compute

    @property
    def labels(self) -> list[str]:
        """The quantity of each column of `quantities`; the dimensions of one follow each other."""
        if not self.family.grid:
            return ["exponent"]
        return [name for name in ("exponent", *(f"shape_{r:g}x" for r in REACHES)) for _ in self.family.grid]

    def quantities(self, theta: np.ndarray) -> np.ndarray:
        """ln of the growth exponents (floored), then ln x of the optimum at each reach: [R, M] for theta [R, P]."""
        if not self.family.grid:  # N* ~ (N D)^s of chinchilla
            return np.log(theta[:, 4:5] / (theta[:, 3:4] + theta[:, 4:5]))
        computes = np.log([*self.ends, *(r * self.ends[1] for r in REACHES)])
        tiled, at = np.tile(theta, (len(computes), 1)), np.repeat(computes, len(theta))
        v = optimum_of(self.family, tiled, at).reshape(len(computes), len(theta), -1)
        growth = (v[1] - v[0]) / (computes[1] - computes[0])
        return np.concatenate([np.log(np.maximum(growth, EXPONENT_FLOOR)), *v[2:]], 1)


def setup(form: str, design: planted.Design, zero_line: float | None = None) -> Setup:
    """A form on a planted design."""
    table, dims = design.columns, () if form == "chinchilla" else planted.DIMS
    dummy = np.exp(0.1 * np.sin(np.arange(len(design.trunk))))
    options = LawOptions(clusters=design.trunk, dims=dims or None, zero_line=zero_line)
    ready = prepare_fit(form, table, dummy, options)
    ready = dataclasses.replace(ready, arms=star(table, planted.DIMS)[1], index=design.trunk)
    grid = {d: np.unique(table[d]).tolist() for d in dims}
    ends = table["compute"].min(), table["compute"].max()
    return Setup(ready.rows, ready.strata, Family(ready.form, ready.rows.centre, design.geometry, grid), ends)


def one_set(s: Setup, log_y: np.ndarray, draws: int, rng: np.random.Generator) -> dict:
    """Fit one data set, log_y over the rows of the form: estimate [M], ends [2, M, 2] by KINDS."""
    rows = dataclasses.replace(s.rows, y=np.exp(log_y))
    solved = solve(rows)
    made = random_effects(rows, solved, draws, rng), pairs(rows, solved, draws, rng, s.strata)
    values = s.quantities(np.concatenate([solved.theta[None], *(done.theta for done in made)]))
    widen = stretch(solved.dof), pairs_stretch(s.strata)
    ends = [[interval(column, by, floor=None) for column in many.T] for by, many in zip(widen, np.split(values[1:], 2))]
    return dict(estimate=values[0], ends=np.array(ends))


def summary(labels: Sequence[str], true: np.ndarray, sets: list[dict]) -> dict:
    """Coverage, width and bias by quantity. true [S, M]; `sets` as `one_set` gives them.

    coverage[kind][quantity]: {mean, se, num}; the error is that of the mean over dimensions, set by set, for the
    dimensions of one set are not independent. width: median of ln(high / low). bias: median of ln(estimate / true).
    """
    ends, estimate = np.array([o["ends"] for o in sets]), np.array([o["estimate"] for o in sets])
    places = {q: [m for m, name in enumerate(labels) if name == q] for q in dict.fromkeys(labels)}
    coverage: dict = {kind: {} for kind in KINDS}
    width: dict = {kind: {} for kind in KINDS}
    for i, kind in enumerate(KINDS):
        for quantity, at in places.items():
            low, high = np.moveaxis(ends[:, i, at], 2, 0)
            hit = (low <= true[:, at]) & (true[:, at] <= high)
            coverage[kind][quantity] = dict(mean=float(hit.mean()), se=standard_error(hit), num=len(hit))
            width[kind][quantity] = np.median(high - low, 0).tolist()
    error = np.median(estimate - true, 0)
    return dict(coverage=coverage, width=width, bias={q: error[at].tolist() for q, at in places.items()})


def standard_error(hit: np.ndarray) -> float:
    """Of the mean of hits [S, K]: between sets, and no less than that of one more miss (Agresti & Coull) in all."""
    num = len(hit)
    p = (hit.mean() * num + 2) / (num + 4)
    between = hit.mean(1).std(ddof=1) / np.sqrt(num) if num > 1 else 0.0
    return float(max(between, np.sqrt(p * (1 - p) / (num + 4) / hit.shape[1])))
