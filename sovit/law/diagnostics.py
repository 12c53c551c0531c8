"""How a fit went and what it cannot say: noise, weakest direction, lack of fit, pattern of the residuals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.design_matrix import positive
from sovit.law.solver.fitter import Rows, Solved, free_columns
from sovit.spec.shape import DIMENSIONS

SIGNIFICANT = 0.05  # p of the F test of lack of fit


@dataclass(frozen=True, kw_only=True)
class Noise:
    """S.d. of ln loss between two runs of one shape, and where it was read: `n` degrees of freedom, `num_rows` rows."""

    sd: float
    source: str
    n: int
    num_rows: int
    support_sd: float | None = None


@dataclass(frozen=True, kw_only=True)
class LackOfFit:
    """Residuals over seed noise, and p of the F test of the two; p None without repeated seeds."""

    residual_over_noise: float | None
    noise_source: str
    p: float | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Weakest:
    """The direction in which the rows say least; `step`: one standard error along it, by centred parameter."""

    parameters: list[str]
    loadings: list[float]
    singular_values: list[float]
    step: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How the bootstraps went: {converged, iterations} of each, and by how much their percentiles are stretched."""

    random_effects: dict[str, float]
    pairs: dict[str, float]
    num: int
    seed: int
    t_over_z: float
    pairs_stretch: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """How the fit went and what it cannot say."""

    objective: float
    iterations: int
    converged: bool
    objective_spread: float
    starts_agreeing: float
    num_starts: int
    active_bounds: dict[str, str]
    weakest_direction: str
    weakest: Weakest
    trunk_sd: float
    row_sd: float
    nu: float
    residual_rms: float
    lack_of_fit: LackOfFit
    residual_pattern: dict[str, float | None]
    draws: Draws | None = None
    absent_share: dict[str, float]
    interval_ratio: dict[str, float]
    held_out_rows: list[int]


def seed_noise(table: Mapping, y: np.ndarray, index: np.ndarray, solved: Solved) -> Noise:
    """S.d. of ln y: pooled within rows of one shape and number of images in several trunks; else from the residuals.

    n: degrees of freedom between trunks (branches of one trunk share its seed); seeded trunks less seeded shapes.
    num_rows: the rows that the s.d. was read from.
    Where the fit was given a known part of the noise, `source` ends in "+support" and `support_sd` is that part (root
    mean square of ln y); `sd` holds it too, as what one measured row differs by from another.
    """
    known = None if solved.known_sd is None else float(np.sqrt((solved.known_sd**2).mean()))
    suffix = "" if known is None else "+support"
    names = [n for n in (*DIMENSIONS, "head_dim", "pool", "num_registers", "num_params", "peak_lr") if n in table]
    shape = _groups([table[n] for n in names], len(y))
    group = _groups([shape, table["num_examples"] if "num_examples" in table else np.arange(len(y))], len(y))
    trunks = np.bincount(_distinct(group, index)[0])
    repeated = np.flatnonzero(trunks[group] > 1)
    if len(repeated):
        group, shape, index, values = group[repeated], shape[repeated], index[repeated], np.log(y[repeated])
        n = len(_distinct(shape, index)[0]) - len(np.unique(shape))
        sd = pooled_sd(values, group) or 0.0  # some group has two rows here
        return Noise(sd=sd, source="seeds" + suffix, n=n, num_rows=len(group), support_sd=known)
    sd = float(np.hypot(np.hypot(solved.trunk_sd, solved.row_sd), known or 0.0))
    dof = int(round(solved.dof))
    return Noise(sd=sd, source="residuals" + suffix, n=dof, num_rows=len(y), support_sd=known)


def pooled_sd(values: np.ndarray, group: np.ndarray) -> float | None:
    """S.d. of values [n] within their groups 0, 1, ... [n], pooled; None where no group has two values."""
    size = np.bincount(group)
    means = np.bincount(group, values) / np.maximum(size, 1)
    dof = len(group) - int((size > 0).sum())
    return float(np.sqrt(((values - means[group]) ** 2).sum() / dof)) if dof else None


def _groups(columns: list, num: int) -> np.ndarray:
    """Which rows [num] agree in all columns, as 0..G-1."""
    group = np.zeros(num, np.int64)
    for column in columns:
        values = column if column.dtype.kind in "iuf" else column.astype(str)
        place = np.unique(values, return_inverse=True)[1].ravel()
        group = np.unique(group * (int(place.max()) + 1) + place, return_inverse=True)[1].ravel()
    return group


def _distinct(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of two columns of whole numbers."""
    return np.divmod(np.unique(a * (int(b.max()) + 1) + b), int(b.max()) + 1)


def describe(rows: Rows, solved: Solved, noise: Noise, table: Mapping) -> dict:
    """Fields of `Diagnostics` that the point fit gives.

    `weakest` is the direction in which the rows say least: the least singular vector of the Jacobian with columns of
    unit norm, its two largest loadings, and the `step` of the centred parameters that is one standard error along it
    (rows taken for independent).
    """
    form, theta = rows.form, solved.theta
    value, jac = form.evaluate(theta[None], rows.u)
    residual, jac = value[0] - np.log(rows.y), jac[0]
    low, high = form.bounds
    bounds = {
        n: "lower" if t <= lo else "upper" for n, t, lo, hi in zip(form.names, theta, low, high) if t <= lo or t >= hi
    }
    free = free_columns(form, theta, jac)
    if not free.any():
        line = "" if form.zero_line is None else f" every loss is far above zero_line={form.zero_line:g}, or"
        raise UserError(f"no parameter moves the fit:{line} no column moves the loss; check the losses and their unit")
    unit = jac[free] / np.linalg.norm(jac[free], axis=1, keepdims=True)
    _, singular, right = np.linalg.svd(unit.T, full_matrices=False)
    names, weak = np.array(form.names)[free], right[-1]
    weak = weak * np.sign(weak[np.argmax(np.abs(weak))])  # a singular vector has no sign of its own
    top = np.argsort(-np.abs(weak), kind="stable")[:2]
    against = "against" if weak[top[0]] * weak[top[-1]] < 0 else "with"
    weakest = (
        (
            f"{names[top[0]]} {against} {names[top[1]]} (loadings {weak[top[0]]:+.2f}, {weak[top[1]]:+.2f});"
            f" singular values of the unit-norm Jacobian {singular[0]:.3g} to {singular[-1]:.3g}"
        )
        if len(top) > 1
        else "one free parameter"
    )
    rms = float(np.sqrt(residual @ residual / max(len(residual) - int(free.sum()), 1)))
    size = np.linalg.norm(jac[free], axis=1) * max(singular[-1], 1e-12)
    shift = dict(zip(names.tolist(), (weak * rms / size).tolist()))
    misfit = rms / noise.sd if noise.sd > 0 else None
    return dict(
        objective=solved.objective,
        iterations=solved.iterations,
        converged=solved.converged,
        objective_spread=solved.spread,
        starts_agreeing=solved.agreeing,
        num_starts=solved.num_starts,
        active_bounds=bounds,
        weakest_direction=weakest,
        weakest=Weakest(
            parameters=[str(names[i]) for i in top],
            loadings=[float(weak[i]) for i in top],
            singular_values=[float(singular[0]), float(singular[-1])],
            step=shift,
        ),
        trunk_sd=solved.trunk_sd,
        row_sd=solved.row_sd,
        nu=solved.dof,
        residual_rms=rms,
        lack_of_fit=_lack_of_fit(misfit, noise, solved.dof),
        residual_pattern=_pattern(residual, rows, table),
    )


def _lack_of_fit(misfit: float | None, noise: Noise, dof: float) -> LackOfFit:
    """Residuals against the noise between seeds: p of the F test of their variances, by trunks on both sides."""
    from scipy.special import fdtrc  # not at import: prediction needs no scipy

    if not noise.source.startswith("seeds") or misfit is None:
        words = "no repeated seeds: the noise is read from the residuals, so lack of fit cannot be told from noise"
        return LackOfFit(residual_over_noise=misfit, noise_source=noise.source, p=None, note=words)
    p = float(fdtrc(dof, noise.n, misfit**2))
    more, same = "the form misses more than seed noise", "the residuals are of the size of seed noise"
    words = f"{more if p < SIGNIFICANT else same} (F test, p = {p:.2g})"
    return LackOfFit(residual_over_noise=misfit, noise_source=noise.source, p=p, note=words)


def _pattern(residual: np.ndarray, rows: Rows, table: Mapping) -> dict:
    """Mean ln(predicted/measured) of small and large models at low and high compute, halves split at the medians."""
    if not {"compute", "num_examples"} <= set(table):
        return {}
    compute = positive(table, "compute")[rows.source]
    size = compute / positive(table, "num_examples")[rows.source]
    cells = {}
    for s, small in (("small", size <= np.median(size)), ("large", size > np.median(size))):
        for c, low in (("low", compute <= np.median(compute)), ("high", compute > np.median(compute))):
            cells[f"{s}_model_{c}_compute"] = float(residual[small & low].mean()) if (small & low).any() else None
    return cells
