"""How fast is the law engine, and does it find the global optimum? Everything side by side with scipy in one run.

python tests/bench/bench_law.py                 bootstraps, the point fit against 100 starts of scipy, 1e5 rows
python tests/bench/bench_law.py --multistart    every form and loss, three data sets each, 100 starts of scipy
Times are of the process, one thread: run with OMP_NUM_THREADS=1.
"""

import argparse
import resource
import time
from functools import partial
from typing import Any

import numpy as np
import planted
from scipy.optimize import least_squares, minimize

from sovit.law import fit as law
from sovit.law.bootstrap import pairs, random_effects
from sovit.law.design_matrix import prepare_fit
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Loss, solve
from sovit.law.solver.polish import loss_of

STARTS = 100
DELTAS = {"squared": np.inf, "Huber 1e-3": 1e-3, "Huber .005": 5e-3}
FORMS = tuple(name for name in LAWS if name != "additive")  # which is joint over other columns


def timed(f, *arguments, **options) -> tuple[float, Any]:
    """Seconds of the process that a call takes, and what it returns."""
    start = time.process_time()
    value = f(*arguments, **options)
    return time.process_time() - start, value


def rows_of(name: str, seed: int, sd: float = 0.005):
    """A star (with corners where the form needs them to be determined) of the planted law, as rows of a form."""
    corners = [(w, d, m) for w in (608, 1152) for d in (8, 20) for m in (1088, 3072)] if name == "joint_n" else ()
    table, trunk = planted.star(extra=tuple(corners))
    table["num_params"] = Geometry(**planted.GEOMETRY).num_params(table)
    y = planted.loss(table, power=1.9 if name == "bounded" else None) * planted.noise(trunk, sd, seed)
    dims = planted.DIMS if LAWS[name].uses_dims else ()
    zero_line = planted.ZERO_LINE if LAWS[name].bounded else None
    return prepare_fit(name, table, y, LawOptions(clusters=trunk, dims=dims or None, zero_line=zero_line))


def random_starts(form, num: int, seed: int) -> np.ndarray:
    rng, (low, high) = np.random.default_rng(seed), form.bounds
    even = rng.uniform(low, np.minimum(high, 3), (num, len(low)))
    return np.where(np.isinf(high), np.exp(rng.uniform(-7, 0, even.shape)), even)


def lbfgs(form, u, log_y, delta, starts) -> np.ndarray:
    """Objectives of scipy's L-BFGS-B: analytic gradient, log-amplitudes, objective x 1e4, up to 2,000 iterations."""
    low, high = form.bounds
    logged = np.isinf(high)
    bounds = [(-30, 10) if is_log else pair for is_log, *pair in zip(logged, low, high)]

    def f(p):
        theta = np.where(logged, np.exp(np.where(logged, p, 0)), p)
        value, jac = form.evaluate(theta[None], u)
        residual = value[0] - log_y
        slope = jac[0] @ np.clip(residual, -delta, delta)
        return 1e4 * loss_of(residual, delta).sum(), 1e4 * np.where(logged, slope * theta, slope)

    options = dict(maxiter=2000, maxfun=4000, ftol=1e-15, gtol=1e-9)
    first = np.where(logged, np.log(starts), starts)
    return (
        np.array([minimize(f, p, jac=True, method="L-BFGS-B", bounds=bounds, options=options).fun for p in first]) / 1e4
    )


def trust_region(form, u, log_y, delta, starts) -> np.ndarray:
    """Objectives of scipy's least_squares, amplitudes linear."""
    low, high = form.bounds
    loss = dict(loss="linear") if np.isinf(delta) else dict(loss="huber", f_scale=delta)
    options = dict(bounds=(low, high), x_scale="jac", max_nfev=500, xtol=1e-12, ftol=1e-12, gtol=1e-12)

    def one(start):
        done = least_squares(
            lambda t: form.evaluate(t[None], u)[0][0] - log_y,
            np.clip(start, low + 1e-9, high - 1e-9),
            lambda t: form.evaluate(t[None], u)[1][0].T,
            **loss,
            **options,
        )
        return loss_of(done.fun, delta).sum()

    return np.array([one(start) for start in starts])


def ours(rows, delta):
    loss = dict(kind="log_squares") if np.isinf(delta) else dict(huber_delta=delta)
    return solve(rows, Loss(whiten=False, **loss))


def multistart(forms, num: int, num_sets: int) -> None:
    """Our objective against the best of `num` starts of each of scipy's two. Ours may not be above by 1e-8."""
    print(
        f"{'form':13}{'loss':12}{'set':>4}{'ours':>17}{'scipy best':>17}{'ours/best-1':>13}{'spread':>9}"
        f"{'ours s':>8}{'L-BFGS s':>10}{'reach 1e-6':>11}{'least_sq s':>11}{'reach':>6}"
    )
    worst = -np.inf
    for name in forms:
        for label, delta in DELTAS.items():
            for seed in range(num_sets):
                rows = rows_of(name, seed).rows
                log_y, starts = np.log(rows.y), random_starts(rows.form, num, seed)
                found, spent = {}, {}
                spent["ours"], solved = min((timed(ours, rows, delta) for _ in range(3)), key=lambda t: t[0])
                for way in (lbfgs, trust_region):
                    spent[way], found[way] = timed(way, rows.form, rows.u, log_y, delta, starts)
                best = min(f.min() for f in found.values())
                excess = solved.objective / best - 1
                worst = max(worst, excess)
                least = min(best, solved.objective)
                reach = {way: int((f < least * (1 + 1e-6)).sum()) for way, f in found.items()}
                print(
                    f"{name:13}{label:12}{seed:4}{solved.objective:17.10g}{best:17.10g}{excess:13.1e}{solved.spread:9.0e}"
                    f"{spent['ours']:8.3f}{spent[lbfgs]:10.2f}{reach[lbfgs]:11}"
                    f"{spent[trust_region]:11.2f}{reach[trust_region]:6}",
                    flush=True,
                )
    print(f"largest excess of ours over scipy's best: {worst:.1e} ({'holds' if worst <= 1e-8 else 'FAILS'} at 1e-8)")


def bootstraps() -> None:
    """1,000 refits of a star, each bootstrap alone."""
    for name in ("joint", "bounded", "sovit"):
        ready = rows_of(name, 0)
        solved = solve(ready.rows)
        rng = np.random.default_rng(0)
        made = {
            "random effects": timed(random_effects, ready.rows, solved, 1000, rng),
            "pairs": timed(pairs, ready.rows, solved, 1000, rng, ready.strata),
        }
        words = [
            f"{kind} {spent:.2f} s ({done.converged.mean():.3f} converged)" for kind, (spent, done) in made.items()
        ]
        print(f"{name:8} 1,000 refits: {', '.join(words)}", flush=True)


def against_scipy() -> None:
    """The point fit (starts and polish) and scipy's multi-starts, alternating in one run."""
    for name in ("joint", "sovit"):
        rows = rows_of(name, 0).rows
        log_y, starts = np.log(rows.y), random_starts(rows.form, STARTS, 0)
        for label, delta in DELTAS.items():
            solved = ours(rows, delta)
            spent = np.median([timed(ours, rows, delta)[0] for _ in range(5)])
            text = f"{name:8} {label:11} ours {spent:.4f} s {solved.objective:.10g};"
            for way in (lbfgs, trust_region):
                theirs, found = timed(way, rows.form, rows.u, log_y, delta, starts)
                excess = solved.objective / found.min() - 1
                title = "L-BFGS-B" if way is lbfgs else "least_squares"
                text += f" {STARTS} x {title} {theirs:.2f} s = {theirs / spent:.0f} times, ours/best-1 {excess:+.1e};"
            print(text, flush=True)


def many_rows(num_trunks: int = 25_000, draws: int = 100) -> None:
    """Random shapes of four branches each."""
    rng = np.random.default_rng(0)
    shapes = np.exp(rng.uniform(np.log([256, 4, 512]), np.log([2048, 48, 8192]), (num_trunks, 3))).round()
    table = planted.columns(np.repeat(shapes, 4, 0), np.tile([32e6, 64e6, 128e6, 256e6], num_trunks))
    trunk = np.repeat(np.arange(num_trunks), 4)
    y = planted.loss(table) * planted.noise(trunk, 0.01, 0)
    fit = partial(law.fit, "joint", table, y, clusters=trunk, geometry=planted.GEOMETRY)
    for bootstrap in (0, draws):
        spent, found = timed(fit, bootstrap=bootstrap)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        a = [round(found.params[f"a_{d}"], 4) for d in planted.DIMS]
        print(
            f"joint, {len(y):,} rows, bootstrap={bootstrap}: {spent:.1f} s, peak memory {peak:.2f} GiB; exponents {a},"
            f" planted {planted.EXPONENTS.tolist()}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--multistart", action="store_true", help="every form against scipy's multi-starts")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--starts", type=int, default=STARTS)
    parser.add_argument("--sets", type=int, default=3)
    options = parser.parse_args()
    if options.multistart:
        return multistart(options.forms, options.starts, options.sets)
    table, trunk = planted.star()
    y = planted.loss(table) * planted.noise(trunk, 0.005, 0)
    common = dict(clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False)
    for form, more in (("joint", {}), ("bounded", dict(zero_line=10.0)), ("sovit", {})):
        fit = partial(law.fit, form, table, y, **common, **more)
        once, both = timed(fit)[0], timed(fit, bootstrap=1000)[0]
        print(f"{form:8} law.fit {once:.3f} s; with 1,000 draws of each interval {both:.2f} s", flush=True)
    bootstraps()
    against_scipy()
    many_rows()


if __name__ == "__main__":
    main()
