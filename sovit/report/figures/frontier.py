"""The compute-optimal frontier: predicted loss, model size and images of the law's best shape at each budget."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sovit.predict.law_at_budget import budgets_run
from sovit.report.figures.style import (
    DASHED,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PALE,
    TRAIN_FLOPS,
    band,
    finish,
    grid,
    loss_axis,
    mark,
    styled,
)
from sovit.report.text import label as shape_label

DIAMOND = dict(marker="D", ms=3.6, mfc="white")
MAX_LABELS = 9  # shapes that are named


@styled
def frontier(fit, rows, data=None) -> Figure:
    """Loss, encoder parameters and images against training FLOPs, with both bands; dashed beyond the runs.

    rows: recommendations, budgets rising. data: the measurements of the law, drawn as points where given.
    Lines are the real-valued optimum, markers the best whole shapes, of which at most MAX_LABELS are named.
    """
    budgets = np.array([row.train_flops for row in rows])
    largest = budgets_run(fit)[1]
    figure, ((*axes,),) = grid(1, 3, 3.0)
    metric = data.metric if data is not None else fit.data.metric or "loss"
    series = [
        (None, "loss", METRICS.get(metric, metric), OKABE_ITO[0]),
        ("num_params", "num_params", "encoder parameters", OKABE_ITO[1]),
        ("num_examples", "num_examples", "images seen", OKABE_ITO[2]),
    ]
    beyond = budgets >= largest / (1 + 1e-9)
    first = max(0, int(np.argmax(beyond)) - 1) if beyond.any() else len(budgets)
    for axis, (size, whole, label, colour) in zip(axes, series):
        for prefix, alpha in (("pairs_", 0.16), ("", 0.32)):
            if (ends := _ends(rows, size, prefix)) is not None:
                axis.fill_between(budgets, *ends, color=colour, alpha=alpha, lw=0, zorder=1)
        values = np.array([row.optimum_size[size].estimate if size else row.optimum_loss for row in rows])
        inside = budgets <= largest * (1 + 1e-9)
        axis.plot(budgets[inside], values[inside], color=colour, zorder=3)
        axis.plot(budgets[first:], values[first:], color=colour, ls=DASHED, zorder=3)
        axis.plot(budgets, [getattr(row, whole) for row in rows], **DIAMOND, ls="", mec=colour, zorder=4)
        axis.axvline(largest, color=GREY, lw=0.6, ls=":", zorder=2)
        axis.set(xscale="log", yscale="log", ylabel=label)
        if data is not None and "train_flops" in data.columns and (whole == "loss" or whole in data.columns):
            column = data.y if whole == "loss" else data.columns[whole]
            shade = GREY if whole == "loss" else PALE  # shapes are named on the other panels
            axis.scatter(data.columns["train_flops"], column, s=7, color=shade, alpha=0.7, lw=0, zorder=0.5)
    low, high = _ends(rows, None, "") or (np.array([row.loss for row in rows]),) * 2
    loss_axis(axes[0], np.concatenate([low, high, [] if data is None else data.y]), pad=1.06)
    _name(axes[1], rows)
    handles: list[Artist] = [mark("law’s optimum", color=INK), mark("beyond the runs", color=INK, ls=DASHED)]
    handles.append(mark("best whole shape", **DIAMOND, mec=INK))
    if _ends(rows, None, "") is not None:
        handles.append(band("90 %, parametric bootstrap", 0.5))
    if _ends(rows, None, "pairs_") is not None:
        handles.append(band("90 %, cluster bootstrap", 0.22))
    if data is not None:
        handles.append(mark("run", marker="o", ms=3, color=GREY))
    return finish(figure, handles, TRAIN_FLOPS)


def _ends(rows, size: str | None, prefix: str):
    """Both ends of an interval at every budget, [T] each; None without draws."""
    if size is None:
        ends = [[getattr(row, f"loss_{prefix}{end}") for row in rows] for end in ("low", "high")]
    else:
        ends = [[getattr(row.optimum_size[size], prefix + end) for row in rows] for end in ("low", "high")]
    return None if ends[0][0] is None else (np.array(ends[0]), np.array(ends[1]))


def _name(axis, rows) -> None:
    """The shapes, width x depth x MLP dim, below their markers on the panel of sizes."""
    shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_LABELS)).round().astype(int))
    for i in shown:
        name = axis.annotate(
            shape_label(rows[i].shape.to_dict(), rows[i].optimum).replace("x", "×"),
            (rows[i].train_flops, rows[i].num_params),
            xytext=(3, -4),
            textcoords="offset points",
            fontsize=5.5,
            color=INK,
            va="top",
            rotation=-35,
            rotation_mode="anchor",
        )
        name.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
    low, high = axis.get_ylim()
    axis.set_ylim(low / 3, high)
    left, right = axis.get_xlim()
    axis.set_xlim(left, right * (right / left) ** 0.12)
