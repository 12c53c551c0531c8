"""How the error of a law grows with the distance of the extrapolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from sovit.report.figures.style import GREY, INK, OKABE_ITO, finish, grid, mark, set_ticks, styled

# form -> label, colour, marker, line style, line width; in the order of the legend
LINES: dict = {
    "headline": ("chosen below the cut (sovit fit)", INK, "o", "-", 2.0),
    "joint": ("joint", OKABE_ITO[0], "", "-", 1.1),
    "joint_n": ("joint_n", OKABE_ITO[5], "", "-", 1.1),
    "bounded": ("bounded", OKABE_ITO[2], "", "-", 1.1),
    "power_mean": ("power_mean", OKABE_ITO[3], "", "-", 1.1),
    "chinchilla": ("N-D law", OKABE_ITO[1], "s", "--", 0.9),
    "compute_only": ("compute only", GREY, "^", "--", 0.9),
    "nearest": ("nearest run", GREY, "x", ":", 0.9),
}


@styled
def extrapolation_distance(found: Sequence[Mapping]) -> Figure:
    """RMSE against decades of compute beyond the dearest row fitted, all cuts pooled: one panel a data set.

    found: of `analysis.published.extrapolation.study`; a data set without `pooled` has no panel.
    """
    sets = [data for data in found if "pooled" in data]
    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    figure, panels = grid(rows, columns, 0.95 + 1.75 * rows)
    axes = panels.ravel()
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
        set_ticks(axis, "y", [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high])
        axis.set_xlim(0, None)
        axis.set_title(f"{data['name']}, {data['metric'].removeprefix('val_')}")
    for axis in axes[len(sets) :]:
        axis.set_visible(False)
    handles = [
        mark(label, color=colour, marker=marker, ms=3, ls=style, lw=width)
        for form, (label, colour, marker, style, width) in LINES.items()
        if form in drawn
    ]
    x = "decades of compute beyond the dearest row fitted"
    return finish(figure, handles, x, "RMSE of ln(predicted / measured) × 100", ncols=5)
