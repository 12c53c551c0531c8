"""Fine-tuning to another resolution: loss against FLOPs by mode, against bytes stored, and the valley of the split."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from sovit.predict.paired_test import student_t
from sovit.report.figures.style import (
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PAGE,
    TRAIN_FLOPS,
    curve_label,
    flops_label,
    legend_row,
    loss_axis,
    panels,
    ramp,
    spread_labels,
    styled,
)

COLOURS = dict(zip(("full", "attention", "mlp", "head"), OKABE_ITO))
MARKERS = dict(zip(("full", "attention", "mlp", "head"), "sovD"))
SCRATCH = "scratch"


def transfer_figures(found: dict) -> dict[str, Figure]:
    """Name -> figure, of what `analysis.resolution.report.summarise` found; those of a law where there is one."""
    out = {"error_by_flops": by_flops(found, "val_error"), "loss_by_flops": by_flops(found, "val_loss")}
    arms = [tuple(c[k] for k in ("shape", "patch_size", "image_size", "mode", "base_examples")) for c in found["cells"]]
    if len(set(arms)) < len(arms):  # else no arm has a second budget, and there is no curve
        out["loss_by_total_flops"] = by_total_flops(found)
    if any(cell["stored_bytes"] for cell in found["cells"]):
        out["loss_by_bytes"] = by_bytes(found)
    if any(law["schedules"] for law in found["laws"]):
        out["split"] = split(found)
    return out


def _targets(found: dict) -> list[tuple]:
    return sorted({_key(c) for c in found["cells"] if c["mode"] != SCRATCH}, key=lambda k: (k[2], k[1], _sizes(k[0])))


def _sizes(label: str) -> list[int]:
    return [int(x) for x in label.split("x")]


def _key(entry: dict) -> tuple:
    return entry["shape"], entry["patch_size"], entry["image_size"]


def _valley(axis, found: dict, line: dict, mode: str, style, colour) -> np.ndarray:
    """One curve: thin where no run was, its band and the best split. Returns what the axis must hold."""
    share, loss = 100 * np.array(line["share"]), np.array(line["loss"])
    axis.plot(share, loss, color=colour, ls=style, lw=0.7, alpha=0.6, zorder=2)
    if line["inside"] is not None:
        low, high = line["inside"]
        run = (share >= 100 * low - 1e-9) & (share <= 100 * high + 1e-9)
        axis.plot(share[run], loss[run], color=colour, ls=style, lw=1.4, zorder=3)
    if line["low"] is not None:
        axis.fill_between(share, line["low"], line["high"], color=colour, alpha=0.14, lw=0, zorder=1)
    face = "white" if found["status"] == "ok" else colour
    axis.plot(100 * found["share"], found["loss"], marker=MARKERS[mode], ms=4, mfc=face, mec=colour, zorder=4)
    return loss


def _grid(found: dict, right: float = 0.985, wspace: float = 0.28):
    """One panel a target, a row a resolution. Returns figure and {target: axes}."""
    targets = _targets(found)
    shapes, sizes = ({k[0]: 0 for k in targets}, list(dict.fromkeys(k[1:] for k in targets)))
    rows, columns = len(sizes), max(len(shapes), 1)
    height = 0.75 + 1.75 * rows
    figure, axes = panels(
        rows,
        columns,
        PAGE,
        height,
        left=0.075,
        right=right,
        bottom=0.45 / height,
        top=1 - 0.5 / height,
        wspace=wspace,
        hspace=0.42,
    )
    order = list(shapes)
    placed = {k: axes[sizes.index(k[1:]) * columns + order.index(k[0])] for k in targets}
    for axis in axes:
        axis.set_visible(any(axis is used for used in placed.values()))
    for key, axis in placed.items():
        axis.set_title(f"{key[0]} at {key[2]} px" + ("" if len({k[1] for k in targets}) == 1 else f", patch {key[1]}"))
    return figure, placed


def _has_scratch(found: dict) -> bool:
    targets = set(_targets(found))
    return any(c["mode"] == SCRATCH and _key(c) in targets for c in found["cells"])


def _before(cell: dict) -> float:
    """FLOPs of pre-training to two digits: shapes never meet a budget exactly."""
    return float(f"{cell['base_flops']:.2g}")


def _flops_axis(axis) -> None:
    """A log axis with two to four round ticks, fewer where the panel is narrow."""
    axis.set_xscale("log")
    low, high = axis.dataLim.intervalx
    most = max(2, int(axis.get_position().width * axis.figure.get_figwidth() / 0.6))
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = []
    for digits in ((1.0, 2.0, 3.0, 4.0, 5.0, 7.0), (1.0, 2.0, 4.0), (1.0, 3.0), (1.0,)):
        ticks = [t for t in np.sort(np.outer(decades, digits).ravel()) if low / 1.02 <= t <= high * 1.02]
        if len(ticks) <= most:
            break
    if len(ticks) < 2:
        ticks = [float(f"{t:.2g}") for t in (low, high)]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _points(cells: list[dict], x: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and half the 90 % interval of the mean over seeds (0 for one seed), x rising."""
    cells = sorted((c for c in cells if c[metric] is not None and c[x] is not None), key=lambda c: c[x])
    half = [student_t(c["n"] - 1) * c[f"{metric}_sd"] / np.sqrt(c["n"]) if c["n"] > 1 else 0.0 for c in cells]
    return np.array([c[x] for c in cells]), np.array([c[metric] for c in cells]), np.array(half)


@styled
def by_flops(found: dict, metric: str = "val_error") -> Figure:
    """Metric against the FLOPs of fine-tuning alone, by mode, from the longest pre-training; from scratch beside it."""
    figure, placed = _grid(found)
    for key, axis in placed.items():
        mine = [c for c in found["cells"] if _key(c) == key]
        longest = max(c["base_examples"] for c in mine)
        every = []
        for mode in (SCRATCH, *COLOURS):
            own = [c for c in mine if c["mode"] == mode and (mode == SCRATCH or c["base_examples"] == longest)]
            x, y, half = _points(own, "own_flops", metric)
            if len(x):
                colour = COLOURS.get(mode, INK)
                axis.errorbar(x, y, half, color=colour, marker=MARKERS.get(mode, "x"), ms=3.2, lw=1.0, elinewidth=0.7)
                every += [y - half, y + half]
        _flops_axis(axis)
        loss_axis(axis, np.concatenate(every))
    handles = [Line2D([], [], color=c, marker=MARKERS[m], ms=3.2, lw=1.0, label=m) for m, c in _modes(found)]
    if _has_scratch(found):
        handles.append(Line2D([], [], color=INK, marker="x", ms=3.2, lw=1.0, label="from scratch"))
    legend_row(figure, handles, 0.07)
    figure.supxlabel("training FLOPs at this resolution (fine-tuning: without its pre-training)", fontsize=8, y=0.01)
    figure.supylabel(METRICS[metric], fontsize=8, x=0.005)
    return figure


def _modes(found: dict) -> list[tuple[str, str]]:
    present = {c["mode"] for c in found["cells"]}
    return [(mode, colour) for mode, colour in COLOURS.items() if mode in present]


@styled
def by_total_flops(found: dict) -> Figure:
    """Loss against all FLOPs, pre-training included: points as measured, lines as the law has them where there is one.

    Full and attention, larger markers for longer pre-training.
    """
    figure, placed = _grid(found)
    laws = {_key(law): law for law in found["laws"]}
    bases = sorted({_before(c) for c in found["cells"] if c["mode"] != SCRATCH})
    size = dict(zip(bases, np.linspace(2.2, 5.2, len(bases))))
    for key, axis in placed.items():
        mine, every = [c for c in found["cells"] if _key(c) == key], []
        for mode in (SCRATCH, "full", "attention"):
            colour = COLOURS.get(mode, INK)
            for base in sorted({_before(c) for c in mine if c["mode"] == mode}):
                own = [c for c in mine if c["mode"] == mode and _before(c) == base]
                x, y, half = _points(own, "total_flops", "val_loss")
                line = dict(ls="") if key in laws else dict(lw=0.8)
                ms = size.get(base, 3.6)
                marker = MARKERS.get(mode, "x")
                axis.errorbar(
                    x, y, half, color=colour, marker=marker, ms=ms, mfc="white", mew=0.8, elinewidth=0.6, **line
                )
                every += [y - half, y + half]
        own_px = max(c["base_image_size"] for c in mine)
        own = [c for c in found["cells"] if (c["shape"], c["image_size"], c["mode"]) == (key[0], own_px, SCRATCH)]
        if own:
            x, y, half = _points(own, "total_flops", "val_loss")
            axis.errorbar(x, y, half, color=GREY, marker="+", ms=4, lw=0.8, ls=(0, (3, 1.5)), elinewidth=0.6)
            every += [y - half, y + half]
        for curve in laws.get(key, {}).get("curves", ()):
            axis.plot(curve["total_flops"], curve["loss"], color=COLOURS.get(curve["mode"], INK), lw=0.9, zorder=1)
            every.append(np.array(curve["loss"]))
        _flops_axis(axis)
        loss_axis(axis, np.concatenate(every))
    handles = [
        Line2D([], [], color=COLOURS[m], marker=MARKERS[m], ms=3.6, mfc="white", lw=0.9, label=m)
        for m in ("full", "attention")
    ]
    if _has_scratch(found):
        handles.append(Line2D([], [], color=INK, marker="x", ms=3.6, lw=0.9, label="from scratch"))
    handles.append(Line2D([], [], color=GREY, marker="+", ms=4, lw=0.8, ls=(0, (3, 1.5)), label="base, at its own px"))
    handles += [
        Line2D([], [], color=GREY, marker="o", ms=s, mfc="white", ls="", label=f"{flops_label(n)} before")
        for n, s in size.items()
    ]
    legend_row(figure, handles, 0.07)
    what = "; lines: the law of transfer" if laws else ""
    figure.supxlabel("all training FLOPs, pre-training included" + what, fontsize=8, y=0.01)
    figure.supylabel(METRICS["val_loss"], fontsize=8, x=0.005)
    return figure


@styled
def by_bytes(found: dict) -> Figure:
    """Loss at the largest budget from the longest pre-training against the bytes that this resolution adds to the store."""
    figure, placed = _grid(found)
    for key, axis in placed.items():
        mine, every = [c for c in found["cells"] if _key(c) == key], []
        for mode, colour in _modes(found):
            own = [c for c in mine if c["mode"] == mode and c["stored_bytes"]]
            if own:
                last = max(own, key=lambda c: (c["base_examples"], c["num_examples"]))
                x, y, half = _points([last], "stored_bytes", "val_loss")
                axis.errorbar(x / 1000, y, half, color=colour, marker=MARKERS[mode], ms=4.5, elinewidth=0.8, ls="")
                every += [y - half, y + half]
        scratch = [c for c in mine if c["mode"] == SCRATCH]
        if scratch:
            best = max(scratch, key=lambda c: c["num_examples"])["val_loss"]
            axis.axhline(best, color=INK, lw=0.8, ls=(0, (3, 1.5)))
            every.append(np.array([best]))
        loss_axis(axis, np.concatenate(every))
        axis.set_xlim(0, 1.1 * max(c["stored_bytes"] or 0 for c in mine) / 1000)
    handles = [Line2D([], [], color=c, marker=MARKERS[m], ms=4.5, ls="", label=m) for m, c in _modes(found)]
    if _has_scratch(found):
        handles.append(Line2D([], [], color=INK, lw=0.8, ls=(0, (3, 1.5)), label="from scratch, its largest budget"))
    legend_row(figure, handles, 0.07)
    figure.supxlabel("kilobytes stored for this resolution", fontsize=8, y=0.01)
    figure.supylabel(METRICS["val_loss"], fontsize=8, x=0.005)
    return figure


@styled
def split(found: dict) -> Figure:
    """Predicted loss along the split of each budget, within what was run; the best, and scratch at the left."""
    laws = {_key(law): law for law in found["laws"] if law["schedules"]}
    figure, placed = _grid({"cells": [c for c in found["cells"] if _key(c) in laws]}, right=0.93, wspace=0.55)
    for key, axis in placed.items():
        every = []
        schedules = sorted(laws[key]["schedules"], key=lambda s: s["train_flops"])
        for entry, colour in zip(schedules, ramp(len(schedules))):
            for mode, style in (("attention", "-"), ("full", (0, (3, 1.2)))):
                if mode in entry["splits"]:
                    every.append(_valley(axis, entry["splits"][mode], entry["valleys"][mode], mode, style, colour))
            for point in entry["measured"]:
                marker = MARKERS[point["mode"]]
                axis.plot(100 * point["share"], point["loss"], marker=marker, ms=2.4, color=INK, mew=0, zorder=6)
                every.append(np.array([point["loss"]]))
            level = next(iter(entry["splits"].values()))["scratch_loss"]
            axis.plot(0, level, marker="x", ms=4.5, mew=1.1, color=colour, clip_on=False, zorder=5)
            every.append(np.array([level]))
            last = next(iter(entry["valleys"].values()))["loss"][-1]
            curve_label(axis, 1.015, last, flops_label(entry["train_flops"]), colour)
        loss_axis(axis, np.concatenate(every))
        axis.set_xlim(-3, 100)
        spread_labels(axis, 0.075)
    handles = [
        Line2D([], [], color=GREY, lw=1.3, marker=MARKERS["attention"], ms=4, mfc="white", label="attention, best"),
        Line2D(
            [], [], color=GREY, lw=1.3, ls=(0, (3, 1.2)), marker=MARKERS["full"], ms=4, mfc="white", label="full, best"
        ),
        Line2D([], [], color=GREY, lw=0.7, alpha=0.6, label="thin: not run"),
        Line2D([], [], color=GREY, ls="", marker="o", ms=4, label="filled: best at its end"),
        Line2D([], [], color=INK, ls="", marker="o", ms=2.4, mew=0, label="measured"),
        Line2D([], [], color=GREY, ls="", marker="x", ms=4.5, label="from scratch"),
    ]
    legend_row(figure, handles, 0.07)
    figure.supxlabel(
        "share of the FLOPs spent on low-resolution pre-training (%); colours: budgets, at the right",
        fontsize=8,
        y=0.01,
    )
    figure.supylabel(METRICS["val_loss"] + ", by the law", fontsize=8, x=0.005)
    return figure


@styled
def flexi_cost(found: dict) -> Figure:
    """Loss at each patch size against FLOPs: the Flexi trunk, the trunk of that size, and its loss priced at all trunks.

    found: of `analysis.flexivit.cost.summarise_sizes`. A row a shape, a column a patch size.
    """
    shapes = found["shapes"]
    columns = max(len(entry["patch_sizes"]) for entry in shapes)
    height = 0.75 + 1.75 * len(shapes)
    margins = dict(left=0.075, right=0.985, bottom=0.45 / height, top=1 - 0.5 / height, wspace=0.28, hspace=0.42)
    figure, axes = panels(len(shapes), columns, PAGE, height, **margins)
    for row, entry in enumerate(shapes):
        per_image = entry["flops_per_image"]
        together = sum(v for k, v in per_image.items() if k != "flexi")
        for column in range(columns):
            axis = axes[row * columns + column]
            if column >= len(entry["patch_sizes"]):
                axis.set_visible(False)
                continue
            size, every = entry["patch_sizes"][column], []
            for curve in entry["curves"]:
                if curve["patch_size"] != size:
                    continue
                x, y = np.array(curve["flops"]), np.array(curve["loss"])
                half = (
                    student_t(curve["n"] - 1) * np.array(curve["sd"]) / np.sqrt(curve["n"]) if curve["n"] > 1 else None
                )
                single = curve["arm"] == "single"
                style = dict(color=INK, marker="x") if single else dict(color=OKABE_ITO[0], marker="o")
                axis.errorbar(x, y, half, ms=3.4, lw=1.0, elinewidth=0.7, **style)
                every.append(y)
                if single:
                    axis.plot(
                        x * together / per_image[str(size)], y, color=GREY, marker="x", ms=3.4, lw=0.9, ls=(0, (3, 1.5))
                    )
            axis.set_title(f"{entry['shape']} at {entry['image_size']} px, patch {size}")
            _flops_axis(axis)
            if every:
                loss_axis(axis, np.concatenate(every))
    handles = [
        Line2D([], [], color=OKABE_ITO[0], marker="o", ms=3.4, lw=1.0, label="one trunk of all sizes"),
        Line2D([], [], color=INK, marker="x", ms=3.4, lw=1.0, label="a trunk of this size alone"),
        Line2D(
            [],
            [],
            color=GREY,
            marker="x",
            ms=3.4,
            lw=0.9,
            ls=(0, (3, 1.5)),
            label="the same, FLOPs of the trunks of all sizes",
        ),
    ]
    legend_row(figure, handles, 0.07)
    figure.supxlabel(TRAIN_FLOPS, fontsize=8, y=0.01)
    figure.supylabel(METRICS["val_loss"], fontsize=8, x=0.005)
    return figure
