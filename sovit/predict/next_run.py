"""Which run to pay for next: the one that lowers the expected regret of the shape recommended at a target most per FLOP.

The loss excess of a shape off the optimum v* (ln x) along the budget is 1/2 dv' H dv, H the Hessian of ln loss; dv =
-H^-1 M d phi, phi = ln theta, M = d2 ln loss / dv dphi. So the expected regret is 1/2 tr(M' H^-1 M Sigma), Sigma the
covariance of phi. Rows of one trunk share an error, rows of one shape what the form gets wrong about it (DISCREPANCY).
Without that term the criterion buys many cheap runs and trusts the extrapolation, which a wrong form punishes; so every
fifth pick is a check near the target. Where the form's compute term is wrong it still does worse than drawing cheap runs
at random (results/active_sweep.json).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.predict.belief import Belief, whitener_of
from sovit.predict.candidates import Candidate
from sovit.spec.shape import Shape

CHECK_EVERY = 5  # picks; the fifth is a check of the law near the target
TRUE = 3.0  # noise s.d. by which a check may miss and still have come true


@dataclass(frozen=True)
class Checks:
    """Tests of the law near the target: {predicted, measured} of each, in order; the last one counts.

    noise_sd: s.d. of ln loss between seeds, None where unknown; the belief's own noise also holds what the form gets wrong.
    """

    made: Sequence[Mapping] = ()
    noise_sd: float | None = None

    @property
    def error(self) -> float:
        """ln(measured / predicted) of the last."""
        return float(np.log(self.made[-1]["measured"] / self.made[-1]["predicted"]))

    def noise(self, belief: Belief) -> float:
        return belief.noise_sd if self.noise_sd is None else min(belief.noise_sd, self.noise_sd)

    def came_true(self, belief: Belief) -> bool:
        """Whether the last missed by no more than TRUE noise s.d., however unsure the law says it is; True without any."""
        return not self.made or abs(self.error) <= TRUE * self.noise(belief)


@dataclass(frozen=True)
class Pick:
    """A candidate with what is expected of it, in plain numbers.

    predicted: losses at its budgets, with prediction_sd of ln loss (parameters, form, trunk and row noise together).
    is_check: picked for a test of the law near the target.
    """

    candidate: Candidate
    regret_before: float
    regret_after: float
    predicted: tuple[float, ...]
    prediction_sd: tuple[float, ...]
    is_check: bool
    why: str

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | dict(candidate=self.candidate.to_dict())


@dataclass(frozen=True)
class _Pool:
    """Candidates as arrays, one column a branch, padded with the last; real [C, B] marks the true ones.

    value, jac: ln loss [C, B] and d ln loss / d phi [C, B, P]; variance [C]: by which the form may be wrong of each.
    """

    candidates: Sequence[Candidate]
    keys: list[tuple]
    real: np.ndarray
    cost: np.ndarray
    value: np.ndarray
    jac: np.ndarray
    variance: np.ndarray

    @staticmethod
    def of(belief: Belief, candidates: Sequence[Candidate]) -> _Pool:
        if not candidates:
            raise UserError("the pool holds no candidate; widen its values, budgets or max_cost")
        most = max(len(c.budgets) for c in candidates)
        budgets = np.array([[*c.budgets, *[c.num_examples] * (most - len(c.budgets))] for c in candidates], float)
        real = np.arange(most) < np.array([len(c.budgets) for c in candidates])[:, None]
        logs = belief.logs_of([c.shape for c in candidates], budgets)
        value, jac = belief.evaluate(logs)
        shape_logs = logs[: len(belief.dims), :, 0]
        cost = np.array([c.cost for c in candidates])
        return _Pool(candidates, _keys(shape_logs), real, cost, value, jac, belief.form_variance(shape_logs))

    def labels(self, i: int) -> list[str]:
        """The trunk of each branch of a candidate."""
        chosen = self.candidates[i]
        return [chosen.trunk_id or f"new {chosen.init_seed}"] * len(chosen.budgets)


Made = dict[tuple, tuple[np.ndarray, list[str]]]  # rows that count as made, by shape: (jac [m, P], trunk names [m])


def _made(belief: Belief) -> Made:
    made: Made = {}
    for i, key in enumerate(_keys(belief.logs[: len(belief.dims)])):
        _add(made, key, belief.jac[:, i : i + 1].T, [belief.trunk[i]])
    return made


def _add(made: Made, key: tuple, jac: np.ndarray, names: list[str]) -> None:
    old_jac, old_names = made.get(key, (np.empty((0, jac.shape[1])), []))
    made[key] = np.concatenate([old_jac, jac]), [*old_names, *names]


def _keys(shape_logs: np.ndarray) -> list[tuple]:
    return [tuple(row) for row in shape_logs.T.round(9).tolist()]


def _innovations(belief: Belief, pool: _Pool, made: Made) -> np.ndarray:
    """The rows that each candidate adds [C, B, P], white and independent of what is made.

    With rows o made and c new of one shape, V their covariance: S^-1/2 (J_c - V_co V_oo^-1 J_o), S the Schur complement. So
    a branch says only what its trunk has not said, a seed what is not the shape's own.
    """
    count, real = pool.real.sum(1), pool.real[:, :, None]
    rows = np.where(real, pool.jac, 0.0)
    # a new shape: (J - kappa x trunk mean) / row s.d.
    kappa = 1 - belief.row_sd / np.sqrt(belief.row_sd**2 + count * (belief.trunk_sd**2 + pool.variance))
    mean = rows.sum(1, keepdims=True) / count[:, None, None]
    white = np.where(real, rows - kappa[:, None, None] * mean, 0.0) / belief.row_sd
    for i, key in enumerate(pool.keys):
        if key in made:
            old, names = made[key]
            labels, m = np.array([*names, *pool.labels(i)]), len(names)
            v = belief.row_sd**2 * np.eye(len(labels)) + belief.trunk_sd**2 * (labels[:, None] == labels)
            v = v + float(pool.variance[i])
            gain = np.linalg.solve(v[:m, :m], v[:m, m:]).T
            left = v[m:, m:] - gain @ v[:m, m:]
            white[i, : count[i]] = whitener_of(left) @ (pool.jac[i, : count[i]] - gain @ old)
    return white


def gains(white: np.ndarray, covariance: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fall of tr(weight covariance) [C] by rows white [C, B, P]: tr((I + J S J')^-1 J S K S J')."""
    through = white @ covariance  # [C, B, P]
    inner = np.eye(white.shape[1]) + through @ white.transpose(0, 2, 1)
    outer = through @ weight @ through.transpose(0, 2, 1)
    return np.linalg.solve(inner, outer).trace(axis1=1, axis2=2)


def choose(
    belief: Belief, candidates: Sequence[Candidate], num: int = 1, num_made: int = 0, checks: Checks = Checks()
) -> list[Pick]:
    """Make at most `num` picks in the order to make them, each chosen as if those before it were made.

    While the last of the checks did not come true the criterion is not believed, and new trunks are drawn at random with
    p ~ 1/cost; num_made, the picks made so far, seeds the draws. Raises UserError for an empty pool.
    """
    pool, made, covariance = _Pool.of(belief, candidates), _made(belief), belief.covariance
    open_, fresh = np.ones(len(candidates), bool), np.array([c.kind == "trunk" for c in candidates])
    trusted = checks.came_true(belief)
    picks: list[Pick] = []
    while len(picks) < num and open_.any():
        white = _innovations(belief, pool, made)
        if trusted or not (open_ & fresh).any():
            gain = gains(white, covariance, belief.weight)
            best = int(np.where(open_, gain / pool.cost, -np.inf).argmax())
        else:
            chance = np.where(open_ & fresh, 1 / pool.cost, 0.0)
            rng = np.random.default_rng([num_made, len(picks)])
            best = int(rng.choice(len(candidates), p=chance / chance.sum()))
        reason = "" if trusted else "at random, the cheaper the likelier, for the last check did not come true; "
        pick, covariance = _pick(belief, pool, best, white[best], covariance, reason)
        picks.append(pick)
        _add(made, pool.keys[best], pool.jac[best][pool.real[best]], pool.labels(best))
        # one trunk is one job: what else would run on it waits for the next round
        mine = pick.candidate.shape, pick.candidate.init_seed
        open_ &= np.array([(c.shape, c.init_seed) != mine for c in candidates])
    return picks


def check_pick(belief: Belief, candidates: Sequence[Candidate]) -> Pick:
    """Pick the run of the lowest predicted loss (the cheaper of equals) as a check. Raises UserError for an empty pool."""
    pool = _Pool.of(belief, candidates)
    best = int(np.lexsort((pool.cost, pool.value[:, -1].round(9)))[0])
    white = _innovations(belief, pool, _made(belief))
    reason = "the run nearest the target, to check the law there before it is trusted; "
    return dataclasses.replace(_pick(belief, pool, best, white[best], belief.covariance, reason)[0], is_check=True)


def _pick(
    belief: Belief, pool: _Pool, i: int, white: np.ndarray, covariance: np.ndarray, reason: str
) -> tuple[Pick, np.ndarray]:
    """Candidate i as a pick, and the covariance of phi after it; white [B, P]: the rows that it adds."""
    chosen, real, jac = pool.candidates[i], pool.real[i], pool.jac[i]
    through = white @ covariance
    after = covariance - through.T @ np.linalg.solve(np.eye(len(white)) + through @ white.T, through)
    variance = np.einsum("bp,pq,bq->b", jac, covariance, jac) + pool.variance[i]
    before, left = (float((belief.weight * c).sum()) for c in (covariance, after))
    what = {"trunk": "a new trunk", "branch": f"a branch of {chosen.trunk_id}", "seed": f"seed {chosen.init_seed}"}
    images = " and ".join(f"{n:.3g}" for n in chosen.budgets)
    why = f"{what[chosen.kind]} {chosen.shape.label} to {images} images, {chosen.cost:.3g} FLOPs: {reason}"
    why += f"expected regret {100 * before:.3g} % -> {100 * left:.3g} %"
    pick = Pick(
        chosen,
        regret_before=before,
        regret_after=left,
        predicted=tuple(np.exp(pool.value[i][real]).tolist()),
        prediction_sd=tuple(np.sqrt(variance + belief.noise_sd**2)[real].tolist()),
        is_check=False,
        why=why,
    )
    return pick, after


def should_stop(belief: Belief, checks: Checks) -> tuple[bool, str]:
    """Say (stop, why). Only a check that came true says stop; a small expected regret alone never does."""
    noise, regret = checks.noise_sd or belief.noise_sd, belief.expected_regret
    small = f"expected regret {100 * regret:.3g} % against a noise of {100 * noise:.3g} %"
    if not checks.made:
        return False, f"go on: no prediction near the target was put to the test yet ({small})"
    z = checks.error / checks.noise(belief)
    tested = f"the last check missed by {100 * checks.error:+.3g} % ({z:+.1f} noise s.d.)"
    if not checks.came_true(belief):
        return False, f"go on: {tested}, so the law is wrong near the target whatever it expects ({small})"
    if regret > noise:
        return False, f"go on: {small}; {tested}"
    return True, f"stop: {small}, and {tested}"


def whole_shape(belief: Belief, base: Shape) -> Shape:
    """Round the real optimum, each dimension down or up (width to head_dim, mlp_dim to 8), to the best buildable shape."""
    steps, ends = dict(width=base.head_dim, mlp_dim=8), []
    for name, x in belief.shape.items():
        step = steps.get(name, 1)
        ends.append([step * max(1, int(np.floor(x / step)) + up) for up in (0, 1)])
    shapes = [base.replace(**dict(zip(belief.dims, pick))) for pick in itertools.product(*ends)]
    flops = belief.geometry.flops({n: np.array([getattr(s, n) for s in shapes], float) for n in belief.dims}, head=True)
    images = np.exp(belief.log_budget) / flops
    return shapes[int(belief.evaluate(belief.logs_of(shapes, images))[0].argmin())]
