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
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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
TICKS = ((1, (1, 2, 5)), (1, (1, 3)), (1, (1,)), (2, (1,)), (3, (1,)), (6, (1,)))  # powers of ten apart, multiples
PAGE, COLUMN = 7.0, 3.4  # inches
LINE = 125  # letters of a legend that fit on a page, about
MAX_POINTS = 5000  # more are pixels in the SVG too: as paths they would make a file of megabytes
INK, GREY, PALE = "#222222", "#767676", "#d9d9d9"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHED = (0, (3, 1.5))
DIAMOND = dict(marker="D", ms=4.2, mfc="white")
STYLE = Path(__file__).with_name("sovit.mplstyle")
styled = matplotlib.rc_context(fname=STYLE)  # as a decorator: the style holds inside the function and nowhere else


def ramp(count: int) -> list:
    """`count` colours from dark to light, none too pale to read on white."""
    return [matplotlib.colormaps["viridis"](p) for p in np.linspace(0.0, 0.78, max(count, 1))]


def save(figure: Figure, path: Path | str) -> None:
    """Write PATH.png and PATH.svg (PATH may end in either), without date or version."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    for suffix in (".png", ".svg"):
        write(figure, path.with_name(path.name + suffix))


@styled
def write(figure: Figure, path: Path) -> None:
    """Write one file, of a kind that its suffix names. Raises UserError."""
    FigureCanvasAgg(figure)
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
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


# what panels draw -----------------------------------------------------------------------------------------------------


def dots(axis, x, y, **look) -> None:
    axis.scatter(x, y, linewidths=0, zorder=3, rasterized=len(x) > MAX_POINTS, **look)


def line_with_bands(axis, x: np.ndarray, y: np.ndarray, bands: Sequence, last: float, colour: str) -> None:
    """A quantity against compute with its bands (low, high), the wider first; dashed beyond `last`, the largest run."""
    for ends, alpha in zip(bands, (0.16, 0.32)):
        axis.fill_between(x, *ends, color=colour, alpha=alpha, lw=0, zorder=1)
    axis.plot(x, y, color=colour, ls=DASHED, zorder=3)
    inside = x <= last * (1 + 1e-9)
    axis.plot(x[inside], y[inside], color=colour, zorder=3)
    axis.axvline(last, color=GREY, lw=0.6, ls=":", zorder=2)
    flops_axis(axis, x, 3)


def line_marks(with_bands: bool) -> list:
    """The entries of a legend for `line_with_bands`."""
    handles: list = [mark("law’s optimum", color=INK), mark("beyond the runs", color=INK, ls=DASHED)]
    if with_bands:
        handles += [band("90 %, parametric bootstrap", 0.5), band("90 %, cluster bootstrap", 0.22)]
    return handles


# numbers and axes -----------------------------------------------------------------------------------------------------


def flops_label(value: float) -> str:
    """3.2e11 as 3.2 × 10¹¹, in plain text."""
    head, exponent = f"{value:.1e}".split("e")
    digits = str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{digits}" if head == "1.0" else f"{head.removesuffix('.0')}×10{digits}"


def metric_label(metric: str | None) -> str:
    """A metric as an axis says it."""
    return METRICS.get(metric or "", drawable(metric or "loss")[0].replace("$", r"\$"))


def drawable(text: str) -> tuple[str, list[str]]:
    """Text of any script as it can be drawn, and the fonts for it, the first that has a letter drawing it.

    Where no font here has all of them, the letters that the style's own lacks become their codes, such as \\u732b.
    """
    own = FontProperties(family="DejaVu Sans")
    lacking = {letter for letter in text if not letter.isspace() and not _has(findfont(own), {letter})}
    if not lacking:
        return text, [own.get_name()]
    for font in fontManager.ttflist:
        if not font.name.startswith("Last Resort") and _has(font.fname, lacking):  # which has a box for each
            return text, [own.get_name(), font.name]
    coded = (letter.encode("ascii", "backslashreplace").decode() if letter in lacking else letter for letter in text)
    return "".join(coded), [own.get_name()]


def _has(file: str, letters: set[str]) -> bool:
    try:
        font = get_font(file)
    except (OSError, RuntimeError):  # a file that FreeType cannot read
        return False
    return bool(font.scalable) and all(font.get_char_index(ord(letter)) for letter in letters)


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def thinned(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def set_ticks(axis, which: str, places) -> None:
    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_locator(FixedLocator(list(places)))
    target.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    target.set_minor_locator(NullLocator())


def flops_axis(axis, x, most: int = 4) -> None:
    """A log x axis with at most `most` labels over the range of x: at 1, 2 and 5 times powers of ten, or at fewer."""
    axis.set_xscale("log")
    low, high = float(np.min(x)) / 1.01, float(np.max(x)) * 1.01
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    rising = [np.outer(powers[::step], heads).ravel() for step, heads in TICKS]
    inside = [places[(places >= low) & (places <= high)] for places in rising]
    places = next((found for found in inside if len(found) <= most), inside[-1])
    if len(places) < 2:  # a range of less than a factor of two or so
        places = np.array([float(f"{end:.2g}") for end in (np.min(x), np.max(x))])
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(places))))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
    axis.xaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=99))
    axis.xaxis.set_minor_formatter(NullFormatter())


def dimension_axis(axis, values, which: str = "x", limits=None) -> None:
    """A log axis with its ticks at the values that were run, five at most."""
    axis.set(**{f"{which}scale": "log"})
    unique = np.unique(values)
    set_ticks(axis, which, unique[thinned(len(unique), 5)])
    axis.set(**{f"{which}lim": limits or (unique.min() / 1.2, unique.max() * 1.2)})


def loss_axis(axis, y, which: str = "y", pad: float = 1.03) -> None:
    """A log axis with round ticks over the range of y."""
    axis.set(**{f"{which}scale": "log"})
    set_ticks(axis, which, ())
    (axis.xaxis if which == "x" else axis.yaxis).set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set(**{f"{which}lim": (float(np.min(y)) / pad, float(np.max(y)) * pad)})


def dimension_name(dim: str) -> str:
    """A dimension, or an arm of a star, as it is said."""
    return "off the axes" if dim == "corner" else DIMENSIONS.get(dim, dim).split(" (")[0]
