"""Loss at each patch size against FLOPs: one trunk of several sizes, and trunks of one."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.panels import DASHED, finish, flops_and_loss, grid, half_interval, mark
from sovit.report.figures.style import GREY, INK, METRICS, OKABE_ITO, TRAIN_FLOPS, styled

ARMS = {"flexi": {"color": OKABE_ITO[0], "marker": "o"}, "single": {"color": INK, "marker": "x"}}
TOGETHER = {"color": GREY, "marker": "x", "ms": 3.4, "lw": 0.9, "ls": DASHED}


@styled
def flexi_cost(found: dict) -> Figure:
    """Loss at each patch size against FLOPs: the Flexi trunk, the trunk of that size, and its loss priced at all trunks.

    found: of `analysis.flexivit.cost.summarise_sizes`. A row a shape, a column a patch size.
    """
    shapes = found["shapes"]
    figure, axes = grid(len(shapes), max(len(entry["patch_sizes"]) for entry in shapes), 0.8 + 1.75 * len(shapes))
    for row, entry in zip(axes, shapes):
        per_image = entry["flops_per_image"]
        together = sum(v for k, v in per_image.items() if k != "flexi")
        for axis in row[len(entry["patch_sizes"]) :]:
            axis.set_visible(False)
        for axis, size in zip(row, entry["patch_sizes"]):
            every = []
            for curve in (c for c in entry["curves"] if c["patch_size"] == size):
                x, y = np.array(curve["flops"]), np.array(curve["loss"])
                half = half_interval(curve["sd"], curve["n"])
                axis.errorbar(x, y, half, ms=3.4, lw=1.0, elinewidth=0.7, **ARMS[curve["arm"]])
                every.append(y)
                if curve["arm"] == "single":
                    axis.plot(x * together / per_image[str(size)], y, **TOGETHER)
            axis.set_title(f"{entry['shape']} at {entry['image_size']} px, patch {size}")
            flops_and_loss(axis, every)
    handles = [
        mark("one trunk of all sizes", ms=3.4, lw=1.0, **ARMS["flexi"]),
        mark("a trunk of this size alone", ms=3.4, lw=1.0, **ARMS["single"]),
        mark("the same, FLOPs of the trunks of all sizes", **TOGETHER),
    ]
    return finish(figure, handles, TRAIN_FLOPS, METRICS["val_loss"])
