"""What rows say of a law, as a posterior over its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.compute_optimum import Family, curvature
from sovit.law.design_matrix import check, geometry_of, positive, trunks, varied_dims
from sovit.law.exponents import box, optimum_of
from sovit.law.form import DATA_COLUMNS, Form
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import HUBER
from sovit.law.solver.polish import Groups, Objective, polish
from sovit.spec.shape import Shape

FORM = "joint_n"
DISCREPANCY = 0.01  # per log unit of shape; .003 helps little, .03 wastes compute where the form is right
DISCREPANCY_DOF = 4.0  # shapes that it is worth against what the residuals say; inf = held as it is
# prior of ln(parameter): centre and s.d. Exponents within a factor 4, amplitudes (in mean losses) within a factor 20
SIZE_EXPONENT, DATA_EXPONENT, EXPONENT_SD = 1.0, 0.5, 0.7
AMPLITUDE, AMPLITUDE_SD = 0.1, 1.5
POWER, POWER_SD = 1.5, 0.4  # of a power mean
LEAST = 1e-5  # amplitude in mean losses that counts as none
NOISE_SD, NOISE_DOF = 0.005, 4.0  # expected s.d. of ln loss (.3-.5 % in published sweeps), worth so many trunks
EM_STEPS = 5
MAX_ROWS = 4000

Spreads = tuple[float, ...]  # s.d. of ln loss: of a trunk, of a row, and of the form per log unit of shape


@dataclass(frozen=True)
class BeliefOptions:
    """What a belief takes for granted.

    geometry, zero_line: as in `law.fit`. reachable: dimension -> values that can be trained (None = the values run).
    discrepancy: what the form is expected to be wrong by, estimated too, worth `discrepancy_dof` shapes.
    """

    form: str = FORM
    geometry: Mapping | None = None
    zero_line: float | None = None
    reachable: Mapping[str, Sequence[int]] | None = None
    discrepancy: float = DISCREPANCY
    discrepancy_dof: float = DISCREPANCY_DOF


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
    def noise_sd(self) -> float:
        """S.d. of ln loss of a run of another trunk."""
        return float(np.hypot(self.trunk_sd, self.row_sd))

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
        family = Family(self.form, self.centre, self.geometry, limits)
        v = _optimum(family, self.phi, float(np.log(train_flops / 3)))
        return dict(zip(self.dims, np.exp(v).tolist()))

    def logs_of(self, shapes: Sequence[Shape], num_examples: np.ndarray) -> np.ndarray:
        """ln of the form's columns [terms, S, ...] of shapes trained on num_examples [S, ...] images."""
        columns = {"num_examples": np.asarray(num_examples, float)}
        spread = (len(shapes), *[1] * (columns["num_examples"].ndim - 1))
        for name in (*self.dims, "num_params"):
            columns[name] = np.array([getattr(shape, name) for shape in shapes], float).reshape(spread)
        return np.stack([np.broadcast_to(np.log(columns[t]), np.shape(num_examples)) for t in self.form.terms])

    def evaluate(self, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln loss [...] and d ln loss / d phi [..., P] at logs [terms, ...]."""
        value, jac = linear(self.form, self.phi, logs.reshape(len(logs), -1) - self.centre[:, None])
        return value.reshape(logs.shape[1:]), jac.T.reshape(*logs.shape[1:], -1)

    def log_sd(self, covariance: np.ndarray) -> np.ndarray:
        """S.d. of ln x of each optimal dimension [K] for a covariance of phi."""
        moved = np.linalg.solve(self.hessian, self.mixed)
        return np.sqrt(np.einsum("kp,pq,kq->k", moved, covariance, moved))

    def form_variance(self, logs: np.ndarray) -> np.ndarray:
        """Variance of ln loss [n] by which the form may be wrong about shapes logs [>= K, n], seen from the target."""
        return (self.discrepancy * distance_to(logs[: len(self.dims)], self.target, self.reachable)) ** 2


@dataclass(frozen=True)
class _Whitened:
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


@dataclass(frozen=True)
class Posterior:
    """A form in phi = ln theta with its prior and its rows, of which those of a trunk and those of a shape share errors."""

    form: Form
    u: np.ndarray  # [terms, n], centred
    log_y: np.ndarray  # [n]
    prior: np.ndarray  # [2, P]: centre and s.d. of phi
    trunk: np.ndarray  # [n, G], 1 where a row is of a trunk
    shape: np.ndarray  # [n, S], 1 where a row is of a shape
    distance: np.ndarray  # [n], of the shape of each row from the target

    @property
    def effects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.trunk, np.eye(len(self.log_y)), self.shape * self.distance[:, None]

    def whitener(self, sds: Spreads) -> np.ndarray:
        """W [n, n] of the rows' errors: W V W' = 1."""
        return whitener_of(sum(sd**2 * e @ e.T for sd, e in zip(sds, self.effects)))

    def fit(self, sds: Spreads, starts: np.ndarray) -> np.ndarray:
        """phi [P] of the best of the polished starts: Huber on white residuals of unit s.d., prior included."""
        whitener, num = self.whitener(sds), len(self.form.names)
        observed = np.concatenate([whitener @ self.log_y, np.zeros(num)])
        room = np.concatenate([self.u, np.zeros((len(self.u), num))], 1)
        groups, problem = Groups.plain(np.arange(len(observed))), _Whitened(self.form, whitener, self.prior)
        done = polish(Objective(problem, room, observed, groups, HUBER), starts, tolerance=1e-7, cap=400)
        return done.theta[int(done.objective.argmin())]

    def covariance(self, phi: np.ndarray, sds: Spreads) -> np.ndarray:
        """Of phi [P, P]: Gauss-Newton information of the rows, and the prior's."""
        white = linear(self.form, phi, self.u)[1] @ self.whitener(sds).T
        return np.linalg.inv(white @ white.T + np.diag(self.prior[1] ** -2))

    def spreads(self, phi: np.ndarray, sds: Spreads, expected: Sequence[tuple[float, float]], steps: int) -> Spreads:
        """(trunk_sd, row_sd, discrepancy) by `steps` of expectation-maximisation on the fit linearised at phi.

        sds: where to begin; expected: (s.d., degrees of freedom) of the prior of each; with inf degrees of freedom one is
        held. What the parameters may still take up is in the expectation, so that few rows do not pass for little noise.
        One odd row counts as 2.5 s.d. at most.
        """
        value, jac = linear(self.form, phi, self.u)
        residual = self.log_y - value
        sds = tuple(sd if np.isfinite(dof) else held for sd, (held, dof) in zip(sds, expected))
        for _ in range(steps):
            whitener = self.whitener(sds)
            white = jac @ whitener.T
            seen = whitener.T @ np.clip(whitener @ residual, -2.5, 2.5)  # V^-1 r
            sides = np.linalg.solve(white @ white.T + np.diag(self.prior[1] ** -2.0), white @ whitener)
            left = whitener.T @ whitener - (whitener.T @ white.T) @ sides  # (V + J S J')^-1
            found = []
            for sd, e, (centre, dof) in zip(sds, self.effects, expected):
                square = sd**4 * (e.T @ seen) ** 2 + sd**2 - sd**4 * (e * (left @ e)).sum(0)
                mean = (dof * centre**2 + square.sum()) / (dof + len(square)) if np.isfinite(dof) else centre**2
                found.append(float(np.sqrt(mean)))
            sds = tuple(found)
        return sds


def learn(
    columns: Mapping,
    y: Sequence[float] | np.ndarray,
    train_flops: float,
    options: BeliefOptions = BeliefOptions(),
    previous: Belief | None = None,
) -> Belief:
    """Fit the rows, however few, with a weak prior, and locate the optimum at the target of `train_flops`.

    columns, y: as in `law.fit`. Trunk and row noise are estimated, shrunk towards .5 % while trunks are few. previous: the
    belief before the latest rows, to start from. Raises UserError.
    """
    known = [n for n, law in LAWS.items() if law.ranks_shapes and (law.plain_sum or law.power_mean)]
    if options.form not in known:
        raise UserError(f"form={options.form!r} cannot choose runs; choose one of {', '.join(known)}")
    if not (np.isfinite(train_flops) and train_flops > 0):
        raise UserError(f"train_flops={train_flops!r} is not a positive number; give FLOPs, such as 1e15")
    table, y = check(options.form, columns, y, LawOptions(zero_line=options.zero_line))
    if len(y) > MAX_ROWS:
        raise UserError(f"{len(y)} rows are too many to weigh a next run; give {MAX_ROWS} at most, near the target")
    dims, geometry = varied_dims(table, None), geometry_of(table, options.geometry)
    if geometry is None:
        raise UserError("the rows do not say patch_size and image_size; give them with geometry={'patch_size': ...}")
    form = LAWS[options.form].build(dims, options.zero_line)
    logs, log_y = np.log(np.stack([positive(table, name) for name in form.terms])), np.log(y)
    limits = {d: (options.reachable or {}).get(d, ()) or np.unique(positive(table, d)).tolist() for d in dims}
    edges = np.log([min(v) for v in limits.values()]), np.log([max(v) for v in limits.values()])
    log_budget, level = float(np.log(train_flops / 3)), float(np.exp(log_y.mean()))
    before = previous if previous is not None and (previous.dims, previous.form) == (dims, form) else None
    centre, index, prior = before.centre if before else logs.mean(1), trunks(table, None, len(y)), prior_of(form, level)
    expected = [(NOISE_SD / 2**0.5, NOISE_DOF)] * 2
    expected += [(options.discrepancy, options.discrepancy_dof if options.discrepancy else np.inf)]
    posterior = Posterior(
        form, logs - centre[:, None], log_y, prior, members(index[None]), members(logs[: len(dims)]), np.zeros(len(y))
    )
    sds: Spreads
    if before:
        starts, sds = np.stack([before.phi, prior[0]]), (before.trunk_sd, before.row_sd, before.discrepancy)
        posterior = dataclasses.replace(posterior, distance=distance_to(logs[: len(dims)], before.target, edges))
    else:
        starts = np.log(np.maximum(form.starts(posterior.u, y), LEAST * level))
        starts, sds = np.concatenate([starts, prior[:1]]), tuple(sd for sd, _ in expected)
    family = Family(form, centre, geometry, limits)
    for _ in range(1 if before else 2):  # a first fit is for target and noise, by which rows weigh
        phi = posterior.fit(sds, starts)
        best = _optimum(family, phi, log_budget)
        posterior = dataclasses.replace(posterior, distance=distance_to(logs[: len(dims)], best, edges))
        sds, starts = posterior.spreads(phi, sds, expected, 1 if before else EM_STEPS), phi[None]
    hessian, mixed = curvature(family, phi, best, log_budget, box(limits))
    jac, names = linear(form, phi, posterior.u)[1], tuple(np.asarray(table.get("trunk_id", index)).astype(str).tolist())
    return Belief(
        form, dims, centre, geometry, log_budget, phi, posterior.covariance(phi, sds), best, hessian, mixed, edges,
        sds[0], sds[1], sds[2], logs, jac, names,
    )  # fmt: skip


def linear(form: Form, phi: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln loss [n] and d ln loss / d phi [P, n] at centred logs u [terms, n]."""
    value, jac = form.evaluate(np.exp(phi)[None], u)
    return value[0], jac[0] * np.exp(phi)[:, None]


def members(columns: np.ndarray) -> np.ndarray:
    """[n, G], 1 where a row is of a group: rows that agree in all columns [., n]."""
    index = np.unique(columns.round(9), axis=1, return_inverse=True)[1].ravel()
    return (index[:, None] == np.arange(index.max() + 1)).astype(float)


def distance_to(shape_logs: np.ndarray, target: np.ndarray, edges: tuple[np.ndarray, ...]) -> np.ndarray:
    """Distance [...] in log shape of shapes [K, ...] from the target, clipped to what can be trained."""
    seen_from = np.clip(target, *edges).reshape(-1, *[1] * (shape_logs.ndim - 1))
    return np.sqrt(((shape_logs - seen_from) ** 2).sum(0))


def prior_of(form: Form, level: float) -> np.ndarray:
    """Centre and s.d. of ln theta [2, P], theta = [A, eps, a, s of a power mean]; level: a typical loss, A's unit."""
    k = len(form.terms)
    exponents = [DATA_EXPONENT if t in (*DATA_COLUMNS, "num_params") else SIZE_EXPONENT for t in form.terms]
    centre = np.log(np.r_[np.full(k + 1, AMPLITUDE * level), exponents])
    sd = np.r_[np.full(k + 1, AMPLITUDE_SD), np.full(k, EXPONENT_SD)]
    return np.stack([np.r_[centre, np.log(POWER)], np.r_[sd, POWER_SD]]) if form.power_mean else np.stack([centre, sd])


def whitener_of(covariance: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.linalg.cholesky(covariance))


def _optimum(family: Family, phi: np.ndarray, log_budget: float) -> np.ndarray:
    return optimum_of(family, np.exp(phi)[None], log_budget, head=True)[0]
