"""The words of report.md: every sentence is made from the numbers of the fit; what they leave open is said to be so.

No clock and no figures; `sovit.report` writes the files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from sovit.law import LAWS
from sovit.measurements import WHOLE_SHAPE, Measurements, levels
from sovit.predict_words import count_words
from sovit.rows import star
from sovit.shape import DIMENSIONS, named_shape

MIN_SEEDS, MIN_SEEDED_SHAPES = 3, 2  # what every study owes: 3 seeds at 2 shapes
NAMES = {
    "width": "width",
    "depth": "depth",
    "mlp_dim": "MLP dim",
    "patch_size": "patch size",
    "image_size": "image size",
    "num_params": "parameters",
}
SOURCES = {
    "stream": "The data are the procedural scenes of the stream: small synthetic pictures with a long tail of"
    " questions.",
    "icons": "The data are drawings (icons), rendered from vector files.",
    "hub": "The data are a public data set read with `datasets`, at the size and preset named above.",
}
BASELINES = {
    "compute_only": "compute alone: E + A t^-a, blind to shape (constant proportions)",
    "nearest": "no law: the loss of the nearest cheaper run",
    "chinchilla": "size and images, blind to shape (Chinchilla)",
}


def report_text(data, fits, headline, why, refused, recommendation, no_recommendation, dependence, figures) -> str:
    """report.md. figures: name -> caption of the files that stand beside it."""
    fit = fits[headline]

    def figure(name):
        return (
            f"![{name.replace('_', ' ')}]({name}.png)\n\n*{figures[name]}* ([SVG]({name}.svg))"
            if name in figures
            else ""
        )

    sections = [
        ("What was found", _found(data, fits, headline, why, recommendation, no_recommendation)),
        ("Data", _data(data, fit)),
        ("The law", "\n\n".join(p for p in (_law(fit), figure("fit_by_dimension"), figure("isoflop")) if p)),
        ("How the best shape grows", "\n\n".join(p for p in (_exponents(fit), figure("optimal_shape")) if p)),
        ("How good the fit is", "\n\n".join(p for p in (_quality(fit), figure("residuals")) if p)),
        (
            "Extrapolation",
            "\n\n".join(p for p in (_extrapolation(fits, headline, refused), figure("extrapolation")) if p),
        ),
        ("Recommendation", _recommendation(fit, recommendation, no_recommendation, dependence)),
        ("What was not shown", _not_shown(data, fits, headline, recommendation)),
        ("Counting and checklist", _checklist(data, fit)),
    ]
    names = ", ".join(f"`{Path(p).name}`" for p in data.paths)
    head = (
        f"# Shape law of {names}\n\nWhich Vision Transformer shape has the lowest `{data.metric}` at a given training"
        " budget, and how"
        " sure is that?"
    )
    return "\n\n".join([head, *(f"## {title}\n\n{body}" for title, body in sections)]) + "\n"


def _found(data, fits, headline, why, recommendation, no_recommendation) -> str:
    fit = fits[headline]
    lines = [f"- The headline law is `{headline}`: {why}."]
    lines += [f"- {_sentence(exponent_words(name, e))}" for name, e in fit.exponents.items()]
    blind = _better_baseline(fits, headline)
    if blind:
        lines.append(
            f"- **A baseline extrapolates better than the law**: {blind}. The law describes these runs; it has not"
            " shown that"
            " it predicts larger ones."
        )
    lines += [f"- **Caution**: {caution}" for caution in _cautions(data)]
    if misfits(fit):
        lines.append(
            f"- **The law misses more than noise**: its residuals are {misfits(fit):.2g} times the noise between seeds."
        )
    if recommendation is None:
        lines.append(f"- No shape is recommended: {no_recommendation}.")
    else:
        r = recommendation
        lines.append(
            f"- For {_flops(r.train_flops)} training FLOPs: {_shape_words(r.shape)}, trained on {r.num_examples:,}"
            " images;"
            f" predicted {data.metric} {_with_interval(r.loss, r.loss_low, r.loss_high)}."
            f" {count_words(r.flat_region)} shapes lie within one noise s.d."
            " of it."
        )
    open_ = [NAMES[n] for n, e in fit.exponents.items() if e["status"] != "ok"]
    if open_:
        lines.append(f"- **Not determined by these runs**: {_and(open_)}; see below.")
    return "\n".join(lines)


def exponent_words(name: str, exponent: dict) -> str:
    """One dimension's growth in a sentence without its full stop; the status is part of it."""
    label = NAMES.get(name, name)
    if exponent["status"] == "unidentified":
        return f"{label}: unidentified ({exponent['note']})"
    text = f"best {label} grows as compute^{_with_interval(exponent['estimate'], exponent['low'], exponent['high'], 3)}"
    if exponent["status"] == "edge":
        text += f"; edge: {exponent['note']}"
    return text


def _data(data: Measurements, fit) -> str:
    shapes = data.shapes()
    trunks = Counter(row["trunk_id"] for row in data.rows)
    lines = [
        f"- {len(data.y)} rows of {len(trunks)} trunks and {len(set(shapes))} shapes, metric `{data.metric}`; "
        + ", ".join(f"{key} {_value(data.rows[0].get(key))}" for key in ("data", "preset", "num_classes", "objective"))
        + "."
    ]
    dims = fit.model["dims"]
    for dim in dims:
        lines.append(f"- Values of {NAMES[dim]} run: {_and([_number(v) for v in fit.data['grid'][dim]], 'and')}.")
    if dims:
        centre, arms = star(data.columns, dims)
        count = Counter(arms[list(dict(zip(shapes, range(len(shapes)))).values())].tolist())
        places = [f"{count[d]} on the {NAMES[d]} arm" for d in dims] + [f"{count['centre']} at the centre"]
        lines.append(
            f"- Design: centre {_and([f'{NAMES[d]} {_number(v)}' for d, v in centre.items()])}; shapes: {_and(places)},"
            f" {count['corner']} off the axes"
            + ("." if count["corner"] else " (without any, no interaction between dimensions could be seen).")
        )
    for name, words in (("train_flops", "training FLOPs"), ("num_examples", "numbers of images")):
        if name in data.columns:
            _, found = levels(data.columns[name])
            text = (
                _and([_flops(v) for v in found])
                if len(found) <= 8
                else f"{len(found)} levels from {_flops(found[0])} to {_flops(found[-1])}"
            )
            lines.append(f"- Budgets in {words}: {text}.")
    lines.append(f"- {_seeds(data, shapes)}")
    if data.support:
        lines.append(f"- {_support(data)}")
    lines.append(f"- {_order(data, shapes)}")
    lines.append(f"- {_rates(data)}")
    excluded = Counter(reason for _, reason in data.left_out)
    total = ", ".join(f"{n} {status}" for status, n in sorted(data.statuses.items()))
    most = [f"{n} × {reason}" for reason, n in sorted(excluded.most_common(9))] + ["..."] * (len(excluded) > 9)
    lines.append(
        f"- Status of the {sum(data.statuses.values())} rows read: {total}. Left out: {len(data.left_out)}"
        + (f" ({'; '.join(most)})." if excluded else ".")
    )
    lines += [f"  - `{run_id}`: {reason}" for run_id, reason in data.left_out[:20]]
    if len(data.left_out) > 20:
        lines.append(f"  - and {len(data.left_out) - 20} more")
    return "\n".join(lines)


def _seeds(data, shapes) -> str:
    if "init_seed" not in data.columns:
        return "The rows do not say their seeds."
    seeds: dict = {}
    for shape, row in zip(shapes, data.rows):
        seeds.setdefault((shape, row.get("peak_lr")), set()).add((row.get("init_seed"), row.get("data_seed")))
    count = Counter(len(s) for s in seeds.values())
    enough = sum(n for seeds_here, n in count.items() if seeds_here >= MIN_SEEDS)
    text = (
        f"Seeds: {_and([f'{n} shape' + 's' * (n > 1) + f' with {s}' for s, n in sorted(count.items(), reverse=True)])}."
    )
    if enough >= MIN_SEEDED_SHAPES:
        return text + f" The noise between seeds can be read ({MIN_SEEDS} or more at {enough} shapes)."
    return text + (
        f" **Fewer than {MIN_SEEDS} seeds at {MIN_SEEDED_SHAPES} shapes**: the noise is poorly known, and so is every"
        " “within the noise” below."
    )


def _support(data) -> str:
    """Few-shot errors: what the choice of the support sets does to a row by itself, and to all rows together."""
    s = data.support
    known = f"each row's mean over {s['sets']} support sets is known to {percent(s['sd'])} (s.d.), which the law"
    known += " takes for known noise of the row and weighs it by"
    alike = "; the rows do not differ in it by more than chance" if s["kept"] == 0 else ""
    if s["shared_sd"] is None:
        return f"Few-shot error: {known}{alike}. The rows hold no error by support set: what all share counts as noise too."
    return (
        f"Few-shot error: {known}{alike}. The sets are the same for all rows: another choice of them would move all rows"
        f" together by {percent(s['shared_sd'])}, which is in no interval here, because it cancels between shapes."
    )


def _order(data, shapes) -> str:
    if "data_seed" not in data.columns:
        return "The rows do not say whether shapes saw the same images in the same order."
    seeds: dict = {}
    for shape, row in zip(shapes, data.rows):
        seeds.setdefault(shape, set()).add(row["data_seed"])
    common = set.intersection(*seeds.values())
    if common:
        return (
            "All shapes were trained with one data order (data seed "
            + _and([str(s) for s in sorted(common)])
            + "): common random"
            " numbers, which make differences between shapes less noisy than losses, and which leave out the noise of"
            " another order."
        )
    return "The shapes do not share a data seed: differences between shapes carry the noise of the data order as well."


def _rates(data) -> str:
    rates = [row["peak_lr"] for row in data.rows if row.get("peak_lr")]
    kinds = sorted({str(row["parametrisation"]) for row in data.rows if row.get("parametrisation")})
    said = f"parametrisation {_and(kinds)}" if kinds else "parametrisation not said"
    if not rates:
        return (
            f"Learning rate: not said by the rows; {said}. Whether it was fair to every shape cannot be told from them."
        )
    low, high = min(rates), max(rates)
    if low == high:
        text = f"the same peak learning rate, {low:g}, throughout, whatever the shape"
    else:
        text = rate_rule(data) or f"peak learning rates from {low:g} to {high:g}, by no power of width and depth"
    return f"Recipe, as the rows carry it: {text}; {said}."


def rate_rule(data) -> str:
    """The rule peak_lr = base (32 / width)^p (2 / depth)^q where the rows' rates keep to it within 1 %, else ""."""
    if not {"width", "depth"} <= set(data.columns) or not all(row.get("peak_lr") for row in data.rows):
        return ""
    found = sorted({(row["width"], row["depth"], row["peak_lr"]) for row in data.rows})
    width, depth, rates = np.array(found, float).T
    terms = [np.ones(len(rates)), np.log(32 / width), np.log(2 / depth)]
    basis = np.stack([t for t in terms if np.ptp(t) > 0 or t is terms[0]], 1)
    power, _, rank, _ = np.linalg.lstsq(basis, np.log(rates), rcond=None)
    if rank < basis.shape[1] or len(found) <= rank:  # no one rule, or any rates would keep to some rule
        return ""
    if np.abs(basis @ power - np.log(rates)).max() > 0.01:
        return ""
    names = [n for n, t in (("(32 / width)", terms[1]), ("(2 / depth)", terms[2])) if np.ptp(t) > 0]
    factors = " · ".join(f"{name}^{round(p, 2) + 0.0:.2f}" for name, p in zip(names, power[1:]))
    return f"peak learning rate {np.exp(power[0]):.3g} · {factors}, from {rates.min():g} to {rates.max():g}"


def misfits(fit) -> float | None:
    """Residuals over seed noise where that is above 2, else None: then the form bends where the data do not."""
    ratio = fit.diagnostics["lack_of_fit"]["residual_over_noise"]
    return ratio if fit.noise["source"].startswith("seeds") and ratio and ratio > 2 else None


def _cautions(data) -> list[str]:
    """What makes rows hard to compare although nothing forbids it."""
    out = [_sentence(note) for note in data.notes]
    rates: dict = {}
    for shape, row in zip(data.shapes(), data.rows):
        rates.setdefault(shape, set()).add(row.get("peak_lr"))
    several = [shape for shape, found in rates.items() if len(found) > 1]
    if several:
        out.append(
            f"{len(several)} of {len(rates)} shapes were run at several learning rates and all of their rows enter"
            " the law, which has"
            " no term for it: the scatter is not noise. Fit a ledger with one rate a shape."
        )
    if len({row.get("parametrisation") for row in data.rows}) > 1:
        out.append("The rows mix parametrisations; their laws may differ.")
    for name in ("batch_size", "weight_decay"):
        values = sorted({_value(row.get(name)) for row in data.rows})
        if len(values) > 1:
            out.append(f"The rows differ in {name} ({_and(values)}), for which the law has no term.")
    if data.zero_line is not None and data.y.max() > data.zero_line:
        out.append(
            f"{int((data.y > data.zero_line).sum())} rows are above the zero line {data.zero_line:.4g}, the loss of"
            " knowing nothing:"
            " these runs have learnt less than nothing."
        )
    return out


def _law(fit) -> str:
    lines = [f"```\n{equation(fit)}\n```", f"Here {_symbols(fit)}."]
    if fit.model["zero_line"]:
        lines.append(f"The zero line z = {fit.model['zero_line']!r} is the loss of knowing nothing; it is not fitted.")
    level = f"{100 * fit.level:.0f} %"
    head = f"| parameter | value | {level} low | high | pairs low | pairs high |\n|---|---|---|---|---|---|"
    rows = []
    for name, value in fit.params.items():
        ends = fit.intervals.get(name, {})
        cells = [_short(ends.get(k)) for k in ("low", "high", "pairs_low", "pairs_high")]
        bound = fit.diagnostics["active_bounds"].get(name)
        rows.append(
            f"| `{name}` | {'absent' if value is None else repr(value)}{f' ({bound} bound)' if bound else ''} |"
            f" {' | '.join(cells)} |"
        )
    lines.append("\n".join([head, *rows]))
    loss = {
        "huber_log": "Huber loss of ln(predicted / measured)",
        "log_squares": "squares of ln(predicted / measured)",
    }[fit.model["loss"]]
    delta = f" with δ = {fit.model['huber_delta']!r}" if fit.model["huber_delta"] else ""
    whitened = ", whitened by trunk" if fit.model["whitened"] else ""
    lines.append(f"Fitted by the sum over rows of the {loss}{delta}{whitened}; objective {fit.objective!r}.")
    return "\n\n".join(lines)


def equation(fit) -> str:
    """The law as one line of text."""
    dims = fit.model["dims"]
    size = " + ".join(f"A_{d}·{d}^-a_{d}" for d in dims)
    if fit.form == "joint":
        return f"loss = {size} + B·n^-c + eps"
    if fit.form in ("bounded", "power_mean"):
        text = f"M = (K^s + D^s)^(1/s) + eps,   K = {size},   D = B·n^-c"
        return text + ("\nloss = (z^-4 + M^-4)^(-1/4)" if fit.form == "bounded" else "\nloss = M")
    if fit.form == "sovit":
        return "loss = alpha_x·x^-a_x + (beta_x·x^b_x + xi_x)·t^-c + eps_x   for each dimension x on its own arm"
    if fit.form == "chinchilla":
        return "loss = E + A·N^-alpha + B·D^-beta"
    return "loss = " + " + ".join(f"{n}" for n in fit.model["names"])


def _symbols(fit) -> str:
    if fit.form == "chinchilla":
        return "N is the number of encoder parameters and D the number of images seen"
    if fit.form == "sovit":
        return (
            "t is compute, forward FLOPs × images, and the other dimensions stay at the centre (Eq. 2 of arXiv"
            " 2305.13035, c shared)"
        )
    return (
        "n is the number of images seen; compute enters through the exact FLOPs of a shape, so that n = budget / FLOPs"
    )


def _exponents(fit) -> str:
    if not fit.exponents:
        return (
            "The rows do not say what a shape costs (patch size, image size), so that no optimum at a given"
            " compute can be computed."
        )
    low, high = next(iter(fit.exponents.values()))["compute_range"] or (None, None)
    level = f"{100 * fit.level:.0f} %"
    lines = []
    if low is not None and high is not None:
        kind = next(iter(fit.exponents.values()))["kind"]
        what = (
            "all dimensions optimised together" if kind == "joint" else "each dimension alone, the others at the centre"
        )
        lines.append(f"x* ∝ t^s between compute t = {_flops(low)} and {_flops(high)} (forward FLOPs × images), {what}:")
    lines.append(
        f"| dimension | s | {level} headline | {level} pairs | status |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {NAMES.get(n, n)} | {'not determined' if e['estimate'] is None else _short(e['estimate'])} |"
            f" {_range(e['low'], e['high'])} | {_range(e['pairs_low'], e['pairs_high'])} | {e['status']} |"
            for n, e in fit.exponents.items()
        )
    )
    if fit.draws:
        lines.append(
            "The headline interval comes from new data drawn from the law with the estimated trunk and row noise; the"
            " pairs"
            " interval from drawing whole trunks anew, arm by arm, without a noise model." + _disagreement(fit)
        )
    words = {
        "edge": "the optimum lies at or beyond the last value run, so that its place is an extrapolation",
        "unidentified": "the runs do not fix the exponent; no number is given for it",
    }
    for name, e in fit.exponents.items():
        if e["status"] != "ok":
            lines.append(f"**{NAMES.get(name, name)} is {e['status']}**: {words[e['status']]}. {_sentence(e['note'])}")
    return "\n\n".join(lines)


def _disagreement(fit) -> str:
    ratios = {
        n: r for n, r in fit.diagnostics["interval_ratio"].items() if fit.exponents[n]["status"] != "unidentified"
    }
    by_profile = {n: r for n, r in fit.diagnostics.get("profile_ratio", {}).items() if n in ratios}
    off = [f"{NAMES.get(n, n)} ({r:.2g} ×, pairs over headline)" for n, r in ratios.items() if not 0.5 <= r <= 2]
    off += [f"{NAMES.get(n, n)} ({r:.2g} ×, profile over headline)" for n, r in by_profile.items() if not 0.5 <= r <= 2]
    if not off:
        return " They agree to within a factor of two in width." if ratios else ""
    return f" **They disagree** by more than a factor of two in width for {_and(off)}: trust the wider."


def _quality(fit) -> str:
    d, noise = fit.diagnostics, fit.noise
    source = {
        "seeds": f"between seeds of one shape ({noise['n']} degrees of freedom between trunks, read from"
        f" {noise['num_rows']} rows)",
        "residuals": "read from the residuals",
    }
    lines = [
        f"- Residual (root mean square of ln measured / fitted): {percent(d['residual_rms'])}; noise s.d.:"
        f" {percent(noise['sd'])},"
        f" {source[noise['source'].removesuffix('+support')]}. {_sentence(d['lack_of_fit']['note'])}",
        f"- Components: {percent(d['trunk_sd'])} between trunks, {percent(d['row_sd'])} between the branches of one"
        + (f", {percent(noise['support_sd'])} from support sets." if "support_sd" in noise else "."),
    ]
    pattern = {k: v for k, v in d["residual_pattern"].items() if v is not None}
    if pattern:
        words = ", ".join(f"{k.replace('_', ' ')} {percent(v, True)}" for k, v in pattern.items())
        worst = max(abs(v) for v in pattern.values())
        note = (
            "a pattern above the noise: the form bends where the data do not"
            if worst > noise["sd"]
            else "no pattern above the noise"
        )
        lines.append(f"- Mean ln(predicted / measured): {words}: {note}.")
    lines.append(f"- Weakest direction: {d['weakest_direction']}.")
    if d["active_bounds"]:
        lines.append(
            "- At a bound: "
            + _and([f"`{n}` ({side})" for n, side in d["active_bounds"].items()])
            + "; these parameters are limits of the search, not estimates."
        )
    lines.append(
        f"- Optimiser: {'converged' if d['converged'] else '**not converged**'}; {d['num_starts']} starts, spread of"
        " their objectives"
        f" {d['objective_spread']:.2g}."
    )
    if not d["converged"]:
        lines.append("- **The optimiser did not converge**: do not use these numbers.")
    return "\n".join(lines)


def _extrapolation(fits, headline, refused) -> str:
    extra = fits[headline].extrapolation
    if not extra.get("cut"):
        return "No extrapolation test was possible: " + extra.get("note", "the rows have no compute") + "."
    lines = [
        f"Laws fitted to the {extra['n_fit']} rows below compute t = {_flops(extra['cut'])} predict the {extra['n']}"
        " rows above it."
        f" {_sentence(extra['rule'] if extra['rule'] != 'given' else 'The cut was given')} Errors are of ln(predicted"
        " / measured); bias above 0 means too high a predicted loss."
    ]
    table = extrapolation_table(fits)
    rows = []
    order = sorted(table, key=lambda n: (table[n]["rmse"] is None, table[n]["rmse"] or 0, n))
    for name in order:
        score = table[name]
        label = (
            f"**`{name}`** (headline)" if name == headline else f"`{name}`" if name in LAWS else name.replace("_", " ")
        )
        more = BASELINES.get(name, "")
        if score["rmse"] is None:
            rows.append(f"| {label} | not scored | | {score['n']} | {score.get('note', more)} |")
        else:
            rows.append(
                f"| {label} | {percent(score['rmse'])} | {percent(score['bias'], True)} | {score['n']} | {more} |"
            )
    lines.append("| form | RMSE | bias | rows | |\n|---|---|---|---|---|\n" + "\n".join(rows))
    counts = {table[n]["n"] for n in order if table[n]["rmse"] is not None}
    if len(counts) > 1:
        lines.append(
            "Forms that describe one arm at a time are scored on their own rows (no corners; a row at the centre gets the"
            " mean of its arms): compare their error, not their rank."
        )
    lines += [f"`{name}` was not fitted: {_sentence(reason)}" for name, reason in refused.items()]
    better = _better_baseline(fits, headline)
    if better:
        lines.append(f"**The headline law does not beat every baseline**: {better}.")
    return "\n\n".join(lines)


def extrapolation_table(fits: dict) -> dict:
    """`extrapolation_scores` without the rows: {rmse, bias, n} by form and baseline."""
    scores = extrapolation_scores(fits)
    return {name: {k: v for k, v in s.items() if k not in ("rows", "predicted")} for name, s in scores.items()}


def extrapolation_scores(fits: dict) -> dict:
    """Scores by form and baseline as `diagnose.extrapolation` gives them, each form's own fit speaking for it."""
    table: dict = {}
    for name, fitted in fits.items():
        for label, score in fitted.extrapolation.get("forms", {}).items():
            if label == name or label not in fits:
                table.setdefault(label, score)
    return table


def own_rmse(fitted, name: str) -> float | None:
    return (fitted.extrapolation.get("forms", {}).get(name) or {}).get("rmse")


def _better_baseline(fits, headline) -> str:
    own = own_rmse(fits[headline], headline)
    if own is None:
        return ""
    table = extrapolation_table(fits)
    scored = [n for n in BASELINES if n != headline and (table.get(n) or {}).get("rmse") is not None]
    better = [n for n in scored if table[n]["rmse"] < own]
    return _and([f"{BASELINES[n]} has RMSE {percent(table[n]['rmse'])} against {percent(own)}" for n in better])


def _recommendation(fit, r, reason, dependence) -> str:
    if r is None:
        return f"None: {_sentence(reason)}"
    lines = [
        f"For **{_flops(r.train_flops)} training FLOPs** ({abs(r.decades):.2f} decades"
        f" {'below' if r.decades < 0 else 'beyond'} the largest run):"
        f" **{_shape_words(r.shape)}**,"
        f" {r.num_params:,} parameters, {_flops(r.forward_flops)} forward FLOPs an image, {r.num_examples:,} images."
        " Predicted loss"
        f" {_with_interval(r.loss, r.loss_low, r.loss_high)}"
        + (f" (pairs: {_range(r.loss_pairs_low, r.loss_pairs_high)})." if r.loss_pairs_low is not None else "."),
    ]
    cells = "\n".join(
        f"| {NAMES[n]} | {_short(o['estimate'])} | {_range(o['low'], o['high'])} |"
        f" {_range(o['pairs_low'], o['pairs_high'])} |"
        f" {r.shape[n]} | {o['status']} | {o['grid']} |"
        for n, o in r.optimum.items()
    )
    lines.append(
        "| dimension | real optimum | headline | pairs | recommended | status | against the values run"
        " |\n|---|---|---|---|---|---|---|\n" + cells
    )
    regret = f"- Rounding to whole numbers costs {percent(r.rounding_regret)} of the loss."
    if r.regret:
        regret += (
            f" If a bootstrap draw were the truth, the shape would lose {percent(r.regret['median'])} (median) or"
            f" {percent(r.regret['high'])} (95th percentile) to that draw's best."
        )
    flat = r.flat_region
    ranges = _and([f"{NAMES[n]} {_number(low)} to {_number(high)}" for n, (low, high) in flat["ranges"].items()])
    region = (
        f"- Flat region: {count_words(flat)} shapes are within one noise s.d."
        f" ({percent(flat['within'])}, from {flat['noise_source']}) of the best: {ranges}."
    )
    if flat["open_above"]:
        region += f" Its upper end was not reached in {_and([NAMES[n] for n in flat['open_above']])}."
    p = r.proportional
    usual = (
        "- ViT-B proportions at the same FLOPs, at the width that the law itself thinks best"
        f" ({_shape_words(p['shape'])},"
        f" {p['num_examples']:,} images): predicted loss {_with_interval(p['loss'], p['loss_low'], p['loss_high'])},"
        f" {percent(p['loss_excess'], True)} against the recommended shape."
    )
    d = r.difference
    if d["low"] is not None:
        usual += (
            f" ln of recommended over usual: {percent(d['estimate'], True)} ({percent(d['low'], True)} to"
            f" {percent(d['high'], True)})."
        )
    if abs(p["loss_excess"]) <= flat["within"]:
        usual += " That is within one noise s.d.: the law does not claim a difference that a run could show."
    if misfits(fit) and flat["within"] < abs(p["loss_excess"]) <= fit.diagnostics["residual_rms"]:
        usual += " That is within what the law itself misses by: only paired runs can settle it."
    lines.append("\n".join([regret, region, usual]))
    if len(dependence) > 1:
        forms = [d["form"] for d in dependence]
        head = (
            "| form | its best shape | its loss | "
            + " | ".join(f"excess under {f}" for f in forms)
            + " |\n"
            + "|---" * (3 + len(forms))
            + "|\n"
        )
        body = "\n".join(
            f"| {d['form']} | {_shape_words(d['shape'])} | {d['loss']:.4g} | "
            + " | ".join(percent(d["loss_excess"][f]) for f in forms)
            + " |"
            for d in dependence
        )
        lines.append(
            "How much this depends on the form: the best shape of each, and what it would cost if another form were"
            " right.\n\n" + head + body
        )
    if r.warnings:
        lines.append("\n".join(f"- **Note**: {_sentence(w.replace('mlp_dim', NAMES['mlp_dim']))}" for w in r.warnings))
    return "\n\n".join(lines)


def _not_shown(data, fits, headline, recommendation) -> str:
    fit = fits[headline]
    source = str(data.rows[0].get("data"))
    lines = [
        f"- {SOURCES.get(source, f'The data are “{source}”.')} Nothing here shows that the exponents or the"
        " recommended proportions carry"
        " over to other images, labels or objectives."
    ]
    if "train_flops_range" in fit.data:
        low, high = fit.data["train_flops_range"]
        usual = 3e8 * named_shape("B/16").train_flops_per_image()
        lines.append(
            f"- Budgets span {np.log10(high / low):.1f} decades, up to {_flops(high)} training FLOPs a run. A"
            " ViT-B/16 that sees 300"
            f" million images takes {_flops(usual)}: {np.log10(usual / high):.1f} decades more."
        )
    if recommendation is not None:
        run = any(all(recommendation.shape[n] == row.get(n) for n in DIMENSIONS) for row in data.rows)
        lines.append(
            "- The recommendation is a prediction; "
            + ("that shape was run, but not at that budget." if run else "that shape was never run.")
            + " Train it and the usual proportions with paired seeds before relying on it."
        )
    open_ = [n for n, e in fit.exponents.items() if e["status"] != "ok"]
    if open_:
        lines.append(f"- The law is not determined in {_and([NAMES.get(n, n) for n in open_])}.")
    floor = fit.model["names"][len(fit.model["terms"])] if fit.form in WHOLE_SHAPE or fit.form == "chinchilla" else None
    ends = fit.intervals.get(floor or "", {})
    if floor and (not fit.params[floor] or (ends and ends["low"] < 0.1 * ends["high"])):
        lines.append(
            f"- The irreducible loss `{floor}` is not identified ({_short(fit.params[floor])},"
            f" {_range(ends.get('low'), ends.get('high'))}):"
            " these budgets do not come near it."
        )
    lines.append(
        "- How the best shape moves with the recipe (learning rate, batch, schedule) cannot be read from these rows."
    )
    return "\n".join(lines)


def _checklist(data, fit) -> str:
    noise = f"{fit.noise['source']}, {fit.noise['n']} degrees of freedom between trunks"
    pools = sorted({str(row["pool"]) for row in data.rows if row.get("pool")})
    draws = fit.diagnostics.get("draws", {})
    lines = [
        "- FLOPs: matrix products only, a multiply-add is 2; attention's n² products, patch embedding and pooling"
        " head included. "
        "Compute t = forward FLOPs of the encoder × images seen; training FLOPs = 3 × (encoder + task head) × images.",
        f"- Pooling: {_and(pools) if pools else 'not said'}. Parameters are the encoder's, the task head apart.",
        f"- Rows {fit.num_rows}, clusters (trunks) {fit.num_clusters}; branches of one trunk are never treated as"
        " independent.",
        f"- Noise: {noise}. Intervals: {100 * fit.level:.0f} %, by trunk"
        + (
            f", {draws['num']} draws each, seed {draws['seed']}, t-widening {draws['t_over_z']:.3f}; converged draws"
            f" {percent(draws['random_effects']['converged'])} and {percent(draws['pairs']['converged'])}."
            if draws
            else ": none (bootstrap=0)."
        ),
        "- Other forms fitted to the same rows: `forms/`. A headline chosen by its score on the held-out rows makes"
        " that score a little"
        " optimistic.",
        "- Parameters at full precision, bootstrap draws and diagnostics: `law.json`.",
    ]
    flops_scale = (fit.geometry or {}).get("flops_scale", 1.0)
    if abs(flops_scale - 1) > 1e-9:
        lines.append(f"- The rows' own FLOPs are {flops_scale:.4g} × ours (geometric mean); ours are scaled by that.")
    return "\n".join(lines)


def summary_text(summary: dict, no_recommendation: str) -> str:
    lines = [
        f"{summary['num_rows']} rows of {summary['num_trunks']} trunks ({summary['left_out']} left out); law:"
        f" {summary['form']},"
        f" because {summary['why']}"
    ]
    lines += [f"  {exponent_words(name, e)}" for name, e in summary["exponents"].items()]
    lines += [f"  note: {note}" for note in summary["notes"]]
    r = summary["recommendation"]
    if r is None:
        lines.append(f"no recommendation: {no_recommendation}")
    else:
        lines.append(
            f"for {_flops(r['train_flops'])} training FLOPs: {_shape_words(r['shape'])}, {r['num_examples']:,}"
            " images, predicted"
            f" {summary['metric']} {r['loss']:.4g}"
        )
        lines += [f"  note: {warning}" for warning in r["warnings"]]
    return "\n".join(lines + [summary["report"]])


# phrases --------------------------------------------------------------------------------------------------------------


def _and(items: list[str], word: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}" if items else ""


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def _value(value) -> str:
    return "not said" if value is None else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def percent(value: float, sign: bool = False) -> str:
    return f"{100 * value:+.2f} %" if sign else f"{100 * value:.2f} %"


def _range(low, high) -> str:
    return "not computed" if low is None else f"{low:.4g} to {high:.4g}"


def _with_interval(value, low, high, digits: int = 4) -> str:
    text = f"{value:.{digits}g}"
    return text if low is None else f"{text} ({low:.{digits}g} to {high:.{digits}g})"


def _flops(value: float) -> str:
    head, exponent = f"{value:.2e}".split("e")
    return f"{head.rstrip('0').rstrip('.')}e{int(exponent)}"


def _shape_words(shape: dict) -> str:
    text = f"width {shape['width']}, depth {shape['depth']}, MLP dim {shape['mlp_dim']}"
    return text + f" (head dim {shape['head_dim']}, patch {shape['patch_size']}, image {shape['image_size']})"
