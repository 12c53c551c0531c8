"""The point fit: grid starts, polish, variance components by trunk, and a whitened refit. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.solver.polish import Groups, Objective, Polished, group_sums, polish

POINT_TOLERANCE = 1e-10
HUBER = 1.345  # 95 % efficiency on Gaussian noise
START_ROWS = 2_000  # starts are sought among whole trunks of about so many rows


@dataclass(frozen=True)
class Rows:
    """The rows a form is fitted to: centred log columns u [K, n], losses y [n] and the trunk of each, 0..G-1 [n].

    source [n]: the row given that each stands for; a star's centre stands once in every arm.
    """

    form: Any
    u: np.ndarray
    y: np.ndarray
    trunk: np.ndarray
    source: np.ndarray
    centre: np.ndarray  # of the columns in ln x


@dataclass(frozen=True)
class Loss:
    """What is minimised. kind: huber_log or log_squares, of ln(predicted / measured).

    huber_delta: None = 1.345 robust s.d.; whiten by trunk: None = where huber_delta is None. Raises UserError.
    """

    kind: str = "huber_log"
    huber_delta: float | None = None
    whiten: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("huber_log", "log_squares"):
            raise UserError(f"loss={self.kind!r} is unknown; choose huber_log or log_squares")
        if self.huber_delta is not None and not self.huber_delta > 0:
            raise UserError(f"huber_delta={self.huber_delta!r} is not positive; give a number such as 1e-3, or None")

    @property
    def whitens(self) -> bool:
        return (self.huber_delta is None) if self.whiten is None else self.whiten


@dataclass(frozen=True)
class Solved:
    """A point fit: theta [P], its loss, and the noise it leaves."""

    theta: np.ndarray
    objective: float
    delta: float
    groups: Groups  # whitening included
    trunk_sd: float
    row_sd: float
    dof: float  # between-trunk degrees of freedom, nu
    converged: bool
    spread: float  # largest relative excess of the objective over the starts
    num_starts: int  # polished; those that reached one objective in the first pass went on as one


def robust_sd(residual: np.ndarray, num_free: int) -> float:
    """Median absolute residual / .6745, inflated for the fitted parameters."""
    n = len(residual)
    return float(np.median(np.abs(residual)) / 0.6745 * np.sqrt(n / max(n - num_free, 1)))


def solve(rows: Rows, loss: Loss = Loss()) -> Solved:
    """Fit one data set: grid starts, polish, then variance components by trunk and one whitened refit.

    huber_delta=None takes 1.345 x the robust s.d. of the unwhitened residuals, in two passes.
    """
    form, log_y, plain, starts = rows.form, np.log(rows.y), Groups.plain(rows.trunk), _starts(rows)
    huber = loss.kind == "huber_log"
    from_data = huber and loss.huber_delta is None
    delta = float(loss.huber_delta) if huber and loss.huber_delta is not None else np.inf

    def refit(theta: np.ndarray, groups: Groups, delta: float) -> Polished:
        return polish(Objective(form, rows.u, log_y, groups, delta), theta, POINT_TOLERANCE).best_first()

    done = _distinct(refit(starts, plain, delta))
    for _ in range(2 if from_data else 0):
        residual = form.evaluate(done.theta[:1], rows.u)[0][0] - log_y
        delta = max(HUBER * robust_sd(residual, starts.shape[1]), 1e-12)
        done = refit(done.theta, plain, delta)
    found = components(rows, done.theta[0])
    groups = Groups(rows.trunk, found.kappa) if loss.whitens else plain
    if groups.kappa.any():
        done = refit(done.theta, groups, delta)
    best = float(done.objective[0])
    return Solved(
        done.theta[0],
        best,
        delta,
        groups,
        found.trunk_sd,
        found.row_sd,
        found.dof,
        bool(done.converged[0]),
        float((done.objective[-1] - best) / max(best, 1e-20)),
        len(starts),
    )


def _starts(rows: Rows) -> np.ndarray:
    """Starting points: those of the form; with many rows, their polish on whole trunks of START_ROWS of them."""
    form = rows.form
    if len(rows.y) <= START_ROWS:
        return form.starts(rows.u, rows.y)
    size = np.bincount(rows.trunk)
    trunk = np.random.default_rng(0).permutation(len(size))
    taken = trunk[: max(1, int(np.searchsorted(np.cumsum(size[trunk]), START_ROWS)))]
    some = np.flatnonzero(np.isin(rows.trunk, taken))
    groups = Groups.plain(np.unique(rows.trunk[some], return_inverse=True)[1].ravel())
    u, y = rows.u[:, some], rows.y[some]
    return _distinct(polish(Objective(form, u, np.log(y), groups), form.starts(u, y)).best_first()).theta


def _distinct(done: Polished) -> Polished:
    """Of fits ordered by their objective the first of each that differs by 1e-6."""
    return done.take(np.append(True, np.diff(done.objective) > 1e-6 * np.maximum(done.objective[1:], 1e-20)))


def free_columns(form: Any, theta: np.ndarray, jac: np.ndarray) -> np.ndarray:
    """Parameters that move the fit: off their bounds and with a column that is not zero. theta [P], jac [P, n]."""
    low, high = form.bounds
    size = np.linalg.norm(jac, axis=1)
    return (theta > low) & (theta < high) & (size > 1e-9 * size.max())


@dataclass(frozen=True)
class Components:
    """Trunk and row s.d. of the log error, between-trunk degrees of freedom, and whitening kappa [G]."""

    trunk_sd: float
    row_sd: float
    dof: float
    kappa: np.ndarray


def components(rows: Rows, theta: np.ndarray) -> Components:
    """Variance components of the residuals of theta [P].

    Residuals are r = M e with M = I - QQ' (Q spans the free Jacobian columns) and e = Z u + v. With P the projector on
    trunk means, E[r'Pr] and E[r'(I-P)r] are linear in the two variances: two equations, corrected for the fitted
    parameters. Residuals are winsorised at 2.5 robust s.d. so that two bad rows do not pass for noise.
    """
    value, jac = rows.form.evaluate(theta[None], rows.u)
    residual, columns = value[0] - np.log(rows.y), jac[0][free_columns(rows.form, theta, jac[0])]
    q = np.linalg.qr((columns / np.linalg.norm(columns, axis=1, keepdims=True)).T)[0].T  # [p, n]
    limit = 2.5 * robust_sd(residual, len(columns))
    residual = np.clip(residual, -limit, limit) if limit > 0 else residual
    sums, size = group_sums(rows.trunk), np.bincount(rows.trunk).astype(float)  # Z holds each trunk's rows as a column
    qz = sums(q)  # Q'Z [p, G]
    qb = qz / np.sqrt(size)  # P = B B' with B = Z / sqrt(size)
    inner = qb @ qb.T
    dof = len(size) - float(np.trace(inner))  # of M P M
    total = float(residual @ residual)
    rp = float((sums(residual) ** 2 / size).sum())
    # traces of M P M and M (I - P) M against ZZ' and I
    tz = float(size.sum() - (qz**2).sum())
    pz = float(size.sum() - 2 * (np.sqrt(size) * (qb * qz).sum(0)).sum() + ((qz @ qz.T) * inner).sum())
    pv, tv = dof, float(max(len(rows.y) - len(q), 1))
    system = np.array([[pz, pv], [tz - pz, tv - pv]])
    trunk_var = row_var = -1.0
    if (size > 1).any() and np.linalg.cond(system) < 1e8:
        trunk_var, row_var = np.linalg.solve(system, [rp, total - rp])
    if trunk_var <= 0:
        trunk_var, row_var = 0.0, total / tv
    row_var = max(row_var, 1e-3 * trunk_var)  # a finite kappa where the branches of a trunk agree to the digit
    kappa = 1 - np.sqrt(row_var / (row_var + size * trunk_var)) if trunk_var > 0 else np.zeros(len(size))
    return Components(float(np.sqrt(trunk_var)), float(np.sqrt(max(row_var, 0.0))), max(dof, 1.0), kappa)
