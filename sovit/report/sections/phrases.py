"""Numbers and lists as words: the formats of every report, in one place."""

from __future__ import annotations

from sovit.law.diagnostics import SIGNIFICANT
from sovit.spec.shape import Shape

NAMES = {
    "width": "width",
    "depth": "depth",
    "mlp_dim": "MLP dim",
    "patch_size": "patch size",
    "image_size": "image size",
    "num_params": "parameters",
}


def listed(items: list[str], word: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}" if items else ""


def few(items: list[str], most: int = 4) -> str:
    """The first of a list, and how many more there are: "a, b, c, d and 2 more"."""
    return listed(items) if len(items) <= most else f"{', '.join(items[:most])} and {len(items) - most} more"


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def said(value) -> str:
    return "not said" if value is None else str(value)


def in_words(text: str) -> str:
    """Text with the names of dimensions as they are said: "mlp_dim is edge" as "MLP dim is edge"."""
    for name, words in NAMES.items():
        text = text.replace(name, words)
    return text


def grows(exponent: float) -> str:
    """The verb of an exponent: what grows as compute^0.2 falls as compute^-0.2."""
    return "falls" if exponent < 0 else "grows"


def cell(text: str) -> str:
    """Text of the rows inside a table: one line, without a bar."""
    return " ".join(str(text).split()).replace("|", "/")


def three(value: float | None) -> str:
    return "not determined" if value is None else f"{value:.3g}"


def number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def percent(value: float, sign: bool = False) -> str:
    return f"{100 * value:+.2f} %" if sign else f"{100 * value:.2f} %"


def span(low, high) -> str:
    return "not computed" if low is None else f"{low:.4g} to {high:.4g}"


def with_interval(value, low, high, digits: int = 4) -> str:
    text = f"{value:.{digits}g}"
    return text if low is None else f"{text} ({low:.{digits}g} to {high:.{digits}g})"


def flops(value: float) -> str:
    head, exponent = f"{value:.2e}".split("e")
    return f"{head.rstrip('0').rstrip('.')}e{int(exponent)}"


def shape_words(shape: Shape) -> str:
    text = f"width {shape.width}, depth {shape.depth}, MLP dim {shape.mlp_dim}"
    return text + f" (head dim {shape.head_dim}, patch {shape.patch_size}, image {shape.image_size})"


def quality_section(fit) -> str:
    d, noise = fit.diagnostics, fit.noise
    source = {
        "seeds": f"between seeds of one shape ({noise.n} degrees of freedom between trunks, read from"
        f" {noise.num_rows} rows)",
        "residuals": "read from the residuals",
    }
    lines = [
        f"- Residual (root mean square of ln measured / fitted): {percent(d.residual_rms)}; noise s.d.:"
        f" {percent(noise.sd)},"
        f" {source[noise.source.removesuffix('+support')]}. {sentence(d.lack_of_fit.note)}",
        f"- Components: {percent(d.trunk_sd)} between trunks, {percent(d.row_sd)} between the branches of one"
        + (f", {percent(noise.support_sd)} from support sets." if noise.support_sd is not None else "."),
    ]
    pattern = {k: v for k, v in d.residual_pattern.items() if v is not None}
    if pattern:
        words = ", ".join(f"{k.replace('_', ' ')} {percent(v, True)}" for k, v in pattern.items())
        worst = max(abs(v) for v in pattern.values())
        note = (
            "a pattern above the noise of a row: the form bends where the data do not"
            if worst > noise.sd
            else "none is above the noise of a single row (means of many rows are surer than that)"
        )
        lines.append(f"- Mean ln(predicted / measured): {words}: {note}.")
    lines.append(
        f"- Optimiser: {'converged' if d.converged else '**not converged**'}; {d.num_starts} starts, spread of"
        " their objectives"
        f" {d.objective_spread:.2g}."
    )
    if not d.converged:
        lines.append("- **The optimiser did not converge**: do not use these numbers.")
    return "\n".join(lines)


def misfits(fit) -> float | None:
    """Residuals over seed noise where an F test tells them apart, else None: then the form bends where the data do not."""
    found = fit.diagnostics.lack_of_fit
    return found.residual_over_noise if found.p is not None and found.p < SIGNIFICANT else None
