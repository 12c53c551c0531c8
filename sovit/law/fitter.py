"""Robust, whitened, bounded least squares on log loss: a projected Levenberg-Marquardt, batched over replicates.

Numpy only. The residual of row i is r_i = ln f_i - ln y_i; rows of one trunk share an error (same data order, same
initialisation), so residuals can be whitened by trunk before the loss. Axis order: replicate, parameter, row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

POINT_TOLERANCE, DRAW_TOLERANCE = 1e-10, 1e-9  # 1e-6 leaves up to 17 % of sovit replicates above their optimum
HUBER = 1.345  # 95 % efficiency on Gaussian noise
CACHED = 100_000  # numbers of the Jacobian that are worked on at once
DENSE_ROWS = 200  # rows up to which whitening is a matrix product
START_ROWS = 2_000  # starts are sought among whole trunks of about so many rows
REWEIGHTED = 3  # passes over components and weights where part of the noise is known


@dataclass(frozen=True)
class Groups:
    """Which trunk each row belongs to, and how much of the trunk mean whitening takes off (kappa, one a trunk).

    scale: factor of each row's residual, where rows are known to be unequally noisy; its square is 1 on average.
    """

    index: np.ndarray  # [n], 0..G-1
    kappa: np.ndarray  # [G], 0 = unwhitened
    scale: np.ndarray | None = None  # [n]

    @staticmethod
    def plain(index: np.ndarray) -> Groups:
        return Groups(index, np.zeros(int(index.max()) + 1))

    @cached_property
    def _sums(self) -> Callable[[np.ndarray], np.ndarray]:
        return group_sums(self.index)

    @cached_property
    def _size(self) -> np.ndarray:
        """Sum over the rows of each trunk of their squared scale, [G]."""
        return self._sums(np.ones(len(self.index)) if self.scale is None else self.scale**2)

    @cached_property
    def _matrix(self) -> np.ndarray:
        """Whitening as one matrix [n, n]; of few rows that is the fastest."""
        return self._subtract(np.eye(len(self.index)) if self.scale is None else np.diag(self.scale))

    def _subtract(self, x: np.ndarray) -> np.ndarray:
        own = x if self.scale is None else x * self.scale
        part = (self._sums(own) * (self.kappa / self._size))[..., self.index]
        return x - (part if self.scale is None else part * self.scale)

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """x [..., n] less kappa times its trunk mean; turns a trunk effect plus a row error into a white error.

        With a scale: the scaled x less kappa times its part along the trunk's scaled ones.
        """
        if not self.kappa.any():
            return x if self.scale is None else x * self.scale
        if len(self.index) > DENSE_ROWS:
            return self._subtract(x if self.scale is None else x * self.scale)
        return (x.reshape(-1, x.shape[-1]) @ self._matrix).reshape(x.shape)


def group_sums(index: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """x [..., n] -> its sums over the rows of each group [..., G]; index [n] holds each of 0..G-1."""
    order = np.argsort(index, kind="stable")
    first = np.concatenate([[0], np.flatnonzero(np.diff(index[order])) + 1])
    if (order[1:] > order[:-1]).all():
        return lambda x: np.add.reduceat(x, first, -1)
    return lambda x: np.add.reduceat(x[..., order], first, -1)


@dataclass(frozen=True)
class Polished:
    theta: np.ndarray  # [R, P]
    objective: np.ndarray  # [R], sum over rows of the loss
    iterations: np.ndarray  # [R]
    converged: np.ndarray  # [R]


def loss_of(residual: np.ndarray, delta: float) -> np.ndarray:
    """Huber loss, r^2/2 inside delta (delta = inf: squares), element by element."""
    size = np.abs(residual)
    if np.isinf(delta):
        return 0.5 * residual**2
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def polish(form, u, theta, log_y, *, weights=None, groups: Groups, delta=np.inf, tolerance=DRAW_TOLERANCE, cap=800):
    """Minimise sum_i w_i rho(whitened residual_i) from each row of theta [R, P]; log_y, weights [R, n] or [n].

    Converged = two accepted steps in a row, each lowering the objective by less than `tolerance` of itself, or a
    damping beyond 1e10. A form may say how a step is taken (`advance`: theta, step -> theta, equal to theta + step for
    small ones). As many replicates as the cache holds are worked on at once; one that is done makes room for the next.
    Returns Polished.
    """
    num, n = len(theta), u.shape[1]
    low, high = form.bounds
    advance = getattr(form, "advance", np.add)
    theta = np.clip(theta, low, high)
    log_y = np.broadcast_to(log_y, (num, n))
    weights = None if weights is None else np.broadcast_to(weights, (num, n))
    size = max(1, min(512, CACHED // (theta.shape[1] * n)))
    diagonal = np.arange(theta.shape[1])
    out = Polished(theta.copy(), np.empty(num), np.full(num, cap), np.zeros(num, bool))

    def measure(theta, rows):
        """Objective [R], gradient [R, P] and Gauss-Newton Hessian [R, P, P] of replicates `rows`."""
        value, jac = form.evaluate(theta, u)
        residual, jac = groups.whiten(value - log_y[rows]), groups.whiten(jac)
        loss = loss_of(residual, delta)
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300)) if np.isfinite(delta) else None
        if weights is not None:
            loss = loss * weights[rows]
            weight = weights[rows] if weight is None else weight * weights[rows]
        weighted = jac if weight is None else jac * weight[:, None]
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        return loss.sum(1), gradient, weighted @ jac.transpose(0, 2, 1)

    def enter(rows):
        start = theta[rows]
        fresh = np.full(len(rows), 1e-3), np.zeros(len(rows), int), np.zeros(len(rows), int), np.zeros_like(start)
        return rows, start, *measure(start, rows), *fresh

    state, entered = enter(np.arange(min(size, num))), min(size, num)
    while len(state[0]):
        live, at, objective, gradient, hessian, damping, calm, age, scale = state
        diag = hessian[:, diagonal, diagonal]
        scale = np.maximum(diag, 0.5 * scale)
        # a parameter on its bound whose descent direction points outwards sits still in this step
        frozen = ((at <= low) & (gradient > 0)) | ((at >= high) & (gradient < 0))
        descent = np.where(frozen, 0.0, -gradient)
        system = np.where(frozen[:, :, None] | frozen[:, None, :], 0.0, hessian)
        damped = damping[:, None] * (scale + 1e-14 * diag.max(1, keepdims=True)) + 1e-300
        system[:, diagonal, diagonal] += np.where(frozen, 1.0, damped)
        step = np.linalg.solve(system, descent[:, :, None])[:, :, 0]
        trial = np.clip(advance(at, step), low, high)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a loss of 0 is tried, and refused
            new = measure(trial, live)
        accept = new[0] <= objective  # False for nan
        gain = objective - new[0]
        calm = np.where(accept, np.where(gain < tolerance * objective, calm + 1, 0), calm)
        # Nielsen's rule: the damping falls as far as the quadratic model foretold the gain
        foretold = (step * (descent - 0.5 * (hessian @ step[:, :, None])[:, :, 0])).sum(1)
        ratio = gain / np.maximum(foretold, 1e-300)
        damping = np.clip(damping * np.where(accept, np.clip(1 - (2 * ratio - 1) ** 3, 0.1, 2.0), 5.0), 1e-15, None)
        at = np.where(accept[:, None], trial, at)
        objective = np.where(accept, new[0], objective)
        gradient = np.where(accept[:, None], new[1], gradient)
        hessian = np.where(accept[:, None, None], new[2], hessian)
        age = age + 1
        state = live, at, objective, gradient, hessian, damping, calm, age, scale
        done = (calm >= 2) | (damping > 1e10) | (objective < 1e-24)
        stop = done | (age >= cap)
        if stop.any():
            rows = live[stop]
            out.theta[rows], out.objective[rows], out.converged[rows] = at[stop], objective[stop], done[stop]
            out.iterations[rows] = age[stop]
            state = tuple(part[~stop] for part in state)
        if entered < num and len(state[0]) <= 0.75 * size:
            more = enter(np.arange(entered, min(entered + size - len(state[0]), num)))
            entered += len(more[0])
            state = tuple(np.concatenate(pair) for pair in zip(state, more))
    return out


@dataclass(frozen=True)
class Solved:
    """A point fit: theta [P], its loss, and the noise it leaves; known_sd [n] is the part of a row's that was given."""

    theta: np.ndarray
    objective: float
    delta: float
    groups: Groups  # whitening included
    trunk_sd: float
    row_sd: float
    dof: float  # between-trunk degrees of freedom, nu
    iterations: int
    converged: bool
    spread: float  # largest relative excess of the objective over the starts
    agreeing: float  # share of the starts that reached the best objective to 1e-6
    starts: np.ndarray  # polished starts, best first
    num_starts: int  # polished; those that reached one objective in the first pass went on as one
    known_sd: np.ndarray | None = None


def robust_sd(residual: np.ndarray, num_free: int) -> float:
    """Median absolute residual / .6745, inflated for the fitted parameters."""
    n = len(residual)
    return float(np.median(np.abs(residual)) / 0.6745 * np.sqrt(n / max(n - num_free, 1)))


def solve(form, u, y, index, *, loss="huber_log", huber_delta=None, whiten=True, starts=None, known_sd=None) -> Solved:
    """Fit one data set: grid starts, polish, then (whiten=True) variance components by trunk and one whitened refit.

    huber_delta=None takes 1.345 x the robust s.d. of the unwhitened residuals, in two passes.
    known_sd [n]: s.d. of a part of each row's log error that was measured apart. Rows then weigh by 1 / (row_sd^2 +
    known_sd^2) within what trunks share; components, weights and fit are iterated REWEIGHTED times.
    """
    log_y, plain = np.log(y), Groups.plain(index)
    starts = _starts(form, u, y, index) if starts is None else starts
    from_data = loss == "huber_log" and huber_delta is None
    delta = float(huber_delta) if loss == "huber_log" and huber_delta is not None else np.inf

    def refit(theta, groups, delta):
        return polish(form, u, theta, log_y, groups=groups, delta=delta, tolerance=POINT_TOLERANCE)

    done = refit(starts, plain, delta)
    order = np.argsort(done.objective, kind="stable")
    theta, objective, share = _distinct(done.theta[order], done.objective[order])
    for _ in range(2 if from_data else 0):
        residual = form.evaluate(theta[:1], u)[0][0] - log_y
        delta = max(HUBER * robust_sd(residual, theta.shape[1]), 1e-12)
        done = refit(theta, plain, delta)
        order = np.argsort(done.objective, kind="stable")
        theta, objective, share = done.theta[order], done.objective[order], share[order]
    groups = plain
    for _ in range(1 if known_sd is None else REWEIGHTED):
        trunk_sd, row_sd, dof, kappa, scale = components(form, u, theta[0], log_y, index, known_sd, groups.scale)
        groups = Groups(index, kappa, scale) if whiten else plain
        if scale is not None and from_data:
            residual = (form.evaluate(theta[:1], u)[0][0] - log_y) * scale
            delta = max(HUBER * robust_sd(residual, theta.shape[1]), 1e-12)
        if whiten and (kappa.any() or scale is not None):
            done = refit(theta, groups, delta)
            order = np.argsort(done.objective, kind="stable")
            theta, objective, share = done.theta[order], done.objective[order], share[order]
    excess = (objective - objective[0]) / max(objective[0], 1e-20)
    best = int(np.argmin(done.objective))
    return Solved(
        theta[0],
        float(objective[0]),
        delta,
        groups,
        trunk_sd,
        row_sd,
        dof,
        int(done.iterations[best]),
        bool(done.converged[best]),
        float(excess.max()),
        float(share[excess < 1e-6].sum()),
        theta,
        len(starts),
        known_sd,
    )


def _starts(form, u, y, index) -> np.ndarray:
    """Starting points: those of the form; with many rows, their polish on whole trunks of START_ROWS of them."""
    if len(y) <= START_ROWS:
        return form.starts(u, y)
    size = np.bincount(index)
    trunk = np.random.default_rng(0).permutation(len(size))
    taken = trunk[: max(1, int(np.searchsorted(np.cumsum(size[trunk]), START_ROWS)))]
    rows = np.flatnonzero(np.isin(index, taken))
    some = np.unique(index[rows], return_inverse=True)[1].ravel()
    done = polish(form, u[:, rows], form.starts(u[:, rows], y[rows]), np.log(y[rows]), groups=Groups.plain(some))
    order = np.argsort(done.objective, kind="stable")
    return _distinct(done.theta[order], done.objective[order])[0]


def _distinct(theta: np.ndarray, objective: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of fits ordered by their objective the first of each that differs by 1e-6: theta, objective, share of the fits."""
    first = np.ones(len(theta), bool)
    first[1:] = np.diff(objective) > 1e-6 * np.maximum(objective[1:], 1e-20)
    return theta[first], objective[first], np.bincount(np.cumsum(first) - 1) / len(theta)


def free_columns(form, theta: np.ndarray, jac: np.ndarray) -> np.ndarray:
    """Parameters that move the fit: off their bounds and with a column that is not zero. theta [P], jac [P, n]."""
    low, high = form.bounds
    size = np.linalg.norm(jac, axis=1)
    return (theta > low) & (theta < high) & (size > 1e-9 * size.max())


def components(form, u, theta, log_y, index, known_sd=None, scale=None):
    """Trunk and row s.d. of the log error, between-trunk degrees of freedom, whitening kappa [G] and scale [n] or None.

    Residuals are r = M e with M = I - QQ' (Q spans the free Jacobian columns) and e = Z u + v. With P the projector on
    trunk means, E[r'Pr] and E[r'(I-P)r] are linear in the two variances: two equations, corrected for the fitted
    parameters. Residuals are winsorised at 2.5 robust s.d. so that two bad rows do not pass for noise.
    known_sd [n] is a further independent error of known size: its share of both expectations is taken off, and the new
    scale weighs rows by what is left and known together. `scale` [n] weighs the residuals from which this is read.
    """
    n, sums = len(log_y), group_sums(index)
    weight = np.ones(n) if scale is None else scale
    value, jac = form.evaluate(theta[None], u)
    residual, jac = (value[0] - log_y) * weight, jac[0] * weight
    columns = jac[free_columns(form, theta, jac)]
    q = np.linalg.qr((columns / np.linalg.norm(columns, axis=1, keepdims=True)).T)[0].T  # [p, n]
    if known_sd is not None:  # of whatever fit it is, weighted or not, M e is what its residuals hold of the error
        residual = residual - q.T @ (q @ residual)
    limit = 2.5 * robust_sd(residual, len(columns))
    if limit > 0:
        residual = np.clip(residual, -limit, limit)
    size = sums(weight**2)  # Z holds each trunk's weights as a column, P = B B' with B = Z / sqrt(size)
    qz = sums(q * weight)  # Q'Z [p, G]
    qb = qz / np.sqrt(size)
    inner = qb @ qb.T
    dof = len(size) - float(np.trace(inner))  # of M P M
    left = max(n - len(columns), 1)
    total = float(residual @ residual)
    rp = float((sums(residual * weight) ** 2 / size).sum())
    # traces of M P M and M (I - P) M against ZZ' and I
    tz = float(size.sum() - (qz**2).sum())
    pz = float(size.sum() - 2 * (np.sqrt(size) * (qb * qz).sum(0)).sum() + ((qz @ qz.T) * inner).sum())
    pv, tv = dof, float(left)
    if known_sd is not None:

        def against(variance):
            """The same traces against a diagonal covariance [n]."""
            held = (weight / np.sqrt(size)[index]) ** 2
            crossed = (weight / np.sqrt(size)[index]) * (q * qb[:, index]).sum(0)
            both = (q * (inner @ q)).sum(0)
            return float(variance @ (held - 2 * crossed + both)), float(variance @ (1 - (q**2).sum(0)))

        pv, tv = against(weight**2)
        known_p, known_t = against((weight * known_sd) ** 2)
        rp, total = rp - known_p, total - known_t
    system = np.array([[pz, pv], [tz - pz, tv - pv]])
    trunk_var = row_var = -1.0
    if (np.bincount(index) > 1).any() and np.linalg.cond(system) < 1e8:
        trunk_var, row_var = np.linalg.solve(system, [rp, total - rp])
    if trunk_var <= 0:
        trunk_var, row_var = 0.0, total / tv
    elif row_var < 0 and known_sd is not None:  # the known part is all that rows of a trunk differ by
        trunk_var = max(total / tz, 0.0)
    row_var = max(row_var, 1e-3 * trunk_var)  # a finite kappa where the branches of a trunk agree to the digit
    if known_sd is None:
        kappa = 1 - np.sqrt(row_var / (row_var + size * trunk_var)) if trunk_var > 0 else np.zeros(len(size))
        return float(np.sqrt(trunk_var)), float(np.sqrt(row_var)), max(dof, 1.0), kappa, None
    row_var = max(row_var, 0.0)
    own = row_var + known_sd**2
    own = np.maximum(own, 1e-3 * (own.mean() + trunk_var))  # no row outweighs a thousand
    kappa = 1 - 1 / np.sqrt(1 + trunk_var * sums(1 / own))
    scale = np.sqrt(1 / own / (1 / own).mean())
    return float(np.sqrt(trunk_var)), float(np.sqrt(row_var)), max(dof, 1.0), kappa, scale
