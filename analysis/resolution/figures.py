"""Fine-tuning to another resolution: loss against all FLOPs, by what is fine-tuned."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.resolution.curves import SCRATCH
from sovit.predict.validation import student_t
from sovit.report.figures.style import (
    DASHED,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    finish,
    flops_axis,
    flops_label,
    grid,
    loss_axis,
    mark,
    styled,
)

COLOURS = dict(zip(("full", "attention", "mlp", "head"), OKABE_ITO)) | {SCRATCH: INK}
MARKERS = {"full": "s", "attention": "o", "mlp": "v", "head": "D", SCRATCH: "x"}
BASE = {"color": GREY, "marker": "+", "ms": 4, "lw": 0.8, "ls": DASHED}


@styled
def by_total_flops(found: dict) -> Figure:
    """Means over seeds against all FLOPs, pre-training included; a panel a shape and resolution.

    found: of `analysis.resolution.tables.summarise`. Larger markers for longer pre-training.
    """
    tuned = [c for c in found["cells"] if c["mode"] != SCRATCH]
    shapes = list(dict.fromkeys(c["shape"] for c in tuned))
    sizes = sorted({(c["image_size"], c["patch_size"]) for c in tuned})
    modes = [mode for mode in COLOURS if any(c["mode"] == mode for c in found["cells"])]
    bases = sorted({_before(c) for c in tuned})
    marker_size = dict(zip(bases, np.linspace(2.2, 5.2, len(bases))))
    figure, axes = grid(len(sizes), len(shapes), 0.8 + 1.75 * len(sizes))
    for (row, column), axis in np.ndenumerate(axes):
        shape, (image_size, patch_size) = shapes[column], sizes[row]
        mine = [c for c in found["cells"] if (c["shape"], c["image_size"], c["patch_size"]) == (shape, *sizes[row])]
        if not mine:
            axis.set_visible(False)
            continue
        every: list = []
        for mode in modes:
            for base in sorted({_before(c) for c in mine if c["mode"] == mode}):
                own = [c for c in mine if c["mode"] == mode and _before(c) == base]
                style = {"color": COLOURS[mode], "marker": MARKERS[mode], "ms": marker_size.get(base, 3.6)}
                _draw(axis, own, every, lw=0.8, mfc="white", mew=0.8, **style)
        wanted = (shape, max(c["base_image_size"] for c in mine), SCRATCH)
        _draw(axis, [c for c in found["cells"] if (c["shape"], c["image_size"], c["mode"]) == wanted], every, **BASE)
        axis.set_title(f"{shape} at {image_size} px, patch {patch_size}")
        flops_axis(axis, axis.dataLim.intervalx, 3)
        loss_axis(axis, np.concatenate(every))
    handles = [mark(m, color=COLOURS[m], marker=MARKERS[m], ms=3.6, mfc="white", lw=0.9) for m in modes]
    handles.append(mark("base, at its own px", **BASE))
    for before, ms in marker_size.items():
        handles.append(mark(f"{flops_label(before)} before", color=GREY, marker="o", ms=ms, mfc="white", ls=""))
    return finish(figure, handles, "all training FLOPs, pre-training included", METRICS["val_loss"])


def _before(cell: dict) -> float:
    """FLOPs of pre-training to two digits: shapes never meet a budget exactly."""
    return float(f"{cell['base_flops']:.2g}")


def _draw(axis, cells: list[dict], every: list, **style) -> None:
    """Means with their 90 % intervals, if there are any; what the axis must hold is added to `every`."""
    cells = sorted(cells, key=lambda c: c["total_flops"])
    if not cells:
        return
    x, y = (np.array([c[name] for c in cells]) for name in ("total_flops", "val_loss"))
    half = [student_t(c["n"] - 1) * c["val_loss_sd"] / np.sqrt(c["n"]) if c["n"] > 1 else 0.0 for c in cells]
    axis.errorbar(x, y, half, elinewidth=0.6, **style)
    every += [y - np.array(half), y + np.array(half)]
