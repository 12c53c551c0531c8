"""What fine-tuning a part costs beside fine-tuning all: one panel a cost, one group of bars a shape."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sovit.report.figures.style import GREY, INK, OKABE_ITO, PAGE, legend_row, panels, styled

PANELS = {
    "train_step_seconds": "step time",
    "step_flops": "step FLOPs",
    "peak_bytes": "peak memory",
    "saved_bytes": "activations kept",
    "stored_bytes": "bytes stored",
}
COLOURS = {"attention": OKABE_ITO[0], "mlp": OKABE_ITO[4], "head": "#b5b5b5"}
HEIGHT = 0.26  # of a bar, where shapes are 1 apart


@styled
def savings_bars(groups: Sequence[dict], names: Sequence[str], claimed: dict[str, float]) -> Figure:
    """Ratios to "full" of `analysis.finetune_cost.savings.savings`, shapes from top to bottom under their `names`.

    claimed: cost -> the share that attention alone is said to save, a dashed line.
    """
    figure, axes = panels(1, len(PANELS), PAGE, 0.75 + 0.44 * len(groups), sharey=True, left=0.145, right=0.985)
    figure.subplots_adjust(bottom=0.42 / figure.get_figheight(), top=1 - 0.48 / figure.get_figheight(), wspace=0.12)
    for axis, (cost, title) in zip(axes, PANELS.items()):
        for i, group in enumerate(groups):
            parts = [part for part in COLOURS if cost in group["parts"].get(part, {}).get("ratio", {})]
            for j, part in enumerate(parts):
                ratio = group["parts"][part]["ratio"]
                y = i + (j - (len(parts) - 1) / 2) * HEIGHT
                axis.barh(y, ratio[cost], HEIGHT, color=COLOURS[part], linewidth=0)
                if cost == "train_step_seconds" and ratio.get("low") is not None:
                    axis.plot([ratio["low"], ratio["high"]], [y, y], color=INK, lw=0.8)
                if part == "attention":
                    axis.text(0.03, y, f"{ratio[cost]:.2f}", fontsize=6, va="center", color="white")
        axis.axvline(1.0, color=GREY, lw=0.6, zorder=0)
        if cost in claimed:
            axis.axvline(1 - claimed[cost], color=INK, lw=0.8, ls="--")
        axis.set_title(title, pad=4)
        axis.set_xlim(0, 1.1)
        axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(groups)), names)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    figure.supxlabel("cost of a step, as a ratio to fine-tuning everything", fontsize=8, y=0.02)
    handles: list = [Patch(color=colour, label=f"{part} alone") for part, colour in COLOURS.items()]
    handles.append(Line2D([], [], color=INK, lw=0.8, ls="--", label="claimed for attention (arXiv 2203.09795)"))
    legend_row(figure, handles, 0.14)
    return figure
