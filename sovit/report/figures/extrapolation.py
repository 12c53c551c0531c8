"""Figures of a law's misses: residuals and held-out rows."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sovit.law.design_matrix import star
from sovit.report.figures.law_lines import MAX_POINTS, budget_levels, markers, points, thinned
from sovit.report.figures.style import (
    COMPUTE,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    arm_name,
    finish,
    flops_label,
    grid,
    loss_axis,
    number_text,
    ramp,
    styled,
)

MAX_SHAPES = 60  # shapes that get a row of their own
MISS = "ln(measured / fitted) × 100"
NOISE = "#ececec"


@styled
def residuals(fit, data) -> Figure:
    """Measured over fitted loss, in per cent of ln: against compute by arm, and by shape; the noise s.d. as a band."""
    dims = fit.model.dims
    residual, sd = 100 * np.log(data.y / fit.predict(data.columns)), 100 * fit.noise.sd
    arms = star(data.columns, dims)[1] if dims else np.full(len(data.y), "all")
    shapes, order = _shape_order(data, dims, arms)
    kept = [order[i] for i in thinned(len(order), MAX_SHAPES)]
    height = max(2.9, 0.9 + 0.135 * len(kept))
    figure, ((left, right),) = grid(1, 2, height, width_ratios=(1.2, 1))
    left.axhspan(-sd, sd, color=NOISE, lw=0, zorder=0)
    left.axhline(0, color=GREY, lw=0.6, zorder=1)
    handles = _by_arm(left, data, residual, arms, dims)
    handles.append(Patch(color="#e4e4e4", lw=0, label=f"± noise s.d. {sd:.2g} % (from {fit.noise.source})"))
    right.axvspan(-sd, sd, color=NOISE, lw=0, zorder=0)
    right.axvline(0, color=GREY, lw=0.6, zorder=1)
    kind, group, budgets = budget_levels(fit, data)
    colours, place = ramp(len(budgets)), {shape: i for i, shape in enumerate(kept)}
    at = np.array([place.get(s, -1) for s in shapes])
    points(right, residual[at >= 0], at[at >= 0], group[at >= 0], colours, s=11)
    right.set_yticks(range(len(kept)), [_shape_name(data, s, dims) for s in kept], fontsize=6)
    right.set_ylim(len(kept) - 0.4, -0.6)
    right.tick_params(axis="y", length=0)
    right.set_xlabel(MISS + (f"; {len(kept)} of {len(order):,} shapes" if len(kept) < len(order) else ""))
    right.set_title("training FLOPs" if kind == "train_flops" else "images", fontsize=7, pad=15, color=INK)
    for i, g in enumerate(thinned(len(budgets), 5)):
        label = flops_label(budgets[g]) if kind == "train_flops" else number_text(budgets[g])
        right.text(0.22 * i, 1.02, label, transform=right.transAxes, fontsize=7, color=colours[g], va="bottom")
    return finish(figure, handles, ncols=4)


def _by_arm(axis, data, residual, arms, dims) -> list:
    """Residuals against compute in the colour and marker of their arm; returns the entries of the legend."""
    kind = "compute" if "compute" in data.columns else "num_examples"
    known = markers(dims) if dims else {"all": "o"}
    names = [arm for arm in known if (arms == arm).any()]
    colours = dict(zip(dims, OKABE_ITO)) | {"centre": INK, "corner": GREY, "all": OKABE_ITO[0]}
    for i, name in enumerate(names):
        mine = arms == name
        aside = 1.07 ** (i - (len(names) - 1) / 2)  # arms of one budget stand side by side
        look = dict(marker=known[name], color=colours[name], alpha=0.9, rasterized=len(data.y) > MAX_POINTS)
        axis.scatter(
            data.columns[kind][mine] * aside, residual[mine], s=13, zorder=3, lw=0, label=arm_name(name), **look
        )
    axis.set_xscale("log")
    axis.set_xlabel(COMPUTE if kind == "compute" else "images seen")
    axis.set_ylabel(MISS)
    return axis.get_legend_handles_labels()[0] if len(names) > 1 else []


def _shape_order(data, dims, arms) -> tuple[list, list]:
    """Each row's shape, and the distinct shapes ordered by arm and then by value."""
    shapes = data.shapes() if dims else [(int(n),) for n in data.columns["num_params"]]
    rank = {name: i for i, name in enumerate(markers(dims))}
    first: dict = {}
    for shape, arm in zip(shapes, arms):
        first.setdefault(shape, (rank.get(str(arm), 0), shape))
    return shapes, sorted(first, key=lambda shape: first[shape])


def _shape_name(data, shape: tuple, dims) -> str:
    if not dims:
        return f"{shape[0]:,}"
    names = [n for n in ("width", "depth", "mlp_dim", "patch_size", "image_size") if n in data.columns]
    return " × ".join(number_text(v) for n, v in zip(names, shape) if n in dims)


@styled
def extrapolation(scores, metric="val_loss") -> Figure | None:
    """Predicted against measured loss of the rows above the compute cut, for laws fitted below it; one panel a form.

    scores: list of {label, measured [n], predicted [n], rmse, bias}, the first being the headline. None if empty.
    """
    if not scores:
        return None
    figure, ((*axes,),) = grid(1, len(scores), 2.3, sharey=True)
    everything = np.concatenate([np.concatenate([s["measured"], s["predicted"]]) for s in scores])
    low, high = everything.min() / 1.04, everything.max() * 1.04
    for i, (axis, score) in enumerate(zip(axes, scores)):
        axis.plot([low, high], [low, high], color=GREY, lw=0.7, zorder=1)
        look = dict(color=GREY if i else OKABE_ITO[0], alpha=0.85, rasterized=len(score["measured"]) > MAX_POINTS)
        axis.scatter(score["measured"], score["predicted"], s=13, lw=0, zorder=3, **look)
        axis.set_title(score["label"], fontweight="normal" if i else "bold", pad=21)
        error = f"RMSE {100 * score['rmse']:.2f} %\nbias {100 * score['bias']:+.2f} %".replace("-", "−")
        axis.text(0, 1.02, error, transform=axis.transAxes, fontsize=6.5, va="bottom", linespacing=1.25)
        for which in ("x", "y"):
            loss_axis(axis, np.array([low, high]), which, pad=1.0)
        axis.set_aspect("equal")
        axis.set_xlabel("measured")
    axes[0].set_ylabel("predicted")
    what = METRICS.get(metric, metric).capitalize()
    title = f"{what} of the most expensive runs, predicted by laws fitted to the cheaper ones"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    return figure
