"""Figures of studies and of data: learning rates, a validation, a contact sheet."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sovit import UserError
from sovit.report.figures.style import (
    COLUMN,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PAGE,
    PALE,
    _write,
    dimension_axis,
    flops_label,
    legend_row,
    loss_axis,
    panels,
    ramp,
    styled,
)


@styled
def learning_rates(rule: dict) -> Figure:
    """Loss against learning rate, one panel a shape, one curve a budget; each best rate, and the rate of the rule.

    rule: what `analysis/recipe_rule.py` writes: cases [{shape, train_flops, rates, losses, best_rate, best_loss, edge,
    rule_rate}].
    """
    shapes = list(dict.fromkeys(case["shape"] for case in rule["cases"]))
    budgets = sorted({case["train_flops"] for case in rule["cases"]})
    colours = dict(zip(budgets, ramp(len(budgets))))
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    height = 0.75 + 1.55 * rows
    figure, axes = panels(
        rows,
        columns,
        PAGE,
        height,
        left=0.07,
        right=0.985,
        bottom=0.42 / height,
        top=1 - 0.55 / height,
        wspace=0.3,
        hspace=0.5,
    )
    every = sorted({rate for case in rule["cases"] for rate in case["rates"]})
    for axis, shape in zip(axes, shapes):
        mine = [case for case in rule["cases"] if case["shape"] == shape]
        for case in mine:
            colour = colours[case["train_flops"]]
            axis.plot(case["rates"], case["losses"], color=colour, marker="o", ms=3, lw=0.9)
            if case["best_rate"] is not None:
                axis.plot(
                    case["best_rate"],
                    case["best_loss"],
                    marker="D",
                    ms=4.5,
                    mec=colour,
                    mew=1.1,
                    ls="",
                    zorder=4,
                    mfc=PALE if case["edge"] else "white",
                )
        if mine[-1]["rule_rate"]:
            axis.axvline(mine[-1]["rule_rate"], color=OKABE_ITO[1], lw=0.9, ls=(0, (3, 1.5)), zorder=1)
        dimension_axis(axis, np.array(every), limits=(every[0] / 1.3, every[-1] * 1.3))
        loss_axis(axis, np.concatenate([case["losses"] for case in mine]))
        axis.set_title(shape)
    for axis in axes[len(shapes) :]:
        axis.set_visible(False)
    figure.supxlabel("peak learning rate (panels: width × depth × MLP dim)", fontsize=8, y=0.015)
    figure.supylabel(METRICS.get(rule["metric"], rule["metric"]), fontsize=8, x=0.005)
    handles = [
        Line2D([], [], color=c, marker="o", ms=3, lw=0.9, label=f"{flops_label(b)} training FLOPs")
        for b, c in colours.items()
    ]
    handles += [
        Line2D([], [], ls="", marker="D", ms=4.5, mfc="white", mec=GREY, label="best rate (parabola)"),
        Line2D([], [], color=OKABE_ITO[1], lw=0.9, ls=(0, (3, 1.5)), label="rule"),
    ]
    if any(case["edge"] for case in rule["cases"]):
        handles.append(Line2D([], [], ls="", marker="D", ms=4.5, mfc=PALE, mec=GREY, label="best at the edge"))
    legend_row(figure, handles, 0.06)
    return figure


@styled
def validation(result: dict) -> Figure:
    """Paired seeds of both arms, joined by seed, predictions as bars beside them; the mean difference and its interval.

    result: as `sovit.predict.validation.verdict` makes it. arms {name: {label, losses [S], predicted, predicted_low,
    predicted_high}} (seed s of both is paired; ends of a prediction may lack), difference {mean, low, high} of ln loss,
    first arm less second, predicted_difference {estimate, low, high} (ends may be None), train_flops, verdict.
    """
    names, arms = list(result["arms"]), list(result["arms"].values())
    figure, (left, right) = panels(
        1, 2, COLUMN + 1.2, 2.7, left=0.125, right=0.97, bottom=0.165, top=0.83, wspace=0.5, width_ratios=(1.7, 1)
    )
    losses = np.array([arm["losses"] for arm in arms], float)  # [arm, seed]
    for seed in range(losses.shape[1]):
        left.plot(range(len(arms)), losses[:, seed], color=PALE, lw=1.0, zorder=1)
    for i, arm in enumerate(arms):
        left.scatter(np.full(losses.shape[1], i), losses[i], s=16, color=OKABE_ITO[i], linewidths=0, zorder=3)
        left.plot([i - 0.16, i + 0.16], [losses[i].mean()] * 2, color=OKABE_ITO[i], lw=1.6, zorder=2)
        if arm.get("predicted") is not None:
            if arm.get("predicted_low") is not None:
                left.plot([i + 0.27] * 2, [arm["predicted_low"], arm["predicted_high"]], color=GREY, lw=1.2, zorder=2)
            left.plot(i + 0.27, arm["predicted"], marker="_", ms=8, mew=1.5, color=INK, ls="", zorder=3)
    left.set_xlim(-0.45, len(arms) - 0.4)
    left.set_xticks(range(len(arms)), [f"{name}\n{arm['label']}" for name, arm in zip(names, arms)])
    left.tick_params(axis="x", length=0)
    left.set_ylabel(METRICS.get(result.get("metric", "val_loss"), result.get("metric")))
    left.set_title(f"{losses.shape[1]} seeds an arm, {flops_label(result['train_flops'])} training FLOPs", fontsize=7)
    difference = result["difference"]
    paired = 100 * (np.log(losses[0]) - np.log(losses[1]))
    right.scatter(paired, np.linspace(0.62, 0.88, len(paired)), s=12, color=GREY, linewidths=0)
    right.plot([100 * difference["low"], 100 * difference["high"]], [0.38] * 2, color=INK, lw=1.4)
    right.plot(100 * difference["mean"], 0.38, marker="o", ms=4.5, color=INK)
    rows = {0.75: "by\nseed", 0.38: "mean,\n90 %"}
    said = result["predicted_difference"]
    if said["low"] is not None:
        right.plot([100 * said["low"], 100 * said["high"]], [0.13] * 2, color=GREY, lw=1.2)
    right.plot(100 * said["estimate"], 0.13, marker="|", ms=9, mew=1.5, color=INK)
    rows[0.13] = "predicted"
    right.axvline(0, color=GREY, lw=0.7, ls=":")
    right.set_ylim(0, 1)
    right.set_yticks(list(rows), list(rows.values()))
    right.tick_params(axis="y", length=0)
    right.spines["left"].set_visible(False)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_xlabel("difference in ln loss × 100", fontsize=7)
    right.set_title(f"{names[0]}: {result['verdict']}", fontsize=7)
    handles = [
        Line2D([], [], color=GREY, lw=1.2, marker="_", ms=8, mew=1.5, mec=INK, label="predicted beforehand, with 90 %"),
        Line2D([], [], color=PALE, lw=1.0, label="one seed"),
    ]
    legend_row(figure, handles, 0.1)
    return figure


@styled
def contact_sheet(images, captions, path: Path | str, *, title: str = "", columns: int = 6, lines: int = 6) -> None:
    """Images [B, H, W, 3] in 0..1, each with its caption below, as one PNG at `path`; pixels stay sharp squares.

    A caption is cut off after what `lines` full lines hold.
    """
    images = np.clip(np.asarray(images, float), 0, 1)
    if images.ndim != 4 or images.shape[3] != 3 or len(images) != len(captions) or not len(images):
        raise UserError(
            f"a contact sheet needs images [B, H, W, 3] and B captions, got {images.shape} and {len(captions)}"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = PAGE / columns
    fits = max(8, round(cell * 15))  # characters a line
    wrapped = [
        "\n".join(w for line in c.splitlines() for w in textwrap.wrap(line, fits))[: lines * fits] for c in captions
    ]
    text = 0.13 * max((w.count("\n") + 1 if w else 0 for w in wrapped), default=0) + 0.08
    height = rows * (cell * 0.94 + text) + 0.3
    figure = Figure(figsize=(PAGE, height))
    for i, (image, caption) in enumerate(zip(images, wrapped)):
        x, y = (i % columns) * cell + 0.03 * cell, height - 0.26 - (i // columns) * (cell * 0.94 + text) - cell * 0.94
        axis = figure.add_axes((x / PAGE, y / height, 0.94 * cell / PAGE, 0.94 * cell / height))
        axis.imshow(image, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(visible=True, color=PALE)
        axis.text(0, -0.03, caption, transform=axis.transAxes, fontsize=6, va="top")
    figure.text(0.03 * cell / PAGE, 1 - 0.06 / height, title, fontsize=8, va="top")
    _write(figure, Path(path), {"Software": None} if Path(path).suffix != ".svg" else {"Date": None, "Creator": None})
