"""The figure of a coverage study: one row a condition, two intervals, the nominal line and the band aimed at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sovit.report.figures.style import GREY, INK, OKABE_ITO, PALE, finish, grid, mark, styled

INTERVALS = {"random_effects": "headline (RE-t)", "pairs": "pairs of trunks"}
QUANTITIES = {"exponent": "growth exponents", "shape_10x": "best shape at 10×", "shape_100x": "best shape at 100×"}
MARKERS = ("o", "s", "D")
BAND = (0.85, 0.95)


@styled
def coverage(lines: Sequence[dict]) -> Figure:
    """Coverage with its standard error, mean over dimensions; conditions whose form is wrong stand apart, below.

    lines: as `analysis.coverage.study.study` returns them.
    """
    ordered = [line for right in (True, False) for line in lines if line["right"] == right]
    num_right = sum(line["right"] for line in ordered)
    place = -np.arange(len(ordered), dtype=float)
    place[num_right:] -= 1.2
    figure, ((*axes,),) = grid(1, 3, 0.95 + 0.2 * (len(ordered) + 1.2), sharey=True)
    for axis, (quantity, title) in zip(axes, QUANTITIES.items()):
        axis.axvspan(*BAND, color=PALE, alpha=0.55, lw=0, zorder=0)
        axis.axvline(lines[0]["level"] if lines else 0.9, color=GREY, lw=0.8, zorder=1)
        for i, kind in enumerate(INTERVALS):
            found = [(p, line["coverage"].get(kind, {}).get(quantity)) for p, line in zip(place, ordered)]
            rows = [(p, c["mean"], c["se"]) for p, c in found if c]
            if not rows:
                continue
            at, mean, error = np.array(rows).T
            axis.errorbar(
                mean, at + 0.22 * (1 - i), xerr=error, fmt=MARKERS[i], ms=3, lw=0, elinewidth=0.8,
                color=OKABE_ITO[i], zorder=3,
            )  # fmt: skip
        lowest = min(
            0.4, *(c["mean"] - 0.05 for line in lines for kind in line["coverage"].values() for c in kind.values())
        )
        axis.set_xticks([0.2, 0.4, 0.6, 0.8, 0.9], ["20", "40", "60", "80", "90"])
        axis.set_xlim(max(lowest, 0.0), 1.005)
        axis.set_title(title)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", color=PALE, lw=0.4)
        axis.set_axisbelow(True)
    axes[1].set_xlabel("share of intervals that hold the truth, % (nominal 90; bar: standard error)")
    axes[0].set_yticks(place, [label(line) for line in ordered])
    axes[0].set_ylim(place[-1] - 0.7, 0.7)
    if num_right < len(ordered):
        axes[0].text(
            -0.02, place[num_right] + 1.05, "the form is wrong:", transform=axes[0].get_yaxis_transform(), ha="right",
            va="center", fontsize=7, fontstyle="italic", color=INK,
        )  # fmt: skip
    handles = [
        mark(text, marker=MARKERS[i], ms=4, color=OKABE_ITO[i])
        for i, (kind, text) in enumerate(INTERVALS.items())
        if any(kind in line["coverage"] for line in lines)
    ]
    return finish(figure, handles)


def label(line: dict) -> str:
    """What the condition is, as short as it stays clear."""
    truth = f"{line['truth']} {line['frac']:g}" if line["frac"] else line["truth"]
    parts = [f"{truth}, fitted {line['form']}" if truth != line["form"] else truth, line["design"]]
    parts.append(f"{100 * line['sd']:g} %, ρ {line['rho']:g}")
    if line["noise"] != "normal":
        parts.append({"arms": "arms correlated", "t3": "t₃ noise"}.get(line["noise"], line["noise"]))
    return " · ".join(parts)
