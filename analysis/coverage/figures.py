"""The figure of a coverage study: one row a condition, two intervals, the nominal line and the band aimed at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sovit.law.bootstrap import LEVEL
from sovit.report.figures.style import GREY, INK, OKABE_ITO, PALE, finish, grid, mark, styled

INTERVALS = {"random_effects": ("headline (RE-t)", "o"), "pairs": ("pairs of trunks", "s")}
QUANTITIES = {"exponent": "growth exponents", "shape_10x": "best shape at 10×", "shape_100x": "best shape at 100×"}
BAND = (0.85, 0.95)


@styled
def coverage(lines: Sequence[dict]) -> Figure:
    """Coverage with its standard error, mean over dimensions; conditions whose form is wrong stand apart, below.

    lines: as `analysis.coverage.tables.study` returns them.
    """
    ordered = sorted(lines, key=lambda line: not line["right"])
    num_right = sum(line["right"] for line in ordered)
    place = -np.arange(len(ordered), dtype=float)
    place[num_right:] -= 1.2
    figure, ((*axes,),) = grid(1, 3, 0.95 + 0.2 * (len(ordered) + 1.2), sharey=True)
    for axis, (quantity, title) in zip(axes, QUANTITIES.items()):
        axis.axvspan(*BAND, color=PALE, alpha=0.55, lw=0, zorder=0)
        axis.axvline(LEVEL, color=GREY, lw=0.8, zorder=1)
        for kind, aside, colour in zip(INTERVALS, (0.22, 0.0), OKABE_ITO):
            found = [(p, line["coverage"].get(kind, {}).get(quantity)) for p, line in zip(place, ordered)]
            rows = [(p + aside, c["mean"], c["se"]) for p, c in found if c]
            if rows:
                at, mean, error = np.array(rows).T
                look = dict(fmt=INTERVALS[kind][1], ms=3, lw=0, elinewidth=0.8, color=colour, zorder=3)
                axis.errorbar(mean, at, xerr=error, **look)
        axis.set_xticks([0.2, 0.4, 0.6, 0.8, 0.9], ["20", "40", "60", "80", "90"])
        axis.set_xlim(0.0, 1.005)
        axis.set_title(title)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", color=PALE, lw=0.4)
        axis.set_axisbelow(True)
    axes[1].set_xlabel("share of intervals that hold the truth, % (nominal 90; bar: standard error)")
    axes[0].set_yticks(place, [line["name"].replace(" | ", " · ") for line in ordered])
    axes[0].set_ylim(place[-1] - 0.7, 0.7)
    if num_right < len(ordered):
        style = dict(ha="right", va="center", fontsize=7, fontstyle="italic", color=INK)
        over = place[num_right] + 1.05
        axes[0].text(-0.02, over, "the form is wrong:", transform=axes[0].get_yaxis_transform(), **style)
    handles = [mark(name, marker=m, ms=4, color=colour) for (name, m), colour in zip(INTERVALS.values(), OKABE_ITO)]
    return finish(figure, handles)
