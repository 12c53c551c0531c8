"""Figures: matplotlib, and nothing else, lives here. Numbers in, a PNG and an SVG out, byte-identical on a rerun."""

from sovit.plot.active import active, scalebench
from sovit.plot.coverage import coverage
from sovit.plot.distance import extrapolation_distance
from sovit.plot.frontier import frontier
from sovit.plot.hardware import pareto_fronts
from sovit.plot.law import (
    budget_levels,
    extrapolation,
    fit_by_dimension,
    isoflop,
    optimal_path,
    optimal_shape,
    residuals,
)
from sovit.plot.savings import savings_bars
from sovit.plot.sensitivity import sensitivity
from sovit.plot.study import contact_sheet, learning_rates, validation, validation_figure
from sovit.plot.style import save
from sovit.plot.trade import trade
from sovit.plot.transfer import flexi_cost, transfer_figures
from sovit.plot.vlm import vlm_vs_encoder

__all__ = [
    "active",
    "budget_levels",
    "contact_sheet",
    "coverage",
    "extrapolation",
    "extrapolation_distance",
    "fit_by_dimension",
    "flexi_cost",
    "frontier",
    "isoflop",
    "learning_rates",
    "optimal_path",
    "optimal_shape",
    "pareto_fronts",
    "residuals",
    "save",
    "savings_bars",
    "scalebench",
    "sensitivity",
    "trade",
    "transfer_figures",
    "validation",
    "validation_figure",
    "vlm_vs_encoder",
]
