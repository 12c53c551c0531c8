"""How the best shape grows with compute."""

from __future__ import annotations

from sovit.words.phrases import NAMES, flops, listed, sentence, short, span, with_interval


def growth_section(fit, implied, closed) -> str:
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
        lines.append(f"x* ∝ t^s between compute t = {flops(low)} and {flops(high)} (forward FLOPs × images), {what}:")
    profiled = any("profile_low" in e for e in fit.exponents.values())
    more = f" {level} profile |" if profiled else ""
    lines.append(
        f"| dimension | s | {level} headline | {level} pairs |{more} status |\n|---|---|---|---|{'---|' * profiled}---|\n"
        + "\n".join(
            f"| {NAMES.get(n, n)} | {'not determined' if e['estimate'] is None else short(e['estimate'])} |"
            f" {span(e['low'], e['high'])} | {span(e['pairs_low'], e['pairs_high'])} |"
            + (f" {profile_words(e)} |" if profiled else "")
            + f" {e['status']} |"
            for n, e in fit.exponents.items()
        )
    )
    if fit.draws:
        lines.append(
            "The headline interval comes from new data drawn from the law with the estimated trunk and row noise; the"
            " pairs"
            " interval from drawing whole trunks anew, arm by arm, without a noise model." + disagreement(fit)
        )
    words = {
        "edge": "the optimum lies at or beyond the last value run, so that its place is an extrapolation",
        "unidentified": "the runs do not fix the exponent; no number is given for it",
    }
    for name, e in fit.exponents.items():
        if e["status"] != "ok":
            lines.append(f"**{NAMES.get(name, name)} is {e['status']}**: {words[e['status']]}. {sentence(e['note'])}")
    if closed:
        lines.append(_closed(closed))
    if implied:
        lines.append(_implied(implied))
    return "\n\n".join(lines)


def profile_words(exponent: dict) -> str:
    """The profile interval of an exponent; a side where the likelihood never falls below the cut is open."""
    low, high = exponent.get("profile_low"), exponent.get("profile_high")
    if low is None and high is None:
        return "not computed"
    return f"at most {high:.4g}" if low is None else f"at least {low:.4g}" if high is None else span(low, high)


def _closed(closed) -> str:
    """Closed form of the growth beside the exact optimum's."""
    low, high = closed["span"]

    def row(name, r):
        form = "none" if r["closed"] is None else with_interval(r["closed"], r["closed_low"], r["closed_high"], 3)
        ends = with_interval(r["exact"], r["low"], r["high"], 3)
        return f"| {NAMES.get(name, name)} | {form} | {r['slope']:.3g} | {ends} |"

    rows = closed["dims"] | {"FLOPs an image": closed["flops"], "images": closed["images"]}
    apart = [f"{NAMES.get(n, n)} × {r['apart']:.2f}" for n, r in closed["dims"].items() if r["apart"] is not None]
    text = (
        "In closed form, with FLOPs elasticities held constant, x* ∝ t^σ, σ = (1/a) / (1/c + Σ g/a); beside it the slope of"
        f" the exact optimum at the budget of the recommendation ({flops(high)} training FLOPs) and its mean slope from"
        f" {flops(low)}:\n\n| | closed form | slope there | exact, over that span |\n|---|---|---|---|\n"
        + "\n".join(row(name, r) for name, r in rows.items())
    )
    if closed["note"]:
        text += f"\n\n{sentence(closed['note'])}"
    return text + (f"\n\nFollowed down to {flops(low)} the closed form misses by {listed(apart)}." if apart else "")


def _implied(implied: list[dict]) -> str:
    """The compute that each dimension says lies between two recommended shapes."""
    lines = [
        "Do the dimensions tell one story? Between two shapes each dimension implies a ratio of compute τ = (x / x₀)^(1/s);"
        " if the exponents describe this law's own path, all are the actual ratio."
    ]
    for case in implied:
        real, whole = case["optimum"], case["shape"]
        head = "| dimension | s | optimum | implied τ | whole shape | implied τ |\n|---|---|---|---|---|---|\n"
        body = "\n".join(
            f"| {NAMES.get(n, n)} | {r['exponent']:.3g} | {r['start']:.4g} to {r['end']:.4g} | {r['tau']:.3g} |"
            f" {w['start']:g} to {w['end']:g} | {w['tau']:.3g} |"
            for (n, r), w in zip(real["dimensions"].items(), whole["dimensions"].values())
        )
        told = (
            f"By the optima the dimensions agree, to a factor {real['spread']:.3g}"
            if real["agree"]
            else f"**By the optima the dimensions contradict each other**, by a factor {real['spread']:.3g}: no power law"
            " describes the path between them"
        )
        rounded = (
            f"by the whole-number shapes too ({whole['spread']:.3g})"
            if whole["agree"]
            else f"by the whole-number shapes they differ by {whole['spread']:.3g}, which is rounding"
            if real["agree"]
            else f"by the whole-number shapes they differ by {whole['spread']:.3g}"
        )
        lines.append(
            f"From {flops(case['from_train_flops'])} to {flops(case['to_train_flops'])} training FLOPs the actual ratio is"
            f" {case['actual']:.3g}. {told}; {rounded}.\n\n{head}{body}"
        )
    return "\n\n".join(lines)


def disagreement(fit) -> str:
    ratios = {
        n: r for n, r in fit.diagnostics["interval_ratio"].items() if fit.exponents[n]["status"] != "unidentified"
    }
    by_profile = {n: r for n, r in fit.diagnostics.get("profile_ratio", {}).items() if n in ratios}
    off = [f"{NAMES.get(n, n)} ({r:.2g} ×, pairs over headline)" for n, r in ratios.items() if not 0.5 <= r <= 2]
    off += [f"{NAMES.get(n, n)} ({r:.2g} ×, profile over headline)" for n, r in by_profile.items() if not 0.5 <= r <= 2]
    if not off:
        return " They agree to within a factor of two in width." if ratios else ""
    return f" **They disagree** by more than a factor of two in width for {listed(off)}: trust the wider."
