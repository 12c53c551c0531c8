"""What fine-tuning a part costs beside fine-tuning all: one panel a cost, one group of bars a shape."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.panels import finish, grid, mark
from sovit.report.figures.style import GREY, INK, OKABE_ITO, styled

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
def savings_bars(found: dict) -> Figure:
    """Ratios to "full" of `analysis.finetune_cost.tables.summary`, shapes from top to bottom; dashed: what is claimed."""
    groups = found["groups"]
    figure, (axes,) = grid(1, len(PANELS), 0.9 + 0.44 * len(groups), sharey=True)
    for axis, (cost, title) in zip(axes, PANELS.items()):
        for i, group in enumerate(groups):
            _bars(axis, i, group["parts"], cost)
        axis.axvline(1.0, color=GREY, lw=0.6, zorder=0)
        if cost in found["claimed"]:
            axis.axvline(1 - found["claimed"][cost], color=INK, lw=0.8, ls="--")
        axis.set_title(title)
        axis.set_xlim(0, 1.1)
        axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(groups)), [f"{group['name']}\nbatch {group['batch_size']}" for group in groups])
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    handles: list = [Patch(color=colour, label=f"{part} alone") for part, colour in COLOURS.items()]
    handles.append(mark("claimed for attention (arXiv 2203.09795)", color=INK, lw=0.8, ls="--"))
    return finish(figure, handles, "cost of a step, as a ratio to fine-tuning everything")


def _bars(axis, place: int, found: dict, cost: str) -> None:
    """The bars of one shape: a part each, with the interval of its time, and attention's ratio in figures."""
    parts = {part: found[part]["ratio"] for part in COLOURS if cost in found.get(part, {}).get("ratio", {})}
    for j, (part, ratio) in enumerate(parts.items()):
        y = place + (j - (len(parts) - 1) / 2) * HEIGHT
        axis.barh(y, ratio[cost], HEIGHT, color=COLOURS[part], linewidth=0)
        if cost == "train_step_seconds" and ratio["low"] is not None:
            axis.plot([ratio["low"], ratio["high"]], [y, y], color=INK, lw=0.8)
        if part == "attention":
            axis.text(0.03, y, f"{ratio[cost]:.2f}", fontsize=6, va="center", color="white")
