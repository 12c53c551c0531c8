"""The law itself: its equation, its parameters at full precision, how it was fitted."""

from __future__ import annotations

from sovit.words.phrases import short


def law_section(fit) -> str:
    lines = [f"```\n{equation(fit)}\n```", f"Here {symbols(fit)}."]
    if fit.data.get("metric", "val_loss") != "val_loss":
        lines[1] += f" The loss is `{fit.data['metric']}`."
    if fit.model["zero_line"]:
        lines.append(f"The zero line z = {fit.model['zero_line']!r} is the loss of knowing nothing; it is not fitted.")
    level = f"{100 * fit.level:.0f} %"
    head = f"| parameter | value | {level} low | high | pairs low | pairs high |\n|---|---|---|---|---|---|"
    rows = []
    for name, value in fit.params.items():
        ends = fit.intervals.get(name, {})
        cells = [short(ends.get(k)) for k in ("low", "high", "pairs_low", "pairs_high")]
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


def symbols(fit) -> str:
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
