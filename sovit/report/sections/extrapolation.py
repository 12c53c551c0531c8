"""Scores on rows more expensive than those fitted, beside baselines."""

from __future__ import annotations

from dataclasses import replace

from sovit.law.extrapolation import Score
from sovit.law.fitted_law import plain
from sovit.law.forms import LAWS
from sovit.report.sections.phrases import flops, listed, percent, sentence

BASELINES = {
    "compute_only": "compute alone: E + A t^-a, blind to shape (constant proportions)",
    "nearest": "no law: the loss of the nearest cheaper run",
    "chinchilla": "size and images, blind to shape (Chinchilla)",
}
SHORT = {
    "compute_only": "constant proportions",
    "nearest": "the nearest cheaper run",
    "chinchilla": "the N-D law",
}


def held_out_words(fits, headline, cuts) -> str:
    """The headline of the report: how the law does on rows more expensive than those fitted, beside baselines."""
    own, extra = own_rmse(fits[headline], headline), fits[headline].extrapolation
    if own is None:
        note = extra.scores[headline].note if headline in extra.scores else extra.note or "the rows have no compute"
        return f"not tested: {sentence(note)} Nothing here shows that the law predicts larger runs."
    table = extrapolation_table(fits)
    text = (
        f"fitted to the {extra.n_fit} cheaper rows, `{headline}` predicts the {table[headline]['n']} most expensive"
        f" with RMSE {percent(own)} (bias {percent(table[headline]['bias'], True)}). "
    )
    rivals = {n: table[n]["rmse"] for n in BASELINES if n != headline and (table.get(n) or {}).get("rmse") is not None}
    said = {n: f"{SHORT[n]} {percent(e)} ({e / own:.2g} ×)" for n, e in rivals.items()}
    lost = [n for n, e in rivals.items() if e < own]
    if not rivals:
        text += "No baseline could be scored beside it."
    elif lost:
        text += (
            f"**A baseline extrapolates better than the law**: {listed([said[n] for n in lost])}. The law describes these"
            " runs; it has not shown that it predicts larger ones."
        )
        won = [said[n] for n in rivals if n not in lost]
        text += f" It beats {listed(won)}." if won else ""
    else:
        text += f"It beats every baseline: {listed([said[n] for n in rivals])}."
    scored = [c for c in cuts if (c["forms"].get(headline) or {}).get("rmse") is not None]
    if len(scored) > 1:
        wins = sum(not beaten_at(cut, headline) for cut in scored)
        errors = [cut["forms"][headline]["rmse"] for cut in scored]
        text += (
            f" At the {len(scored)} budgets where the rows can be cut it is ahead of all baselines"
            f" {'every time' if wins == len(scored) else f'{wins} times' if wins != 1 else 'once'}, with RMSE"
            f" {percent(min(errors))} to {percent(max(errors))}."
        )
    return text


def beaten_at(cut: dict, headline: str) -> list[str]:
    """Baselines that score better than the headline at one cut."""
    own = cut["forms"][headline]["rmse"]
    scores = {n: (cut["forms"].get(n) or {}).get("rmse") for n in BASELINES if n != headline}
    return [n for n, e in scores.items() if e is not None and e < own]


def extrapolation_section(fits, headline, refused, cuts) -> str:
    extra = fits[headline].extrapolation
    if not extra.cut:
        return "No extrapolation test was possible: " + (extra.note or "the rows have no compute") + "."
    lines = [
        f"Laws fitted to the {extra.n_fit} rows below compute t = {flops(extra.cut)} predict the {extra.n}"
        " rows above it."
        f" {sentence(extra.rule if extra.rule != 'given' else 'The cut was given')} Errors are of ln(predicted"
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
    if cuts:
        lines.append(_cuts(cuts, headline))
    lines += [f"`{name}` was not fitted: {sentence(reason)}" for name, reason in refused.items()]
    better = better_baseline(fits, headline)
    if better:
        lines.append(f"**The headline law does not beat every baseline**: {better}.")
    return "\n\n".join(lines)


def _cuts(cuts, headline) -> str:
    """RMSE and bias of each form and baseline at every cut, the headline first."""
    names = list(dict.fromkeys(n for cut in cuts for n in cut["forms"]))
    names.sort(key=lambda n: (n != headline, n in BASELINES))

    def cell(score):
        known = score and score["rmse"] is not None
        return f"{percent(score['rmse'])} ({percent(score['bias'], True)})" if known else "not scored"

    head = "| fitted to, in training FLOPs | rows fitted | rows scored | " + " | ".join(
        f"**`{n}`**" if n == headline else f"`{n}`" if n in LAWS else n.replace("_", " ") for n in names
    )
    body = "\n".join(
        f"| up to {flops(cut['largest'])} | {cut['n_fit']} | {cut['n']} | "
        + " | ".join(cell(cut["forms"].get(n)) for n in names)
        + " |"
        for cut in cuts
    )
    text = "The same test at every budget that leaves enough rows below it: RMSE (bias) of all rows above.\n\n"
    return text + head + " |\n" + "|---" * (3 + len(names)) + "|\n" + body


def extrapolation_table(fits: dict) -> dict:
    """`extrapolation_scores` without the rows: {rmse, bias, n} by form and baseline."""
    scores = extrapolation_scores(fits)
    return {name: plain(replace(score, rows=None, predicted=None)) for name, score in scores.items()}


def extrapolation_scores(fits: dict) -> dict[str, Score]:
    """Scores by form and baseline as `diagnose.extrapolation` gives them, each form's own fit speaking for it."""
    table: dict = {}
    for name, fitted in fits.items():
        for label, score in fitted.extrapolation.scores.items():
            if label == name or label not in fits:
                table.setdefault(label, score)
    return table


def own_rmse(fitted, name: str) -> float | None:
    return fitted.extrapolation.rmse(name)


def better_baseline(fits, headline) -> str:
    own = own_rmse(fits[headline], headline)
    if own is None:
        return ""
    table = extrapolation_table(fits)
    scored = [n for n in BASELINES if n != headline and (table.get(n) or {}).get("rmse") is not None]
    better = [n for n in scored if table[n]["rmse"] < own]
    return listed([f"{BASELINES[n]} has RMSE {percent(table[n]['rmse'])} against {percent(own)}" for n in better])
