"""Our fits of published sweeps beside the published figures, and beside scipy started 100 times.

    python -m analysis.published.fits FOLDER [--json] [--out results/public_fits.json]

FOLDER is described in `analysis.published.sweeps`. Three parts: Gemstones (objectives and exponents against the authors', intervals by
model and by row), vision learning curves (what extrapolates, 72 curves) and scalebench (forms fitted to the cheap pool,
scored on the expensive region). Objectives and exponents are compared, never amplitudes: these trade off against the
floor. The times printed are not in the JSON, which is the same on every run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.published import sweeps as public
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law import fit as law
from sovit.law.fitter import Groups, loss_of, polish, solve
from sovit.law.forms import LAWS
from sovit.law.nnls import nnls

HUBER_DELTA = 1e-3  # of the Gemstones authors, on log loss
# file, terms, the authors' exponents, their E, as their repository prints them
GEMSTONES = (
    ("hot_100b+", ("num_params", "tokens"), (0.2591, 0.5973), 1.951),
    ("hot_100b+", ("width", "depth", "tokens"), (0.2607, 0.1416, 0.5310), 0.0),
    ("hot_100b+", ("width", "depth", "num_params", "tokens"), (0.2053, 0.4741, 0.3721, 0.5116), 1.487),
    ("cool_end", ("num_params", "tokens"), (0.3003, 0.5802), 2.075),
)
BOOTSTRAPPED = GEMSTONES[1][:2]
WINDOWS = {"all": 0.0, "n > 2e8": 2e8}
MIN_ROWS = 10  # of a curve within a window, for up to five parameters
GRID_STEP = 0.01  # of the exponent in `grid_fit`
NUM_STARTS, NUM_DRAWS = 100, 1000
CURVE_STARTS = 10  # of each of some 370 fits of a curve, where 8 of 10 starts find the lowest point
TOLERANCE = 1e-8  # of an objective above scipy's lowest
FINISHED = 5  # the best of scipy's starts, which are run on until they stop for good


def score(predicted: np.ndarray, y: np.ndarray) -> dict:
    """Root mean square and mean of ln(predicted / measured)."""
    residual = np.log(predicted / y)
    return dict(rmse=float(np.sqrt((residual**2).mean())), bias=float(residual.mean()), n=len(y))


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


def fit_columns(name: str, sweep: public.Sweep, terms: tuple[str, ...], **options) -> Fitted:
    """`solve` for the columns `terms` of a published sweep, rows as they are (no trunks). Options as of `solve`."""
    start = time.perf_counter()
    form = LAWS[name].build((), sweep.zero_line, terms)
    logs = np.log(np.stack([sweep.columns[t] for t in terms]))
    centre = logs.mean(1)
    u = logs - centre[:, None]
    solved = solve(form, u, sweep.y, np.arange(len(sweep.y)), whiten=False, **options)
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
    options = dict(groups=groups, delta=fitted.solved.delta, tolerance=1e-13)
    done = polish(form, fitted.u, fitted.solved.theta[None], np.log(fitted.y), **options)
    return float(done.objective[0])


def gemstones(folder: Path, num_starts: int = NUM_STARTS) -> list[dict]:
    """Each form fitted to all models (`train`) beside the authors' exponents, and, fitted to those up to 1.8 B
    parameters, scored on those above (`held_out`)."""
    rows = []
    for file, terms, exponents, floor in GEMSTONES:
        sweep = public.gemstones(folder, file)
        train, test = sweep.part(~sweep.held_out), sweep.part(sweep.held_out)
        whole = fit_columns("additive", sweep, terms, huber_delta=HUBER_DELTA)
        pinned = pinned_objective(whole, {f"a_{t}": e for t, e in zip(terms, exponents)})
        part = fit_columns("additive", train, terms, huber_delta=HUBER_DELTA)
        rows.append(
            dict(
                file=file,
                terms=terms,
                n=len(sweep.y),
                exponents=[whole.params[f"a_{t}"] for t in terms],
                floor=whole.params["eps"],
                published=dict(exponents=exponents, floor=floor, objective=pinned),
                train=score(whole.predict(sweep.columns), sweep.y),
                held_out=score(part.predict(test.columns), test.y),
                **optimum(whole, num_starts),
            )
        )
    return rows


def intervals(folder: Path, num_draws: int = NUM_DRAWS) -> dict:
    """90 % intervals of the exponents of BOOTSTRAPPED: whole models resampled, and rows, as if each were a run."""
    file, terms = BOOTSTRAPPED
    sweep = public.gemstones(folder, file)
    out: dict = dict(file=file, terms=terms, num_draws=num_draws)
    for kind, clusters in (("models", sweep.clusters), ("rows", np.arange(len(sweep.y)))):
        options = dict(terms=terms, clusters=clusters, huber_delta=HUBER_DELTA, bootstrap=num_draws, extrapolate=False)
        fitted = law.fit("additive", sweep.columns, sweep.y, **options)
        ends = [(fitted.intervals[f"a_{t}"]["pairs_low"], fitted.intervals[f"a_{t}"]["pairs_high"]) for t in terms]
        out[kind] = dict(zip(terms, ends))
        out[f"{kind}_converged"] = fitted.diagnostics["draws"]["pairs"]["converged"]
    out["width_ratio"] = {t: float(np.ptp(out["models"][t]) / np.ptp(out["rows"][t])) for t in terms}
    return out


def grid_fit(sweep: public.Sweep, step: float = GRID_STEP) -> dict:
    """eps + beta (n/1e9)^-c with c on a grid and the rest by NNLS on relative error: how the recorded figures were made."""
    n = sweep.columns["num_examples"] / 1e9
    c = np.arange(1, round(2 / step)) * step
    power = n ** -c[:, None]  # [grid, n]
    amplitude, objective = nnls(np.stack([np.ones_like(power), power], 1) / sweep.y, np.ones(len(sweep.y)))
    best = int(objective.argmin())
    return dict(c=float(c[best]), eps=float(amplitude[best, 0]), beta=float(amplitude[best, 1]))


def vision(folder: Path, num_starts: int = CURVE_STARTS) -> dict:
    """Every curve, by every form and window: fitted where the publishers train, scored where they extrapolate."""
    recorded, curves = [], []
    for (model, task), sweep in public.vision(folder).items():
        test = sweep.part(sweep.held_out)
        for window, lowest in WINDOWS.items():
            train = sweep.part(~sweep.held_out & (sweep.columns["num_examples"] > lowest))
            if len(train.y) < MIN_ROWS:
                continue
            if task == "inet_10" and model.startswith("ViT"):
                found = grid_fit(train)
                predicted = found["eps"] + found["beta"] * (test.columns["num_examples"] / 1e9) ** -found["c"]
                recorded.append(dict(model=model, window=window) | found | score(predicted, test.y))
            for form, given in CURVE_FORMS.items():
                # squared log residuals, as in the publishers' code; a curve is one run, so rows are taken as they are
                whole = fit_columns(form, given(train), ("num_examples",), loss="log_squares")
                curves.append(
                    dict(
                        model=model,
                        task=task,
                        window=window,
                        form=form,
                        n_fit=len(train.y),
                        c=whole.params["c"],
                        floor=whole.params["eps"],
                        **score(whole.predict(test.columns), test.y),
                        **optimum(whole, num_starts),
                    )
                )
    return dict(recorded=recorded, curves=curves, summary=curve_summary(curves))


def without_line(sweep: public.Sweep) -> public.Sweep:
    return public.Sweep(sweep.columns, sweep.y, sweep.clusters, sweep.held_out)


# the forms a learning curve is fitted with, and what each is told: `bounded` knows the error of a guess
CURVE_FORMS = {"additive": without_line, "shifted": without_line, "bounded": lambda sweep: sweep}


def curve_summary(curves: Sequence[Mapping]) -> list[dict]:
    """By window and form: median and mean extrapolation RMSE, bias, and the share of curves on which it is the lowest."""
    out = []
    for window in dict.fromkeys(c["window"] for c in curves):
        rmse = {
            form: np.array([c["rmse"] for c in curves if c["window"] == window and c["form"] == form])
            for form in CURVE_FORMS
        }
        lowest = np.min(list(rmse.values()), 0)
        for form in CURVE_FORMS:
            bias = np.array([c["bias"] for c in curves if c["window"] == window and c["form"] == form])
            out.append(
                dict(
                    window=window,
                    form=form,
                    num_curves=len(bias),
                    median_rmse=float(np.median(rmse[form])),
                    mean_rmse=float(rmse[form].mean()),
                    median_bias=float(np.median(bias)),
                    mean_bias=float(bias.mean()),
                    share_too_low=float((bias < 0).mean()),
                    share_won=float((rmse[form] == lowest).mean()),
                )
            )
    return out


def nearest(train: public.Sweep, test: public.Sweep) -> np.ndarray:
    """The loss of the nearest training row in log columns, each divided by its spread."""
    logs = [np.log(np.stack(list(part.columns.values()), 1)) for part in (train, test)]
    spread = logs[0].std(0) + 1e-12
    distance = (((logs[1][:, None] - logs[0][None]) / spread) ** 2).sum(2)
    return train.y[distance.argmin(1)]


def scalebench(folder: Path, num_starts: int = NUM_STARTS) -> list[dict]:
    """Every group whose law is a sum of powers: ours in all its columns, in the first two or one, and the nearest run."""
    rows = []
    for family, (terms, _) in public.POWER_SUMS.items():
        for group, sweep in public.scalebench(folder, family).items():
            train, test = sweep.part(~sweep.held_out), sweep.part(sweep.held_out)
            smaller = terms[:2] if len(terms) > 2 else terms[:1]  # N and D of three columns, the size of two
            tries = [("additive", terms), ("power_mean", terms), ("additive", smaller)]
            for form, columns in tries:
                fitted = fit_columns(form, train, columns)
                rows.append(
                    dict(
                        family=family,
                        group=group,
                        form=form,
                        terms=columns,
                        n_fit=len(train.y),
                        exponents=[fitted.params.get(f"a_{t}", fitted.params.get("c")) for t in columns],
                        train_rmse=score(fitted.predict(train.columns), train.y)["rmse"],
                        **score(fitted.predict(test.columns), test.y),
                        **optimum(fitted, num_starts),
                    )
                )
            rows.append(
                dict(family=family, group=group, form="nearest", terms=terms) | score(nearest(train, test), test.y)
            )
    return rows


def public_fits(folder: Path, num_starts: int = NUM_STARTS, num_draws: int = NUM_DRAWS, say=lambda line: None) -> dict:
    """All parts; `say` is told of each as it starts. Plain data, with `seconds` in the rows of fits."""
    say("Gemstones")
    found: dict = dict(gemstones=gemstones(folder, num_starts))
    say("Gemstones, bootstraps")
    found["intervals"] = intervals(folder, num_draws)
    say("vision learning curves (1 to 3 minutes)")
    found["vision"] = vision(folder)
    say("scalebench")
    found["scalebench"] = scalebench(folder, num_starts)
    found["not_expressible"] = public.NOT_POWER_SUMS
    fits = [row for part in (found["gemstones"], found["vision"]["curves"], found["scalebench"]) for row in part]
    fits = [row for row in fits if "scipy" in row]
    found["optimum"] = dict(
        num_fits=len(fits),
        num_starts=[num_starts, CURVE_STARTS],
        largest_excess=max(row["excess"] for row in fits),
        num_above=sum(row["excess"] > TOLERANCE for row in fits),
        tolerance=TOLERANCE,
        seconds=np.sum([row["seconds"] for row in fits], 0).tolist(),
    )
    return found


def timeless(found):
    """Without what differs from run to run."""
    if isinstance(found, dict):
        return {name: timeless(value) for name, value in found.items() if name != "seconds"}
    return [timeless(value) for value in found] if isinstance(found, (list, tuple)) else found


def text(found: Mapping) -> str:
    lines = ["Gemstones (2502.06857): exponents, ours / published at 4 digits, and log-RMSE (bias)"]
    for row in found["gemstones"]:
        ours, theirs = (" ".join(f"{e:.4f}" for e in x) for x in (row["exponents"], row["published"]["exponents"]))
        lines.append(
            f"  {row['file']:<10}{' '.join(row['terms']):<32}{ours} / {theirs}  E {row['floor']:.4f} /"
            f" {row['published']['floor']:.3f}  all {_score(row['train'])}, held out {_score(row['held_out'])}"
        )
        lines.append(
            f"{'':44}objective {row['objective']:.12f}, at the published exponents {row['published']['objective']:.12f},"
            f" scipy {row['scipy']:.12f} ({row['seconds'][0]:.2f} s, {row['seconds'][1]:.1f} s)"
        )
    known = found["intervals"]
    lines.append(
        f"\nExponents of {known['file']}, 90 % of {known['num_draws']} draws: by model, by row, ratio of widths"
    )
    for term in known["terms"]:
        by_model, by_row = (f"{known[kind][term][0]:.3f}-{known[kind][term][1]:.3f}" for kind in ("models", "rows"))
        lines.append(f"  {term:<10}{by_model}   {by_row}   {known['width_ratio'][term]:.1f}")
    lines.append("\nLearning curves of vision models (2209.06640), ImageNet 10-shot, grid fit as recorded")
    for row in found["vision"]["recorded"]:
        lines.append(f"  {row['model']:<10}{row['window']:<9} c {row['c']:.2f}  eps {row['eps']:.2f}  {_score(row)}")
    lines.append("All curves, scored where the publishers extrapolate")
    lines.append(f"  {'window':<9}{'form':<12}curves  median RMSE  mean  median bias  mean  too low  won")
    for row in found["vision"]["summary"]:
        lines.append(
            f"  {row['window']:<9}{row['form']:<12}{row['num_curves']:>6}{100 * row['median_rmse']:>11.1f} %"
            f"{100 * row['mean_rmse']:>6.1f}{100 * row['median_bias']:>+11.1f}{100 * row['mean_bias']:>+8.1f}"
            f"{row['share_too_low']:>8.0%}{row['share_won']:>7.0%}"
        )
    lines.append("\nscalebench (2604.22753): fitted to the cheap pool, scored on the expensive region")
    for row in found["scalebench"]:
        exponents = " ".join(f"{e:.3f}" for e in row.get("exponents", []))
        name = f"{row['family']} {row['group'] if row['group'] != 'all_data' else ''}"
        lines.append(f"  {name:<27}{row['form']:<11}{'+'.join(row['terms']):<32}{_score(row):<17}{exponents}")
    lines += [f"  {family}: not expressible; {why}" for family, why in found["not_expressible"].items()]
    best = found["optimum"]
    lines.append(
        f"\n{best['num_fits']} fits: our objective exceeds the lowest of scipy from {best['num_starts'][0]} starts"
        f" ({best['num_starts'][1]} for a learning curve) by"
        f" {best['largest_excess']:.1e} of itself at most, by more than {best['tolerance']:.0e} in {best['num_above']};"
        f" {best['seconds'][0]:.1f} s against {best['seconds'][1]:.1f} s"
    )
    return "\n".join(lines)


def _score(row: Mapping) -> str:
    return f"{row['rmse']:.4f} ({row['bias']:+.4f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print what is written instead of tables")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "public_fits.json")
    options = parser.parse_args(argv)
    try:
        found = public_fits(options.folder, say=lambda line: print(line, file=sys.stderr, flush=True))
        written = json.dumps(timeless(found), indent=1, allow_nan=False)
        written = (
            re.sub(r"[{\[][^{}\[\]]*[\]}]", lambda flat: " ".join(flat[0].split()), written) + "\n"
        )  # a fit a line
        write_atomic(options.out, written)
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(written if options.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
