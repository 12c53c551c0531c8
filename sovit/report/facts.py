"""The values that a report shows beyond law.json: plain data for report.json, no sentences.

`data_facts` describes the rows, `law_facts` the forms and their scores, `budget_facts` what a law says at a budget.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.law.checks.sensitivity import extrapolation_cuts
from sovit.law.design_matrix import star
from sovit.law.diagnostics import SIGNIFICANT
from sovit.law.extrapolation import Score
from sovit.law.fitted_law import Fit, plain
from sovit.law.forms import WHOLE_SHAPE
from sovit.ledger.measurements import LEVEL_WIDTH, Measurements, levels
from sovit.predict.growth_rules import other_rules
from sovit.predict.law_at_budget import TOKENS, ladder
from sovit.predict.patch_tradeoff import trade
from sovit.predict.recommend import Recommendation, best_shape, form_dependence
from sovit.spec.named_shapes import named_shape
from sovit.spec.shape import DIMENSIONS, Shape

BASELINES = ("compute_only", "nearest", "chinchilla")  # blind to shape
MIN_SEEDS, MIN_SEEDED_SHAPES = 3, 2  # what every study owes: 3 seeds at 2 shapes
FRONTIER_POINTS = 6  # budgets of the frontier, from the least run to 100 x the largest
NEXT_BUDGET = 10**0.5  # the default recommendation is for this many times the largest budget run
USUAL_IMAGES = 3e8  # a common pre-training run, to say how small these are


# the rows -------------------------------------------------------------------------------------------------------------


def data_facts(data: Measurements, dims) -> dict:
    """Count rows, seeds, budgets and recipes, and what makes the rows hard to compare."""
    shapes = data.shapes()
    by_shape: dict = {}
    for shape, row in zip(shapes, data.rows):
        by_shape.setdefault(shape, []).append(row)
    rates = [row["peak_lr"] for row in data.rows if row.get("peak_lr")]
    zero_line = data.zero_line
    return dict(
        ledgers=[Path(path).name for path in data.paths],
        metric=data.metric,
        num_rows=len(data.y),
        num_trunks=len({row["trunk_id"] for row in data.rows}),
        num_shapes=len(by_shape),
        same={name: data.rows[0].get(name) for name in ("data", "preset", "num_classes", "objective")},
        design=_design(data, dims, shapes),
        budgets={n: levels(data.columns[n])[1].tolist() for n in ("train_flops", "num_examples") if n in data.columns},
        seeds=_seeds(by_shape) if "init_seed" in data.columns else None,
        data_seeds=_common_data_seeds(by_shape) if "data_seed" in data.columns else None,
        rates=dict(low=min(rates), high=max(rates)) if rates else None,
        shapes_at_several_rates=sum(len({row.get("peak_lr") for row in rows}) > 1 for rows in by_shape.values()),
        parametrisations=sorted({str(row["parametrisation"]) for row in data.rows if row.get("parametrisation")}),
        mixed={
            name: values for name in ("parametrisation", "batch_size", "weight_decay") if (values := _mix(data, name))
        },
        zero_line=zero_line,
        above_zero_line=0 if zero_line is None else int((data.y > zero_line).sum()),
        statuses=dict(sorted(data.statuses.items())),
        left_out=[dict(run_id=run_id, reason=reason) for run_id, reason in data.left_out],
        reasons=sorted(Counter(reason for _, reason in data.left_out).most_common()),
        notes=data.notes,
        usual_train_flops=USUAL_IMAGES * named_shape("B/16").train_flops_per_image(),
    )


def _design(data: Measurements, dims, shapes) -> dict | None:
    """{centre: {dimension: value}, shapes: {dimension, "centre" or "corner": number of shapes}} of a star."""
    if not dims:
        return None
    centre, arms = star(data.columns, dims)
    count = Counter(arms[list(dict(zip(shapes, range(len(shapes)))).values())].tolist())
    return dict(centre={d: float(v) for d, v in centre.items()}, shapes=dict(count), corners=count["corner"])


def _seeds(by_shape: Mapping) -> dict:
    """{counts: [[seeds, number of shapes]], enough}: seeds of one shape at one learning rate."""
    pairs: dict = {}
    for shape, rows in by_shape.items():
        for row in rows:
            pairs.setdefault((shape, row.get("peak_lr")), set()).add((row.get("init_seed"), row.get("data_seed")))
    count = Counter(len(seeds) for seeds in pairs.values())
    enough = sum(n for num_seeds, n in count.items() if num_seeds >= MIN_SEEDS) >= MIN_SEEDED_SHAPES
    return dict(counts=[list(item) for item in sorted(count.items(), reverse=True)], enough=enough)


def _common_data_seeds(by_shape: Mapping) -> list:
    """Data seeds that every shape was trained with."""
    return sorted(set.intersection(*({row["data_seed"] for row in rows} for rows in by_shape.values())))


def _mix(data: Measurements, name: str) -> list[str]:
    """The values of a recipe's field where the rows have several."""
    values = {str(row[name]) if row.get(name) is not None else "not said" for row in data.rows}
    return sorted(values) if len(values) > 1 else []


# the forms ------------------------------------------------------------------------------------------------------------


def law_facts(data: Measurements, fits: Mapping[str, Fit], headline: str, refits: bool) -> dict:
    """{equation, floor, misfit, scores, better_baselines, cuts, wins} of the headline law and the forms beside it."""
    fit, scores = fits[headline], extrapolation_table(fits)
    cuts = extrapolation_cuts(data, fits) if refits else []
    scored = [cut["forms"] for cut in cuts if _rmse(cut["forms"], headline) is not None]
    return dict(
        equation=equation(fit),
        floor=_floor(fit),
        misfit=_misfit(fit),
        scores=scores,
        better_baselines=_better(scores, headline),
        cuts=cuts,
        cut_errors=[forms[headline]["rmse"] for forms in scored],
        wins=sum(not _better(forms, headline) for forms in scored),
    )


def _misfit(fit: Fit) -> float | None:
    """Residuals over the noise between seeds where an F test tells them apart, else None."""
    found = fit.diagnostics.lack_of_fit
    return found.residual_over_noise if found.p is not None and found.p < SIGNIFICANT else None


def _floor(fit: Fit) -> str | None:
    """The parameter of the irreducible loss, where the form has one for all rows."""
    floors = [term.amplitude for term in fit.shape_form.formula if not term.factors]
    return floors[0] if floors and (fit.form in WHOLE_SHAPE or fit.form == "chinchilla") else None


def extrapolation_scores(fits: Mapping[str, Fit]) -> dict[str, Score]:
    """Held-out scores by form and baseline, each form's own fit speaking for it."""
    table: dict[str, Score] = {}
    for name, fitted in fits.items():
        for label, score in fitted.extrapolation.scores.items():
            if label == name or label not in fits:
                table.setdefault(label, score)
    return table


def extrapolation_table(fits: Mapping) -> dict:
    """The same without the rows: {rmse, bias, n} by form and baseline."""
    scores = extrapolation_scores(fits)
    return {name: plain(replace(score, rows=None, predicted=None)) for name, score in scores.items()}


def held_out(fits: Mapping[str, Fit], headline: str, data: Measurements) -> list[dict]:
    """Measured and predicted losses of the rows above the compute cut, the headline form first.

    Returns [{label, measured [n], predicted [n], rmse, bias}] as `figures.extrapolation` takes them; [] without a test.
    """
    table = extrapolation_scores(fits)
    return [
        dict(
            label=name.replace("_", " ") if name == "compute_only" else name,
            measured=data.y[table[name].rows],
            predicted=np.array(table[name].predicted),
            rmse=table[name].rmse,
            bias=table[name].bias,
        )
        for name in [*sorted(fits, key=lambda n: n != headline), "compute_only"]
        if name in table and table[name].rows
    ]


def _rmse(scores: Mapping, name: str) -> float | None:
    return (scores.get(name) or {}).get("rmse")


def _better(scores: Mapping, headline: str) -> list[str]:
    """Baselines that predict the held-out rows better than the headline form."""
    own = _rmse(scores, headline)
    known = [n for n in BASELINES if n != headline and _rmse(scores, n) is not None]
    return [] if own is None else [name for name in known if scores[name]["rmse"] < own]


def equation(fit: Fit) -> str:
    """The law as a line of text, or two."""
    form = fit.shape_form
    if form.arms:
        c = "c" if form.shared else "c_x"
        return f"loss = alpha_x·x^-a_x + (beta_x·x^b_x + xi_x)·t^-{c} + eps_x   for each dimension x on its own arm"
    names = dict(num_params="N", num_examples="n", tokens="D", compute="t", num_patches="T")
    names |= dict(num_examples="D") if fit.form == "chinchilla" else {}

    def total(terms) -> str:
        return " + ".join(
            "·".join([t.amplitude, *(f"{names.get(c, c)}^{'-' * (sign < 0)}{e}" for c, e, sign in t.factors)])
            for t in terms
        )

    floor = [t for t in form.formula if not t.factors]
    data = [t for t in form.formula if any(c == form.terms[-1] for c, _, _ in t.factors)]
    size = [t for t in form.formula if t.factors and t not in data]
    if not form.power_mean:
        return f"loss = {total([*size, *data, *floor])}"
    mean = " + ".join(["(K^s + D^s)^(1/s)", *(t.amplitude for t in floor)])
    loss = "M" if form.zero_line is None else "(z^-4 + M^-4)^(-1/4)"
    return f"M = {mean},   K = {total(size)},   D = {total(data)}\nloss = {loss}"


# at a budget ----------------------------------------------------------------------------------------------------------


def budget_facts(data: Measurements, fits: Mapping[str, Fit], headline: str, train_flops: float | None) -> dict:
    """{recommendation, why_none, dependence, rules, frontier, trades, run_before} at a budget.

    The recommendation and the rows of the frontier are `Recommendation`s, the rest is plain data. train_flops: None = 3.16 x
    the largest budget run. recommendation: None, with the reason in why_none, where the law
    supports none; then the others are empty.
    """
    fit = fits[headline]
    largest = extent(fit)
    empty: dict = dict(dependence=[], rules={}, frontier=[], trades={}, run_before="never")
    if train_flops is None and largest is None:
        reason = "the rows do not say their training FLOPs, so that there is no budget to plan for"
        return dict(recommendation=None, why_none=reason, **empty)
    budget = train_flops or float(f"{largest * NEXT_BUDGET:.3g}")  # type: ignore[operator]
    try:
        best = best_shape(fit, budget)
    except UserError as error:
        return dict(recommendation=None, why_none=str(error), **empty)
    return dict(
        recommendation=best,
        why_none="",
        dependence=form_dependence([fits[name] for name in fits if name in WHOLE_SHAPE], budget),
        rules=other_rules(fit, best, fits),
        frontier=_frontier(fit),
        trades={n: trade(fit, budget, n) for n in TOKENS if n in best.optimum},
        run_before=run_before(data, best.shape, budget),
    )


def extent(fit: Fit) -> float | None:
    """The largest budget run, in training FLOPs; None where the rows do not say."""
    known = fit.data.train_flops_range
    return known[1] if known else None


def run_before(data: Measurements, shape: Shape, train_flops: float) -> str:
    """Whether a shape was run: "never", "at this budget" or "at other budgets"."""
    run = [row for row in data.rows if all(getattr(shape, n) == row.get(n) for n in DIMENSIONS)]
    spent = np.array([row["train_flops"] for row in run if row.get("train_flops")])
    there = np.abs(np.log(spent / train_flops)) < LEVEL_WIDTH
    return "never" if not run else "at this budget" if there.any() else "at other budgets"


def _frontier(fit: Fit) -> list[Recommendation]:
    """The best shape at FRONTIER_POINTS budgets, without those that pay for no image of the law's best shape."""
    rows = []
    for budget in ladder(fit, points=FRONTIER_POINTS):
        with contextlib.suppress(UserError):
            rows.append(best_shape(fit, budget))
    return rows
