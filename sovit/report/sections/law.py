"""The law itself: its equation, its parameters at full precision, how it was fitted."""

from __future__ import annotations

from sovit.report.sections.phrases import short


def law_section(fit) -> str:
    lines = [f"```\n{equation(fit)}\n```", f"Here {symbols(fit)}."]
    if (fit.data.metric or "val_loss") != "val_loss":
        lines[1] += f" The loss is `{fit.data.metric}`."
    if fit.model.zero_line:
        lines.append(f"The zero line z = {fit.model.zero_line!r} is the loss of knowing nothing; it is not fitted.")
    level = f"{100 * fit.level:.0f} %"
    head = f"| parameter | value | {level} low | high | pairs low | pairs high |\n|---|---|---|---|---|---|"
    rows = []
    for name, value in fit.params.items():
        ends = fit.intervals.get(name)
        cells = [short(getattr(ends, k, None)) for k in ("low", "high", "pairs_low", "pairs_high")]
        bound = fit.diagnostics.active_bounds.get(name)
        rows.append(
            f"| `{name}` | {'absent' if value is None else repr(value)}{f' ({bound} bound)' if bound else ''} |"
            f" {' | '.join(cells)} |"
        )
    lines.append("\n".join([head, *rows]))
    loss = {
        "huber_log": "Huber loss of ln(predicted / measured)",
        "log_squares": "squares of ln(predicted / measured)",
    }[fit.model.loss]
    delta = f" with δ = {fit.model.huber_delta!r}" if fit.model.huber_delta else ""
    whitened = ", whitened by trunk" if fit.model.whitened else ""
    lines.append(f"Fitted by the sum over rows of the {loss}{delta}{whitened}; objective {fit.objective!r}.")
    return "\n\n".join(lines)


def equation(fit) -> str:
    """The law as a line of text, or two."""
    form = fit.shape_form
    names = dict(num_params="N", num_examples="n", tokens="D", compute="t", num_patches="T")
    if fit.form == "chinchilla":
        names["num_examples"] = "D"
    if form.shift:
        names["num_examples"] = "(n + d)"

    def term(t) -> str:
        factors = [f"{names.get(c, c)}^{'-' if sign < 0 else ''}{exponent}" for c, exponent, sign in t.factors]
        return "·".join([t.amplitude, *factors])

    floor = [t.amplitude for t in form.formula if not t.factors]
    if form.arms:
        text = (
            "alpha_x·x^-a_x + (beta_x·x^b_x + xi_x)·t^-c + eps_x   for each dimension x on its own arm"
            if form.shared
            else "alpha_x·x^-a_x + (beta_x·x^b_x + xi_x)·t^-c_x + eps_x   for each dimension x on its own arm"
        )
        return f"loss = {text}"
    data = [t for t in form.formula if any(c == form.terms[-1] for c, _, _ in t.factors)]
    size = [t for t in form.formula if t.factors and t not in data]
    if not form.power_mean:
        return "loss = " + " + ".join([*map(term, size), *map(term, data), *floor])
    text = f"M = {' + '.join(['(K^s + D^s)^(1/s)', *floor])},   K = {' + '.join(map(term, size))},"
    text += f"   D = {' + '.join(map(term, data))}"
    return text + ("\nloss = M" if form.zero_line is None else "\nloss = (z^-4 + M^-4)^(-1/4)")


def symbols(fit) -> str:
    if fit.form == "chinchilla":
        return "N is the number of encoder parameters and D the number of images seen"
    if fit.shape_form.arms:
        own = "shared" if fit.shape_form.shared else "each arm's own"
        return (
            "t is compute, forward FLOPs × images, and the other dimensions stay at the centre (Eq. 2 of arXiv"
            f" 2305.13035, c {own})"
        )
    text = (
        "n is the number of images seen; compute enters through the exact FLOPs of a shape, so that n = budget / FLOPs"
    )
    text += "; N is the number of encoder parameters of the shape" * ("num_params" in fit.model.terms)
    return text + "; T is the number of patches that an image is cut into" * ("num_patches" in fit.model.terms)
