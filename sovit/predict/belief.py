"""What rows say of a law, as a posterior over its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.compute_optimum import curvature, loss_along_budget
from sovit.law.design_matrix import check, geometry_of, positive, trunks, varied_dims
from sovit.law.exponents import box, optimum_of
from sovit.law.fitted_law import Fit
from sovit.law.fitter import HUBER, Groups, polish
from sovit.law.form import DATA_COLUMNS, Form
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.predict.candidates import Candidate
from sovit.spec.shape import DIMENSIONS

FORM = "joint_n" if "joint_n" in LAWS else "joint"


DISCREPANCY = 0.01  # per log unit of shape; .003 helps little, .03 wastes compute where the form is right


DISCREPANCY_DOF = 4.0  # shapes that it is worth against what the residuals say; inf = held as it is


# prior of ln(parameter): centre and s.d. Exponents within a factor 4, amplitudes (in mean losses) within a factor 20
SIZE_EXPONENT, DATA_EXPONENT, EXPONENT_SD = 1.0, 0.5, 0.7


AMPLITUDE, AMPLITUDE_SD = 0.1, 1.5


POWER, POWER_SD = 1.5, 0.4  # of a power mean


LEAST = 1e-5  # amplitude in mean losses that counts as none


NOISE_SD, NOISE_DOF = 0.005, 4.0  # expected s.d. of ln loss (.3-.5 % in published sweeps), worth so many trunks


EM_STEPS = 5


TRUE = 3.0  # noise s.d. by which a check may miss and still have come true


MAX_ROWS = 4000


@dataclass(frozen=True)
class Belief:
    """What the rows say of the optimum at a target. phi = ln theta of the form, P of them; K dimensions; n rows."""

    form: Form
    dims: tuple[str, ...]
    centre: np.ndarray  # [terms]
    geometry: Geometry
    log_budget: float  # ln of forward FLOPs (head included) x images at the target
    phi: np.ndarray  # [P]
    covariance: np.ndarray  # [P, P]
    target: np.ndarray  # [K], ln x of the recommended shape
    hessian: np.ndarray  # [K, K] of ln loss there, along the budget
    mixed: np.ndarray  # [K, P], M
    reachable: tuple[np.ndarray, np.ndarray]  # [K] each: ln of the smallest and largest values that can be trained
    trunk_sd: float
    row_sd: float
    discrepancy: float  # s.d. per log unit of shape
    logs: np.ndarray  # [terms, n] of the rows
    jac: np.ndarray  # [P, n], d ln loss / d phi
    trunk: tuple[str, ...]  # [n]

    @property
    def theta(self) -> np.ndarray:
        return np.exp(self.phi)

    @property
    def weight(self) -> np.ndarray:
        """K = 1/2 M' H^-1 M [P, P]: expected regret = tr(K covariance)."""
        return 0.5 * self.mixed.T @ np.linalg.solve(self.hessian, self.mixed)

    @property
    def expected_regret(self) -> float:
        return float((self.weight * self.covariance).sum())

    @property
    def shape(self) -> dict[str, float]:
        """The real-valued optimum at the target, by dimension."""
        return dict(zip(self.dims, np.exp(self.target).tolist()))

    def shape_at(self, train_flops: float) -> dict[str, float]:
        """The real-valued optimum at another budget, by dimension."""
        limits = {d: np.exp([low, high]) for d, low, high in zip(self.dims, *self.reachable)}
        v = _optimum(self.form, self.centre, self.phi, self.geometry, limits, float(np.log(train_flops / 3)))
        return dict(zip(self.dims, np.exp(v).tolist()))

    @property
    def log_sd(self) -> np.ndarray:
        """S.d. of ln x of each optimal dimension [K]."""
        return _spread(self.hessian, self.mixed, self.covariance)

    def form_variance(self, logs: np.ndarray) -> np.ndarray:
        """Variance of ln loss [n] by which the form may be wrong about shapes logs [>= K, n], seen from the target."""
        return (self.discrepancy * _distance_to(logs[: len(self.dims)], self.target, self.reachable)) ** 2


@dataclass(frozen=True)
class _Posterior:
    """A form in ln theta with its rows whitened and its prior appended as rows: least squares on it is the MAP."""

    form: Form
    whitener: np.ndarray  # [n, n]
    prior: np.ndarray  # [2, P]: centre and s.d. of phi

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.form.bounds
        least = np.exp(self.prior[0]) * LEAST / AMPLITUDE
        return np.log(np.maximum(low, least)), np.log(np.minimum(high, 1e12 * least))

    def evaluate(self, phi: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """u [terms, n + P]: its last P columns only make room for the prior."""
        value, jac = self.form.evaluate(np.exp(phi), u[:, : len(self.whitener)])
        jac = jac * np.exp(phi)[:, :, None]
        centre, sd = self.prior
        own = np.broadcast_to(np.diag(1 / sd), (len(phi), len(sd), len(sd)))
        rows = np.concatenate([value @ self.whitener.T, (phi - centre) / sd], 1)
        return rows, np.concatenate([jac @ self.whitener.T, own], 2)


def learn(
    columns: Mapping,
    y,
    train_flops: float,
    *,
    clusters=None,
    form: str = FORM,
    dims: Sequence[str] | None = None,
    geometry: Mapping | None = None,
    discrepancy: float = DISCREPANCY,
    reachable: Mapping[str, Sequence[float]] | None = None,
    discrepancy_dof: float = DISCREPANCY_DOF,
    noise: tuple[float, float] | None = None,
    previous: Belief | None = None,
    zero_line: float | None = None,
) -> Belief:
    """Fit the rows, however few, with a weak prior, and locate the optimum at the target of `train_flops`.

    columns, y, clusters, dims, geometry: as in `law.fit`. reachable: dimension -> values that can be trained (None = the
    values run); noise: (trunk, row) s.d. of ln loss, None = estimated, shrunk towards .5 % while trunks are few;
    discrepancy: what the form is expected to be wrong by, estimated too, worth `discrepancy_dof` shapes; previous: the
    belief before the latest rows, to start from. Raises UserError.
    """
    known = [n for n, law in LAWS.items() if law.ranks_shapes and (law.plain_sum or law.power_mean)]
    if form not in known:
        raise UserError(f"form={form!r} cannot choose runs; choose one of {', '.join(known)}")
    if not (np.isfinite(train_flops) and train_flops > 0):
        raise UserError(f"train_flops={train_flops!r} is not a positive number; give FLOPs, such as 1e15")
    if not (np.isfinite(discrepancy) and discrepancy >= 0):
        raise UserError(f"discrepancy={discrepancy!r} is not an s.d. per log unit; give 0 or more, such as .01")
    table, y = check(form, columns, y, clusters, None, zero_line)
    if len(y) > MAX_ROWS:
        raise UserError(
            f"{len(y)} rows are too many to weigh a next run; give at most {MAX_ROWS}, those near the target"
        )
    dims = varied_dims(table, dims)
    counted = geometry_of(table, geometry)
    if counted is None:
        raise UserError("the rows do not say patch_size and image_size; give them with geometry={'patch_size': ...}")
    built = LAWS[form].build(dims, zero_line)
    logs = np.log(np.stack([positive(table, name) for name in built.terms]))
    index = trunks(table, clusters, len(y))
    log_y, log_budget = np.log(y), float(np.log(train_flops / 3))
    limits = {d: tuple((reachable or {}).get(d, ())) or tuple(np.unique(positive(table, d)).tolist()) for d in dims}
    ends = np.array([[min(v), max(v)] for v in limits.values()], float)
    edges = np.log(ends[:, 0]), np.log(ends[:, 1])
    before = previous if previous is not None and (previous.dims, previous.form) == (dims, built) else None
    centre = before.centre if before else logs.mean(1)
    u = logs - centre[:, None]
    prior = _prior(built, float(np.exp(log_y.mean())))
    expected = [(NOISE_SD / 2**0.5, NOISE_DOF)] * 2 if noise is None else [(sd, np.inf) for sd in noise]
    expected += [(discrepancy, discrepancy_dof if discrepancy else np.inf)]
    sds = (before.trunk_sd, before.row_sd, before.discrepancy) if before else tuple(sd for sd, _ in expected)
    if before:
        starts = np.stack([before.phi, prior[0]])
        distance = _distance_to(logs[: len(dims)], before.target, edges)
    else:
        starts = np.log(np.maximum(built.starts(u, y), LEAST * np.exp(log_y.mean())))
        starts, distance = np.concatenate([starts, prior[:1]]), np.zeros(len(y))
    for _ in range(1 if before else 2):  # a first fit is for target and noise, by which rows weigh
        phi = _map(built, u, log_y, prior, _covariance(logs[: len(dims)], index, distance, *sds), starts)
        target = _optimum(built, centre, phi, counted, limits, log_budget)
        value, jac = built.evaluate(np.exp(phi)[None], u)
        jac = jac[0] * np.exp(phi)[:, None]
        distance = _distance_to(logs[: len(dims)], target, edges)
        residual, steps = log_y - value[0], 1 if before else EM_STEPS
        sds = _spreads(residual, jac, prior[1], logs[: len(dims)], index, distance, sds, expected, steps)
        starts = phi[None]
    white = jac @ _whitener(_covariance(logs[: len(dims)], index, distance, *sds)).T
    covariance = np.linalg.inv(white @ white.T + np.diag(prior[1] ** -2))
    hessian, mixed = curvature(built, centre, phi, counted, dims, target, log_budget, box(limits))
    names = tuple(np.asarray(clusters if clusters is not None else table.get("trunk_id", index)).astype(str).tolist())
    return Belief(
        built, dims, centre, counted, log_budget, phi, covariance, target, hessian, mixed, edges,
        sds[0], sds[1], sds[2], logs, jac, names,
    )  # fmt: skip


def _map(form, u, log_y, prior, covariance, starts) -> np.ndarray:
    """phi [P] of the best of the polished starts: Huber on white residuals of unit s.d., prior included."""
    whitener = _whitener(covariance)
    observed = np.concatenate([whitener @ log_y, np.zeros(len(form.names))])
    room = np.zeros((len(u), len(form.names)))
    groups = Groups.plain(np.arange(len(observed)))
    posterior = _Posterior(form, whitener, prior)
    done = polish(
        posterior, np.concatenate([u, room], 1), starts, observed, groups=groups, delta=HUBER, tolerance=1e-7, cap=400
    )
    return done.theta[int(done.objective.argmin())]


def _distance_to(shape_logs, target, edges) -> np.ndarray:
    """Distance [...] in log shape of shapes [K, ...] from the target, clipped to what can be trained."""
    seen_from = np.clip(target, *edges).reshape(-1, *[1] * (shape_logs.ndim - 1))
    return np.sqrt(((shape_logs - seen_from) ** 2).sum(0))


def _prior(form: Form, level: float) -> np.ndarray:
    """Centre and s.d. of ln theta [2, P], theta = [A, eps, a, s of a power mean]; level: a typical loss, A's unit."""
    k = len(form.terms)
    exponents = [DATA_EXPONENT if t in (*DATA_COLUMNS, "num_params") else SIZE_EXPONENT for t in form.terms]
    centre = np.log(np.r_[np.full(k + 1, AMPLITUDE * level), exponents])
    sd = np.r_[np.full(k + 1, AMPLITUDE_SD), np.full(k, EXPONENT_SD)]
    return np.stack([np.r_[centre, np.log(POWER)], np.r_[sd, POWER_SD]]) if form.power_mean else np.stack([centre, sd])


def _covariance(shape_logs, index, distance, trunk_sd, row_sd, discrepancy) -> np.ndarray:
    """Of ln loss [n, n]: row noise, what rows of a trunk share, and what those of a shape share, by its distance [n]."""
    same_trunk = index[:, None] == index
    same_shape = (np.abs(shape_logs[:, :, None] - shape_logs[:, None, :]) < 1e-9).all(0)
    shared = discrepancy**2 * distance[:, None] * distance
    return row_sd**2 * np.eye(len(index)) + trunk_sd**2 * same_trunk + shared * same_shape


def _whitener(covariance: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.linalg.cholesky(covariance))


def _spreads(residual, jac, prior_sd, shape_logs, index, distance, sds, expected, steps) -> tuple[float, ...]:
    """(trunk_sd, row_sd, discrepancy) by `steps` of expectation-maximisation on the fit linearised at its MAP.

    residual, distance [n], jac [P, n]; sds: where to begin; expected: (s.d., degrees of freedom) of the prior of each; with
    inf degrees of freedom one is held. What the parameters may still take up is in the expectation, so that few rows do
    not pass for little noise. One odd row counts as 2.5 s.d. at most.
    """
    sds = tuple(sd if np.isfinite(dof) else held for sd, (held, dof) in zip(sds, expected))
    alike = (np.abs(shape_logs[:, :, None] - shape_logs[:, None, :]) < 1e-9).all(0)
    kinds = np.unique(alike.argmax(1), return_inverse=True)[1]
    trunk, shape = ((i[:, None] == np.arange(i.max() + 1)).astype(float) for i in (index, kinds))  # [n, G], [n, S]
    effects = trunk, np.eye(len(residual)), shape * distance[:, None]
    for _ in range(steps):
        whitener = _whitener(sum(sd**2 * e @ e.T for sd, e in zip(sds, effects)))
        white = jac @ whitener.T
        seen = whitener.T @ np.clip(whitener @ residual, -2.5, 2.5)  # V^-1 r
        sides = np.linalg.solve(white @ white.T + np.diag(prior_sd**-2.0), white @ whitener)
        left = whitener.T @ whitener - (whitener.T @ white.T) @ sides  # (V + J S J')^-1
        found = []
        for sd, e, (centre, dof) in zip(sds, effects, expected):
            square = sd**4 * (e.T @ seen) ** 2 + sd**2 - sd**4 * (e * (left @ e)).sum(0)
            mean = (dof * centre**2 + square.sum()) / (dof + len(square)) if np.isfinite(dof) else centre**2
            found.append(float(np.sqrt(mean)))
        sds = tuple(found)
    return sds


def _optimum(form, centre, phi, geometry, limits, log_budget) -> np.ndarray:
    return optimum_of(form, centre, np.exp(phi)[None], geometry, limits, log_budget, head=True)[0]


def _spread(hessian, mixed, covariance) -> np.ndarray:
    moved = np.linalg.solve(hessian, mixed)
    return np.sqrt(np.einsum("kp,pq,kq->k", moved, covariance, moved))


def expected_regret(fit: Fit, train_flops: float) -> float:
    """Mean relative excess loss of the recommended (real-valued) shape if each bootstrap draw were the truth."""
    if not fit.draws or fit.geometry is None:
        raise UserError("the law has no draws to expect a regret over; fit it with bootstrap=1000")
    if not (LAWS[fit.form].ranks_shapes and fit.model.dims):
        raise UserError(f"form={fit.form!r} cannot rank whole shapes; fit 'joint' to the same rows")
    geometry, centre, form = fit.geometry, fit.centre, fit.shape_form
    draws, log_budget = np.array(fit.draws["random_effects"]), float(np.log(train_flops / 3))
    dims = tuple(fit.model.dims)

    def best(theta):
        return optimum_of(form, centre, theta, geometry, fit.data.grid, log_budget, head=True)

    ours = best(fit.theta[None])
    regret = []
    for theta, v in zip(draws, best(draws)):
        value, _ = loss_along_budget(form, centre, np.log(np.maximum(theta, 1e-300)), geometry, dims, np.stack([ours[0], v]),
                                 log_budget)  # fmt: skip
        regret.append(np.expm1(value[0] - value[1]))
    return float(np.mean(regret))


@dataclass(frozen=True)
class _Pool:
    """The pool as arrays: logs [terms, C, B], one column a branch, padded with the last; real [C, B] marks the true ones."""

    logs: np.ndarray
    real: np.ndarray
    cost: np.ndarray


def _arrays(belief: Belief, pool: Sequence[Candidate]) -> _Pool:
    most = max(len(c.budgets) for c in pool)
    real = np.array([[i < len(c.budgets) for i in range(most)] for c in pool])
    columns = {d: np.array([getattr(c.shape, d) for c in pool], float)[:, None] for d in belief.dims}
    columns["num_params"] = np.array([c.shape.num_params for c in pool], float)[:, None]
    columns["num_examples"] = np.array([[*c.budgets, *[c.num_examples] * (most - len(c.budgets))] for c in pool], float)
    logs = np.stack([np.broadcast_to(np.log(columns[t]), real.shape) for t in belief.form.terms])
    return _Pool(logs, real, np.array([c.cost for c in pool]))


def _jacobian(belief: Belief, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln loss [...] and d ln loss / d phi [..., P] at logs [terms, ...]."""
    flat = logs.reshape(len(logs), -1) - belief.centre[:, None]
    value, jac = belief.form.evaluate(belief.theta[None], flat)
    size = logs.shape[1:]
    return value[0].reshape(size), (jac[0] * belief.theta[:, None]).T.reshape(*size, -1)


def _noise(belief: Belief, noise_sd: float | None) -> float:
    """S.d. by which a check is judged: noise_sd, as from seeds, where it is less than the belief's own, which also holds
    what its form gets wrong."""
    own = float(np.hypot(belief.trunk_sd, belief.row_sd))
    return own if noise_sd is None else min(own, noise_sd)


def _reach(pool: Sequence[Candidate]) -> dict[str, tuple[int, ...]]:
    return {d: tuple(sorted({getattr(c.shape, d) for c in pool})) for d in DIMENSIONS}
