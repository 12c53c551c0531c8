"""How a fit went and what it cannot say: noise, weakest direction, lack of fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.design_matrix import groups_of
from sovit.law.solver.fitter import Rows, Solved, free_columns
from sovit.spec.shape import DIMENSIONS

SIGNIFICANT = 0.05  # p of the F test of lack of fit
FAR, FAR_LOSS = 8.0, 0.2  # robust s.d., and ln loss, beyond which a row is an outlier
NORMAL_MAD = 0.6745  # median of |x| of a standard normal x


@dataclass(frozen=True, kw_only=True)
class Noise:
    """S.d. of ln loss between two runs of one shape, and where it was read: `n` degrees of freedom, `num_rows` rows.

    outliers: rows, by run_id where one is known, that the law misses by far and that the s.d. therefore leaves out.
    """

    sd: float
    source: str
    n: int
    num_rows: int
    outliers: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class LackOfFit:
    """Residuals over seed noise, and p of the F test of the two; p None without repeated seeds."""

    residual_over_noise: float | None
    p: float | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Weakest:
    """The direction in which the rows say least: the least singular vector of the Jacobian with columns of unit norm.

    Its two largest loadings, and the largest and the least singular value.
    """

    parameters: list[str]
    loadings: list[float]
    singular_values: list[float]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What was drawn, and by how much the percentiles of either bootstrap are stretched."""

    num: int
    seed: int
    t_over_z: float
    pairs_stretch: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """How the fit went and what it cannot say."""

    converged: bool
    objective_spread: float
    num_starts: int
    active_bounds: dict[str, str]
    weakest: Weakest
    trunk_sd: float
    row_sd: float
    nu: float
    residual_rms: float
    lack_of_fit: LackOfFit
    draws: Draws | None = None


def far_rows(rows: Rows, solved: Solved) -> np.ndarray:
    """The rows given, by number, that the law misses by more than FAR robust s.d. of its residuals, and by FAR_LOSS."""
    residual = rows.form.evaluate(solved.theta[None], rows.u)[0][0] - np.log(rows.y)
    aside = np.abs(residual - np.median(residual))
    return np.unique(rows.source[aside > max(FAR * np.median(aside) / NORMAL_MAD, FAR_LOSS)])


def seed_noise(table: Mapping, y: np.ndarray, index: np.ndarray, solved: Solved, far: np.ndarray) -> Noise:
    """S.d. of ln y: pooled within rows of one shape and number of images in several trunks; else from the residuals.

    far: numbers of rows that are left out, for one wrong loss would make all others look alike.
    n: degrees of freedom between trunks (branches of one trunk share its seed); seeded trunks less seeded shapes.
    num_rows: the rows that the s.d. was read from.
    """
    names = [n for n in (*DIMENSIONS, "head_dim", "pool", "num_registers", "num_params", "peak_lr") if n in table]
    shape = groups_of([table[n] for n in names], len(y))
    group = groups_of([shape, table.get("num_examples", np.arange(len(y)))], len(y))
    sound = ~np.isin(np.arange(len(y)), far)
    pairs = np.unique(np.stack([group, index])[:, sound], axis=1)  # each trunk of a group once
    repeated = np.flatnonzero((np.bincount(pairs[0], minlength=group.max() + 1)[group] > 1) & sound)
    outliers = [str(i) for i in far] or None
    if len(repeated):
        seeded = np.unique(np.stack([shape, index])[:, repeated], axis=1)
        n = seeded.shape[1] - len(np.unique(seeded[0]))
        sd = pooled_sd(np.log(y[repeated]), group[repeated]) or 0.0  # some group has two rows here
        return Noise(sd=sd, source="seeds", n=n, num_rows=len(repeated), outliers=outliers)
    sd = float(np.hypot(solved.trunk_sd, solved.row_sd))
    return Noise(sd=sd, source="residuals", n=int(round(solved.dof)), num_rows=len(y), outliers=outliers)


def pooled_sd(values: np.ndarray, group: np.ndarray) -> float | None:
    """S.d. of values [n] within their groups 0, 1, ... [n], pooled; None where no group has two values."""
    size = np.bincount(group)
    means = np.bincount(group, values) / np.maximum(size, 1)
    dof = len(group) - int((size > 0).sum())
    return float(np.sqrt(((values - means[group]) ** 2).sum() / dof)) if dof else None


def describe(rows: Rows, solved: Solved, noise: Noise, draws: Draws | None) -> Diagnostics:
    """Outliers of the noise have no part in the residuals' size. Raises UserError where no parameter moves the fit."""
    form, theta = rows.form, solved.theta
    value, jac = form.evaluate(theta[None], rows.u)
    residual, jac = value[0] - np.log(rows.y), jac[0]
    low, high = form.bounds
    on = {n: "lower" if t <= lo else "upper" for n, t, lo, hi in zip(form.names, theta, low, high) if not lo < t < hi}
    free = free_columns(form, theta, jac)
    if not free.any():
        line = "" if form.zero_line is None else f" every loss is far above zero_line={form.zero_line:g}, or"
        raise UserError(f"no parameter moves the fit:{line} no column moves the loss; check the losses and their unit")
    unit = jac[free] / np.linalg.norm(jac[free], axis=1, keepdims=True)
    _, singular, right = np.linalg.svd(unit.T, full_matrices=False)
    names, weak = np.array(form.names)[free], right[-1]
    weak = weak * np.sign(weak[np.argmax(np.abs(weak))])  # a singular vector has no sign of its own
    top = np.argsort(-np.abs(weak), kind="stable")[:2]
    near = residual[~np.isin(rows.source, np.array(noise.outliers or (), int))]
    rms = float(np.sqrt(near @ near / max(len(near) - int(free.sum()), 1)))
    return Diagnostics(
        converged=solved.converged,
        objective_spread=solved.spread,
        num_starts=solved.num_starts,
        active_bounds=on,
        weakest=Weakest(
            parameters=names[top].tolist(),
            loadings=weak[top].tolist(),
            singular_values=[float(singular[0]), float(singular[-1])],
        ),
        trunk_sd=solved.trunk_sd,
        row_sd=solved.row_sd,
        nu=solved.dof,
        residual_rms=rms,
        lack_of_fit=_lack_of_fit(rms / noise.sd if noise.sd > 0 else None, noise, solved.dof),
        draws=draws,
    )


def _lack_of_fit(misfit: float | None, noise: Noise, dof: float) -> LackOfFit:
    """Residuals against the noise between seeds: p of the F test of their variances, by trunks on both sides."""
    from scipy.special import fdtrc  # not at import: prediction needs no scipy

    if noise.source != "seeds" or misfit is None:
        words = "no repeated seeds: the noise is read from the residuals, so lack of fit cannot be told from noise"
        return LackOfFit(residual_over_noise=misfit, p=None, note=words)
    p = float(fdtrc(dof, noise.n, misfit**2))
    more, same = "the form misses more than seed noise", "the residuals are of the size of seed noise"
    words = f"{more if p < SIGNIFICANT else same} (F test, p = {p:.2g})"
    return LackOfFit(residual_over_noise=misfit, p=p, note=words)
