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
# s.d. of ln loss per log unit between a shape and the target by which the form may be wrong; the runs so far do not show it.
# .003 helps little, .03 wastes compute where the form is right
DISCREPANCY = 0.01
# prior of ln(parameter): centre and s.d. Exponents within a factor 4, amplitudes (in mean losses) within a factor 20
SIZE_EXPONENT, DATA_EXPONENT, EXPONENT_SD = 1.0, 0.5, 0.7
AMPLITUDE, AMPLITUDE_SD = 0.1, 1.5
POWER, POWER_SD = 1.5, 0.4  # of a power mean
LEAST = 1e-5  # amplitude in mean losses that counts as none
# expected s.d. of ln loss of a trunk and of a row (together .3-.5 % in published sweeps), worth so many of each
NOISE_EACH, NOISE_DOF = 0.005 / 2**0.5, 4.0
EM_STEPS = 5

Spreads = tuple[float, ...]  # s.d. of ln loss of a trunk and of a row


@dataclass(frozen=True)
class BeliefOptions:
    """What a belief takes for granted.

    geometry, zero_line: as in `law.fit`. reachable: dimension -> values that can be trained (None = the values run).
    """

    form: str = FORM
    geometry: Mapping | None = None
    zero_line: float | None = None
    reachable: Mapping[str, Sequence[int]] | None = None


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

    def form_variance(self, logs: np.ndarray) -> np.ndarray:
        """Variance of ln loss [n] by which the form may be wrong about shapes logs [>= K, n], seen from the target."""
        return (DISCREPANCY * distance_to(logs[: len(self.dims)], self.target, self.reachable)) ** 2


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
    shape: np.ndarray  # [n, S], by how much the form may be wrong about the shape of each row, 0 elsewhere

    @property
    def effects(self) -> tuple[np.ndarray, np.ndarray]:
        return self.trunk, np.eye(len(self.log_y))

    def whitener(self, sds: Spreads) -> np.ndarray:
        """W [n, n] of the rows' errors: W V W' = 1."""
        noise = sum(sd**2 * e @ e.T for sd, e in zip(sds, self.effects))
        return whitener_of(noise + self.shape @ self.shape.T)

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

    def spreads(self, phi: np.ndarray, sds: Spreads) -> Spreads:
        """Estimate both spreads from `sds` by EM_STEPS of expectation-maximisation on the fit linearised at phi.

        What the parameters may still take up is in the expectation, so that few rows do not pass for little noise. One odd
        row counts as 2.5 s.d. at most.
        """
        value, jac = linear(self.form, phi, self.u)
        residual = self.log_y - value
        for _ in range(EM_STEPS):
            whitener = self.whitener(sds)
            white = jac @ whitener.T
            seen = whitener.T @ np.clip(whitener @ residual, -2.5, 2.5)  # V^-1 r
            sides = np.linalg.solve(white @ white.T + np.diag(self.prior[1] ** -2.0), white @ whitener)
            left = whitener.T @ whitener - (whitener.T @ white.T) @ sides  # (V + J S J')^-1
            found = []
            for sd, e in zip(sds, self.effects):
                square = sd**4 * (e.T @ seen) ** 2 + sd**2 - sd**4 * (e * (left @ e)).sum(0)
                mean = (NOISE_DOF * NOISE_EACH**2 + square.sum()) / (NOISE_DOF + len(square))
                found.append(float(np.sqrt(mean)))
            sds = tuple(found)
        return sds


def learn(
    columns: Mapping,
    y: Sequence[float] | np.ndarray,
    train_flops: float,
    options: BeliefOptions = BeliefOptions(),
) -> Belief:
    """Fit the rows, however few, with a weak prior, and locate the optimum at the target of `train_flops`.

    columns, y: as in `law.fit`. Trunk and row noise are estimated, shrunk towards .5 % while trunks are few. Raises
    UserError.
    """
    table, y = check(options.form, columns, y, LawOptions(zero_line=options.zero_line))
    dims, geometry = varied_dims(table, None), geometry_of(table, options.geometry)
    if geometry is None:
        raise UserError("the rows do not say patch_size and image_size; give them with geometry={'patch_size': ...}")
    form = LAWS[options.form].build(dims, options.zero_line)
    logs, log_y = np.log(np.stack([positive(table, name) for name in form.terms])), np.log(y)
    limits = {d: (options.reachable or {}).get(d, ()) or np.unique(positive(table, d)).tolist() for d in dims}
    edges = np.log([min(v) for v in limits.values()]), np.log([max(v) for v in limits.values()])
    log_budget, level = float(np.log(train_flops / 3)), float(np.exp(log_y.mean()))
    centre, index, prior = logs.mean(1), trunks(table, None, len(y)), prior_of(form, level)
    shape_logs = logs[: len(dims)]
    shapes = members(shape_logs)
    sds: Spreads = (NOISE_EACH, NOISE_EACH)
    posterior = Posterior(form, logs - centre[:, None], log_y, prior, members(index[None]), np.zeros_like(shapes))
    starts = np.log(np.maximum(form.starts(posterior.u, y), LEAST * level))
    starts = np.concatenate([starts, prior[:1]])
    family = Family(form, centre, geometry, limits)
    for _ in range(2):  # a first fit is for target and noise, by which rows weigh
        phi = posterior.fit(sds, starts)
        best = optimum_of(family, np.exp(phi)[None], log_budget, head=True)[0]
        wrong = DISCREPANCY * distance_to(shape_logs, best, edges)
        posterior = dataclasses.replace(posterior, shape=shapes * wrong[:, None])
        sds, starts = posterior.spreads(phi, sds), phi[None]
    hessian, mixed = curvature(family, phi, best, log_budget, box(limits))
    jac, names = linear(form, phi, posterior.u)[1], tuple(np.asarray(table.get("trunk_id", index)).astype(str).tolist())
    return Belief(
        form, dims, centre, geometry, log_budget, phi, posterior.covariance(phi, sds), best, hessian, mixed, edges,
        sds[0], sds[1], logs, jac, names,
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
