"""What each strategy of choosing runs has bought: regret against compute on simulated laws."""

from __future__ import annotations

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sovit.report.figures.style import GREY, OKABE_ITO, finish, grid, styled

# what is drawn: colour, dashes of the searches that know no law, name. A summary may hold more strategies
LINES = {
    "next_run": (OKABE_ITO[1], "-", "next run"),
    "cost_random": (OKABE_ITO[0], "-", "random, p ~ 1/cost"),
    "random": (OKABE_ITO[5], "-", "random"),
    "star": (OKABE_ITO[6], "-", "SoViT's star"),
    "isoflop": (OKABE_ITO[4], "-", "isoFLOP"),
    "v_optimal": (OKABE_ITO[3], "-", "V-optimal, form trusted"),
    "tpe-24-scaled": (OKABE_ITO[2], "--", "TPE below, scaled to the target"),
    "gp-24-scaled": (GREY, "--", "GP below, scaled to the target"),
    "tpe-at-target": (OKABE_ITO[2], ":", "TPE at the target"),
    "gp-at-target": (GREY, ":", "GP at the target"),
}
BANDS = ("next_run", "cost_random")  # more bands than two hide each other


@styled
def active(summary: dict):
    """Median actual regret against compute, quartiles as a band, a panel a truth, a line a strategy."""
    measure = summary["measure"]
    multiple = measure.rpartition("_")[2].replace("x", " ×")
    label = f"regret at {multiple} (%)"
    truths = summary["truths"]
    columns = min(3, len(truths))
    rows = -(-len(truths) // columns)
    figure, panels = grid(rows, columns, 0.85 + 1.95 * rows)
    axes = panels.ravel()
    shown: dict = {}
    for i, (axis, (truth, entry)) in enumerate(zip(axes, truths.items())):
        for name, strategy in entry["strategies"].items():
            if measure not in strategy or name not in LINES:
                continue
            colour, dashes, named = LINES[name]
            x, curve = np.array(strategy["levels"]), {k: 100 * np.array(v) for k, v in strategy[measure].items()}
            front = 3 if name in BANDS else 2
            axis.plot(x, curve["median"], color=colour, ls=dashes, lw=1.6 if name == "next_run" else 1.1, zorder=front)
            if name in BANDS:
                axis.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.15, lw=0, zorder=1)
            shown[name] = Line2D([], [], color=colour, ls=dashes, label=named)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side, steps in ((axis.xaxis, (1.0,)), (axis.yaxis, (1.0, 2.0, 5.0))):
            side.set_major_locator(LogLocator(subs=steps, numticks=9))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_formatter(NullFormatter())
        axis.set_title(truth)
        if i % columns == 0:
            axis.set_ylabel(label)
        if i >= len(truths) - columns:
            axis.set_xlabel("compute spent (SoViT stars)")
    for axis in axes[len(truths) :]:
        axis.set_axis_off()
    return finish(figure, list(shown.values()), ncols=4)
