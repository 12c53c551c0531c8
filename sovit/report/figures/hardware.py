"""Predicted loss against what shapes cost on a device: four Pareto fronts side by side."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sovit.report.figures.style import GREY, INK, OKABE_ITO, PALE, finish, flops_label, grid, loss_axis, mark, styled

TITLES = {
    "train_flops": "per training FLOP",
    "train_seconds": "per training second",
    "latency": "per latency",
    "memory": "per memory",
}
MIB = 2**20


@styled
def pareto_fronts(found: dict) -> Figure:
    """Draw the four fronts of `sovit.predict.pareto`: loss against training FLOPs and seconds (curves, one a shape), and
    at the budget against latency and memory (points)."""
    figure, ((*axes,),) = grid(1, 4, 3.0, sharey=True)
    table = found["shapes"]
    colours = _colours(found)
    loss = np.array([row["loss_at_flops"] for row in table])
    curves = np.array(found["curves"]["train_flops"]["loss"]).min(0)
    loss_axis(axes[0], np.array([loss.min(), max(np.quantile(loss, 0.9), curves.max())]), pad=1.06)
    for axis, name in zip(axes, ("train_flops", "train_seconds")):
        _curves(axis, found, name, colours)
    _points(axes[2], found, "latency", 1e3, colours)
    _points(axes[3], found, "memory", 1 / MIB, colours)
    xlabels = ("training FLOPs", "training seconds", "one image forward, ms", "peak of a training step, MiB")
    for axis, name, xlabel in zip(axes, TITLES, xlabels):
        axis.set_xscale("log")
        axis.set_title(TITLES[name], pad=4)
        axis.set_xlabel(xlabel)
        axis.xaxis.set_minor_formatter(NullFormatter())
        if np.ptp(np.log10(axis.get_xlim())) < 2.2 and name != "train_flops":
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
    axes[0].set_ylabel("predicted validation loss")
    budget = f"the budget of the right panels: {flops_label(found['train_flops'])} training FLOPs"
    handles = [
        mark("a profiled shape", color=PALE, lw=0.8),
        mark("the best shape there (width × depth × MLP dim)", color=INK, lw=2.2),
        mark(budget, color=GREY, lw=0.6, ls=":"),
    ]
    return finish(figure, handles)


def _curves(axis, found: dict, name: str, colours: dict) -> None:
    """Loss of every shape against a budget, the best shape of each stretch in colour."""
    table = found["shapes"]
    budget, losses = np.array(found["curves"][name]["budget"]), np.array(found["curves"][name]["loss"])  # [S, B]
    axis.plot(budget, losses.T, color=PALE, lw=0.5, zorder=1)
    best = losses.argmin(0)
    for i in dict.fromkeys(best.tolist()):
        here = np.flatnonzero(best == i)
        span = slice(here[0], min(here[-1] + 2, len(budget)))
        colour = colours[table[i]["label"]]
        axis.plot(budget[span], losses[i][span], color=colour, lw=2.2, zorder=3, solid_capstyle="butt")
        middle = here[len(here) // 2]
        _label(axis, budget[middle], losses[i][middle], table[i]["label"], colour, middle > 0.3 * len(budget))
    axis.axvline(found[name], color=GREY, lw=0.6, ls=":", zorder=0)


def _points(axis, found: dict, name: str, scale: float, colours: dict) -> None:
    """Loss at the budget against a cost of every shape, those on the front in colour."""
    table, key = found["shapes"], {"latency": "latency", "memory": "train_bytes"}[name]
    known = [row for row in table if row[key] is not None]
    cost = np.array([row[key] * scale for row in known])
    loss = np.array([row["loss_at_flops"] for row in known])
    on = np.array([name in row["fronts"] for row in known], bool)
    axis.scatter(cost[~on], loss[~on], s=10, color="#b5b5b5", linewidths=0, zorder=2)
    order = np.flatnonzero(on)[np.argsort(cost[on])]
    axis.step(cost[order], loss[order], where="post", color=INK, lw=0.8, zorder=2)
    for i in order:
        colour = colours.get(known[i]["label"], INK)
        axis.scatter(cost[i], loss[i], s=22, color=colour, linewidths=0, zorder=4)
        place = np.log(cost[i] / cost.min()) / max(np.log(cost.max() / cost.min()), 1e-9)
        _label(axis, cost[i], loss[i], known[i]["label"], colour, place > 0.3)


def _colours(found: dict) -> dict[str, str]:
    """A colour for each shape on a front, the same in all panels; shapes on most fronts first."""
    rows = sorted((r for r in found["shapes"] if r["fronts"]), key=lambda r: (-len(r["fronts"]), r["loss_at_flops"]))
    inks = [*OKABE_ITO[:6], "#7a5195", "#8c564b", "#4d4d4d"]
    return {row["label"]: inks[min(i, len(inks) - 1)] for i, row in enumerate(rows)}


def _label(axis, x: float, y: float, text: str, colour, below: bool) -> None:
    """A shape's name beside its point: above and right of it, or below and left, where nothing lies under a front.

    Next to the upper edge it stands right of its point, clear of the title.
    """
    top = not below and np.log(axis.get_ylim()[1] / y) < 0.06 * np.log(axis.get_ylim()[1] / axis.get_ylim()[0])
    axis.annotate(
        text.replace("x", "×").replace(" (", "\n("),
        (x, y),
        (-3, -3) if below else (6, 1) if top else (2.5, 2.5),
        textcoords="offset points",
        ha="right" if below else "left",
        va="top" if below or top else "bottom",
        fontsize=5.5,
        color=colour,
        zorder=5,
    )
