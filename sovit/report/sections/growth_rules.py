"""How the best shape grows with compute."""

from __future__ import annotations

from sovit.report.sections.phrases import NAMES, flops, listed, sentence, short, span, with_interval


def growth_section(fit, path) -> str:
    if not fit.exponents:
        return (
            "The rows do not say what a shape costs (patch size, image size), so that no optimum at a given"
            " compute can be computed."
        )
    low, high = next(iter(fit.exponents.values())).compute_range or (None, None)
    level = f"{100 * fit.level:.0f} %"
    lines = []
    if low is not None and high is not None:
        kind = next(iter(fit.exponents.values())).kind
        what = (
            "all dimensions optimised together" if kind == "joint" else "each dimension alone, the others at the centre"
        )
        lines.append(f"x* ∝ t^s between compute t = {flops(low)} and {flops(high)} (forward FLOPs × images), {what}:")
    lines.append(
        f"| dimension | s | {level} headline | {level} pairs | status |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {NAMES.get(n, n)} | {'not determined' if e.estimate is None else short(e.estimate)} |"
            f" {span(e.low, e.high)} | {span(e.pairs_low, e.pairs_high)} |"
            f" {e.status} |"
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
        if e.status != "ok":
            lines.append(f"**{NAMES.get(name, name)} is {e.status}**: {words[e.status]}. {sentence(e.note)}")
    if path:
        lines.append(_path(path))
    return "\n\n".join(lines)


def _path(path) -> str:
    """Growth of the exact optimum, of its FLOPs and of its images."""
    low, high = path["span"]
    rows = path["dims"] | {"FLOPs an image": path["flops"], "images": path["images"]}
    body = "\n".join(
        f"| {NAMES.get(n, n)} | {r['slope']:.3g} | {with_interval(r['exact'], r['low'], r['high'], 3)} |"
        for n, r in rows.items()
    )
    return (
        f"Slope of the exact optimum at the budget of the recommendation ({flops(high)} training FLOPs), and its mean"
        f" slope from {flops(low)}:\n\n| | slope there | exact, over that span |\n|---|---|---|\n{body}"
    )


def disagreement(fit) -> str:
    ratios = {n: r for n, r in fit.diagnostics.interval_ratio.items() if fit.exponents[n].status != "unidentified"}
    off = [f"{NAMES.get(n, n)} ({r:.2g} ×, pairs over headline)" for n, r in ratios.items() if not 0.5 <= r <= 2]
    if not off:
        return " They agree to within a factor of two in width." if ratios else ""
    return f" **They disagree** by more than a factor of two in width for {listed(off)}: trust the wider."
