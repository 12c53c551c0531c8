"""What all figures share: sizes, colours, axes, and how they are written.

Sizes are those of a printed column (3.4 in) or page (7 in) at 8 points. Colours: budgets run through a perceptually
even ramp, categories take the Okabe-Ito palette; both survive colour blindness and grey printing.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sovit import UserError

TRAIN_FLOPS = "training FLOPs (3 × forward × images)"
COMPUTE = "compute t = forward FLOPs × images"
METRICS = {"val_loss": "validation loss (nats)", "val_error": "validation error"}
DIMENSIONS = {
    "width": "width",
    "depth": "depth (blocks)",
    "mlp_dim": "MLP dim",
    "patch_size": "patch size (pixels)",
    "image_size": "image size (pixels)",
    "num_params": "encoder parameters",
}
PAGE, COLUMN = 7.0, 3.4  # inches
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: dict = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.3,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "svg.hashsalt": "sovit",
    "svg.fonttype": "path",
    "path.simplify": False,
}
styled = matplotlib.rc_context(STYLE)  # as a decorator: the style holds inside the function and nowhere else


def ramp(count: int) -> list:
    """`count` colours from dark to light, none too pale to read on white."""
    return [matplotlib.colormaps["viridis"](p) for p in np.linspace(0.0, 0.78, max(count, 1))]


def save(figure: Figure, path: Path | str) -> list[str]:
    """Write PATH.png and PATH.svg (PATH may end in either), without date or version; returns the names of the files."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        _write(figure, path.with_name(path.name + suffix), metadata)
    return [path.name + ".png", path.name + ".svg"]


@styled
def _write(figure: Figure, path: Path, metadata: dict) -> None:
    FigureCanvasAgg(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=240, metadata=metadata, facecolor="white")
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; choose another file") from None


def panels(rows: int, columns: int, width: float, height: float, sharey=False, width_ratios=None, **margins):
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(rows, columns, width_ratios=width_ratios, **margins)
    axes = grid.subplots(sharey=sharey, squeeze=False).ravel()
    return figure, axes


def flops_label(value: float) -> str:
    """3.2e11 as 3.2 × 10¹¹, in plain text."""
    exponent = int(np.floor(np.log10(value)))
    head = f"{value / 10.0**exponent:.2g}"
    if head == "10":
        head, exponent = "1", exponent + 1
    digits = str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{digits}" if head == "1" else f"{head}×10{digits}"


def legend_row(figure, handles, left: float, ncols: int | None = None) -> None:
    """A legend in a row along the top of the figure, from `left` (figure units)."""
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, 1.0),
        ncols=ncols or len(handles),
        handletextpad=0.4,
        columnspacing=1.1,
        borderaxespad=0.15,
        handlelength=1.5,
        labelspacing=0.25,
    )


def curve_label(axis, x: float, y: float, text: str, colour) -> None:
    """A direct label at the right of a curve; x in axes units, y in data."""
    label = axis.text(x, y, text, color=colour, fontsize=7, va="center", transform=axis.get_yaxis_transform())
    label.set_gid("direct")


def spread_labels(axis, gap: float = 0.055) -> None:
    """Push direct labels apart so that none covers another; gap in axes units."""
    labels = [t for t in axis.texts if t.get_gid() == "direct"]
    to_axes = axis.transAxes.inverted()
    place = {t: to_axes.transform(axis.transData.transform((1, t.get_position()[1])))[1] for t in labels}
    labels.sort(key=lambda t: place[t])
    spots = [min(max(place[t], 0.02), 0.98) for t in labels]
    for _ in range(200):
        moved = False
        for i in range(1, len(spots)):
            if spots[i] - spots[i - 1] < gap - 1e-6:
                push = (gap - (spots[i] - spots[i - 1])) / 2
                spots[i], spots[i - 1], moved = spots[i] + push, spots[i - 1] - push, True
        if not moved:
            break
    for label, spot in zip(labels, spots):
        x = label.get_position()[0]
        label.set_transform(axis.transAxes)
        label.set_position((x, spot))


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def set_ticks(axis, which: str, places) -> None:
    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_locator(FixedLocator(list(places)))
    target.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    target.set_minor_locator(NullLocator())


def dimension_axis(axis, values, which: str = "x", limits=None) -> None:
    """A log axis with its ticks at the values that were run, thinned where they would touch."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    unique = np.unique(values)
    low, high = limits or (unique.min() / 1.2, unique.max() * 1.2)
    spot = axis.get_position()
    inches = spot.width * axis.figure.get_figwidth() if which == "x" else spot.height * axis.figure.get_figheight()
    shown = [unique[0]]
    for value in unique[1:]:
        gap = np.log(value / shown[-1]) / np.log(high / low) * inches
        letters = (len(number_text(value)) + len(number_text(shown[-1]))) / 2
        if gap > (0.06 * letters + 0.06 if which == "x" else 0.13):
            shown.append(value)
    set_ticks(axis, which, shown)
    (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)


def loss_axis(axis, y, which: str = "y", pad: float = 1.03) -> None:
    """A log axis with four to eight round ticks over the range of y."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    low, high = float(np.min(y)) / pad, float(np.max(y)) * pad
    for step in (10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
        if len(ticks) >= 4:
            break
    set_ticks(axis, which, ticks[ticks > 0])
    (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)


def arm_name(arm: str) -> str:
    names = {"corner": "off the axes", "mlp_dim": "MLP dim", "patch_size": "patch size", "image_size": "image size"}
    return names.get(arm, arm)
