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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.predict.belief import TRUE, Belief, _arrays, _jacobian, _noise, _Pool, _reach, _spread, _whitener, learn
from sovit.predict.candidates import Candidate

CHECK_EVERY = 5  # picks; the fifth is a check of the law near the target


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
