"""Loss against compute for each patch size (or image size), every other dimension chosen anew, with the turns marked."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from sovit.ledger.measurements import levels
from sovit.report.figures.style import (
    DASHED,
    DIMENSIONS,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    TRAIN_FLOPS,
    band,
    finish,
    flops_label,
    grid,
    loss_axis,
    mark,
    styled,
)

MOST = 0.35  # excess shown at most


@styled
def trade(found: dict, data=None) -> Figure:
    """Left the loss, right the excess over the best of the values; bands are headline intervals, dashed beyond the runs.

    found: of `sovit.predict.patch_tradeoff.trade`. data: the measurements of the law, of which the best run of each value
    at each budget is a point. A turn (triangle, with its interval as a bar) is where the value with more tokens becomes the
    better one.
    """
    curves, name = found["curves"], found["by"]
    budgets = np.array(curves["train_flops"])
    run = tuple(found["turns"][0]["run"]) if found["turns"] else (budgets[0], budgets[-1])
    figure, ((left, right),) = grid(1, 2, 3.0)
    colours = dict(zip((curve["value"] for curve in curves["values"]), OKABE_ITO))
    for curve in curves["values"]:
        for axis, what in ((left, "loss"), (right, "excess")):
            _curve(axis, budgets, curve, what, colours[curve["value"]], run)
    measured = [] if data is None else _best_runs(data, name)
    for value, flops, loss in measured:
        left.plot(flops, loss, marker="o", ms=3, mec="white", mew=0.4, color=colours.get(value, GREY), ls="", zorder=4)
    for i, turn in enumerate(t for t in found["turns"] if t["where"]["estimate"] == "within"):
        height, colour = -0.012 - 0.011 * i, colours[turn["more"]]
        ends = [turn[end] if turn["where"][end] == "within" else edge for end, edge in _edges(turn, budgets)]
        if turn["where"]["low"] is not None:
            right.plot(ends, [height] * 2, color=colour, lw=1.2, zorder=3)
        right.plot(turn["estimate"], height, marker="^", ms=5, color=colour, mec="white", mew=0.4, zorder=4)
    for axis in (left, right):
        axis.set(xscale="log", xlim=(budgets[0], budgets[-1]))
        for end in run:
            axis.axvline(end, color=GREY, lw=0.6, ls=":", zorder=2)
        axis.axvline(found["train_flops"], color=INK, lw=0.6, zorder=2)
    loss_axis(left, np.array([x for c in curves["values"] for x in c["loss"]] + [loss for _, _, loss in measured]))
    left.set_ylabel(METRICS.get(found["metric"], found["metric"]))
    _excess_axis(right, max(x for curve in curves["values"] for x in curve["excess"]))
    label = DIMENSIONS[name].split(" (")[0]
    handles: list[Artist] = [mark(f"{label} {v}", color=c) for v, c in colours.items()]
    if curves["values"][0]["loss_low"] is not None:
        handles.append(band(f"{found['level']:.0%}", 0.4))
    handles.append(mark("turn, with its interval", marker="^", ms=5, color=GREY))
    if measured:
        handles.append(mark("best run", marker="o", ms=3, color=GREY))
    handles.append(mark(flops_label(found["train_flops"]), color=INK, lw=0.6))
    return finish(figure, handles, TRAIN_FLOPS)


def _curve(axis, budgets: np.ndarray, curve: dict, what: str, colour: str, run: tuple[float, float]) -> None:
    """The `what` of one value against the budget with its band, dashed beyond the budgets run."""
    line, (first, last) = np.array(curve[what]), run
    if curve[f"{what}_low"] is not None:
        axis.fill_between(
            budgets, curve[f"{what}_low"], curve[f"{what}_high"], color=colour, alpha=0.22, lw=0, zorder=1
        )
    inside = (budgets >= first / 1.001) & (budgets <= last * 1.001)
    for part, dashes in ((inside, "-"), (budgets <= first * 1.001, DASHED), (budgets >= last / 1.001, DASHED)):
        axis.plot(budgets[part], line[part], color=colour, ls=dashes, zorder=3)


def _excess_axis(axis, top: float) -> None:
    axis.axhline(0, color=GREY, lw=0.6, zorder=1)
    axis.set_ylim(-0.06, min(MOST, max(0.05, 1.05 * top)))
    ticks = MaxNLocator(6).tick_values(0, axis.get_ylim()[1])
    axis.yaxis.set_major_locator(FixedLocator([t for t in ticks if t >= 0]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axis.set_ylabel("excess over the best of them")


def _edges(turn: dict, budgets: np.ndarray) -> list[tuple[str, float]]:
    """For both ends of a turn's interval the end of the axis where it lies beyond."""
    sides = dict(before=budgets[0], after=budgets[-1], within=budgets[0])
    return [(end, float(sides[turn["where"][end] or "within"])) for end in ("low", "high")]


def _best_runs(data, name: str) -> list[tuple[float, float, float]]:
    """(value, training FLOPs, loss) of the best run of each value at each budget, for the budgets that rows share."""
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
