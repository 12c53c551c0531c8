"""Our fits of published sweeps beside the published figures, and beside scipy started 100 times.

    python -m analysis.published.fits FOLDER [--out FILE.json]

FOLDER is described in `analysis.published.sweeps`. There are three parts. Gemstones: objectives and exponents against the
authors', intervals by model and by row. Vision learning curves: what extrapolates, on 72 curves. Scalebench: forms
fitted to the cheap pool, scored on the expensive region. Objectives and exponents are compared, never amplitudes: these
trade off against the floor. The seconds printed are not in the JSON, which is the same on every run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.published import sweeps as public
from analysis.published.multistart import NUM_STARTS, fit_columns, optimum, pinned_objective
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law import fit as law
from sovit.law.solver.starts import nnls

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
NUM_DRAWS = 1000
CURVE_STARTS = 10  # of each of some 370 fits of a curve, where 8 of 10 starts find the lowest point
TOLERANCE = 1e-8  # of an objective above scipy's lowest


def score(predicted: np.ndarray, y: np.ndarray) -> dict:
    """Root mean square and mean of ln(predicted / measured)."""
    residual = np.log(predicted / y)
    return dict(rmse=float(np.sqrt((residual**2).mean())), bias=float(residual.mean()), n=len(y))


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
        ends = [(fitted.intervals[f"a_{t}"].pairs_low, fitted.intervals[f"a_{t}"].pairs_high) for t in terms]
        out[kind] = dict(zip(terms, ends))
        out[f"{kind}_converged"] = fitted.diagnostics.draws.pairs["converged"]
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
                whole = fit_columns(form, given(train), ("num_examples",), kind="log_squares")
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
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
    best = found["optimum"]
    print(
        f"{options.out}: {best['num_fits']} fits; the objective exceeds the lowest of {best['num_starts'][0]} scipy starts"
        f" ({best['num_starts'][1]} for a learning curve) by at most {best['largest_excess']:.1e} of itself, by more than"
        f" {best['tolerance']:.0e} in {best['num_above']}; {best['seconds'][0]:.1f} s against {best['seconds'][1]:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
