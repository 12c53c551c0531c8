"""Loss against compute for each patch size (or image size), every other dimension chosen anew, with the turns marked."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from sovit.report.figures.style import (
    DIMENSIONS,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PAGE,
    TRAIN_FLOPS,
    flops_label,
    legend_row,
    loss_axis,
    panels,
    styled,
)

MOST = 0.35  # excess shown at most


@styled
def trade(found: dict, data=None) -> Figure:
    """Left the loss, right the excess over the best of the values; bands are headline intervals, dashed beyond the runs.

    found: of `sovit.predict.patch_tradeoff.trade`. data: the measurements of the law; the best run of each value at each budget is a point.
    A turn (triangle, with its interval as a bar) is where the value with more tokens becomes the better one.
    """
    curves, name = found["curves"], found["by"]
    budgets = np.array(curves["train_flops"])
    first, last = found["turns"][0]["run"] if found["turns"] else (budgets[0], budgets[-1])
    figure, (left, right) = panels(1, 2, PAGE, 3.0, left=0.075, right=0.985, bottom=0.155, top=0.84, wspace=0.2)
    colours = dict(zip((curve["value"] for curve in curves["values"]), OKABE_ITO))
    run = (budgets >= first / 1.001) & (budgets <= last * 1.001), "-"
    parts = [run, (budgets <= first * 1.001, (0, (3, 1.5))), (budgets >= last / 1.001, (0, (3, 1.5)))]
    for curve in curves["values"]:
        colour = colours[curve["value"]]
        for axis, what in ((left, "loss"), (right, "excess")):
            line = np.array(curve[what])
            if curve[f"{what}_low"] is not None:
                low, high = np.array(curve[f"{what}_low"]), np.array(curve[f"{what}_high"])
                axis.fill_between(budgets, low, high, color=colour, alpha=0.22, lw=0, zorder=1)
            for here, style in parts:
                axis.plot(budgets[here], line[here], color=colour, ls=style, zorder=3)
    measured = [] if data is None else _best_runs(data, name)
    for value, flops, loss in measured:
        left.plot(flops, loss, marker="o", ms=3, mec="white", mew=0.4, color=colours.get(value, GREY), ls="", zorder=4)
    for i, turn in enumerate(t for t in found["turns"] if t["where"]["estimate"] == "within"):
        height = -0.012 - 0.011 * i
        ends = [turn[end] if turn["where"][end] == "within" else edge for end, edge in _edges(turn, budgets)]
        if turn["where"]["low"] is not None:
            right.plot(ends, [height] * 2, color=colours[turn["more"]], lw=1.2, zorder=3, clip_on=True)
        right.plot(
            turn["estimate"], height, marker="^", ms=5, color=colours[turn["more"]], mec="white", mew=0.4, zorder=4
        )
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlim(budgets[0], budgets[-1])
        for end in (first, last):
            axis.axvline(end, color=GREY, lw=0.6, ls=":", zorder=2)
        axis.axvline(found["train_flops"], color=INK, lw=0.6, zorder=2)
    every = [x for curve in curves["values"] for x in curve["loss"]] + [loss for _, _, loss in measured]
    loss_axis(left, np.array(every))
    left.set_ylabel(METRICS.get(found["metric"], found["metric"]))
    top = max(x for curve in curves["values"] for x in curve["excess"])
    right.axhline(0, color=GREY, lw=0.6, zorder=1)
    right.set_ylim(-0.06, min(MOST, max(0.05, 1.05 * top)))
    right.yaxis.set_major_locator(
        FixedLocator([t for t in MaxNLocator(6).tick_values(0, right.get_ylim()[1]) if t >= 0])
    )
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    right.set_ylabel("excess over the best of them")
    figure.supxlabel(TRAIN_FLOPS, fontsize=8, y=0.01)
    label = DIMENSIONS[name].split(" (")[0]
    handles: list[Artist] = [Line2D([], [], color=c, label=f"{label} {v}") for v, c in colours.items()]
    if curves["values"][0]["loss_low"] is not None:
        handles.append(Patch(color=GREY, alpha=0.4, lw=0, label=f"{found['level']:.0%}"))
    handles.append(Line2D([], [], ls="", marker="^", ms=5, color=GREY, label="turn, with its interval"))
    if measured:
        handles.append(Line2D([], [], ls="", marker="o", ms=3, color=GREY, label="best run"))
    handles.append(Line2D([], [], color=INK, lw=0.6, label=f"{flops_label(found['train_flops'])}"))
    legend_row(figure, handles, 0.06, ncols=min(len(handles), 7))
    return figure


def _edges(turn: dict, budgets: np.ndarray) -> list[tuple[str, float]]:
    """For both ends of a turn's interval the end of the axis where it lies beyond."""
    sides = dict(before=budgets[0], after=budgets[-1], within=budgets[0])
    return [(end, float(sides[turn["where"][end] or "within"])) for end in ("low", "high")]


def _best_runs(data, name: str) -> list[tuple[float, float, float]]:
    """(value, training FLOPs, loss) of the best run of each value at each budget, for the budgets that rows share."""
    from sovit.ledger.measurements import levels

    if "train_flops" not in data.columns or name not in data.columns:
        return []
    group, centres = levels(data.columns["train_flops"])
    out = []
    for g, centre in enumerate(centres):
        for value in np.unique(data.columns[name]):
            mine = (group == g) & (data.columns[name] == value)
            if mine.any():
                out.append((float(value), float(centre), float(data.y[mine].min())))
    return out
