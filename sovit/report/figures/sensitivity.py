"""What each exponent does under every alteration of one choice, beside its own interval."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from sovit.report.figures.style import DIMENSIONS, GREY, OKABE_ITO, PALE, grid, styled

KINDS = {
    "shape": "one shape left out",
    "window": "window of compute",
    "loss": "loss",
    "form": "form",
}


@styled
def sensitivity(found: dict) -> Figure | None:
    """Dots of each dimension's exponent by kind of alteration, as `checks.sensitivity` finds them; None without any."""
    dims = list(found.get("dimensions", {}))
    rows = [r for r in found.get("alterations", ()) if r["kind"] == found["headline"]["kind"]]
    if not dims or not rows:
        return None
    lines = [name for name in KINDS if any(r["what"] == name for r in rows)]
    order = [KINDS[n] for n in lines]
    figure, ((*axes,),) = grid(1, len(dims), 0.75 + 0.27 * len(order), sharey=True)
    place = {label: -i for i, label in enumerate(order)}
    for axis, dim in zip(axes, dims):
        own = found["dimensions"][dim]
        if own["low"] is not None:
            axis.axvspan(own["low"], own["high"], color=PALE, lw=0, zorder=0)
        if own["estimate"] is not None:
            axis.axvline(own["estimate"], color=GREY, lw=0.8, zorder=1)
        for i, name in enumerate(lines):
            values = [r["exponents"][dim] for r in rows if r["what"] == name and r["exponents"][dim] is not None]
            spread = 0.24 * (
                (np.arange(len(values)) * 0.618034) % 1 - 0.5
            )  # so that equal values do not hide each other
            colour = OKABE_ITO[i % 6]
            axis.scatter(values, place[KINDS[name]] + spread, s=9, color=colour, alpha=0.8, linewidths=0, zorder=3)
        axis.set_yticks([place[label] for label in order], order)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(-len(order) + 0.4, 0.6)
        axis.set_title(DIMENSIONS.get(dim, dim).split(" (")[0])
        axis.margins(x=0.06)
    figure.supxlabel("exponent s of x* ∝ compute^s")
    return figure
