"""Fine-tuning to another resolution: loss against all FLOPs by mode, and the valley of the split of a budget."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.resolution.curves import SCRATCH
from sovit.predict.paired_test import student_t
from sovit.report.figures.style import (
    DASHED,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    curve_label,
    finish,
    flops_label,
    grid,
    loss_axis,
    mark,
    ramp,
    spread_labels,
    styled,
)

COLOURS = dict(zip(("full", "attention", "mlp", "head"), OKABE_ITO)) | {SCRATCH: INK}
MARKERS = {"full": "s", "attention": "o", "mlp": "v", "head": "D", SCRATCH: "x"}
STYLES = {"attention": "-", "full": DASHED}


def transfer_figures(found: dict) -> dict[str, Figure]:
    """Name -> figure, of what `analysis.resolution.tables.summarise` found; the split where there is a law."""
    out = {"loss_by_total_flops": by_total_flops(found)}
    return out | ({"split": split(found)} if found["laws"] else {})


def _key(entry: dict) -> tuple:
    return entry["shape"], entry["patch_size"], entry["image_size"]


def _panels(targets: list[tuple]):
    """One panel a target, a row a resolution, a column a shape. Returns figure and {target: axes}."""
    targets = list(dict.fromkeys(targets))
    shapes, sizes = list(dict.fromkeys(k[0] for k in targets)), sorted({k[:0:-1] for k in targets})
    figure, axes = grid(len(sizes), len(shapes), 0.8 + 1.75 * len(sizes))
    placed = {k: axes[sizes.index(k[:0:-1]), shapes.index(k[0])] for k in targets}
    for axis in set(axes.ravel()) - set(placed.values()):
        axis.set_visible(False)
    for (shape, patch_size, image_size), axis in placed.items():
        axis.set_title(f"{shape} at {image_size} px, patch {patch_size}")
    return figure, placed


def _before(cell: dict) -> float:
    """FLOPs of pre-training to two digits: shapes never meet a budget exactly."""
    return float(f"{cell['base_flops']:.2g}")


def _draw(axis, cells: list[dict], every: list, **style) -> None:
    """Means over seeds against all FLOPs, with their 90 % intervals; what the axis must hold is added to `every`."""
    cells = sorted(cells, key=lambda c: c["total_flops"])
    x, y = (np.array([c[name] for c in cells]) for name in ("total_flops", "val_loss"))
    half = [student_t(c["n"] - 1) * c["val_loss_sd"] / np.sqrt(c["n"]) if c["n"] > 1 else 0.0 for c in cells]
    axis.errorbar(x, y, half, elinewidth=0.6, **style)
    every += [y - np.array(half), y + np.array(half)]


def _flops_axis(axis) -> None:
    """A log axis with three ticks over what was drawn."""
    axis.set_xscale("log")
    ticks = np.geomspace(*axis.dataLim.intervalx, 3)
    axis.xaxis.set_major_locator(FixedLocator(sorted({float(f"{x:.2g}") for x in ticks})))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
    axis.xaxis.set_minor_locator(NullLocator())


@styled
def by_total_flops(found: dict) -> Figure:
    """Loss against all FLOPs, pre-training included: points as measured, lines as the law has them where there is one.

    Larger markers for longer pre-training; with a law full and attention alone, as it is fitted to these.
    """
    tuned = [c for c in found["cells"] if c["mode"] != SCRATCH]
    laws, targets = {_key(law): law for law in found["laws"]}, {_key(c) for c in tuned}
    run = {c["mode"] for c in found["cells"] if _key(c) in targets}
    modes = [mode for mode in COLOURS if mode in run and (mode in (SCRATCH, *STYLES) or not laws)]
    bases = sorted({_before(c) for c in tuned})
    size = dict(zip(bases, np.linspace(2.2, 5.2, len(bases))))
    figure, placed = _panels([_key(c) for c in tuned])
    for key, axis in placed.items():
        mine, every = [c for c in found["cells"] if _key(c) == key], []
        for mode in modes:
            for base in sorted({_before(c) for c in mine if c["mode"] == mode}):
                own = [c for c in mine if c["mode"] == mode and _before(c) == base]
                style = {
                    "ms": size.get(base, 3.6),
                    "ls": "" if key in laws else "-",
                    "lw": 0.8,
                    "mfc": "white",
                    "mew": 0.8,
                }
                _draw(axis, own, every, color=COLOURS[mode], marker=MARKERS[mode], **style)
        wanted = (key[0], max(c["base_image_size"] for c in mine), SCRATCH)
        own = [c for c in found["cells"] if (c["shape"], c["image_size"], c["mode"]) == wanted]
        if own:
            _draw(axis, own, every, color=GREY, marker="+", ms=4, lw=0.8, ls=DASHED)
        for curve in laws.get(key, {}).get("curves", ()):
            axis.plot(curve["total_flops"], curve["loss"], color=COLOURS[curve["mode"]], lw=0.9, zorder=1)
            every.append(np.array(curve["loss"]))
        _flops_axis(axis)
        loss_axis(axis, np.concatenate(every))
    handles = [mark(m, color=COLOURS[m], marker=MARKERS[m], ms=3.6, mfc="white", lw=0.9) for m in modes]
    handles.append(mark("base, at its own px", color=GREY, marker="+", ms=4, lw=0.8, ls=DASHED))
    for before, ms in size.items():
        handles.append(mark(f"{flops_label(before)} before", color=GREY, marker="o", ms=ms, mfc="white", ls=""))
    law = "; lines: the law of transfer" if laws else ""
    return finish(figure, handles, "all training FLOPs, pre-training included" + law, METRICS["val_loss"])


@styled
def split(found: dict) -> Figure:
    """Predicted loss along the split of each budget, within what was run; the best, and scratch at the left."""
    laws = {_key(law): law for law in found["laws"]}
    figure, placed = _panels(list(laws))
    for key, axis in placed.items():
        every = []
        schedules = sorted(laws[key]["schedules"], key=lambda s: s["train_flops"])
        for entry, colour in zip(schedules, ramp(len(schedules))):
            for mode, best in entry["splits"].items():
                every.append(_valley(axis, best, entry["valleys"][mode], colour))
                axis.plot(0, best["scratch_loss"], marker="x", ms=4.5, mew=1.1, color=colour, clip_on=False, zorder=5)
                every.append(np.array([best["scratch_loss"]]))
            last = next(iter(entry["valleys"].values()))["loss"][-1]
            curve_label(axis, 1.015, last, flops_label(entry["train_flops"]), colour)
        loss_axis(axis, np.concatenate(every))
        axis.set_xlim(-3, 100)
        spread_labels(axis, 0.075)
    shown = {"color": GREY, "ms": 4}
    handles = [mark(f"{m}, best", lw=1.3, ls=ls, marker=MARKERS[m], mfc="white", **shown) for m, ls in STYLES.items()]
    handles += [
        mark("thin: not run", color=GREY, lw=0.7, alpha=0.6),
        mark("filled: best at its end", ls="", marker="o", **shown),
        mark("from scratch", ls="", marker="x", **shown),
    ]
    words = "share of the FLOPs spent on low-resolution pre-training (%); colours: budgets, at the right"
    return finish(figure, handles, words, METRICS["val_loss"] + ", by the law")


def _valley(axis, best: dict, line: dict, colour) -> np.ndarray:
    """One curve: thin where no run was, its band and the best split. Returns what the axis must hold."""
    mode, share, loss = best["mode"], 100 * np.array(line["share"]), np.array(line["loss"])
    axis.plot(share, loss, color=colour, ls=STYLES[mode], lw=0.7, alpha=0.6, zorder=2)
    low, high = line["inside"]
    run = (share >= 100 * low - 1e-9) & (share <= 100 * high + 1e-9)
    axis.plot(share[run], loss[run], color=colour, ls=STYLES[mode], lw=1.4, zorder=3)
    if line["low"] is not None:
        axis.fill_between(share, line["low"], line["high"], color=colour, alpha=0.14, lw=0, zorder=1)
    face = "white" if best["status"] == "ok" else colour
    axis.plot(100 * best["share"], best["loss"], marker=MARKERS[mode], ms=4, mfc=face, mec=colour, zorder=4)
    return loss
