"""Panels, legends and axes that the figures of the analyses share, laid out by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sovit.predict.paired_test import student_t
from sovit.report.figures.style import PAGE, flops_label, loss_axis

DASHED = (0, (3, 1.5))
LINE = 125  # letters of a legend that fit on a page, about


def grid(rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    """Make a page-wide figure of rows x columns panels, `height` inches high. Returns it and its axes [rows, columns]."""
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def mark(label: str, **style) -> Line2D:
    """An entry of a legend that is drawn as a line or a marker."""
    return Line2D([], [], label=label, **style)


def finish(figure: Figure, handles: Sequence, x: str = "", y: str = "") -> Figure:
    """Put the legend above the panels, and the labels that they share around them."""
    letters = sum(len(handle.get_label()) + 6 for handle in handles)
    columns = -(-len(handles) // -(-letters // LINE))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.0, handlelength=1.6)
    if x:
        figure.supxlabel(x, fontsize=8)
    if y:
        figure.supylabel(y, fontsize=8)
    return figure


def half_interval(sd: np.ndarray, n: int) -> np.ndarray:
    """Half the 90 % interval of a mean of n values, from their s.d. [k]; 0 for one value."""
    return student_t(n - 1) * np.asarray(sd, float) / np.sqrt(n) if n > 1 else np.zeros_like(sd, dtype=float)


def flops_and_loss(axis: Axes, losses: Sequence[np.ndarray]) -> None:
    """A log axis of FLOPs with three ticks over what was drawn, and one of loss over the given values."""
    axis.set_xscale("log")
    low, high = axis.dataLim.intervalx
    axis.xaxis.set_major_locator(FixedLocator(sorted({float(f"{x:.2g}") for x in np.geomspace(low, high, 3)})))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    if losses:
        loss_axis(axis, np.concatenate(losses))
