"""Figures: matplotlib, and nothing else, lives here. Numbers in, a PNG and an SVG out, byte-identical on a rerun."""

from sovit.report.figures.extrapolation import extrapolation, residuals
from sovit.report.figures.frontier import frontier
from sovit.report.figures.law import fit_by_dimension, isoflop, optimal_shape
from sovit.report.figures.law_lines import budget_levels, optimal_path
from sovit.report.figures.sensitivity import sensitivity
from sovit.report.figures.study import contact_sheet, learning_rates, validation
from sovit.report.figures.style import save

__all__ = [
    "budget_levels",
    "contact_sheet",
    "extrapolation",
    "fit_by_dimension",
    "frontier",
    "isoflop",
    "learning_rates",
    "optimal_path",
    "optimal_shape",
    "residuals",
    "save",
    "sensitivity",
    "validation",
]
