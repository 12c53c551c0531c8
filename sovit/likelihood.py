"""The third interval: a profile of the whitened likelihood, with an F(1, nu) cut in place of chi-square.

For a quantity h (the ln of a growth exponent, or ln x of the optimum at a budget) the profile is the least loss among
all laws that give h a stated value; the interval is where 2 (loss - least loss) / s^2 stays below F(1, nu), s^2 being
the variance of a whitened residual and nu its degrees of freedom between trunks. Under Huber's loss the difference is
on another scale, E psi^2 / E psi' of its variance (Schrader & Hettmansperger 1980), which is taken off. A profile of
unwhitened rows, or with the chi-square cut, holds the truth in 64 to 82 % of cases instead of 90; neither is offered.

Each end is searched for by itself, all ends as one batch of the fitter: a law is held at h = target by one more
residual, (h - target) x a stiffness far above that of the data, and the target moves until the loss meets the cut. The
force of that residual leaves h a hair short of its target; what counts is h and the loss where the fit stands. An end
that no law reaches at the cut, where the profile is flat, is open: None. So is one where the fitter crawls along a
curved valley and does not get there in PASSES x STEPS iterations: open is then too wide. In simulations the profile holds a
little less than it says (results/coverage.jsonl); it stands beside the bootstraps and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sovit.allocate import law_columns
from sovit.bootstrap import LEVEL
from sovit.diagnose import EXPONENT_FLOOR, box, optimum_of
from sovit.fitter import Groups, Solved, free_columns, loss_of, polish
from sovit.forms import FALLING

STIFF = 1000.0  # how much stronger h is held than the data hold it
PASSES, STEPS, TOLERANCE = 8, 60, 1e-6  # targets tried an end, most need three; the fitter's limits at each
REACH = np.log(100.0)  # an end further than this factor from the estimate is open
STEEP = 1e6
PRECISION = 0.01  # of the cut, in units of t

# theta [R, P], quantity of each [R], a number that names each replicate [R] -> h [R] and its gradient [R, P]
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Held:
    """`form` with one more row, h times its stiffness: the fitter then holds h at the value that stands as that row's ln y.

    The last parameter names the replicate: no row moves with it, so the fitter leaves it where it is.
    """

    form: object
    measure: Measure
    which: np.ndarray  # [R], the quantity of each replicate
    stiffness: np.ndarray  # [R]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.form.bounds  # type: ignore[attr-defined]
        return np.r_[low, 0.0], np.r_[high, np.inf]

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        name = theta[:, -1].astype(int)
        value, jac = self.form.evaluate(theta[:, :-1], u[:, :-1])  # type: ignore[attr-defined]
        h, slope = self.measure(theta[:, :-1], self.which[name], name)
        slope = np.clip(np.nan_to_num(slope), -STEEP, STEEP)  # at a law whose optimum is nowhere
        wide = np.zeros((len(theta), theta.shape[1], u.shape[1]))
        wide[:, :-1, :-1] = jac
        wide[:, :-1, -1] = self.stiffness[name, None] * slope
        return np.concatenate([value, (self.stiffness[name] * h)[:, None]], 1), wide


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # trial laws may be absurd; the fitter turns them down
def profile(form, u, y, solved: Solved, measure: Measure, num: int, level: float = LEVEL) -> list[tuple]:
    """(low, high) of h for each of `num` quantities; None for an open end, or where there is no noise to measure by.

    u [K, n], y [n]: the rows that `solved` was fitted to, whitened by trunk.
    """
    from scipy.special import stdtrit  # not at import: prediction needs no scipy

    which, side = np.repeat(np.arange(num), 2), np.tile([-1.0, 1.0], num)
    ends = np.full(2 * num, np.nan)
    variance = _variance(solved)
    if variance > 0:
        cut, log_y = float(stdtrit(solved.dof, 0.5 + level / 2)), np.log(y)
        theta = np.tile(solved.theta, (2 * num, 1))
        best, slope = measure(theta, which, np.arange(2 * num))
        wide_u, groups = np.concatenate([u, np.zeros((len(u), 1))], 1), _with_a_row(solved.groups)
        spread = _spread(form, u, solved, slope, log_y)
        stiffness = np.sqrt(STIFF) / np.maximum(spread, 1e-12)
        reach = cut * np.sqrt(variance) * spread  # distance from the estimate aimed at
        live = np.isfinite(reach) & (reach > 0) & np.isfinite(best)
        reach = np.clip(reach, 1e-4, 1.0)
        stuck = np.zeros(2 * num, int)
        inner, outer = np.zeros((2, 2 * num)), np.full((2, 2 * num), np.inf)  # (distance, root) known on either side
        for _ in range(PASSES):
            at = np.flatnonzero(live)
            if not len(at):
                break
            wanted = np.tile(np.r_[log_y, 0.0], (len(at), 1))
            wanted[:, -1] = (stiffness * (best + side * reach))[at]
            held = _Held(form, measure, which, stiffness)
            start = np.column_stack([theta[at], at])
            done = polish(
                held, wide_u, start, wanted, groups=groups, delta=solved.delta, tolerance=TOLERANCE, cap=STEPS
            )
            theta[at] = done.theta[:, :-1]
            excess = loss_of(solved.groups.whiten(form.evaluate(theta[at], u)[0] - log_y), solved.delta).sum(1)
            root = np.sqrt(np.maximum(2 * (excess - solved.objective) / variance, 0.0))
            gone = side[at] * (measure(theta[at], which[at], at)[0] - best[at])
            found = done.converged & (np.abs(root - cut) < PRECISION * cut) & (gone > 0)
            ends[at[found]] = (best[at] + side[at] * gone)[found]
            stuck[at] = np.where((root < cut) & (gone < 0.5 * reach[at]), stuck[at] + 1, 0)
            open_end = (stuck[at] == 3) | ((root < cut) & (gone > REACH))
            for r, g, t, converged in zip(at, gone, root, done.converged):
                if t < cut and g > inner[0, r]:
                    inner[:, r] = g, t
                elif t >= cut and inner[0, r] < g < outer[0, r] and converged:
                    outer[:, r] = g, t
            reach = _next_reach(inner, outer, cut)
            live[at[found | (open_end & np.isinf(outer[0, at]))]] = False
        late = live & np.isfinite(outer[0])  # out of passes, with the end between two targets
        ends[late] = (best + side * reach)[late]
    return [tuple(None if np.isnan(e) else float(e) for e in ends[2 * i : 2 * i + 2]) for i in range(num)]


def _variance(solved: Solved) -> float:
    """What twice a difference of the loss is divided by: the variance of a whitened residual, on the scale of the loss."""
    from scipy.special import ndtr

    variance = solved.row_sd**2
    if solved.known_sd is not None:
        variance = float(1 / (1 / (solved.row_sd**2 + solved.known_sd**2)).mean())
    if not variance > 0 or np.isinf(solved.delta):
        return variance
    k = solved.delta / np.sqrt(variance)
    inside = 2 * ndtr(k) - 1  # E psi'
    square = inside - 2 * k * np.exp(-k * k / 2) / np.sqrt(2 * np.pi) + 2 * k * k * (1 - ndtr(k))  # E psi^2
    return float(variance * square / inside)


def _spread(form, u, solved: Solved, slope: np.ndarray, log_y) -> np.ndarray:
    """sqrt(g' (J J')^-1 g) of each slope g [M, P] over the parameters that are free: the linear s.d. at unit noise."""
    value, jac = form.evaluate(solved.theta[None], u)
    residual, columns = solved.groups.whiten(value - log_y)[0], solved.groups.whiten(jac)[0]
    free = free_columns(form, solved.theta, jac[0])
    weight = np.minimum(1.0, solved.delta / np.maximum(np.abs(residual), 1e-300))
    columns = columns[free]
    size = np.linalg.norm(columns, axis=1)
    unit = columns / size[:, None]
    inverse = np.linalg.pinv((unit * weight) @ unit.T, rcond=1e-10, hermitian=True)
    scaled = slope[:, free] / size
    return np.sqrt(np.maximum(np.einsum("mp,pq,mq->m", scaled, inverse, scaled), 0.0))


def _with_a_row(groups: Groups) -> Groups:
    """Groups of one more row, in a trunk of its own that nothing is taken off."""
    scale = None if groups.scale is None else np.r_[groups.scale, 1.0]
    return Groups(np.r_[groups.index, len(groups.kappa)], np.r_[groups.kappa, 0.0], scale)


def _next_reach(inner: np.ndarray, outer: np.ndarray, cut: float) -> np.ndarray:
    """The distance at which the root should meet the cut: it rises with distance, as a line where the loss is a parabola."""
    with np.errstate(invalid="ignore", divide="ignore"):
        between = inner[0] + (outer[0] - inner[0]) * np.clip((cut - inner[1]) / (outer[1] - inner[1]), 0.1, 0.9)
        beyond = inner[0] * np.clip(cut / inner[1], 1.1, 2.0)
    return np.where(np.isfinite(outer[0]), between, np.where(inner[0] > 0, beyond, 1.0))


def of_optimum(form, centre, geometry, grid: dict, ends, log_computes=()) -> tuple[Measure, int]:
    """ln of the growth exponent of each dimension between the computes `ends`, then ln x of each at every ln compute.

    Returns the measure and how many quantities it has: K (1 + number of ln computes), the dimensions running fastest.
    """
    k = len(grid)
    sign = np.array([-1.0 if name in FALLING else 1.0 for name in grid])  # the best patch shrinks as compute grows
    computes = [*np.log(ends), *log_computes]
    memory = [np.full((2 * k * (1 + len(log_computes)), k), np.nan) for _ in computes]  # where each optimum was last

    def at(i: int, theta, which, name):
        v, slope = optimum_slope(form, centre, theta, geometry, grid, computes[i], memory[i][name])
        memory[i][name] = v
        pick = np.arange(len(v)), which % k
        return v[pick], slope[pick]

    def measure(theta, which, name):
        h, gradient = np.empty(len(theta)), np.empty(theta.shape)
        grows = which < k
        if grows.any():
            (low, low_slope), (high, high_slope) = (at(i, theta[grows], which[grows], name[grows]) for i in (0, 1))
            span = sign[which[grows]] * (computes[1] - computes[0])
            s = np.maximum((high - low) / span, EXPONENT_FLOOR)
            h[grows] = np.log(s)
            moves = s > EXPONENT_FLOOR
            gradient[grows] = np.where(moves[:, None], (high_slope - low_slope) / (span * s)[:, None], 0.0)
        for i in range(len(log_computes)):
            mine = which // k == i + 1
            if mine.any():
                h[mine], gradient[mine] = at(i + 2, theta[mine], which[mine], name[mine])
        return h, gradient

    return measure, k * (1 + len(log_computes))


def of_function(function, num: int = 1) -> tuple[Measure, int]:
    """Quantities in closed form: function(theta [R, P]) -> h [R, num]."""

    def measure(theta, which, name):
        h, gradient = _numeric(function, theta)
        return h[np.arange(len(h)), which], gradient[np.arange(len(h)), which]

    return measure, num


def optimum_slope(form, centre, theta, geometry, grid: dict, log_compute: float, near=None) -> tuple:
    """ln x* of the optimum [R, K] and d ln x* / d theta [R, K, P], for theta [R, P].

    With v = ln x and L = ln f at v and n = t / F(e^v) images, the optimum has dL/dv = 0, hence (implicit functions)
    dv/dtheta = -(d2L/dv2)^-1 d2L/dv dtheta; a dimension on the edge of the box stays there. The derivatives are central
    differences around v, of L itself and of the form's own Jacobian. near [R, K]: an optimum close by, from which
    Newton's steps lead to this one; where they do not, or it is nan, the optimum is found from nothing.
    """
    if form.arms:
        return _numeric(lambda t: optimum_of(form, centre, t, geometry, grid, log_compute), theta)
    low, high = box(grid)
    v = np.full((len(theta), len(grid)), np.nan) if near is None else near.copy()
    slope = np.zeros((*v.shape, theta.shape[1]))
    left = np.arange(len(v))  # replicates whose optimum is not yet found
    for last in (*[False] * 8, True):
        cold = np.full(len(left), last) | np.isnan(v[left]).any(1)
        if cold.any():
            v[left[cold]] = optimum_of(form, centre, theta[left[cold]], geometry, grid, log_compute)
        gradient, curve, mixed = _around(form, centre, theta[left], geometry, grid, log_compute, v[left])
        still = ((v[left] <= low + 1e-9) & (gradient > 0)) | ((v[left] >= high - 1e-9) & (gradient < 0))
        curve = np.where(still[:, :, None] | still[:, None, :], 0.0, curve) + np.eye(len(grid)) * still[:, :, None]
        right = np.where(still[:, :, None], 0.0, np.concatenate([gradient[:, :, None], mixed], 2))
        answer = -_solve(curve, right)
        step, slope[left] = answer[:, :, 0], answer[:, :, 1:]
        v[left] = np.where(cold[:, None], v[left], np.clip(v[left] + np.clip(step, -0.7, 0.7), low, high))
        left = left[~(cold | (np.abs(step).max(1) < 1e-4))]  # the step after that is of the order of 1e-8
        if not len(left):
            break
    return v, slope


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right, with a little on the diagonal so that no dimension without any effect ends the run."""
    size = np.abs(matrix).max((1, 2), keepdims=True)
    return np.linalg.solve(matrix + (1e-12 * size + 1e-300) * np.eye(matrix.shape[1]), right)


def _around(form, centre, theta, geometry, grid: dict, log_compute, v) -> tuple:
    """dL/dv [R, K], d2L/dv2 [R, K, K] and d2L/dv dtheta [R, K, P] at v [R, K], each replicate's own."""
    k, step = v.shape[1], 1e-4
    single = step * np.eye(k)
    pairs = [(i, j) for i in range(k) for j in range(i)]
    both = np.array([single[i] + single[j] for i, j in pairs]).reshape(-1, k)
    offsets = np.concatenate([np.zeros((1, k)), single, -single, both, -both])  # [S, K]
    table = dict(zip(grid, np.exp(np.moveaxis(v[:, None] + offsets, 2, 0))))  # name -> [R, S]
    logs = law_columns(form.terms, table, np.exp(log_compute) / geometry.flops(table, head=False), geometry)
    value, jac = form.evaluate(theta, logs.transpose(1, 0, 2) - np.asarray(centre)[:, None])
    up, down = slice(1, k + 1), slice(k + 1, 2 * k + 1)
    diagonal = (value[:, up] + value[:, down] - 2 * value[:, :1]) / step**2
    curve = diagonal[:, :, None] * np.eye(k)
    for p, (i, j) in enumerate(pairs):
        plus, minus = 2 * k + 1 + p, 2 * k + 1 + len(pairs) + p
        whole = (value[:, plus] + value[:, minus] - 2 * value[:, 0]) / step**2
        curve[:, i, j] = curve[:, j, i] = (whole - diagonal[:, i] - diagonal[:, j]) / 2
    mixed = (jac[:, :, up] - jac[:, :, down]).transpose(0, 2, 1) / (2 * step)
    return (value[:, up] - value[:, down]) / (2 * step), curve, mixed


def _numeric(function, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """function(theta) [R, M] and its gradient [R, M, P] by central differences, for closed forms."""
    num, p = theta.shape
    step = 1e-6 * np.maximum(np.abs(theta), 1e-4)
    moved = theta[:, None, None] + np.array([1.0, -1.0])[:, None, None] * (step[:, None] * np.eye(p))[:, None]
    value = function(moved.reshape(-1, p)).reshape(num, 2, p, -1)  # moved [R, 2, P, P]
    return function(theta), ((value[:, 0] - value[:, 1]) / (2 * step)[:, :, None]).transpose(0, 2, 1)
