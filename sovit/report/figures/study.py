"""Figures of studies and of data: learning rates, a validation, a contact sheet."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sovit import UserError
from sovit.report.figures.style import (
    COLUMN,
    DASHED,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PAGE,
    PALE,
    _write,
    dimension_axis,
    finish,
    flops_label,
    grid,
    loss_axis,
    mark,
    ramp,
    styled,
)

DIAMOND = dict(marker="D", ms=4.5, mfc="white")
PAIR, ENDS = ("difference", "predicted_difference"), ("mean", "estimate", "low", "high")


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
    figure, panels = grid(rows, columns, 0.75 + 1.55 * rows)
    axes = panels.ravel()
    every = sorted({rate for case in rule["cases"] for rate in case["rates"]})
    dashed = dict(color=OKABE_ITO[1], lw=0.9, ls=DASHED)
    for axis, shape in zip(axes, shapes):
        mine = [case for case in rule["cases"] if case["shape"] == shape]
        for case in mine:
            colour = colours[case["train_flops"]]
            axis.plot(case["rates"], case["losses"], color=colour, marker="o", ms=3, lw=0.9)
            if case["best_rate"] is not None:
                look = DIAMOND | dict(mec=colour, mew=1.1, mfc=PALE if case["edge"] else "white")
                axis.plot(case["best_rate"], case["best_loss"], **look, ls="", zorder=4)
        if mine[-1]["rule_rate"]:
            axis.axvline(mine[-1]["rule_rate"], **dashed, zorder=1)
        dimension_axis(axis, np.array(every), limits=(every[0] / 1.3, every[-1] * 1.3))
        loss_axis(axis, np.concatenate([case["losses"] for case in mine]))
        axis.set_title(shape)
    for axis in axes[len(shapes) :]:
        axis.set_visible(False)
    handles = [
        *(
            mark(f"{flops_label(b)} training FLOPs", color=c, marker="o", ms=3, lw=0.9, ls="-")
            for b, c in colours.items()
        ),
        mark("best rate (parabola)", **DIAMOND, mec=GREY),
        mark("rule", **dashed),
    ]
    if any(case["edge"] for case in rule["cases"]):
        handles.append(mark("best at the edge", **(DIAMOND | dict(mfc=PALE)), mec=GREY))
    x = "peak learning rate (panels: width × depth × MLP dim)"
    return finish(figure, handles, x, METRICS.get(rule["metric"], rule["metric"]))


@styled
def validation(result: dict) -> Figure:
    """Paired seeds of both arms, joined by seed, predictions as bars beside them; the mean difference and its interval.

    result: as `sovit.predict.validation.verdict` makes it. arms {name: {label, losses [S], predicted, predicted_low,
    predicted_high}} (seed s of both is paired; ends of a prediction may lack), difference {mean, low, high} of ln loss,
    first arm less second, predicted_difference {estimate, low, high} (ends may be None), train_flops, verdict.
    """
    names, arms = list(result["arms"]), list(result["arms"].values())
    figure, ((left, right),) = grid(1, 2, 2.7, COLUMN + 1.2, width_ratios=(1.7, 1))
    losses = np.array([arm["losses"] for arm in arms], float)  # [arm, seed]
    left.plot(range(len(arms)), losses, color=PALE, lw=1.0, zorder=1)
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
    _differences(right, result, 100 * (np.log(losses[0]) - np.log(losses[1])))
    right.set_title(f"{names[0]}: {result['verdict']}", fontsize=7)
    before = mark("predicted beforehand, with 90 %", color=GREY, lw=1.2, marker="_", ms=8, mew=1.5, mec=INK, ls="-")
    return finish(figure, [before, mark("one seed", color=PALE, lw=1.0)])


def _differences(axis, result: dict, paired: np.ndarray) -> None:
    """Differences in 100 ln loss: each seed's, their mean with its interval, and the predicted one."""
    measured, said = (
        {k: None if v is None else 100 * v for k, v in result[name].items() if k in ENDS} for name in PAIR
    )
    axis.scatter(paired, np.linspace(0.62, 0.88, len(paired)), s=12, color=GREY, linewidths=0)
    axis.plot([measured["low"], measured["high"]], [0.38] * 2, color=INK, lw=1.4)
    axis.plot(measured["mean"], 0.38, marker="o", ms=4.5, color=INK)
    if said["low"] is not None:
        axis.plot([said["low"], said["high"]], [0.13] * 2, color=GREY, lw=1.2)
    axis.plot(said["estimate"], 0.13, marker="|", ms=9, mew=1.5, color=INK)
    axis.axvline(0, color=GREY, lw=0.7, ls=":")
    axis.set_ylim(0, 1)
    axis.set_yticks([0.75, 0.38, 0.13], ["by\nseed", "mean,\n90 %", "predicted"])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.set_xlabel("difference in ln loss × 100", fontsize=7)


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
    rows, cell = -(-len(images) // columns), PAGE / columns
    fits = max(8, round(cell * 15))  # characters a line
    wrapped = [
        "\n".join(w for line in c.splitlines() for w in textwrap.wrap(line, fits))[: lines * fits] for c in captions
    ]
    text = 0.13 * max((w.count("\n") + 1 if w else 0 for w in wrapped), default=0) + 0.08
    figure, axes = grid(rows, columns, rows * (cell * 0.94 + text) + 0.3)
    for axis in axes.ravel()[len(images) :]:
        axis.set_visible(False)
    for axis, image, caption in zip(axes.ravel(), images, wrapped):
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=PALE)
        axis.text(0, -0.03, caption, transform=axis.transAxes, fontsize=6, va="top")
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    _write(figure, Path(path), {"Software": None} if Path(path).suffix != ".svg" else {"Date": None, "Creator": None})
