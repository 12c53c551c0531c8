"""What is known of each dimension and what is not, the direction in which the rows say least, and bounds that are active."""

from __future__ import annotations

from sovit.law.exponents import Growth
from sovit.law.form import FALLING
from sovit.report.sections.phrases import NAMES, flops, grows, listed, number, percent, span


def known_section(fit, inside, weakest) -> str:
    lines = [f"- {_dimension(fit, name, e, inside.get(name))}" for name, e in fit.exponents.items()]
    lines.append(f"- {_weakest(weakest)}")
    for name, side in fit.diagnostics.active_bounds.items():
        meaning = bound(name, side)
        lines.append(f"- `{name}` is at its {side} bound, which is a limit of the search and no estimate: {meaning}.")
    if not fit.diagnostics.active_bounds:
        lines.append("- No parameter is at a bound of the search.")
    return "\n".join(lines)


def _dimension(fit, name: str, e: Growth, inside: dict | None) -> str:
    label = NAMES.get(name, name)
    text = f"**{label[:1].upper()}{label[1:]}** "
    if e.estimate is None:
        text += f"is not determined: {e.note}."
    else:
        text += f"{grows(e.estimate)} as compute^{e.estimate:.3g}"
        if e.low is None or e.high is None:
            text += ", without an interval (fitted with bootstrap=0)."
        else:
            text += f"; {100 * fit.level:.0f} % interval {span(e.low, e.high)}"
            text += f", by pairs {span(e.pairs_low, e.pairs_high)}"
            growth = [10**e.low, 10**e.high]
            text += f": ten times the compute wants {growth[0]:.2f} to {growth[1]:.2f} times as much of it."
    grid = fit.data.grid.get(name)
    if inside is None or not grid:
        return text
    low, high = fit.data.compute_range
    least, most = min(grid), max(grid)
    if e.status == "unidentified" and "amplitude" in e.note:
        return f"{text} {_remedy(name, e, inside, fit)}"
    text += f" Over the budgets run the law's optimum moves from {inside['at'][0]:.3g} to {inside['at'][1]:.3g};"
    text += f" the values run are {number(least)} to {number(most)}"
    if inside["low"] is None:
        text += ", and the optimum lies among them at no compute near the runs."
    elif inside["low"] <= low and inside["high"] >= high:
        text += ", and the optimum lies strictly between them at every compute of the runs"
        text += f" (t = {flops(low)} to {flops(high)})"
        text += f" and on to {flops(inside['high'])}." if inside["high"] < 99 * high else " and two decades beyond."
    else:
        text += f", and the optimum lies strictly between them only from t = {flops(inside['low'])} to"
        text += f" {flops(inside['high'])} (the runs: {flops(low)} to {flops(high)})."
    remedy = _remedy(name, e, inside, fit)
    return f"{text} {remedy}" if remedy else text


def _remedy(name: str, e: Growth, inside: dict, fit) -> str:
    """What to run so that the dimension is known; "" where it is."""
    label, grid = NAMES.get(name, name), fit.data.grid[name]
    least, most = min(grid), max(grid)
    top = inside["at"][1]
    if e.status == "ok":
        return ""
    if e.status == "edge":
        if max(inside["at"]) >= most:
            return f"Remedy: extend the {label} arm above {number(most)}."
        if min(inside["at"]) <= least > 1:
            return f"Remedy: extend the {label} arm below {number(least)}, or run larger budgets."
        return f"Remedy: run larger budgets, where the optimum leaves the smallest {label} that there is."
    if "amplitude" in e.note or "no gain" in e.note:
        if name in FALLING:
            return (
                f"Remedy: run larger values of {label} than {number(most)}, where they would hurt, or larger budgets."
            )
        return (
            f"Remedy: run smaller values of {label} than {number(least)} at the largest budgets, where they would hurt."
            if least > 1
            else f"Remedy: run larger budgets; the rows hold no {label} small enough to hurt."
        )
    if "compute" in e.note and "span" in e.note:
        return "Remedy: run budgets further apart."
    far = f"; the optimum is near {top:.3g}" if least < top < most else ""
    return f"Remedy: more values of {label} on both sides of the optimum{far}, or more seeds of the outermost ones."


def _weakest(weakest: dict | None) -> str:
    if not weakest:
        return "The weakest direction of the fit is not known."
    first, *rest = weakest["parameters"]
    if not rest:
        return f"One free parameter, {parameter(first)}: nothing trades off."
    way = "with" if weakest["loadings"][0] * weakest["loadings"][1] > 0 else "against"
    text = (
        f"Weakest direction: {parameter(first)} {way} {parameter(rest[0])} (loadings {weakest['loadings'][0]:+.2f},"
        f" {weakest['loadings'][1]:+.2f}; singular values of the Jacobian with columns of unit norm"
        f" {weakest['singular_values'][0]:.3g} to {weakest['singular_values'][1]:.3g}). "
        + (
            "Raising both together hardly changes the fit"
            if way == "with"
            else "Raising one and lowering the other hardly changes the fit"
        )
    )
    moves = weakest.get("moves")
    if not moves:
        return text + "."
    said = listed([f"{NAMES.get(n, n)} by {percent(m, True)}" for n, m in moves.items()])
    touched = [NAMES.get(n, n) for n, m in moves.items() if abs(m) > 0.05]
    text += f"; one standard error along it (rows taken for independent) moves the recommended {said}"
    return text + (f": the recommendation for {listed(touched)} hangs on it." if touched else ", which is little.")


def parameter(name: str) -> str:
    """A parameter of a law in words."""
    kinds = {
        "A": "the amplitude of", "a": "the exponent of", "alpha": "the amplitude of", "beta": "the cost amplitude of",
        "b": "the cost exponent of", "xi": "the shape-free compute term of the arm", "eps": "the floor of the arm",
        "c": "the compute exponent of the arm",
    }  # fmt: skip
    alone = {
        "B": "the amplitude of the images", "c": "the exponent of the images", "eps": "the irreducible loss",
        "E": "the irreducible loss", "s": "the sharpness of the power mean", "A": "the amplitude of the parameters",
        "alpha": "the exponent of the parameters", "beta": "the exponent of the images", "d": "the shift of the images",
        "h": "the exponent of the patches in the data term",
    }  # fmt: skip
    kind, _, dim = name.partition("_")
    if not dim:
        return f"{alone[name]} (`{name}`)" if name in alone else f"`{name}`"
    what = "the parameter count" if dim == "N" else NAMES.get(dim, dim)
    return f"{kinds[kind]} {what} (`{name}`)" if kind in kinds else f"`{name}`"


def bound(name: str, side: str) -> str:
    """What it means that a parameter ended on a bound."""
    kind, _, dim = name.partition("_")
    label = {"": "the images", "N": "the parameter count"}.get(dim) or NAMES.get(dim, dim)
    lower, falls = side == "lower", "rises" if dim in FALLING else "falls"
    label = f"smaller {label}s" if dim in FALLING and kind == "A" else label
    if kind in ("eps", "E"):
        return "these budgets show no irreducible loss, so that predictions far beyond them may be too low"
    if kind in ("A", "alpha", "B", "beta") and lower:
        return f"the rows show no gain from {label}" if kind != "beta" else f"the rows show no cost of {label}"
    if kind == "xi":
        return "all of the compute term depends on the dimension"
    if kind == "s":
        return (
            "capacity and data add up, as in `joint`"
            if lower
            else "the worse of capacity and data decides alone, a maximum"
        )
    if kind == "h":
        return (
            "an image teaches as much however many patches it is cut into"
            if lower
            else "the rows want a value beyond it"
        )
    if kind == "d":
        return "the metric shows no saturation at the poor end"
    if kind in ("a", "b", "c", "alpha", "beta"):
        return (
            f"the loss {falls} with {label} about as slowly as a logarithm"
            if lower
            else f"the loss {falls} with {label} more steeply than any law is allowed to: a step rather than a power"
        )
    return "the rows want a value beyond it"
