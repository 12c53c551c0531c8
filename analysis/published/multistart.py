"""A form fitted to the columns of a published sweep, and the same problem given to scipy from many random starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.published.sweeps import Sweep
from sovit.law.forms import LAWS
from sovit.law.solver.fitter import Loss, Rows, solve
from sovit.law.solver.polish import Groups, Objective, loss_of, polish

NUM_STARTS = 100
FINISHED = 5  # the best of scipy's starts, which are run on until they stop for good


@dataclass(frozen=True)
class Fitted:
    """A form fitted to columns, with what a second optimiser needs to be given the same problem."""

    form: object
    centre: np.ndarray
    u: np.ndarray
    y: np.ndarray
    solved: object
    seconds: float

    def predict(self, columns: Mapping) -> np.ndarray:
        u = np.log(np.stack([columns[name] for name in self.form.terms])) - self.centre[:, None]
        return np.exp(self.form.evaluate(self.solved.theta[None], u)[0][0])

    @property
    def params(self) -> dict:
        raw = self.form.raw(self.solved.theta[None], self.centre)[0]
        return dict(zip(self.form.names, map(float, raw)))


def fit_columns(name: str, sweep: Sweep, terms: tuple[str, ...], **loss) -> Fitted:
    """`solve` for the columns `terms` of a published sweep, rows as they are (no trunks). loss: fields of `Loss`."""
    start = time.perf_counter()
    form = LAWS[name].build((), sweep.zero_line, terms)
    logs = np.log(np.stack([sweep.columns[t] for t in terms]))
    centre = logs.mean(1)
    u = logs - centre[:, None]
    solved = solve(Rows(form, u, sweep.y, np.arange(len(sweep.y))), Loss(**loss, whiten=False))
    return Fitted(form, centre, u, sweep.y, solved, time.perf_counter() - start)


def multistart(fitted: Fitted, num: int = NUM_STARTS, seed: int = 0) -> tuple[float, float]:
    """The lowest objective that scipy's L-BFGS-B finds from `num` random starts, with our gradient and bounds.

    Starts: exponents log-uniform within their bounds (at most 3), the mean loss shared out among amplitudes and floor at
    random. The FINISHED best are started again from where they stopped until nothing is gained. Returns the lowest
    objective and the share of starts that came within 1e-6 of it.
    """
    from scipy.optimize import minimize

    form, delta, log_y = fitted.form, fitted.solved.delta, np.log(fitted.y)
    low, high = form.bounds
    rng = np.random.default_rng(seed)

    def objective(theta):
        with np.errstate(all="ignore"):
            value, jac = form.evaluate(theta[None], fitted.u)
        if not (np.isfinite(value).all() and np.isfinite(jac).all()):  # every amplitude 0: the line search turns back
            return 1e10, np.zeros_like(theta)
        residual = value[0] - log_y
        slope = residual if np.isinf(delta) else np.clip(residual, -delta, delta)
        return scale * loss_of(residual, delta).sum(), scale * (jac[0] @ slope)

    def descend(theta):
        options = dict(maxiter=2000, maxfun=4000, ftol=1e-15, gtol=1e-12, maxcor=20)
        done = minimize(objective, theta, jac=True, bounds=list(zip(low, high)), method="L-BFGS-B", options=options)
        return done.fun, done.x

    linear = np.isinf(high)  # amplitudes and floor: what has no upper bound
    found = []
    for _ in range(num):
        theta = np.exp(rng.uniform(np.log(np.maximum(low, 1e-2)), np.log(np.minimum(high, 3.0))))
        theta[linear] = rng.dirichlet(np.ones(linear.sum())) * fitted.y.mean()
        scale = 1.0
        scale = 1 / objective(theta)[0]
        value, theta = descend(theta)
        found.append((value / scale, theta))
    found.sort(key=lambda f: f[0])
    for i, (value, theta) in enumerate(found[:FINISHED]):
        while True:
            scale = 1 / value
            again, theta = descend(theta)
            gain, value = value - again / scale, min(value, again / scale)
            if not gain > 1e-12 * value:
                break
        found[i] = value, theta
    values = np.array([f[0] for f in found])
    return float(values.min()), float((values < values.min() * (1 + 1e-6)).mean())


def optimum(fitted: Fitted, num_starts: int) -> dict:
    """Our objective beside the lowest of scipy's: `excess` = ours / scipy's - 1; `agreeing`, of its starts; seconds."""
    start = time.perf_counter()
    lowest, agreeing = multistart(fitted, num_starts)
    ours, seconds = fitted.solved.objective, [fitted.seconds, time.perf_counter() - start]
    return dict(objective=ours, scipy=lowest, excess=round(ours / lowest - 1, 10), agreeing=agreeing, seconds=seconds)


@dataclass(frozen=True)
class Pinned:
    """A form with the parameters named held at given values."""

    form: object
    values: Mapping[str, float]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = (limit.copy() for limit in self.form.bounds)
        for name, value in self.values.items():
            low[self.form.names.index(name)] = high[self.form.names.index(name)] = value
        return low, high

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.form.evaluate(theta, u)


def pinned_objective(fitted: Fitted, values: Mapping[str, float]) -> float:
    """The lowest objective at these exponents, over amplitudes and floor."""
    form, groups = Pinned(fitted.form, values), Groups.plain(np.arange(len(fitted.y)))
    problem = Objective(form, fitted.u, np.log(fitted.y), groups, fitted.solved.delta)
    done = polish(problem, fitted.solved.theta[None], tolerance=1e-13)
    return float(done.objective[0])
