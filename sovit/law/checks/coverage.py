"""How often the intervals hold the truth: simulation from a planted law (a study), or from a fitted one (`of_fit`).

A set is one simulated data set: fitted, its two intervals made, and asked whether they hold the true value of each
quantity: the growth exponent of each dimension over the design's range of compute, and ln x of the best shape at
multiples of the largest compute. Nominal is LEVEL for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import LEVEL, both, interval, pairs_stretch, stretch
from sovit.law.checks import simulate as planted
from sovit.law.compute_optimum import Family
from sovit.law.design_matrix import prepare_fit, star
from sovit.law.exponents import EXPONENT_FLOOR, MAX_ABSENT, MAX_RATIO, amplitudes, optimum_of
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Loss, Rows, Solved, solve

KINDS = ("random_effects", "pairs")
REACHES = (10.0, 100.0)  # multiples of the largest compute at which the best shape is asked for
NO_BOUND = ("eps", "E", "xi", "beta", "s")  # parameters that may lie on a bound without harm
BAD = 1.05  # factor on the loss of a bad row or trunk


@dataclass(frozen=True)
class Setup:
    """What all sets of one simulation share: a form and a design."""

    rows: Rows
    strata: np.ndarray  # [G]
    family: Family
    ends: tuple[float, float]  # smallest and largest compute
    loss: Loss = Loss()
    reaches: tuple[float, ...] = REACHES

    @property
    def labels(self) -> list[tuple[str, str]]:
        """(quantity, dimension) of each column of `quantities`."""
        if not self.family.grid:
            return [("exponent", "num_params")]
        names = ["exponent", *(f"shape_{r:g}x" for r in self.reaches)]
        return [(name, dim) for name in names for dim in self.family.grid]

    def quantities(self, theta: np.ndarray) -> np.ndarray:
        """ln of the growth exponents (floored), then ln x of the optimum at each reach: [R, M] for theta [R, P]."""
        if not self.family.grid:  # N* ~ (N D)^s of chinchilla
            return np.log(theta[:, 4:5] / (theta[:, 3:4] + theta[:, 4:5]))
        computes = np.log([*self.ends, *(r * self.ends[1] for r in self.reaches)])
        tiled, at = np.tile(theta, (len(computes), 1)), np.repeat(computes, len(theta))
        v = optimum_of(self.family, tiled, at)
        v = v.reshape(len(computes), len(theta), -1)
        growth = (v[1] - v[0]) / (computes[1] - computes[0])
        return np.concatenate([np.log(np.maximum(growth, EXPONENT_FLOOR)), *v[2:]], 1)


def setup(form: str, design: planted.Design, zero_line: float | None = None) -> Setup:
    """A form on a planted design."""
    table, dims = design.columns, () if form == "chinchilla" else planted.DIMS
    dummy = np.exp(0.1 * np.sin(np.arange(len(design.trunk))))
    options = LawOptions(clusters=design.trunk, dims=dims or None, zero_line=zero_line)
    ready = prepare_fit(form, table, dummy, options)
    ready = dataclasses.replace(ready, arms=star(table, planted.DIMS)[1], index=design.trunk)
    grid = {d: np.unique(table[d]).tolist() for d in dims}
    ends = table["compute"].min(), table["compute"].max()
    family = Family(ready.form, ready.rows.centre, design.geometry, grid)
    return Setup(ready.rows, ready.strata, family, ends)


def one_set(s: Setup, log_y: np.ndarray, draws: int, rng: np.random.Generator) -> dict:
    """Fit one data set, log_y over the rows of the form: estimate [M], ends [2, M, 2] by KINDS, troubles."""
    form = s.rows.form
    rows = dataclasses.replace(s.rows, y=np.exp(log_y))
    solved = solve(rows, s.loss)
    estimate = s.quantities(solved.theta[None])[0]
    out: dict = dict(estimate=estimate, ends=np.empty((2, len(estimate), 2)), nu=solved.dof)
    done = both(rows, solved, draws, rng, s.strata)
    values = s.quantities(done.theta).reshape(2, draws, -1)
    for kind, widen in enumerate((stretch(solved.dof), pairs_stretch(s.strata))):
        out["ends"][kind] = [interval(column, widen, floor=None) for column in values[kind].T]
    low, high = form.bounds
    watched = [i for i, n in enumerate(form.names) if n.split("_")[0] not in NO_BOUND]
    theta = done.theta[:draws]
    on = (theta[:, watched] <= low[watched]) | (theta[:, watched] >= high[watched])
    wide = out["ends"][0, : max(len(s.family.grid), 1)]
    absent = (amplitudes(form, theta) <= 0).mean(0) if s.family.grid else 0.0
    lost = (absent > MAX_ABSENT) | (wide[:, 1] - wide[:, 0] > np.log(MAX_RATIO))
    return out | dict(on_bound=on.any(1).mean(), unidentified=lost.mean())


def summary(labels: Sequence[tuple[str, str]], true: np.ndarray, sets: list[dict]) -> dict:
    """Coverage, width, bias and spread by quantity. true [S, M]; `sets` as `one_set` gives them.

    coverage[kind][quantity]: {mean, se, by_dim, num}; the error is that of the mean over dimensions, set by set, for
    the dimensions of one set are not independent. width: median of ln(high / low).
    """
    ends, estimate = np.array([o["ends"] for o in sets]), np.array([o["estimate"] for o in sets])
    quantities = list(dict.fromkeys(name for name, _ in labels))
    out: dict = dict(coverage={}, width={})
    for i, kind in enumerate(KINDS):
        for quantity in quantities:
            at = [m for m, (name, _) in enumerate(labels) if name == quantity]
            low, high = np.moveaxis(ends[:, i, at], 2, 0)
            hit = (low <= true[:, at]) & (true[:, at] <= high)
            out["coverage"].setdefault(kind, {})[quantity] = dict(
                mean=float(hit.mean()),
                se=standard_error(hit),
                by_dim={labels[m][1]: float(h) for m, h in zip(at, hit.mean(0))},
                num=len(hit),
            )
            out["width"].setdefault(kind, {})[quantity] = np.median(high - low, 0).tolist()
    error = estimate - true
    middle = np.median(error, 0)
    for key, values in (("bias", middle), ("spread", np.median(np.abs(error - middle), 0) / 0.6745)):
        out[key] = {q: [float(v) for v, (name, _) in zip(values, labels) if name == q] for q in quantities}
    return out | {k: float(np.mean([o[k] for o in sets])) for k in ("on_bound", "unidentified", "nu")}


def standard_error(hit: np.ndarray) -> float:
    """Of the mean of hits [S, K]: between sets, and no less than that of one more miss (Agresti & Coull) in all."""
    num = len(hit)
    p = (hit.mean() * num + 2) / (num + 4)
    if num < 2:
        return float(np.sqrt(p * (1 - p) / (num + 4)))
    return float(max(hit.mean(1).std(ddof=1) / np.sqrt(num), np.sqrt(p * (1 - p) / (num + 4) / hit.shape[1])))


def table(lines: Sequence[dict]) -> str:
    """The study as a markdown table: coverage of headline / pairs in per cent, mean over dimensions."""
    out = [
        "| condition | sets | exponents | shape at 10x | shape at 100x | width of exponents | bias | unidentified |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def cell(line: dict, quantity: str) -> str:
        parts = [line["coverage"].get(kind, {}).get(quantity) for kind in KINDS]
        return " / ".join(f"{100 * c['mean']:.0f}±{100 * c['se']:.0f}" if c else "–" for c in parts)

    for right in (True, False):
        chosen = [line for line in lines if line["right"] == right]
        if chosen and not right:
            out.append("| *the form is wrong:* | | | | | | | |")
        for line in chosen:
            widths = line["width"]["random_effects"]["exponent"]
            cells = [cell(line, q) for q in ("exponent", *(f"shape_{r:g}x" for r in line["reaches"]))]
            wide = " ".join(f"{w:.2f}" for w in widths)
            bias = " ".join(f"{b:+.2f}" for b in line["bias"]["exponent"])
            name = line["name"].replace(" | ", ", ")
            out.append(
                f"| {name} | {line['sets']} | {' | '.join(cells)} | {wide} | {bias} | {line['unidentified']:.0%} |"
            )
    return "\n".join(out)


def of_fit(s: Setup, solved: Solved, num: int, draws: int = 99, seed: int = 0) -> dict:
    """Coverage where the fitted law is the truth, on its own design, with its own estimates of the noise.

    `num` sets, each refitted with `draws` of both bootstraps; what is held true is the fit's exponents
    and its best shape at 10 x the largest compute. What this cannot see is a form that is wrong.
    """
    rng = np.random.default_rng([seed, num])
    form, source = s.rows.form, s.rows.source
    clean = form.evaluate(solved.theta[None], s.rows.u)[0][0]
    sets, failed = [], 0
    for _ in range(num):
        trunk = solved.trunk_sd * rng.standard_normal(int(s.rows.trunk.max()) + 1)[s.rows.trunk]
        row = rng.standard_normal(int(source.max()) + 1)[source]
        try:
            sets.append(one_set(s, clean + trunk + solved.drawn_row_sd() * row, draws, rng))
        except np.linalg.LinAlgError:
            failed += 1
    if not sets:
        raise UserError(f"coverage={num}: none of the simulated data sets could be fitted; the law is not determined")
    true = np.tile(s.quantities(solved.theta[None])[0], (len(sets), 1))
    return dict(num=len(sets), failed=failed, draws=draws, level=LEVEL) | summary(s.labels, true, sets)


def words(result: dict) -> str:
    """A short paragraph of `of_fit` for a report."""
    names = dict(random_effects="the headline interval", pairs="the pairs bootstrap")
    parts = []
    for quantity, what in (("exponent", "the growth exponents"), ("shape_10x", "the best shape at 10 x the compute")):
        found = {kind: c[quantity] for kind, c in result["coverage"].items()}
        shares = ", ".join(f"{names[k]} {c['mean']:.0%} ± {c['se']:.0%}" for k, c in found.items())
        parts.append(f"{what}: {shares}")
    return (
        f"Were the fitted law true, with the noise estimated here, how often would these intervals hold it? In"
        f" {result['num']} simulated data sets on this design, nominal {result['level']:.0%}; {'; '.join(parts)}."
        " Coverage under the fitted form says nothing of a form that is wrong."
    )
