"""Figures of studies and of data: a validation, a contact sheet."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sovit import UserError
from sovit.report.figures.style import (
    COLUMN,
    GREY,
    INK,
    OKABE_ITO,
    PAGE,
    PALE,
    drawable,
    finish,
    flops_label,
    grid,
    mark,
    metric_label,
    styled,
    write,
)


@styled
def validation(result: dict) -> Figure:
    """Measured losses of both arms, joined by seed, with the prediction and its interval beside each.

    result: as `sovit.predict.validation.verdict` makes it. arms {name: {label, losses [S], predicted, predicted_low,
    predicted_high}} (seed s of both is paired; ends of a prediction may lack), train_flops, verdict.
    """
    names, arms = list(result["arms"]), list(result["arms"].values())
    figure, ((axis,),) = grid(1, 1, 2.7, COLUMN + 0.6)
    losses = np.array([arm["losses"] for arm in arms], float)  # [arm, seed]
    axis.plot(range(len(arms)), losses, color=PALE, lw=1.0, zorder=1)
    for i, arm in enumerate(arms):
        axis.scatter(np.full(losses.shape[1], i), losses[i], s=16, color=OKABE_ITO[i], linewidths=0, zorder=3)
        axis.plot([i - 0.16, i + 0.16], [losses[i].mean()] * 2, color=OKABE_ITO[i], lw=1.6, zorder=2)
        if arm.get("predicted_low") is not None:
            axis.plot([i + 0.27] * 2, [arm["predicted_low"], arm["predicted_high"]], color=GREY, lw=1.2, zorder=2)
        if arm.get("predicted") is not None:
            axis.plot(i + 0.27, arm["predicted"], marker="_", ms=8, mew=1.5, color=INK, ls="", zorder=3)
    axis.set_xlim(-0.45, len(arms) - 0.4)
    axis.set_xticks(range(len(arms)), [f"{name}\n{arm['label']}" for name, arm in zip(names, arms)])
    axis.set_ylabel(metric_label(result.get("metric", "val_loss")))
    seeds = f"{losses.shape[1]} seeds an arm, {flops_label(result['train_flops'])} training FLOPs"
    axis.set_title(f"{names[0]}: {result['verdict']} ({seeds})", fontsize=7)
    before = mark("predicted beforehand, with 90 %", color=GREY, lw=1.2, marker="_", ms=8, mew=1.5, mec=INK, ls="-")
    return finish(figure, [before, mark("one seed", color=PALE, lw=1.0)])


@styled
def contact_sheet(images, captions, path: Path | str, *, title: str = "", columns: int = 6, lines: int = 6) -> None:
    """Images [B, H, W, 3] in 0..1, each with its caption below, as one PNG at `path`; pixels stay sharp squares.

    A caption is cut off after what `lines` full lines hold.
    """
    if len(images) != len(captions) or not len(images):
        raise UserError(f"a contact sheet needs as many captions as images, got {len(captions)} and {len(images)}")
    columns = min(columns, len(images))
    rows, cell = -(-len(images) // columns), PAGE / columns
    fits = max(8, round(cell * 15))  # characters a line
    words = [drawable(caption) for caption in captions]
    wrapped = [
        "\n".join(w for line in text.splitlines() for w in textwrap.wrap(line, fits))[: lines * fits]
        for text, _ in words
    ]
    text = 0.13 * max(w.count("\n") + 1 if w else 0 for w in wrapped) + 0.08
    figure, axes = grid(rows, columns, rows * (cell * 0.94 + text) + 0.3)
    for axis in axes.ravel()[len(images) :]:
        axis.set_visible(False)
    for axis, image, caption, (_, fonts) in zip(axes.ravel(), images, wrapped, words):
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=PALE)
        plain = dict(family=fonts, va="top", parse_math=False)
        axis.text(0, -0.03, caption, transform=axis.transAxes, fontsize=6, **plain)
    above, fonts = drawable(title)
    figure.suptitle(above, fontsize=8, x=0.01, ha="left", family=fonts, parse_math=False)
    write(figure, Path(path))
