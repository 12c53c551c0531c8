"""How far a law can be trusted: residuals, held-out rows, and what the exponents depend on."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sovit.law.design_matrix import star
from sovit.report.figures.style import (
    COLUMN,
    COMPUTE,
    GREY,
    OKABE_ITO,
    PALE,
    dimension_name,
    dots,
    finish,
    flops_axis,
    grid,
    loss_axis,
    metric_label,
    styled,
)

NOISE = "#ececec"
KINDS = {
    "shape": "one shape left out",
    "window": "window of compute",
    "loss": "loss",
    "form": "form",
}


@styled
def residuals(fit, data) -> Figure:
    """Measured over fitted loss, in per cent of ln, against compute in the colour of the arm; the noise s.d. as a band."""
    dims = fit.model.dims
    residual, sd = 100 * np.log(data.y / fit.predict(data.columns)), 100 * fit.noise.sd
    arms = star(data.columns, dims)[1] if dims else np.full(len(data.y), "all rows")
    kind = "compute" if "compute" in data.columns else "num_examples"
    figure, ((axis,),) = grid(1, 1, 2.9, COLUMN + 1.6)
    axis.axhspan(-sd, sd, color=NOISE, lw=0, zorder=0)
    axis.axhline(0, color=GREY, lw=0.6, zorder=1)
    names = [arm for arm in ("all rows", "centre", *dims, "corner") if (arms == arm).any()]
    for i, (name, colour) in enumerate(zip(names, OKABE_ITO)):
        aside = 1.07 ** (i - (len(names) - 1) / 2)  # arms of one budget stand side by side
        x = data.columns[kind][arms == name] * aside
        dots(axis, x, residual[arms == name], s=13, color=colour, alpha=0.9, label=dimension_name(name))
    flops_axis(axis, data.columns[kind])
    axis.set_xlabel(COMPUTE if kind == "compute" else "images seen")
    axis.set_ylabel("ln(measured / fitted) × 100")
    noise = Patch(color=NOISE, lw=0, label=f"± noise s.d. {sd:.2g} % (from {fit.noise.source})")
    return finish(figure, [*axis.get_legend_handles_labels()[0], noise], ncols=3)


@styled
def extrapolation(scores: list[dict], metric: str = "val_loss") -> Figure | None:
    """Predicted against measured loss of the rows above the compute cut, for laws fitted below it; one panel a form.

    scores: {label, measured [n], predicted [n], rmse, bias}, the first being the headline. None if empty.
    """
    if not scores:
        return None
    figure, ((*axes,),) = grid(1, len(scores), 2.3, sharey=True)
    everything = np.concatenate([np.concatenate([s["measured"], s["predicted"]]) for s in scores])
    ends = np.array([everything.min() / 1.04, everything.max() * 1.04])
    for i, (axis, score) in enumerate(zip(axes, scores)):
        axis.plot(ends, ends, color=GREY, lw=0.7, zorder=1)
        dots(axis, score["measured"], score["predicted"], s=13, color=GREY if i else OKABE_ITO[0], alpha=0.85)
        title = f"{score['label']}\nRMSE {score['rmse']:.2%}\nbias {score['bias']:+.2%}"
        axis.set_title(title, fontsize=7, fontweight="normal" if i else "bold")
        for which in ("x", "y"):
            loss_axis(axis, ends, which, pad=1.0)
        axis.set_aspect("equal")
        axis.set_xlabel("measured")
    axes[0].set_ylabel("predicted " + metric_label(metric))
    return figure


@styled
def sensitivity(found: dict) -> Figure | None:
    """Dots of each dimension's exponent by kind of alteration, as `checks.sensitivity` finds them; None without any."""
    dims = list(found.get("dimensions", {}))
    rows = [r for r in found.get("alterations", ()) if r["kind"] == found["headline"]["kind"]]
    if not dims or not rows:
        return None
    kinds = [name for name in KINDS if any(r["what"] == name for r in rows)]
    figure, ((*axes,),) = grid(1, len(dims), 0.75 + 0.27 * len(kinds), sharey=True)
    for axis, dim in zip(axes, dims):
        own = found["dimensions"][dim]
        if own["low"] is not None:
            axis.axvspan(own["low"], own["high"], color=PALE, lw=0, zorder=0)
        if own["estimate"] is not None:
            axis.axvline(own["estimate"], color=GREY, lw=0.8, zorder=1)
        for i, name in enumerate(kinds):
            values = [r["exponents"][dim] for r in rows if r["what"] == name and r["exponents"][dim] is not None]
            aside = 0.24 * ((np.arange(len(values)) * 0.618034) % 1 - 0.5)  # equal values do not hide each other
            dots(axis, values, aside - i, s=9, color=OKABE_ITO[i % 6], alpha=0.8)
        axis.set_yticks(-np.arange(len(kinds)), [KINDS[name] for name in kinds])
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(-len(kinds) + 0.4, 0.6)
        axis.set_title(dimension_name(dim))
        axis.margins(x=0.06)
    figure.supxlabel("exponent s of x* ∝ compute^s")
    return figure
