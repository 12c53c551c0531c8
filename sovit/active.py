"""Which run to pay for next: the one that lowers the expected regret of the shape recommended at a target most per FLOP.

    data = measurements(["results/stream_star.jsonl"])
    pool = candidates(base, {"width": (...), "depth": (...), "mlp_dim": (...)}, train_flops=(...), rows=data.rows)
    picks = next_run(data.columns, data.y, pool, target_train_flops, num=4, num_made=12)

Criterion (V-optimality for the decision): the loss excess of a shape off the optimum v* (ln x) along the budget is
1/2 dv' H dv, H the Hessian of ln loss over v with n = budget / F(x); dv = D d phi, phi = ln theta, and by the implicit
function theorem D = -H^-1 M, M = d2 ln loss / dv dphi. So the expected regret is 1/2 tr(M' H^-1 M Sigma), Sigma the
posterior covariance of phi: Gauss-Newton information of the rows plus a weak prior. Rows of one trunk share an error, rows
of one shape share what the form gets wrong about it: an s.d. of `discrepancy` per log unit between the shape and the
target. Without that term the criterion buys many small cheap runs and trusts the extrapolation, which a wrong
form punishes; for the same reason it works under `joint_n`, and every fifth pick is a check near the target. Where the
form's compute term is wrong it still does worse than drawing cheap runs at random (results/active_sweep.json). Numpy only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.allocate import Geometry, curvature, loss_along_budget
from sovit.diagnose import box, optimum_of
from sovit.fitter import HUBER, Groups, polish
from sovit.forms import DATA_COLUMNS, LAWS, Form
from sovit.law import Fit
from sovit.rows import check, geometry_of, positive, trunks, varied_dims
from sovit.run import budgets_for
from sovit.shape import DIMENSIONS, Shape

FORM = "joint_n" if "joint_n" in LAWS else "joint"
DISCREPANCY = 0.01  # per log unit of shape; .003 helps little, .03 wastes compute where the form is right
DISCREPANCY_DOF = 4.0  # shapes that it is worth against what the residuals say; inf = held as it is
CHECK_EVERY = 5  # picks; the fifth is a check of the law near the target
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
class Candidate:
    """A run that could be made: a new trunk (or a new seed of a shape that was run), or a branch of a trunk there is.

    budgets: images seen at the end of each branch that it adds, rising. cost: training FLOPs that it would still take,
    task head included: of a branch, the cooldown and the way from the last point where another branch left the trunk.
    """

    shape: Shape
    budgets: tuple[int, ...]
    kind: str  # trunk | branch | seed
    cost: float
    trunk_id: str | None = None  # of the trunk that a branch leaves
    init_seed: int = 0

    @property
    def num_examples(self) -> int:
        return self.budgets[-1]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | dict(num_examples=self.num_examples)


@dataclass(frozen=True)
class Pick:
    """A candidate with what is expected of it, in plain numbers.

    gain: fall of the expected regret; per_flop: gain / cost. predicted: losses at its budgets, with prediction_sd
    of ln loss (parameters, form, trunk and row noise together). is_check: picked for a test of the law near the target.
    """

    candidate: Candidate
    gain: float
    per_flop: float
    regret_before: float
    regret_after: float
    predicted: tuple[float, ...]
    prediction_sd: tuple[float, ...]
    is_check: bool
    why: str

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | dict(candidate=self.candidate.to_dict())


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


# Candidates ----------------------------------------------------------------------------------------------------------------


def candidates(
    base: Shape,
    values: Mapping[str, Sequence[int]],
    *,
    num_examples: Sequence[float] | None = None,
    train_flops: Sequence[float] | None = None,
    rows: Sequence[Mapping] = (),
    max_cost: float = np.inf,
    num_classes: int = 0,
    batch_size: int = 1,
    cooldown: float = 0.2,
    seeds: int = 3,
    min_examples: int = 1,
) -> list[Candidate]:
    """Every run worth weighing: new trunks on a lattice of shapes, branches of the trunks in `rows`, further seeds.

    values: dimension -> its lattice (a value that no shape can take, such as a width that is no multiple of head_dim, is
    an error; none = no new shapes); the rest is as in `base`. Budgets are levels of images or of training FLOPs, give
    one of the two. A new trunk is offered to each level alone and with all lower ones as branches. rows: ledger rows,
    for trunk_id, shape, num_examples, init_seed and status, those that did not end well included: they are not offered
    again, nor are other branches of a trunk that diverged. A shape may have `seeds` seeds in all. Raises UserError.
    """
    if (num_examples is None) == (train_flops is None):
        raise UserError("candidates need budgets: give num_examples=(...) or train_flops=(...), one of the two")
    unknown = [name for name in values if name not in DIMENSIONS]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a dimension of a shape; choose from {', '.join(DIMENSIONS)}")

    def levels(shape: Shape) -> tuple[int, ...]:
        if train_flops is not None:
            found = budgets_for(shape, train_flops, num_classes, batch_size)
        else:
            found = tuple(sorted({max(5, round(n / batch_size)) * batch_size for n in num_examples or ()}))
        return tuple(n for n in found if n >= min_examples)

    def trunk_examples(n: int) -> int:
        return n - max(1, round(cooldown * n / batch_size)) * batch_size

    def cost_of(shape: Shape, new: Sequence[int], old: Sequence[int] = ()) -> float:
        """As Run.new_examples: each branch goes on from the last point where a shorter one left."""
        budgets = sorted({*new, *old})
        images = sum(n - max((trunk_examples(b) for b in budgets if b < n), default=0) for n in new)
        return float(images * shape.train_flops_per_image(num_classes))

    def ladders(shape: Shape) -> list[tuple[int, ...]]:
        steps = levels(shape)
        return [(n,) for n in steps] + [steps[: i + 1] for i in range(1, len(steps))]

    existing: dict[str, tuple[Shape, int, set[int]]] = {}
    spoilt = set()
    for row in rows:
        shape = base.replace(**{name: int(row[name]) for name in DIMENSIONS if name in row})
        held = existing.setdefault(str(row["trunk_id"]), (shape, int(row.get("init_seed") or 0), set()))
        held[2].add(int(row["num_examples"]))
        if row.get("status") == "diverged":
            spoilt.add(str(row["trunk_id"]))
    taken: dict[Shape, set[int]] = {}
    for shape, seed, _ in existing.values():
        taken.setdefault(shape, set()).add(seed)

    pool = []
    for combination in itertools.product(*values.values()) if values else ():
        shape = base.replace(**dict(zip(values, combination)))
        if shape not in taken:
            pool += [Candidate(shape, b, "trunk", cost_of(shape, b)) for b in ladders(shape)]
    for trunk_id, (shape, seed, done) in existing.items():
        for n in levels(shape):
            if n not in done and trunk_id not in spoilt:
                pool.append(Candidate(shape, (n,), "branch", cost_of(shape, (n,), sorted(done)), trunk_id, seed))
    for shape, used in taken.items():
        if len(used) < seeds:
            seed = next(s for s in itertools.count() if s not in used)
            pool += [Candidate(shape, b, "seed", cost_of(shape, b), None, seed) for b in ladders(shape)]
    pool = [c for c in pool if c.cost <= max_cost]
    if not pool:
        raise UserError(
            f"no candidate costs {max_cost:.3g} training FLOPs or less; raise max_cost or lower the budgets"
        )
    return pool


# Belief --------------------------------------------------------------------------------------------------------------------


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
    if not (LAWS[fit.form].ranks_shapes and fit.model["dims"]):
        raise UserError(f"form={fit.form!r} cannot rank whole shapes; fit 'joint' to the same rows")
    geometry, centre, form = Geometry(**fit.geometry), np.array(fit.model["centres"]), fit.shape_form
    draws, log_budget = np.array(fit.draws["random_effects"]), float(np.log(train_flops / 3))
    dims = tuple(fit.model["dims"])

    def best(theta):
        return optimum_of(form, centre, theta, geometry, fit.data["grid"], log_budget, head=True)

    ours = best(fit.theta[None])
    regret = []
    for theta, v in zip(draws, best(draws)):
        value, _ = loss_along_budget(form, centre, np.log(np.maximum(theta, 1e-300)), geometry, dims, np.stack([ours[0], v]),
                                 log_budget)  # fmt: skip
        regret.append(np.expm1(value[0] - value[1]))
    return float(np.mean(regret))


# Choice --------------------------------------------------------------------------------------------------------------------


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


@dataclass
class _Made:
    """Rows that count as made, by shape: (jac [m, P], trunk names [m]); grows while a batch is picked."""

    by_shape: dict

    @staticmethod
    def of(belief: Belief) -> _Made:
        made = _Made({})
        for i, key in enumerate(_keys(belief.logs[: len(belief.dims)])):
            made.add(key, belief.jac[:, i : i + 1].T, [belief.trunk[i]])
        return made

    def add(self, key, jac, names) -> None:
        old_jac, old_names = self.by_shape.get(key, (np.empty((0, jac.shape[1])), []))
        self.by_shape[key] = np.concatenate([old_jac, jac]), [*old_names, *names]


def _keys(shape_logs: np.ndarray) -> list[tuple]:
    return [tuple(row) for row in shape_logs.T.round(9).tolist()]


def _innovations(belief: Belief, pool: Sequence[Candidate], arrays: _Pool, jac: np.ndarray, made: _Made) -> np.ndarray:
    """The rows that each candidate adds [C, B, P], white and independent of what is made.

    With rows o made and c new of one shape, V their covariance: S^-1/2 (J_c - V_co V_oo^-1 J_o), S the Schur complement. So
    a branch says only what its trunk has not said, a seed what is not the shape's own.
    """
    shape_logs = arrays.logs[: len(belief.dims), :, 0]
    variance = belief.form_variance(shape_logs)
    count = arrays.real.sum(1)
    rows = np.where(arrays.real[:, :, None], jac, 0.0)
    # a new shape: (J - kappa x trunk mean) / row s.d.
    kappa = 1 - belief.row_sd / np.sqrt(belief.row_sd**2 + count * (belief.trunk_sd**2 + variance))
    mean = rows.sum(1, keepdims=True) / count[:, None, None]
    white = np.where(arrays.real[:, :, None], rows - kappa[:, None, None] * mean, 0.0) / belief.row_sd
    for i, key in enumerate(_keys(shape_logs)):
        if key in made.by_shape:
            old, names = made.by_shape[key]
            own = pool[i].trunk_id or f"new {pool[i].init_seed}"
            labels = np.array([*names, *[own] * count[i]])
            m = len(names)
            v = (
                belief.row_sd**2 * np.eye(len(labels))
                + belief.trunk_sd**2 * (labels[:, None] == labels)
                + float(variance[i])
            )
            gain = np.linalg.solve(v[:m, :m], v[:m, m:]).T
            left = v[m:, m:] - gain @ v[:m, m:]
            white[i, : count[i]] = _whitener(left) @ (jac[i, : count[i]] - gain @ old)
    return white


def _gains(white: np.ndarray, covariance: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fall of tr(weight covariance) [C] by rows white [C, B, P]: tr((I + J S J')^-1 J S K S J')."""
    through = white @ covariance  # [C, B, P]
    inner = np.eye(white.shape[1]) + through @ white.transpose(0, 2, 1)
    outer = through @ weight @ through.transpose(0, 2, 1)
    return np.linalg.solve(inner, outer).trace(axis1=1, axis2=2)


def choose(
    belief: Belief,
    pool: Sequence[Candidate],
    *,
    num: int = 1,
    num_made: int = 0,
    check_every: int = CHECK_EVERY,
    check_cost: float = np.inf,
    checks: Sequence[Mapping] = (),
    noise_sd: float | None = None,
) -> list[Pick]:
    """`num` picks in the order to make them, each chosen as if those before it were made. See `next_run`."""
    if num < 1 or num_made < 0 or check_every < 0:
        raise UserError(f"num={num}, num_made={num_made}, check_every={check_every}: give at least 1, 0 and 0")
    if not pool:
        raise UserError("the pool holds no candidate; widen its values, budgets or max_cost")
    arrays = _arrays(belief, pool)
    value, jac = _jacobian(belief, arrays.logs)
    variance = belief.form_variance(arrays.logs[: len(belief.dims), :, 0])
    keys = _keys(arrays.logs[: len(belief.dims), :, 0])
    made, covariance, weight = _Made.of(belief), belief.covariance, belief.weight
    longest = value[np.arange(len(pool)), arrays.real.sum(1) - 1]
    open_ = np.ones(len(pool), bool)
    picks: list[Pick] = []
    trusted = not checks or came_true(belief, checks[-1], noise_sd)
    fresh = np.array([c.kind == "trunk" for c in pool])
    for i in range(min(num, len(pool))):
        if not open_.any():
            break
        white = _innovations(belief, pool, arrays, jac, made)
        gain = _gains(white, covariance, weight)
        affordable = open_ & (arrays.cost <= check_cost) & np.array([c.kind != "branch" for c in pool])
        is_check = check_every > 0 and (num_made + i + 1) % check_every == 0 and affordable.any()
        if is_check:
            best = int(np.lexsort((arrays.cost, np.where(affordable, longest.round(9), np.inf)))[0])
        elif trusted or not (open_ & fresh).any():
            best = int(np.where(open_, gain / arrays.cost, -np.inf).argmax())
        else:
            chance = np.where(open_ & fresh, 1 / arrays.cost, 0.0)
            best = int(np.random.default_rng([num_made, i]).choice(len(pool), p=chance / chance.sum()))
        rows, real = white[best], arrays.real[best]
        through = rows @ covariance
        after = covariance - through.T @ np.linalg.solve(np.eye(len(rows)) + through @ rows.T, through)
        sd = np.sqrt(np.einsum("bp,pq,bq->b", jac[best], covariance, jac[best]) + variance[best])
        sd = np.sqrt(sd**2 + belief.trunk_sd**2 + belief.row_sd**2)
        before, left = float((weight * covariance).sum()), float((weight * after).sum())
        chosen = pool[best]
        picks.append(
            Pick(
                chosen,
                gain=float(gain[best]),
                per_flop=float(gain[best] / chosen.cost),
                regret_before=before,
                regret_after=left,
                predicted=tuple(np.exp(value[best][real]).tolist()),
                prediction_sd=tuple(sd[real].tolist()),
                is_check=bool(is_check),
                why=_why(belief, chosen, covariance, after, before, left, is_check, trusted),
            )
        )
        made.add(keys[best], jac[best][real], [chosen.trunk_id or f"new {chosen.init_seed}"] * int(real.sum()))
        covariance = after
        # one trunk is one job: what else would run on it waits for the next round
        open_ &= np.array([(c.shape, c.init_seed) != (chosen.shape, chosen.init_seed) for c in pool])
    return picks


def _why(belief, chosen, covariance, after, before, left, is_check, trusted) -> str:
    what = {"trunk": "a new trunk", "branch": f"a branch of {chosen.trunk_id}", "seed": f"seed {chosen.init_seed}"}
    images = " and ".join(f"{n:.3g}" for n in chosen.budgets)
    head = f"{what[chosen.kind]} {chosen.shape.label} to {images} images, {chosen.cost:.3g} FLOPs"
    fall = f"expected regret {100 * before:.3g} % -> {100 * left:.3g} %"
    if is_check:
        return f"{head}: the run nearest the target, to check the law there before it is trusted; {fall}"
    if not trusted:
        return f"{head}: at random, the cheaper the likelier, for the last check did not come true; {fall}"
    was, now = (_spread(belief.hessian, belief.mixed, c) for c in (covariance, after))
    most = int(np.argmax(was**2 - now**2))
    return f"{head}: {fall}, most of all by {belief.dims[most]} (s.d. of its log {was[most]:.2f} -> {now[most]:.2f})"


def next_run(
    columns: Mapping,
    y,
    pool: Sequence[Candidate],
    train_flops: float,
    *,
    num: int = 1,
    num_made: int = 0,
    check_every: int = CHECK_EVERY,
    check_cost: float = np.inf,
    checks: Sequence[Mapping] = (),
    noise_sd: float | None = None,
    **options,
) -> list[Pick]:
    """The runs of the pool that lower the expected regret at `train_flops` most per FLOP, in the order to make them.

    columns, y: what was measured, as for `law.fit`. num: picks for as many workers, each chosen as if the earlier ones
    were made. num_made: picks made so far: pick number check_every, twice that, ... is a check (check_every=0: never), the
    trunk nearest the target, which is that of the lowest predicted loss, among those of check_cost FLOPs or less. Its
    prediction is in the pick and is to be compared with what it measures. checks: {predicted, measured} of those made,
    in order; while the last did not come true the criterion is not believed, and new trunks are drawn at random with
    p ~ 1/cost. noise_sd: s.d. of ln loss between seeds, by which a check is judged where it is less than the belief's own,
    which also holds what the form gets wrong. options: of `learn` (form, discrepancy, which is held here, geometry,
    clusters, ...). Raises UserError.
    """
    options.setdefault("reachable", _reach(pool))
    options.setdefault("discrepancy_dof", np.inf)  # the runs so far do not show what the form gets wrong elsewhere
    belief = learn(columns, y, train_flops, **options)
    return choose(
        belief,
        pool,
        num=num,
        num_made=num_made,
        check_every=check_every,
        check_cost=check_cost,
        checks=checks,
        noise_sd=noise_sd,
    )


def came_true(belief: Belief, check: Mapping, noise_sd: float | None = None) -> bool:
    """Whether a check missed by no more than TRUE noise s.d. However unsure the law says it is: that is no excuse here."""
    return bool(abs(np.log(check["measured"] / check["predicted"])) <= TRUE * _noise(belief, noise_sd))


def _noise(belief: Belief, noise_sd: float | None) -> float:
    """S.d. by which a check is judged: noise_sd, as from seeds, where it is less than the belief's own, which also holds
    what its form gets wrong."""
    own = float(np.hypot(belief.trunk_sd, belief.row_sd))
    return own if noise_sd is None else min(own, noise_sd)


def _reach(pool: Sequence[Candidate]) -> dict[str, tuple[int, ...]]:
    return {d: tuple(sorted({getattr(c.shape, d) for c in pool})) for d in DIMENSIONS}


def should_stop(belief: Belief, checks: Sequence[Mapping], noise_sd: float | None = None) -> tuple[bool, str]:
    """(stop, why). Only a check that came true says stop; a small expected regret alone never does.

    checks: {predicted, measured} of each check made, in order; the last one counts (`came_true`). noise_sd: s.d. of ln
    loss under which regret does not matter, and by which a check is judged unless the belief's own is less; None = that.
    """
    noise = noise_sd or float(np.hypot(belief.trunk_sd, belief.row_sd))
    regret = belief.expected_regret
    small = f"expected regret {100 * regret:.3g} % against a noise of {100 * noise:.3g} %"
    if not checks:
        return False, f"go on: no prediction near the target was put to the test yet ({small})"
    last = checks[-1]
    error = float(np.log(last["measured"] / last["predicted"]))
    z = error / _noise(belief, noise_sd)
    tested = f"the last check missed by {100 * error:+.3g} % ({z:+.1f} noise s.d.)"
    if not came_true(belief, last, noise_sd):
        return False, f"go on: {tested}, so the law is wrong near the target whatever it expects ({small})"
    if regret > noise:
        return False, f"go on: {small}; {tested}"
    return True, f"stop: {small}, and {tested}"
