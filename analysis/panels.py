"""Panels and legends that the figures of the analyses share, laid out by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sovit.report.figures.style import PAGE

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
