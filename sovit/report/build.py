"""Ledgers -> law.json, report.md and figures: `fit_ledgers` is what `sovit fit` and `analysis/fit_laws.py` do.

No clock and no torch: the same ledgers give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law import fit as law
from sovit.law.coverage import words as coverage_words
from sovit.law.exponents import inside, optimum_of
from sovit.law.fitted_law import plain
from sovit.law.forms import LAWS, WHOLE_SHAPE
from sovit.law.sensitivity import extrapolation_cuts, sensitivity
from sovit.ledger.measurements import Measurements, measurements
from sovit.predict import growth_rules as growth
from sovit.predict import patch_tradeoff as trade
from sovit.predict import recommend as predict
from sovit.predict.law_at_budget import TOKENS, ladder
from sovit.predict.recommend import frontier
from sovit.report.sections import report_text
from sovit.report.sections.extrapolation import extrapolation_scores, extrapolation_table, own_rmse
from sovit.report.sections.phrases import percent
from sovit.report.sections.summary import summary_text

FORMS = ("joint", "bounded", "sovit", "chinchilla")  # tried by default, in the order in which ties are settled
FORMS_TOKENS = ("joint_tokens", "bounded_tokens")  # besides, where patch or image size was varied
FORMS_WITHOUT_LINE = ("joint", "power_mean", "sovit", "chinchilla")  # where the loss of knowing nothing is not known
MIN_DRAWS = 100  # fewer do not give a 90 % interval
SENSITIVITY, FACTS = (
    "sensitivity.json",
    "report.json",
)  # beside law.json: what report.md says that law.json does not hold
INPUTS = "inputs.json"  # beside law.json: what it was made of, written last
FRONTIER_POINTS = 6  # budgets of the frontier, from the least run to 100 x the largest
NO_REFITS = "no refits were asked for"
NEXT_BUDGET = 10**0.5  # the default recommendation is for this many times the largest budget run


def fit_ledgers(
    paths: Sequence[Path | str],
    *,
    metric: str = "val_loss",
    form: str | None = None,
    out=None,
    bootstrap: int = 1000,
    train_flops: float | None = None,
    seed: int = 0,
    figures: bool = True,
    refits: bool = True,
    skip_bad: bool = False,
    coverage: int = 0,
) -> dict:
    """Fit every law form that the rows of `paths` allow; write law.json, forms/, sensitivity.json, report.json, report.md,
    inputs.json and figures.

    form         the headline law; None = the one that extrapolates best among those that rank whole shapes
    out          folder of all this; None = `<stem of the first ledger>_law` in OUTPUTS
    bootstrap    draws of each interval, at least MIN_DRAWS; 0 = none
    coverage     data sets simulated from the headline law, to see how often its intervals hold it; 0 = none
    train_flops  budget of the recommendation; None = 3.16 x the largest budget run
    refits       False = without the hundred refits that say what the law depends on, and without the further cuts
    skip_bad     leave bad rows out, each with its reason, where otherwise the first is refused
    Returns a summary of plain data (`text` holds it in words). Raises UserError for bad input, before writing anything.
    """
    data = measurements(paths, metric, skip_bad=skip_bad)
    if form is not None and form not in LAWS:
        raise UserError(f"form={form!r} is unknown; choose one of {', '.join(LAWS)}")
    if train_flops is not None and not (np.isfinite(train_flops) and train_flops > 0):
        raise UserError(f"train_flops={train_flops!r} is not a positive number; give FLOPs, such as 1e15")
    if bootstrap < 0:
        raise UserError(f"bootstrap={bootstrap} is negative; give the number of draws, or 0 for no intervals")
    if coverage < 0:
        raise UserError(f"coverage={coverage} is negative; give the number of data sets to simulate, or 0 for none")
    if 0 < bootstrap < MIN_DRAWS:
        raise UserError(f"bootstrap={bootstrap} draws give no interval; give at least {MIN_DRAWS}, or 0 for none")
    fits, refused = {}, {}
    tried: tuple[str, ...] = FORMS_WITHOUT_LINE if data.zero_line is None else FORMS
    if any(len(np.unique(data.columns[n])) > 1 for n in ("patch_size", "image_size") if n in data.columns):
        tried += tuple(name for name in FORMS_TOKENS if data.zero_line is not None or not LAWS[name].bounded)
    for name in dict.fromkeys((*tried, *([form] if form else []))):
        try:
            options = dict(bootstrap=bootstrap, seed=seed, measurement_sd=data.measurement_sd, metric=metric)
            options |= _options(name, data)
            fits[name] = law.fit(name, data.columns, data.y, **options)
        except np.linalg.LinAlgError as error:
            refused[name] = f"form={name!r} cannot be fitted to these rows: {error}"
        except UserError as error:
            if name == form:
                raise
            refused[name] = str(error)
    if form in refused:
        raise UserError(refused[form])
    if not fits or (not form and "width" in data.columns and not any(LAWS[name].uses_dims for name in fits)):
        raise UserError(next(iter(refused.values())))  # a law blind to shape is no answer where shapes were run
    headline, why = choose_headline(fits, form)
    recommendation, no_recommendation, dependence = _recommend(fits, headline, data, train_flops)
    scores = held_out(fits, headline, data)
    if coverage:
        options = dict(bootstrap=bootstrap, seed=seed, measurement_sd=data.measurement_sd, metric=metric)
        options |= _options(headline, data) | dict(coverage=coverage)
        fits[headline] = law.fit(headline, data.columns, data.y, **options)
    facts = facts_of(data, fits, headline, recommendation, seed, refits)

    left_out = [dict(run_id=i, reason=why_not) for i, why_not in data.left_out]
    fits = {
        name: replace(fitted, data=replace(fitted.data, left_out=left_out, notes=data.notes))
        for name, fitted in fits.items()
    }
    folder = Path(out) if out is not None else law_folder(data.paths)
    with contextlib.suppress(NotADirectoryError):  # the next line says it better
        (folder / INPUTS).unlink(missing_ok=True)
    write_atomic(folder / "law.json", fits[headline].to_json())
    for name, fitted in fits.items():
        if name != headline:
            write_atomic(folder / "forms" / f"{name}.json", fitted.to_json())
    write_atomic(folder / SENSITIVITY, _json(facts["sensitivity"]))
    write_atomic(folder / FACTS, _json(_plain_facts(facts)))
    drawn = draw(fits[headline], data, recommendation, scores, facts, folder) if figures else {}
    text = report_text(data, fits, headline, why, refused, recommendation, no_recommendation, dependence, facts, drawn)
    simulated = coverage_words(simulations) if (simulations := fits[headline].diagnostics.coverage) else ""
    if simulated:
        text += f"\n## How often these intervals would hold\n\n{simulated}\n"
    write_atomic(folder / "report.md", text)
    if figures:
        write_atomic(folder / INPUTS, json.dumps(data.identity, indent=1) + "\n")
    summary = dict(
        out=str(folder),
        law=str(folder / "law.json"),
        report=str(folder / "report.md"),
        form=headline,
        why=why,
        forms=list(fits),
        refused=refused,
        metric=metric,
        num_rows=len(data.y),
        left_out=len(data.left_out),
        notes=data.notes,
        num_trunks=fits[headline].num_clusters,
        params=fits[headline].params,
        exponents=plain(fits[headline].exponents),
        noise=plain(fits[headline].noise),
        extrapolation=extrapolation_table(fits),
        recommendation=recommendation.to_dict() if recommendation else None,
        figures=[f"{n}.png" for n in drawn],
        coverage=fits[headline].diagnostics.coverage,
    )
    return summary | dict(
        text="\n\n".join(part for part in (summary_text(summary, no_recommendation), simulated) if part)
    )


def law_folder(paths: Sequence[Path | str]) -> Path:
    """Where the law of these ledgers is kept unless another folder is named."""
    return OUTPUTS / f"{Path(paths[0]).stem}_law"


def choose_headline(fits: dict, form: str | None) -> tuple[str, str]:
    """The headline form and the reason: the one asked for, else the least extrapolation error of those that can rank
    whole shapes (the others describe part of the rows, or no shape, so that their scores choose nothing)."""
    if form is not None:
        return form, "it was asked for"
    able = [name for name in fits if name in WHOLE_SHAPE]
    if not able:
        name = next(iter(fits))
        return name, "no form that ranks whole shapes could be fitted"
    errors = {name: error for name in able if (error := own_rmse(fits[name], name)) is not None}
    if len(able) == 1:
        return able[0], "it is the only form fitted that ranks whole shapes"
    if not errors:
        return able[0], "no form could be scored by extrapolation; the first of the table is kept"
    best = min(errors, key=lambda n: errors[n])
    others = ", ".join(f"{n} {percent(errors[n]) if n in errors else 'not scored'}" for n in able if n != best)
    return best, (
        f"among the forms that rank whole shapes it predicts the held-out, most expensive rows best"
        f" (RMSE {percent(errors[best])}; {others})"
    )


def held_out(fits: dict, headline: str, data: Measurements) -> list[dict]:
    """Predicted and measured losses of the rows above the compute cut, by laws fitted below it; the headline first.

    [{label, measured [n], predicted [n], rmse, bias}] as `plot.extrapolation` takes them, read from the fits' own test
    (`diagnose.extrapolation`); [] where none was possible.
    """
    table = extrapolation_scores(fits)
    order = [*sorted(fits, key=lambda n: n != headline), "compute_only"]
    return [
        dict(
            label=name if name in fits else name.replace("_", " "),
            measured=data.y[table[name].rows],
            predicted=np.array(table[name].predicted),
            rmse=table[name].rmse,
            bias=table[name].bias,
        )
        for name in order
        if name in table and table[name].rows
    ]


def facts_of(data: Measurements, fits: dict, headline, recommendation, seed: int, refits: bool) -> dict:
    """What the report says beyond the laws, as plain data: {cuts, rules, frontier, growth,
    inside, weakest, sensitivity}; empty where a law cannot say."""
    fit = fits[headline]
    budget = recommendation.train_flops if recommendation else None
    return dict(
        cuts=extrapolation_cuts(data, fits) if refits else [],
        rules=growth.other_rules(fit, recommendation, fits) if recommendation else {},
        **_trades(fit, recommendation),
        frontier=_frontier(fit) if recommendation else [],
        growth=growth.exact_growth(fit, recommendation.train_flops) if recommendation else {},
        inside=_inside(fit),
        weakest=_weakest(fit, budget),
        sensitivity=sensitivity(data, fit, budget, fits=fits, seed=seed) if refits else dict(note=NO_REFITS),
    )


def _trades(fit, recommendation) -> dict:
    """{"trades": {patch_size, image_size}}, `trade.trade` for each of them that the law has a term of; {} without."""
    if recommendation is None:
        return {}
    names = [n for n in TOKENS if n in fit.model.dims]
    found = {n: trade.trade(fit, recommendation.train_flops, n) for n in names}
    return dict(trades=found) if found else {}


def _frontier(fit) -> list[predict.Recommendation]:
    """The frontier at FRONTIER_POINTS budgets, without those at which the law has no shape."""
    rows = []
    for budget in ladder(fit, points=FRONTIER_POINTS):
        with contextlib.suppress(UserError):  # a budget that does not pay for one image of the law's best shape
            rows += frontier(fit, [budget])
    return rows


def _inside(fit) -> dict:
    """Over which compute the optimum lies between the values run, by dimension; {} where nothing is known of it."""
    if not fit.model.dims or not fit.exponents:
        return {}
    geometry = fit.geometry
    centre = fit.centre
    return inside(fit.shape_form, centre, fit.theta, geometry, fit.data.grid, fit.data.compute_range)


def _weakest(fit, train_flops: float | None) -> dict:
    """The weakest direction of the fit, with what a standard error along it does to each recommended dimension."""
    weakest = plain(fit.diagnostics.weakest)
    step = weakest.pop("step")
    if train_flops is None or not fit.geometry:
        return weakest | dict(moves={})
    form, centre, low_high = fit.shape_form, fit.centre, fit.shape_form.bounds
    moved = fit.theta + np.array([step.get(name, 0.0) for name in form.names])
    theta = np.stack([fit.theta, np.clip(moved, *low_high)])
    budget, grid = np.log(train_flops / 3), fit.data.grid
    x = np.exp(optimum_of(form, centre, theta, fit.geometry, grid, budget, head=True))
    return weakest | dict(moves=dict(zip(fit.model.dims, (x[1] / x[0] - 1).tolist())))


def _json(value) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain_facts(facts: dict) -> dict:
    """The facts as they are written: all but the sensitivity, which has a file of its own."""
    frontier_rows = [row.to_frontier_row() for row in facts["frontier"]]
    return {name: fact for name, fact in facts.items() if name != "sensitivity"} | dict(frontier=frontier_rows)


def draw(fit, data: Measurements, recommendation, scores, facts: dict, folder: Path) -> dict[str, str]:
    """Write every figure that this law allows; name -> what it shows (the caption), in the order of the report."""
    from sovit.report import figures as plot

    captions = {
        "fit_by_dimension": "Measured losses (points; seeds as separate points) against each dimension of the star, with"
        " the law at each budget (lines). Along a line the other dimensions stay at the centre of the design and the"
        " images make up the budget; the diamond is the minimum of that line, not the joint optimum.",
        "isoflop": "The same runs against model size. Lines: shapes on the law's own optimal path, trained for the"
        " budget; diamonds: the law's optimum at each budget. Runs above a line have other proportions.",
        "optimal_shape": "The optimal value of each dimension against compute with both 90 % bands; dashed beyond the"
        " runs (dotted line), the range of values run shaded.",
        "residuals": "Measured over fitted loss, against compute and by shape; the band is one noise standard"
        " deviation.",
        "extrapolation": "The most expensive rows, predicted by laws fitted to the cheaper ones only; the headline"
        " first.",
        "frontier": "The law's best shape at each budget: predicted loss with its 90 % interval, model size and images,"
        " beside the runs.",
        "trade_patch_size": "The law's loss with each patch size that was run, everything else chosen anew at every budget,"
        " and its excess over the best of them; dots are the best runs with it.",
        "trade_image_size": "The same for each image size.",
        "sensitivity": "The growth exponent of each dimension under every alteration (dots) and random sets of shapes left"
        " out (bars: 5 to 95 %, the dot the median); the line is the headline law's, the band its 90 % interval.",
    }
    made = dict(
        extrapolation=plot.extrapolation(scores, data.metric),
        frontier=plot.frontier(fit, facts["frontier"], data) if facts["frontier"] else None,
        **{f"trade_{name}": plot.trade(found, data) for name, found in facts.get("trades", {}).items()},
        optimal_shape=plot.optimal_shape(fit, recommendation),
        sensitivity=plot.sensitivity(facts["sensitivity"]),
        fit_by_dimension=plot.fit_by_dimension(fit, data) if fit.model.dims else None,
        isoflop=plot.isoflop(fit, data),
        residuals=plot.residuals(fit, data),
    )
    for name, figure in made.items():
        if figure is not None:
            plot.save(figure, folder / name)
    return {name: captions[name] for name, figure in made.items() if figure is not None}


def _options(name: str, data: Measurements) -> dict:
    if not LAWS[name].bounded:
        return {}
    if data.zero_line is None:
        raise UserError(
            f"form={name!r} needs the loss of knowing nothing: rows with zero_line, or val_loss with num_classes"
        )
    return dict(zero_line=data.zero_line)


def _recommend(fits, headline, data, train_flops):
    """(Recommendation or None, reason for none, form dependence [] or rows)."""
    largest = fits[headline].data.train_flops_range
    if train_flops is None and largest is None:
        return None, "the rows do not say their training FLOPs, so that there is no budget to plan for", []
    budget = train_flops or float(f"{largest[1] * NEXT_BUDGET:.3g}")
    try:
        recommendation = predict.best_shape(fits[headline], budget)
    except UserError as error:
        return None, str(error), []
    able = [fits[name] for name in fits if name in WHOLE_SHAPE]
    return recommendation, "", predict.form_dependence(able, budget)
