"""How good the fit is: residuals, noise, bounds, optimiser."""

from __future__ import annotations

from sovit.words.phrases import percent, sentence


def quality_section(fit) -> str:
    d, noise = fit.diagnostics, fit.noise
    source = {
        "seeds": f"between seeds of one shape ({noise['n']} degrees of freedom between trunks, read from"
        f" {noise['num_rows']} rows)",
        "residuals": "read from the residuals",
    }
    lines = [
        f"- Residual (root mean square of ln measured / fitted): {percent(d['residual_rms'])}; noise s.d.:"
        f" {percent(noise['sd'])},"
        f" {source[noise['source'].removesuffix('+support')]}. {sentence(d['lack_of_fit']['note'])}",
        f"- Components: {percent(d['trunk_sd'])} between trunks, {percent(d['row_sd'])} between the branches of one"
        + (f", {percent(noise['support_sd'])} from support sets." if "support_sd" in noise else "."),
    ]
    pattern = {k: v for k, v in d["residual_pattern"].items() if v is not None}
    if pattern:
        words = ", ".join(f"{k.replace('_', ' ')} {percent(v, True)}" for k, v in pattern.items())
        worst = max(abs(v) for v in pattern.values())
        note = (
            "a pattern above the noise of a row: the form bends where the data do not"
            if worst > noise["sd"]
            else "none is above the noise of a single row (means of many rows are surer than that)"
        )
        lines.append(f"- Mean ln(predicted / measured): {words}: {note}.")
    lines.append(
        f"- Optimiser: {'converged' if d['converged'] else '**not converged**'}; {d['num_starts']} starts, spread of"
        " their objectives"
        f" {d['objective_spread']:.2g}."
    )
    if not d["converged"]:
        lines.append("- **The optimiser did not converge**: do not use these numbers.")
    return "\n".join(lines)


def misfits(fit) -> float | None:
    """Residuals over seed noise where that is above 2, else None: then the form bends where the data do not."""
    ratio = fit.diagnostics["lack_of_fit"]["residual_over_noise"]
    return ratio if fit.noise["source"].startswith("seeds") and ratio and ratio > 2 else None
