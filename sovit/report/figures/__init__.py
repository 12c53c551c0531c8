"""Figures: matplotlib, and nothing else, lives here. Numbers in, a PNG and an SVG out, byte-identical on a rerun."""

from sovit.report.figures.checks import extrapolation, residuals, sensitivity
from sovit.report.figures.law import budget_levels, fit_by_dimension, frontier, isoflop, optimal_shape
from sovit.report.figures.study import contact_sheet, validation
from sovit.report.figures.style import save

__all__ = [
    "budget_levels",
    "contact_sheet",
    "extrapolation",
    "fit_by_dimension",
    "frontier",
    "isoflop",
    "optimal_shape",
    "residuals",
    "save",
    "sensitivity",
    "validation",
]
