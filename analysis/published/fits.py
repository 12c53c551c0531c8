"""Our fits of published sweeps beside the published figures, and beside scipy started 100 times.

    python -m analysis.published.fits FOLDER [--out FOLDER]

FOLDER is described in `analysis.published.sweeps`. Gemstones: objectives and exponents against the authors'. Scalebench:
forms fitted to the cheap pool, scored on the expensive region. Objectives and exponents are compared, never amplitudes:
these trade off against the floor. Writes public_fits.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.publish import Result, run
from analysis.published import sweeps as public
from sovit.law.forms import LAWS
from sovit.law.solver.fitter import Loss, Rows, Solved, solve
from sovit.law.solver.polish import Groups, Objective, loss_of, polish

HUBER_DELTA = 1e-3  # of the Gemstones authors, on log loss
# file, terms, the authors' exponents, their E, as their repository prints them
GEMSTONES = (
    ("hot_100b+", ("num_params", "tokens"), (0.2591, 0.5973), 1.951),
    ("hot_100b+", ("width", "depth", "tokens"), (0.2607, 0.1416, 0.5310), 0.0),
    ("hot_100b+", ("width", "depth", "num_params", "tokens"), (0.2053, 0.4741, 0.3721, 0.5116), 1.487),
    ("cool_end", ("num_params", "tokens"), (0.3003, 0.5802), 2.075),
)
TOLERANCE = 1e-8  # of an objective above scipy's lowest
NUM_STARTS = 100
FINISHED = 5  # the best of scipy's starts, which are run on until they stop for good


@dataclass(frozen=True)
class Fitted:
    """A form fitted to columns, with what a second optimiser needs to be given the same problem."""

    form: object
    centre: np.ndarray
    u: np.ndarray
    y: np.ndarray
    solved: Solved

    def predict(self, columns: Mapping) -> np.ndarray:
        u = np.log(np.stack([columns[name] for name in self.form.terms])) - self.centre[:, None]
        return np.exp(self.form.evaluate(self.solved.theta[None], u)[0][0])

    @property
    def params(self) -> dict:
        raw = self.form.raw(self.solved.theta[None], self.centre)[0]
        return dict(zip(self.form.names, map(float, raw)))


def fit_columns(name: str, sweep: public.Sweep, terms: tuple[str, ...], **loss) -> Fitted:
    """`solve` for the columns `terms` of a published sweep, rows as they are (no trunks). loss: fields of `Loss`."""
    form = LAWS[name].build((), None, terms)
    logs = np.log(np.stack([sweep.columns[t] for t in terms]))
    centre = logs.mean(1)
    u, each = logs - centre[:, None], np.arange(len(sweep.y))
    solved = solve(Rows(form, u, sweep.y, each, each, centre), Loss(**loss, whiten=False))
    return Fitted(form, centre, u, sweep.y, solved)


def multistart(fitted: Fitted, num: int = NUM_STARTS) -> tuple[float, float]:
    """The lowest objective that scipy's L-BFGS-B finds from `num` random starts, with our gradient and bounds.

    Starts: exponents log-uniform within their bounds (at most 3), the mean loss shared out among amplitudes and floor at
    random. The FINISHED best are started again from where they stopped until nothing is gained. Returns the lowest
    objective and the share of starts that came within 1e-6 of it.
    """
    from scipy.optimize import minimize

    form, delta, log_y = fitted.form, fitted.solved.delta, np.log(fitted.y)
    low, high = form.bounds
    rng = np.random.default_rng(0)

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
    """Our objective beside the lowest of scipy's: `excess` = ours / scipy's - 1; `agreeing`, of its starts."""
    lowest, agreeing = multistart(fitted, num_starts)
    ours = fitted.solved.objective
    return {"objective": ours, "scipy": lowest, "excess": round(ours / lowest - 1, 10), "agreeing": agreeing}


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


def gemstones(folder: Path, num_starts: int = NUM_STARTS) -> list[dict]:
    """Each form of GEMSTONES fitted to all models, beside the authors' exponents and the objective at them."""
    rows = []
    for file, terms, exponents, floor in GEMSTONES:
        sweep = public.gemstones(folder, file)
        fitted = fit_columns("additive", sweep, terms, huber_delta=HUBER_DELTA)
        at_theirs = pinned_objective(fitted, {f"a_{t}": e for t, e in zip(terms, exponents)})
        ours = {"exponents": [fitted.params[f"a_{t}"] for t in terms], "floor": fitted.params["eps"]}
        theirs = {"exponents": exponents, "floor": floor, "objective": at_theirs}
        row = {"file": file, "terms": terms, "n": len(sweep.y)} | ours | {"published": theirs}
        rows.append(row | optimum(fitted, num_starts))
    return rows


def scalebench(folder: Path, num_starts: int = NUM_STARTS) -> list[dict]:
    """Every group whose law is a sum of powers: forms in all its columns, and a sum in the first two or one."""
    rows = []
    for family, (terms, _) in public.POWER_SUMS.items():
        smaller = terms[:2] if len(terms) > 2 else terms[:1]  # N and D of three columns, the size of two
        for group, sweep in public.scalebench(folder, family).items():
            train, test = sweep.part(~sweep.held_out), sweep.part(sweep.held_out)
            for form, columns in (("additive", terms), ("power_mean", terms), ("additive", smaller)):
                fitted = fit_columns(form, train, columns)
                residual = np.log(fitted.predict(test.columns) / test.y)
                row = {"family": family, "group": group, "form": form, "terms": columns, "n_fit": len(train.y)}
                row["exponents"] = [fitted.params.get(f"a_{t}", fitted.params.get("c")) for t in columns]
                row |= {"rmse": float(np.sqrt((residual**2).mean())), "bias": float(residual.mean()), "n": len(test.y)}
                rows.append(row | optimum(fitted, num_starts))
    return rows


def analyse(options: argparse.Namespace) -> Result:
    found: dict = {"gemstones": gemstones(options.folder), "scalebench": scalebench(options.folder)}
    excess = [row["excess"] for part in found.values() for row in part]
    above, largest = sum(e > TOLERANCE for e in excess), max(excess)
    about = {"num_fits": len(excess), "num_starts": [NUM_STARTS], "tolerance": TOLERANCE}
    found["optimum"] = about | {"largest_excess": largest, "num_above": above}
    text = f"{len(excess)} fits: the objective exceeds the lowest of {NUM_STARTS} scipy starts by at most {largest:.1e}"
    return Result(found, f"{text} of itself, by more than {TOLERANCE:.0e} in {above}", "public_fits.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
