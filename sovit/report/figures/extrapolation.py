"""Figures of a law's misses: residuals and held-out rows."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sovit.law.design_matrix import star
from sovit.report.figures.law import (
    MAX_POINTS,
    MAX_SHAPES,
    _arm_colour,
    _markers,
    _points,
    _shape_name,
    _shape_order,
    _thinned,
    budget_levels,
)
from sovit.report.figures.style import (
    COMPUTE,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PAGE,
    arm_name,
    flops_label,
    legend_row,
    loss_axis,
    number_text,
    panels,
    ramp,
    styled,
)


@styled
def residuals(fit, data) -> Figure:
    """Measured over fitted loss, in per cent of ln: against compute by arm, and by shape; the noise s.d. as a band."""
    dims = fit.model.dims
    residual = 100 * np.log(data.y / fit.predict(data.columns))
    sd = 100 * fit.noise.sd
    if dims:
        _, arms = star(data.columns, dims)
    else:
        arms = np.full(len(data.y), "all")
    names = [a for a in _markers(dims) if (arms == a).any()] if dims else ["all"]
    shapes, order = _shape_order(data, dims, arms)
    num_shapes = len(order)
    order = [order[i] for i in _thinned(num_shapes, MAX_SHAPES)]
    figure, axes = panels(
        1,
        2,
        PAGE,
        max(2.9, 0.9 + 0.135 * len(order)),
        left=0.085,
        right=0.985,
        bottom=0.14,
        top=0.87,
        wspace=0.36,
        width_ratios=(1.2, 1),
    )
    left, right = axes
    compute = data.columns["compute"] if "compute" in data.columns else data.columns["num_examples"]
    left.axhspan(-sd, sd, color="#ececec", lw=0, zorder=0)
    left.axhline(0, color=GREY, lw=0.6, zorder=1)
    for i, name in enumerate(names):
        here = arms == name
        aside = 1.07 ** (i - (len(names) - 1) / 2)  # arms of one budget stand side by side
        left.scatter(
            compute[here] * aside,
            residual[here],
            s=13,
            marker=_markers(dims).get(name, "o"),
            color=_arm_colour(name, dims),
            linewidths=0,
            alpha=0.9,
            zorder=3,
            label=arm_name(name),
            rasterized=len(data.y) > MAX_POINTS,
        )
    left.set_xscale("log")
    left.set_xlabel(COMPUTE if "compute" in data.columns else "images seen")
    left.set_ylabel("ln(measured / fitted) × 100")
    handles = left.get_legend_handles_labels()[0] if len(names) > 1 else []
    handles.append(Patch(color="#e4e4e4", lw=0, label=f"± noise s.d. {sd:.2g} % (from {fit.noise.source})"))
    legend_row(figure, handles, 0.075, ncols=3)
    right.axvspan(-sd, sd, color="#ececec", lw=0, zorder=0)
    right.axvline(0, color=GREY, lw=0.6, zorder=1)
    kind, group, budgets = budget_levels(fit, data)
    colours = ramp(len(budgets))
    place = {shape: i for i, shape in enumerate(order)}
    at = np.array([place.get(s, -1) for s in shapes])
    drawn = at >= 0
    _points(right, residual[drawn], at[drawn], group[drawn], colours, s=11)
    right.set_yticks(range(len(order)), [_shape_name(data, s, dims) for s in order], fontsize=6)
    right.set_ylim(len(order) - 0.4, -0.6)
    right.tick_params(axis="y", length=0)
    some = f"; {len(order)} of {num_shapes:,} shapes" if len(order) < num_shapes else ""
    right.set_xlabel(f"ln(measured / fitted) × 100{some}")
    unit = "training FLOPs" if kind == "train_flops" else "images"
    right.set_title(unit, fontsize=7, pad=15, color=INK)
    for i, g in enumerate(np.unique(np.linspace(0, len(budgets) - 1, min(len(budgets), 5)).round().astype(int))):
        label = flops_label(budgets[g]) if kind == "train_flops" else number_text(budgets[g])
        right.text(0.22 * i, 1.02, label, transform=right.transAxes, fontsize=7, color=colours[g], va="bottom")
    return figure


@styled
def extrapolation(scores, metric="val_loss") -> Figure | None:
    """Predicted against measured loss of the rows above the compute cut, for laws fitted below it; one panel a form.

    scores: list of {label, measured [n], predicted [n], rmse, bias}, the first being the headline. None if empty.
    """
    if not scores:
        return None
    figure, axes = panels(
        1, len(scores), PAGE, 2.3, sharey=True, left=0.075, right=0.985, bottom=0.17, top=0.71, wspace=0.12
    )
    everything = np.concatenate([np.concatenate([s["measured"], s["predicted"]]) for s in scores])
    low, high = everything.min() / 1.04, everything.max() * 1.04
    for i, (axis, score) in enumerate(zip(axes, scores)):
        axis.plot([low, high], [low, high], color=GREY, lw=0.7, zorder=1)
        axis.scatter(
            score["measured"],
            score["predicted"],
            s=13,
            color=OKABE_ITO[0] if not i else GREY,
            linewidths=0,
            alpha=0.85,
            zorder=3,
            rasterized=len(score["measured"]) > MAX_POINTS,
        )
        axis.set_title(score["label"], fontweight="bold" if not i else "normal", pad=21)
        error = f"RMSE {100 * score['rmse']:.2f} %\nbias {100 * score['bias']:+.2f} %".replace("-", "−")
        axis.text(0, 1.02, error, transform=axis.transAxes, fontsize=6.5, va="bottom", linespacing=1.25)
        loss_axis(axis, np.array([low, high]), pad=1.0)
        loss_axis(axis, np.array([low, high]), "x", pad=1.0)
        axis.set_aspect("equal")
        axis.set_xlabel("measured")
    axes[0].set_ylabel("predicted")
    figure.text(
        0.075,
        0.955,
        f"{METRICS.get(metric, metric).capitalize()} of the most expensive runs, predicted by laws fitted to the"
        " cheaper ones",
        fontsize=8,
    )
    return figure
