"""How the error of a law grows with the distance of the extrapolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sovit.report.figures.style import GREY, INK, OKABE_ITO, PAGE, legend_row, panels, set_ticks, styled

# form -> label, colour, marker, line style, line width; in the order of the legend
LINES: dict = {
    "headline": ("chosen below the cut (sovit fit)", INK, "o", "-", 2.0),
    "of_all": ("chosen among all forms", INK, "", ":", 1.4),
    "joint": ("joint", OKABE_ITO[0], "", "-", 1.1),
    "joint_n": ("joint_n", OKABE_ITO[5], "", "-", 1.1),
    "bounded": ("bounded", OKABE_ITO[2], "", "-", 1.1),
    "power_mean": ("power_mean", OKABE_ITO[3], "", "-", 1.1),
    "shifted": ("shifted", OKABE_ITO[4], "", "-", 1.1),
    "chinchilla": ("N-D law", OKABE_ITO[1], "s", "--", 0.9),
    "compute_only": ("compute only", GREY, "^", "--", 0.9),
    "nearest": ("nearest run", GREY, "x", ":", 0.9),
}


@styled
def extrapolation_distance(found: Sequence[Mapping]) -> Figure:
    """RMSE against decades of compute beyond the dearest row fitted, all cuts pooled: one panel a data set.

    found: as `analysis/published/extrapolation.py` makes it: [{name, metric, pooled: {forms: {form: {by_distance: [{decades,
    rmse}]}}}}]; a data set without `pooled` has no panel.
    """
    sets = [data for data in found if "pooled" in data]
    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    height = 0.95 + 1.75 * rows
    margins = dict(left=0.075, right=0.985, bottom=0.45 / height, top=1 - 0.68 / height, wspace=0.25, hspace=0.42)
    figure, axes = panels(rows, columns, PAGE, height, **margins)
    drawn: set = set()
    for axis, data in zip(axes, sets):
        forms = data["pooled"]["forms"]
        for form, (_, colour, marker, style, width) in LINES.items():
            if form not in forms:
                continue
            drawn.add(form)
            points = [(p["decades"], 100 * p["rmse"]) for p in forms[form]["by_distance"]]
            axis.plot(*zip(*points), color=colour, marker=marker, ms=3, ls=style, lw=width, zorder=1 + width)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high]
        set_ticks(axis, "y", ticks)
        axis.set_xlim(0, None)
        axis.set_title(f"{data['name']}, {data['metric'].removeprefix('val_')}")
    for axis in axes[len(sets) :]:
        axis.set_visible(False)
    figure.supxlabel("decades of compute beyond the dearest row fitted", fontsize=8, y=0.008)
    figure.supylabel("RMSE of ln(predicted / measured) × 100", fontsize=8, x=0.005)
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=3, ls=style, lw=width, label=label)
        for form, (label, colour, marker, style, width) in LINES.items()
        if form in drawn
    ]
    legend_row(figure, handles, 0.06, ncols=5)
    return figure
