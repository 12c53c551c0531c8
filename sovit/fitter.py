"""Robust, whitened, bounded least squares on log loss: a projected Levenberg-Marquardt, batched over replicates.

Numpy only. The residual of row i is r_i = ln f_i - ln y_i; rows of one trunk share an error (same data order, same
initialisation), so residuals can be whitened by trunk before the loss. Axis order: replicate, parameter, row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POINT_TOLERANCE, DRAW_TOLERANCE = 1e-10, 1e-9  # 1e-6 leaves up to 17 % of sovit replicates above their optimum
HUBER = 1.345  # 95 % efficiency on Gaussian noise
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

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """x [..., n] less kappa times its trunk mean; turns a trunk effect plus a row error into a white error.

        With a scale: the scaled x less kappa times its part along the trunk's scaled ones.
        """
        if self.scale is not None:
            x = x * self.scale
        if not self.kappa.any():
            return x
        member = members(self.index, self.scale)
        return x - (x @ (member / (member**2).sum(0) * self.kappa)) @ member.T


def members(index: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """Indicator [n, G] of the trunk of each row, times the row's scale."""
    member = (index[:, None] == np.arange(int(index.max()) + 1)).astype(float)
    return member if scale is None else member * scale[:, None]


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
    damping beyond 1e10. Replicates are worked on in chunks small enough for the cache. Returns Polished.
    """
    num, n = len(theta), u.shape[1]
    log_y = np.broadcast_to(log_y, (num, n))
    weights = np.broadcast_to(1.0 if weights is None else weights, (num, n))
    size = max(8, min(512, 400_000 // (theta.shape[1] * n)))
    parts = [
        _polish_chunk(
            form, u, theta[i : i + size], log_y[i : i + size], weights[i : i + size], groups, delta, tolerance, cap
        )
        for i in range(0, num, size)
    ]
    return Polished(*(np.concatenate(column) for column in zip(*parts)))


def _polish_chunk(form, u, theta, log_y, weights, groups, delta, tolerance, cap):
    low, high = form.bounds
    theta = np.clip(theta, low, high)
    out = theta.copy(), np.empty(len(theta)), np.full(len(theta), cap), np.zeros(len(theta), bool)

    def measure(theta, log_y, weights):
        value, jac = form.evaluate(theta, u)
        residual = groups.whiten(value - log_y)
        return residual, groups.whiten(jac), (weights * loss_of(residual, delta)).sum(1)

    residual, jac, objective = measure(theta, log_y, weights)
    live = np.arange(len(theta))
    damping, calm = np.full(len(theta), 1e-3), np.zeros(len(theta), int)
    scale = np.zeros_like(theta)
    diagonal = np.arange(theta.shape[1])
    for iteration in range(cap):
        w = weights
        if np.isfinite(delta):
            w = weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        weighted = jac * w[:, None]
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        hessian = weighted @ jac.transpose(0, 2, 1)
        diag = hessian[:, diagonal, diagonal]
        scale = np.maximum(diag, 0.5 * scale)
        # a parameter on its bound whose descent direction points outwards sits still in this step
        frozen = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
        hessian[frozen] = 0
        hessian.transpose(0, 2, 1)[frozen] = 0
        damped = damping[:, None] * (scale + 1e-14 * diag.max(1, keepdims=True)) + 1e-300
        hessian[:, diagonal, diagonal] += np.where(frozen, 1.0, damped)
        step = np.linalg.solve(hessian, np.where(frozen, 0, -gradient)[:, :, None])[:, :, 0]
        trial = np.clip(theta + step, low, high)
        new_residual, new_jac, new_objective = measure(trial, log_y, weights)
        accept = new_objective <= objective  # False for nan
        gain = objective - new_objective
        calm = np.where(accept, np.where(gain < tolerance * objective, calm + 1, 0), calm)
        damping = np.clip(np.where(accept, damping * 0.2, damping * 5), 1e-15, None)
        theta = np.where(accept[:, None], trial, theta)
        objective = np.where(accept, new_objective, objective)
        residual = np.where(accept[:, None], new_residual, residual)
        jac = np.where(accept[:, None, None], new_jac, jac)
        done = (calm >= 2) | (damping > 1e10) | (objective < 1e-24)
        if done.any() or iteration == cap - 1:
            stop = done | (iteration == cap - 1)
            at = live[stop]
            out[0][at], out[1][at], out[2][at], out[3][at] = theta[stop], objective[stop], iteration + 1, done[stop]
            keep = ~stop
            live, theta, objective, residual, jac = live[keep], theta[keep], objective[keep], residual[keep], jac[keep]
            log_y, weights, damping, calm, scale = log_y[keep], weights[keep], damping[keep], calm[keep], scale[keep]
            if not len(live):
                break
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
    starts = form.starts(u, y) if starts is None else starts
    from_data = loss == "huber_log" and huber_delta is None
    delta = float(huber_delta) if loss == "huber_log" and huber_delta is not None else np.inf

    def refit(theta, groups, delta):
        return polish(form, u, theta, log_y, groups=groups, delta=delta, tolerance=POINT_TOLERANCE)

    done = refit(starts, plain, delta)
    order = np.argsort(done.objective, kind="stable")
    theta = done.theta[order]
    for _ in range(2 if from_data else 0):
        residual = form.evaluate(theta[:1], u)[0][0] - log_y
        delta = max(HUBER * robust_sd(residual, theta.shape[1]), 1e-12)
        done = refit(theta, plain, delta)
        order = np.argsort(done.objective, kind="stable")
        theta = done.theta[order]
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
            theta = done.theta[order]
    objective = done.objective[order]
    excess = (objective - objective[0]) / max(objective[0], 1e-20)
    return Solved(
        theta[0],
        float(objective[0]),
        delta,
        groups,
        trunk_sd,
        row_sd,
        dof,
        int(done.iterations[order[0]]),
        bool(done.converged[order[0]]),
        float(excess.max()),
        float((excess < 1e-6).mean()),
        theta,
        known_sd,
    )


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
    n = len(log_y)
    weight = np.ones(n) if scale is None else scale
    value, jac = form.evaluate(theta[None], u)
    residual, jac = (value[0] - log_y) * weight, jac[0] * weight
    columns = jac[free_columns(form, theta, jac)]
    q = np.linalg.qr((columns / np.linalg.norm(columns, axis=1, keepdims=True)).T)[0]
    maker = np.eye(n) - q @ q.T
    if known_sd is not None:  # of whatever fit it is, weighted or not, M e is what its residuals hold of the error
        residual = maker @ residual
    limit = 2.5 * robust_sd(residual, len(columns))
    if limit > 0:
        residual = np.clip(residual, -limit, limit)
    member = members(index, scale)
    size = (member**2).sum(0)
    between = member / np.sqrt(size)  # P = between between'
    mb, mz = maker @ between, maker @ member
    dof = float((mb * (between - q @ (q.T @ between))).sum())
    left = max(n - len(columns), 1)
    total = float(residual @ residual)
    rp = float(((between.T @ residual) ** 2).sum())
    # traces of M P M and M (I - P) M against ZZ' and I
    pz, tz = float(((between.T @ mz) ** 2).sum()), float((mz**2).sum())
    pv, tv = dof, float(left)
    if known_sd is not None:
        pv, tv = (float(((weight[:, None] * m) ** 2).sum()) for m in (mb, maker))
        known_p, known_t = (float((((weight * known_sd)[:, None] * m) ** 2).sum()) for m in (mb, maker))
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
    kappa = 1 - 1 / np.sqrt(1 + trunk_var * (members(index) / own[:, None]).sum(0))
    scale = np.sqrt(1 / own / (1 / own).mean())
    return float(np.sqrt(trunk_var)), float(np.sqrt(row_var)), max(dof, 1.0), kappa, scale
