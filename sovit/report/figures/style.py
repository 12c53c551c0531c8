"""What all figures share: colours, axes, legends, and how they are written; `sovit.mplstyle` holds the rest.

Budgets run through a perceptually even ramp, categories take the Okabe-Ito palette; both survive colour blindness and
grey printing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
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
LINE = 125  # letters of a legend that fit on a page, about
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHED = (0, (3, 1.5))
STYLE = Path(__file__).with_name("sovit.mplstyle")
styled = matplotlib.rc_context(fname=STYLE)  # as a decorator: the style holds inside the function and nowhere else


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


def grid(rows: int, columns: int, height: float, width: float = PAGE, **options) -> tuple[Figure, np.ndarray]:
    """Make a figure of rows x columns panels, sizes in inches. Returns it and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def mark(label: str, **style) -> Line2D:
    """An entry of a legend that is drawn as a line or, with a marker, as a point."""
    return Line2D([], [], label=label, **(dict(ls="") if "marker" in style else {}) | style)


def band(label: str, alpha: float) -> Patch:
    """An entry of a legend that is drawn as a grey patch."""
    return Patch(color=GREY, alpha=alpha, lw=0, label=label)


def finish(figure: Figure, handles: Sequence, x: str = "", y: str = "", ncols: int | None = None) -> Figure:
    """Put the legend above the panels, and the labels that they share around them. ncols: None = as fills a page."""
    letters = sum(len(handle.get_label()) + 6 for handle in handles)
    columns = ncols or -(-len(handles) // -(-letters // LINE))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)
    if x:
        figure.supxlabel(x)
    if y:
        figure.supylabel(y)
    return figure


def flops_label(value: float) -> str:
    """3.2e11 as 3.2 × 10¹¹, in plain text."""
    exponent = int(np.floor(np.log10(value)))
    head = f"{value / 10.0**exponent:.2g}"
    if head == "10":
        head, exponent = "1", exponent + 1
    digits = str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{digits}" if head == "1" else f"{head}×10{digits}"


def curve_label(axis, x: float, y: float, text: str, colour) -> None:
    """A direct label at the right of a curve; x in axes units, y in data."""
    label = axis.text(x, y, text, color=colour, fontsize=7, va="center", transform=axis.get_yaxis_transform())
    label.set_gid("direct")


def spread_labels(axis, gap: float = 0.055) -> None:
    """Move direct labels apart, up and below the top, so that none covers another; gap in axes units."""
    to_axes = axis.transData + axis.transAxes.inverted()
    place = {t: to_axes.transform((1, t.get_position()[1]))[1] for t in axis.texts if t.get_gid() == "direct"}
    labels = sorted(place, key=lambda t: place[t])
    at = 0.02 - gap
    for i, label in enumerate(labels):
        at = max(place[label], at + gap)
        top = 0.98 - gap * (len(labels) - 1 - i)
        label.set_transform(axis.transAxes)
        label.set_position((label.get_position()[0], min(at, top)))


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
    spot, (wide, tall) = axis.get_position(), axis.figure.get_size_inches()
    inches = spot.width * wide if which == "x" else spot.height * tall
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
