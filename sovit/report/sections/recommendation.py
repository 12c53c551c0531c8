"""The shape for the budget asked for, what is as good, and how it depends on the form."""

from __future__ import annotations

from math import expm1

from sovit.predict.law_at_budget import TOKENS
from sovit.report.sections.phrases import (
    NAMES,
    flops,
    in_words,
    listed,
    misfits,
    number,
    percent,
    sentence,
    shape_words,
    short,
    span,
    with_interval,
)
from sovit.report.text import count_words, flat_words, label, paper_lines
from sovit.spec.shape import Shape


def recommendation_section(data, fit, r, reason, dependence, rules, frontier) -> str:
    if r is None:
        return f"None: {sentence(reason)}"
    lines = [
        f"For **{flops(r.train_flops)} training FLOPs** ({abs(r.decades):.2f} decades"
        f" {'below' if r.decades < 0 else 'beyond'} the largest run):"
        f" **{shape_words(r.shape)}**,"
        f" {r.num_params:,} parameters, {flops(r.forward_flops)} forward FLOPs an image, {r.num_examples:,} images."
        f" Predicted {data.metric}"
        f" {with_interval(r.loss, r.loss_low, r.loss_high)}"
        + (f" (pairs: {span(r.loss_pairs_low, r.loss_pairs_high)})." if r.loss_pairs_low is not None else "."),
    ]
    cells = "\n".join(
        f"| {NAMES[n]} | {short(o.estimate)} | {span(o.low, o.high)} |"
        f" {span(o.pairs_low, o.pairs_high)} |"
        f" {getattr(r.shape, n)} | {o.status} | {o.grid} |"
        for n, o in r.optimum.items()
    )
    lines.append(
        "| dimension | real optimum | headline | pairs | recommended | status | against the values run"
        " |\n|---|---|---|---|---|---|---|\n" + cells
    )
    tokens = [NAMES[n] for n in TOKENS if n in r.optimum]
    what = "whole numbers" + (f" and to a {listed(tokens)} that was run" if tokens else "")
    regret = f"- Rounding to {what} costs {percent(r.rounding_regret)} of the loss."
    if r.regret:
        regret += (
            f" If a bootstrap draw were the truth, the shape would lose {percent(r.regret.median)} (median) or"
            f" {percent(r.regret.high)} (95th percentile) to that draw's best."
        )
    flat = r.flat_region
    ranges = listed([f"{NAMES[n]} {number(low)} to {number(high)}" for n, (low, high) in flat.ranges.items()])
    region = (
        f"- Flat region: {flat_words(flat)} within one noise s.d."
        f" ({percent(flat.within)}, from {flat.noise_source}) of the best: {ranges}."
    )
    if flat.open_above:
        region += f" Its upper end was not reached in {listed([NAMES[n] for n in flat.open_above])}."
    p = r.proportional
    usual = (
        "- ViT-B proportions at the same FLOPs, at the width that the law itself thinks best"
        f" ({shape_words(p.shape)},"
        f" {p.num_examples:,} images): predicted {data.metric} {with_interval(p.loss, p.loss_low, p.loss_high)},"
        f" {percent(p.loss_excess, True)} against the recommended shape."
    )
    d = r.difference
    if d.low is not None:
        usual += (
            f" ln of recommended over usual: {percent(d.estimate, True)} ({percent(d.low, True)} to"
            f" {percent(d.high, True)})."
        )
    if abs(p.loss_excess) <= flat.within:
        usual += " That is within one noise s.d.: the law does not claim a difference that a run could show."
    if misfits(fit) and flat.within < abs(p.loss_excess) <= fit.diagnostics.residual_rms:
        usual += " That is within what the law itself misses by: only paired runs can settle it."
    lines.append("\n".join([regret, region, usual]))
    if rules:
        lines.append(_rules(data, r, rules))
    if frontier:
        lines.append(_frontier(data, fit, frontier))
    if len(dependence) > 1:
        forms = [d["form"] for d in dependence]
        head = (
            f"| form | its best shape | its {data.metric} | "
            + " | ".join(f"excess under {f}" for f in forms)
            + " |\n"
            + "|---" * (3 + len(forms))
            + "|\n"
        )
        body = "\n".join(
            f"| {d['form']} | {shape_words(d['shape'])} | {d['loss']:.4g} | "
            + " | ".join(percent(d["loss_excess"][f]) for f in forms)
            + " |"
            for d in dependence
        )
        lines.append(
            "How much this depends on the form: the best shape of each, and what it would cost if another form were"
            " right.\n\n" + head + body
        )
    if r.warnings:
        lines.append("\n".join(f"- **Note**: {sentence(in_words(w))}" for w in r.warnings))
    return "\n\n".join(lines)


def _rules(data, r, rules) -> str:
    """What other rules would train at the same budget, and where SoViT's recipe parts from the law."""
    titles = {"size_rule": "ViT-B proportions, size by the N-D law", "paper_rule": "SoViT's recipe (each by τ^(s/D))"}
    cells = [("the law's own", r.shape, r.num_params, r.num_examples, r.loss, "")]
    p = r.proportional
    more = _worse(vars(r.difference), -1)
    cells.append(("ViT-B proportions, size by this law", p.shape, p.shape.num_params, p.num_examples, p.loss, more))
    for name, title in titles.items():
        if rule := rules.get(name):
            more = _worse(rule["difference"]) + (f"; {rule['note']}" if rule["note"] else "")
            cells.append((title, Shape(**rule["shape"]), rule["num_params"], rule["num_examples"], rule["loss"], more))
    body = "\n".join(
        f"| {title} | {label(shape, r.optimum)} | {params:,} | {images:,} | {loss:.4g} | {more} |"
        for title, shape, params, images, loss, more in cells
    )
    text = (
        "Other rules at the same budget, as this law judges them (excess with its interval).\n\n"
        f"| rule | shape | parameters | images | {data.metric} | excess |\n|---|---|---|---|---|---|\n{body}"
    )
    paper = rules.get("paper_rule")
    if paper:
        text += "\n\n" + " ".join(sentence(line.strip()) for line in paper_lines(paper))
    return text


def _worse(difference, sign: int = 1) -> str:
    """Relative excess of a loss from ln of a ratio, with its interval."""
    text = percent(expm1(sign * difference["estimate"]), True)
    if difference["low"] is None:
        return text
    low, high = sorted(expm1(sign * difference[end]) for end in ("low", "high"))
    return f"{text} ({percent(low, True)} to {percent(high, True)})"


def _frontier(data, fit, rows) -> str:
    """The best shape at a ladder of budgets."""
    body = "\n".join(
        f"| {flops(row.train_flops)} | {row.decades:+.1f} | {label(row.shape, row.optimum)} |"
        f" {row.num_params:,} |"
        f" {row.num_examples:,} | {with_interval(row.loss, row.loss_low, row.loss_high)} |"
        f" {count_words(row.flat_region)} |"
        for row in rows
    )
    return (
        "The frontier: the best shape of the law at other budgets (decades from the largest run; beyond 2 a shape is a"
        f" guess).\n\n| training FLOPs | decades | shape | parameters | images | {data.metric} ({100 * fit.level:.0f} %) |"
        f" shapes as good |\n|---|---|---|---|---|---|---|\n{body}"
    )
