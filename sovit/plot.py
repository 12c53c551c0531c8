"""Figures: matplotlib, and nothing else, lives here. Numbers in, a PNG and an SVG out, byte-identical on a rerun.

Sizes are those of a printed column (3.4 in) or page (7 in) at 8 points. Colours: budgets run through a perceptually
even ramp, categories take the Okabe-Ito palette; both survive colour blindness and grey printing. Every compute axis
says which compute it is.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sovit import UserError
from sovit.allocate import Geometry, optimum
from sovit.bootstrap import interval
from sovit.diagnose import box, optimum_of
from sovit.measurements import WHOLE_SHAPE, levels
from sovit.rows import star

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
CHUNK = 4000  # optima solved at once
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


# laws -----------------------------------------------------------------------------------------------------------------


@styled
def fit_by_dimension(fit, data) -> Figure | None:
    """One panel a dimension: measured losses of its arm against it, the law at each budget, the optimum marked.

    Along a curve the other dimensions stay at the centre of the design and the budget is spent exactly, on as many
    images as it pays for; where the runs stand on no common FLOPs, a curve is a number of images instead. None where the
    design is no star (an isoFLOP line has no shape that differs in one dimension alone).
    """
    dims = fit.model["dims"]
    _, arms = star(data.columns, dims)
    if not all(dim in arms for dim in dims):
        return None
    kind, group, budgets = budget_levels(fit, data)
    colours = ramp(len(budgets))
    shown = set(np.linspace(0, len(budgets) - 1, min(len(budgets), 7)).round().astype(int).tolist())
    figure, axes = _panels(
        1, len(dims), PAGE, 2.6, sharey=True, right=0.895, left=0.075, bottom=0.17, top=0.88, wspace=0.08
    )
    measured = data.columns
    lows = [data.y.min()]
    for axis, dim in zip(axes, dims):
        mine = (arms == dim) | (arms == "centre")
        values = measured[dim][mine].astype(float)
        for g in range(len(budgets)):
            here = mine & (group == g)
            axis.scatter(measured[dim][here], data.y[here], s=11, color=colours[g], linewidths=0, zorder=3, alpha=0.9)
            if g not in shown:
                continue
            x = np.geomspace(values.min() / 1.12, values.max() * 1.12, 201)
            loss = _along(fit, dim, x, kind, budgets[g])
            axis.plot(x, loss, color=colours[g], zorder=2)
            lowest = int(np.nanargmin(loss))
            lows.append(loss[lowest])
            if 0 < lowest < len(x) - 1:
                axis.plot(
                    x[lowest], loss[lowest], marker="D", ms=4.2, mfc="white", mec=colours[g], mew=1.1, ls="", zorder=4
                )
            if dim == dims[-1]:
                label = _flops(budgets[g]) if kind == "train_flops" else f"{budgets[g]:,.0f}"
                _label(axis, 1.03, loss[-1], label, colours[g])
        _dimension_axis(axis, values)
        axis.set_xlabel(DIMENSIONS[dim])
    axes[0].set_ylabel(METRICS.get(data.metric, data.metric))
    _loss_axis(axes[0], np.array([min(lows), data.y.max()]))
    _spread_labels(axes[-1])
    header = "training FLOPs\n(3 × forward × images)" if kind == "train_flops" else "images seen"
    axes[-1].text(1.0, 1.03, header, transform=axes[-1].transAxes, fontsize=7, va="bottom", ha="center")
    handles = [
        Line2D([], [], ls="", marker="o", ms=3.5, color=GREY, label="run"),
        Line2D([], [], color=GREY, label=f"law “{fit.form}”"),
        Line2D(
            [],
            [],
            ls="",
            marker="D",
            ms=4.2,
            mfc="white",
            mec=GREY,
            label="its minimum, other dimensions at the centre",
        ),
    ]
    _legend_row(figure, handles, 0.065)
    return figure


@styled
def isoflop(fit, data) -> Figure | None:
    """Loss against model size at equal training FLOPs. Curves: shapes on the law's own optimal path; dots: its valley.

    Size is forward FLOPs of one image. None where the runs stand on no common FLOPs, the law cannot rank shapes, or its
    optimum is nowhere near the sizes run.
    """
    kind, group, budgets = budget_levels(fit, data)
    if kind != "train_flops" or fit.geometry is None or fit.form not in WHOLE_SHAPE:
        return None
    dims, geometry = fit.model["dims"], Geometry(**fit.geometry)
    _, arms = star(data.columns, dims)
    colours = ramp(len(budgets))
    size = data.columns["forward_flops"].astype(float)
    low, high = np.log(fit.data["compute_range"])
    path = np.exp(optimal_path(fit, np.linspace(low - 9, high + 9, 161), fit.theta[None])[:, 0])  # [T, K]
    table = dict(zip(dims, path.T))
    path_size = geometry.flops(table, head=False)
    with_head = geometry.flops(table, head=True)
    keep = (path_size > size.min() / 1.5) & (path_size < size.max() * 1.5)
    if not keep.any():
        return None
    figure, (axis,) = _panels(1, 1, COLUMN + 0.6, 3.2, left=0.125, right=0.86, bottom=0.13, top=0.84)
    valley = []
    for g, budget in enumerate(budgets):
        images = budget / 3 / with_head
        loss = fit.predict(table | dict(num_examples=images))
        axis.plot(path_size[keep], loss[keep], color=colours[g], zorder=2)
        _label(axis, 1.02, loss[keep][-1], _flops(budget), colours[g])
        best = int(loss.argmin())
        valley.append((path_size[best], loss[best]))
        for arm, marker in _markers(dims).items():
            here = (group == g) & (arms == arm)
            axis.scatter(
                size[here], data.y[here], s=13, marker=marker, color=colours[g], linewidths=0, zorder=3, alpha=0.85
            )
    axis.plot(*np.array(valley).T, color=INK, lw=0.9, ls=(0, (3, 2)), marker="D", ms=4, mfc="white", mec=INK, zorder=4)
    axis.set_xscale("log")
    if np.ptp(np.log10(axis.get_xlim())) < 1.5:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _flops(value)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("model size: forward FLOPs of one image")
    axis.set_ylabel(METRICS.get(data.metric, data.metric))
    _loss_axis(axis, np.array([data.y.min(), *np.array(valley)[:, 1], data.y.max()]))
    _spread_labels(axis)
    handles = [
        Line2D([], [], ls="", marker=m, ms=4, color=GREY, label=_arm_name(a))
        for a, m in _markers(dims).items()
        if (arms == a).any()
    ]
    handles.append(
        Line2D([], [], color=INK, lw=0.9, ls=(0, (3, 2)), marker="D", ms=4, mfc="white", label="law’s optimum")
    )
    _legend_row(figure, handles, 0.1, ncols=3)
    axis.text(
        1.02,
        1.03,
        "training FLOPs\n(3 × forward\n× images)",
        transform=axis.transAxes,
        fontsize=7,
        va="bottom",
        ha="center",
    )
    return figure


@styled
def optimal_shape(fit, recommendation=None) -> Figure | None:
    """Optimal value of each dimension against compute with both bands; dashed beyond the runs, values run shaded.

    recommendation: a `predict.Recommendation` to mark, or None. None where the law does not say what a shape costs.
    """
    if not fit.exponents or "num_params" in fit.exponents:
        return None
    dims, grid = fit.model["dims"], fit.data["grid"]
    low, high = np.log(fit.data["compute_range"])
    far = high + np.log(10)
    if recommendation is not None:
        target = np.log(float(recommendation.forward_flops) * recommendation.num_examples)
        far = max(far, target + 0.3)
    ln_compute = np.unique(np.concatenate([np.linspace(low, high, 13), np.linspace(high, far, 7)]))
    compute = np.exp(ln_compute)
    inside = ln_compute <= high + 1e-9
    line = np.exp(optimal_path(fit, ln_compute, fit.theta[None])[:, 0])  # [T, K]
    bands = {}
    for kind, draws in fit.draws.items():
        widen = fit.diagnostics["draws"]["t_over_z"] if kind == "random_effects" else 1.0
        many = np.exp(optimal_path(fit, ln_compute, np.array(draws)))  # [T, R, K]
        bands[kind] = np.array([[interval(at[:, k], widen) for k in range(len(dims))] for at in many])  # [T, K, 2]
    figure, axes = _panels(1, len(dims), PAGE, 2.85, left=0.05, right=0.985, bottom=0.165, top=0.76, wspace=0.17)
    for k, (axis, dim) in enumerate(zip(axes, dims)):
        colour = OKABE_ITO[k]
        values = np.array(grid[dim])
        axis.axhspan(values.min(), values.max(), color="#f3f3f3", lw=0, zorder=0)
        for value in values:
            axis.axhline(value, color="white", lw=0.8, zorder=0.5)
        for kind, alpha in (("pairs", 0.16), ("random_effects", 0.32)):
            if kind in bands:
                axis.fill_between(
                    compute, bands[kind][:, k, 0], bands[kind][:, k, 1], color=colour, alpha=alpha, lw=0, zorder=1
                )
        axis.plot(compute[inside], line[inside, k], color=colour, zorder=3)
        beyond = ln_compute >= high - 1e-9
        axis.plot(compute[beyond], line[beyond, k], color=colour, ls=(0, (3, 1.5)), zorder=3)
        axis.axvline(np.exp(high), color=GREY, lw=0.6, ls=":", zorder=2)
        if recommendation is not None:
            axis.plot(
                np.exp(target),
                recommendation.shape[dim],
                marker="*",
                ms=8,
                color=INK,
                mec="white",
                mew=0.5,
                ls="",
                zorder=5,
            )
        axis.set_xscale("log")
        bottom = min(values.min(), line[:, k].min()) / 1.25
        top = max(values.max(), line[:, k].max()) * 1.25
        _dimension_axis(axis, values, "y", (max(bottom, values.min() / 6), min(top, values.max() * 6)))
        axis.set_xlim(compute[0] / 1.1, compute[-1] * 1.1)
        axis.set_title(_exponent_title(fit.exponents[dim], dim), linespacing=1.35)
    figure.supxlabel(COMPUTE, fontsize=8, y=0.015)
    handles: list[Artist] = [
        Line2D([], [], color=GREY, label="law’s optimum"),
        Line2D([], [], color=GREY, ls=(0, (3, 1.5)), label="beyond the runs"),
    ]
    if bands:
        handles += [
            Patch(color=GREY, alpha=0.5, lw=0, label="90 %, headline"),
            Patch(color=GREY, alpha=0.22, lw=0, label="90 %, pairs of trunks"),
        ]
    handles.append(Patch(facecolor="#f3f3f3", edgecolor=PALE, lw=0.5, label="values run"))
    if recommendation is not None:
        label = f"recommended at {_flops(recommendation.train_flops)} training FLOPs"
        handles.append(Line2D([], [], ls="", marker="*", ms=7, color=INK, label=label))
    _legend_row(figure, handles, 0.04, ncols=3)
    return figure


@styled
def residuals(fit, data) -> Figure:
    """Measured over fitted loss, in per cent of ln: against compute by arm, and by shape; the noise s.d. as a band."""
    dims = fit.model["dims"]
    residual = 100 * np.log(data.y / fit.predict(data.columns))
    sd = 100 * fit.noise["sd"]
    if dims:
        _, arms = star(data.columns, dims)
    else:
        arms = np.full(len(data.y), "all")
    names = [a for a in _markers(dims) if (arms == a).any()] if dims else ["all"]
    shapes, order = _shape_order(data, dims, arms)
    figure, axes = _panels(
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
            label=_arm_name(name),
        )
    left.set_xscale("log")
    left.set_xlabel(COMPUTE if "compute" in data.columns else "images seen")
    left.set_ylabel("ln(measured / fitted) × 100")
    handles = left.get_legend_handles_labels()[0] if len(names) > 1 else []
    handles.append(Patch(color="#e4e4e4", lw=0, label=f"± noise s.d. {sd:.2g} % (from {fit.noise['source']})"))
    _legend_row(figure, handles, 0.075, ncols=3)
    right.axvspan(-sd, sd, color="#ececec", lw=0, zorder=0)
    right.axvline(0, color=GREY, lw=0.6, zorder=1)
    kind, group, budgets = budget_levels(fit, data)
    colours = ramp(len(budgets))
    place = {shape: i for i, shape in enumerate(order)}
    at = np.array([place[s] for s in shapes])
    for g in range(len(budgets)):
        here = group == g
        right.scatter(residual[here], at[here], s=11, color=colours[g], linewidths=0, zorder=3)
    right.set_yticks(range(len(order)), [_shape_name(data, s, dims) for s in order], fontsize=6)
    right.set_ylim(len(order) - 0.4, -0.6)
    right.tick_params(axis="y", length=0)
    right.set_xlabel("ln(measured / fitted) × 100")
    unit = "training FLOPs" if kind == "train_flops" else "images"
    right.set_title(unit, fontsize=7, pad=15, color=INK)
    for i, g in enumerate(np.unique(np.linspace(0, len(budgets) - 1, min(len(budgets), 5)).round().astype(int))):
        label = _flops(budgets[g]) if kind == "train_flops" else _number(budgets[g])
        right.text(0.22 * i, 1.02, label, transform=right.transAxes, fontsize=7, color=colours[g], va="bottom")
    return figure


@styled
def extrapolation(scores, metric="val_loss") -> Figure | None:
    """Predicted against measured loss of the rows above the compute cut, for laws fitted below it; one panel a form.

    scores: list of {label, measured [n], predicted [n], rmse, bias}, the first being the headline. None if empty.
    """
    if not scores:
        return None
    figure, axes = _panels(
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
        )
        axis.set_title(score["label"], fontweight="bold" if not i else "normal", pad=21)
        error = f"RMSE {100 * score['rmse']:.2f} %\nbias {100 * score['bias']:+.2f} %".replace("-", "−")
        axis.text(0, 1.02, error, transform=axis.transAxes, fontsize=6.5, va="bottom", linespacing=1.25)
        _loss_axis(axis, np.array([low, high]), pad=1.0)
        _loss_axis(axis, np.array([low, high]), "x", pad=1.0)
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


# other figures --------------------------------------------------------------------------------------------------------


@styled
def learning_rates(rule: dict) -> Figure:
    """Loss against learning rate, one panel a shape, one curve a budget; each best rate, and the rate of the rule.

    rule: what `analysis/recipe_rule.py` writes: cases [{shape, train_flops, rates, losses, best_rate, best_loss, edge,
    rule_rate}].
    """
    shapes = list(dict.fromkeys(case["shape"] for case in rule["cases"]))
    budgets = sorted({case["train_flops"] for case in rule["cases"]})
    colours = dict(zip(budgets, ramp(len(budgets))))
    columns = min(4, len(shapes))
    rows = -(-len(shapes) // columns)
    height = 0.75 + 1.55 * rows
    figure, axes = _panels(
        rows,
        columns,
        PAGE,
        height,
        left=0.07,
        right=0.985,
        bottom=0.42 / height,
        top=1 - 0.55 / height,
        wspace=0.3,
        hspace=0.5,
    )
    every = sorted({rate for case in rule["cases"] for rate in case["rates"]})
    for axis, shape in zip(axes, shapes):
        mine = [case for case in rule["cases"] if case["shape"] == shape]
        for case in mine:
            colour = colours[case["train_flops"]]
            axis.plot(case["rates"], case["losses"], color=colour, marker="o", ms=3, lw=0.9)
            if case["best_rate"] is not None:
                axis.plot(
                    case["best_rate"],
                    case["best_loss"],
                    marker="D",
                    ms=4.5,
                    mec=colour,
                    mew=1.1,
                    ls="",
                    zorder=4,
                    mfc=PALE if case["edge"] else "white",
                )
        if mine[-1]["rule_rate"]:
            axis.axvline(mine[-1]["rule_rate"], color=OKABE_ITO[1], lw=0.9, ls=(0, (3, 1.5)), zorder=1)
        _dimension_axis(axis, np.array(every), limits=(every[0] / 1.3, every[-1] * 1.3))
        _loss_axis(axis, np.concatenate([case["losses"] for case in mine]))
        axis.set_title(shape)
    for axis in axes[len(shapes) :]:
        axis.set_visible(False)
    figure.supxlabel("peak learning rate (panels: width × depth × MLP dim)", fontsize=8, y=0.015)
    figure.supylabel(METRICS.get(rule["metric"], rule["metric"]), fontsize=8, x=0.005)
    handles = [
        Line2D([], [], color=c, marker="o", ms=3, lw=0.9, label=f"{_flops(b)} training FLOPs")
        for b, c in colours.items()
    ]
    handles += [
        Line2D([], [], ls="", marker="D", ms=4.5, mfc="white", mec=GREY, label="best rate (parabola)"),
        Line2D([], [], color=OKABE_ITO[1], lw=0.9, ls=(0, (3, 1.5)), label="rule"),
    ]
    if any(case["edge"] for case in rule["cases"]):
        handles.append(Line2D([], [], ls="", marker="D", ms=4.5, mfc=PALE, mec=GREY, label="best at the edge"))
    _legend_row(figure, handles, 0.06)
    return figure


@styled
def validation(result: dict) -> Figure:
    """Paired seeds of both arms, joined by seed, predictions as bars beside them; the mean difference and its interval.

    result: as `sovit.validate.verdict` makes it. arms {name: {label, losses [S], predicted, predicted_low,
    predicted_high}} (seed s of both is paired; ends of a prediction may lack), difference {mean, low, high} of ln loss,
    first arm less second, predicted_difference {estimate, low, high} (ends may be None), train_flops, verdict.
    """
    names, arms = list(result["arms"]), list(result["arms"].values())
    figure, (left, right) = _panels(
        1, 2, COLUMN + 1.2, 2.7, left=0.125, right=0.97, bottom=0.165, top=0.83, wspace=0.5, width_ratios=(1.7, 1)
    )
    losses = np.array([arm["losses"] for arm in arms], float)  # [arm, seed]
    for seed in range(losses.shape[1]):
        left.plot(range(len(arms)), losses[:, seed], color=PALE, lw=1.0, zorder=1)
    for i, arm in enumerate(arms):
        left.scatter(np.full(losses.shape[1], i), losses[i], s=16, color=OKABE_ITO[i], linewidths=0, zorder=3)
        left.plot([i - 0.16, i + 0.16], [losses[i].mean()] * 2, color=OKABE_ITO[i], lw=1.6, zorder=2)
        if arm.get("predicted") is not None:
            if arm.get("predicted_low") is not None:
                left.plot([i + 0.27] * 2, [arm["predicted_low"], arm["predicted_high"]], color=GREY, lw=1.2, zorder=2)
            left.plot(i + 0.27, arm["predicted"], marker="_", ms=8, mew=1.5, color=INK, ls="", zorder=3)
    left.set_xlim(-0.45, len(arms) - 0.4)
    left.set_xticks(range(len(arms)), [f"{name}\n{arm['label']}" for name, arm in zip(names, arms)])
    left.tick_params(axis="x", length=0)
    left.set_ylabel(METRICS.get(result.get("metric", "val_loss"), result.get("metric")))
    left.set_title(f"{losses.shape[1]} seeds an arm, {_flops(result['train_flops'])} training FLOPs", fontsize=7)
    difference = result["difference"]
    paired = 100 * (np.log(losses[0]) - np.log(losses[1]))
    right.scatter(paired, np.linspace(0.62, 0.88, len(paired)), s=12, color=GREY, linewidths=0)
    right.plot([100 * difference["low"], 100 * difference["high"]], [0.38] * 2, color=INK, lw=1.4)
    right.plot(100 * difference["mean"], 0.38, marker="o", ms=4.5, color=INK)
    rows = {0.75: "by\nseed", 0.38: "mean,\n90 %"}
    said = result["predicted_difference"]
    if said["low"] is not None:
        right.plot([100 * said["low"], 100 * said["high"]], [0.13] * 2, color=GREY, lw=1.2)
    right.plot(100 * said["estimate"], 0.13, marker="|", ms=9, mew=1.5, color=INK)
    rows[0.13] = "predicted"
    right.axvline(0, color=GREY, lw=0.7, ls=":")
    right.set_ylim(0, 1)
    right.set_yticks(list(rows), list(rows.values()))
    right.tick_params(axis="y", length=0)
    right.spines["left"].set_visible(False)
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.set_xlabel("difference in ln loss × 100", fontsize=7)
    right.set_title(f"{names[0]}: {result['verdict']}", fontsize=7)
    handles = [
        Line2D([], [], color=GREY, lw=1.2, marker="_", ms=8, mew=1.5, mec=INK, label="predicted beforehand, with 90 %"),
        Line2D([], [], color=PALE, lw=1.0, label="one seed"),
    ]
    _legend_row(figure, handles, 0.1)
    return figure


def validation_figure(result: dict, path: Path | str) -> list[str]:
    """Draw `validation` and write it at `path` as `save` does."""
    return save(validation(result), path)


@styled
def contact_sheet(images, captions, path: Path | str, *, title: str = "", columns: int = 6) -> None:
    """Images [B, H, W, 3] in 0..1, each with its caption below, as one PNG at `path`; pixels stay sharp squares."""
    images = np.clip(np.asarray(images, float), 0, 1)
    if images.ndim != 4 or images.shape[3] != 3 or len(images) != len(captions) or not len(images):
        raise UserError(
            f"a contact sheet needs images [B, H, W, 3] and B captions, got {images.shape} and {len(captions)}"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell = PAGE / columns
    fits = max(8, round(cell * 15))  # characters a line
    wrapped = ["\n".join(w for line in c.splitlines() for w in textwrap.wrap(line, fits))[: 6 * fits] for c in captions]
    text = 0.13 * max((w.count("\n") + 1 if w else 0 for w in wrapped), default=0) + 0.08
    height = rows * (cell * 0.94 + text) + 0.3
    figure = Figure(figsize=(PAGE, height))
    for i, (image, caption) in enumerate(zip(images, wrapped)):
        x, y = (i % columns) * cell + 0.03 * cell, height - 0.26 - (i // columns) * (cell * 0.94 + text) - cell * 0.94
        axis = figure.add_axes((x / PAGE, y / height, 0.94 * cell / PAGE, 0.94 * cell / height))
        axis.imshow(image, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(visible=True, color=PALE)
        axis.text(0, -0.03, caption, transform=axis.transAxes, fontsize=6, va="top")
    figure.text(0.03 * cell / PAGE, 1 - 0.06 / height, title, fontsize=8, va="top")
    _write(figure, Path(path), {"Software": None} if Path(path).suffix != ".svg" else {"Date": None, "Creator": None})


# what the figures share -----------------------------------------------------------------------------------------------


def budget_levels(fit, data) -> tuple[str, np.ndarray, np.ndarray]:
    """(column, group [n], budgets [G]): the column on whose levels the runs stand, training FLOPs where they do."""
    found = {}
    for name in ("train_flops", "num_examples"):
        if name in data.columns and (name != "train_flops" or fit.geometry is not None or not fit.model["dims"]):
            found[name] = levels(data.columns[name])
    # runs of equal FLOPs have few levels of it; runs of equal images have few levels of those
    name = min(found, key=lambda n: (len(found[n][1]), n != "train_flops"))
    return name, *found[name]


def optimal_path(fit, ln_compute: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """ln of the optimal dimensions at each ln compute [T] (head apart), for each theta [R, P]: [T, R, K]."""
    geometry = Geometry(**(fit.geometry or {}))  # the closed form below needs none
    form, centre, grid = fit.shape_form, np.array(fit.model["centres"]), fit.data["grid"]
    if fit.form not in WHOLE_SHAPE:  # closed form, one compute at a time
        return np.array([optimum_of(form, centre, theta, geometry, grid, t) for t in ln_compute])
    tiled, budget = np.tile(theta, (len(ln_compute), 1)), np.repeat(ln_compute, len(theta))
    flat = [
        optimum(form.split(tiled[i : i + CHUNK]), centre, tuple(grid), geometry, budget[i : i + CHUNK], *box(grid))
        for i in range(0, len(tiled), CHUNK)
    ]
    return np.concatenate(flat).reshape(len(ln_compute), len(theta), -1)


def _along(fit, dim: str, x: np.ndarray, kind: str, budget: float) -> np.ndarray:
    """The law's loss with `dim` at x [n] and the rest at the centre, at one budget of FLOPs or of images."""
    table = {d: np.full(len(x), fit.data["centre"][d]) for d in fit.model["dims"]} | {dim: x}
    if fit.geometry is None:
        return fit.predict(table | dict(num_examples=np.full(len(x), budget)))
    geometry = Geometry(**fit.geometry)
    images = budget / 3 / geometry.flops(table, head=True) if kind == "train_flops" else np.full(len(x), budget)
    return fit.predict(table | dict(num_examples=images, compute=geometry.flops(table, head=False) * images))


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


def _panels(rows: int, columns: int, width: float, height: float, sharey=False, width_ratios=None, **margins):
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(rows, columns, width_ratios=width_ratios, **margins)
    axes = grid.subplots(sharey=sharey, squeeze=False).ravel()
    return figure, axes


def _flops(value: float) -> str:
    """3.2e11 as 3.2 × 10¹¹, in plain text."""
    exponent = int(np.floor(np.log10(value)))
    head = f"{value / 10.0**exponent:.2g}"
    if head == "10":
        head, exponent = "1", exponent + 1
    digits = str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return f"10{digits}" if head == "1" else f"{head}×10{digits}"


def _legend_row(figure, handles, left: float, ncols: int | None = None) -> None:
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


def _label(axis, x: float, y: float, text: str, colour) -> None:
    """A direct label at the right of a curve; x in axes units, y in data."""
    label = axis.text(x, y, text, color=colour, fontsize=7, va="center", transform=axis.get_yaxis_transform())
    label.set_gid("direct")


def _spread_labels(axis, gap: float = 0.055) -> None:
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


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _ticks(axis, which: str, places) -> None:
    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_locator(FixedLocator(list(places)))
    target.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    target.set_minor_locator(NullLocator())


def _dimension_axis(axis, values, which: str = "x", limits=None) -> None:
    """A log axis with its ticks at the values that were run, thinned where they would touch."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    unique = np.unique(values)
    low, high = limits or (unique.min() / 1.2, unique.max() * 1.2)
    spot = axis.get_position()
    inches = spot.width * axis.figure.get_figwidth() if which == "x" else spot.height * axis.figure.get_figheight()
    shown = [unique[0]]
    for value in unique[1:]:
        gap = np.log(value / shown[-1]) / np.log(high / low) * inches
        letters = (len(_number(value)) + len(_number(shown[-1]))) / 2
        if gap > (0.06 * letters + 0.06 if which == "x" else 0.13):
            shown.append(value)
    _ticks(axis, which, shown)
    (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)


def _loss_axis(axis, y, which: str = "y", pad: float = 1.03) -> None:
    """A log axis with four to eight round ticks over the range of y."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    low, high = float(np.min(y)) / pad, float(np.max(y)) * pad
    for step in (10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001):
        ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
        if len(ticks) >= 4:
            break
    _ticks(axis, which, ticks[ticks > 0])
    (axis.set_xlim if which == "x" else axis.set_ylim)(low, high)


def _markers(dims) -> dict[str, str]:
    return dict(zip(("centre", *dims, "corner"), ("o", *"^sv<>"[: len(dims)], "P")))


def _arm_colour(name: str, dims) -> str:
    """Arms in the colours of `optimal_shape`, centre and corners in black and grey."""
    if name in dims:
        return OKABE_ITO[list(dims).index(name)]
    return {"centre": INK, "corner": GREY}.get(name, OKABE_ITO[0])


def _arm_name(arm: str) -> str:
    names = {"corner": "off the axes", "mlp_dim": "MLP dim", "patch_size": "patch size", "image_size": "image size"}
    return names.get(arm, arm)


def _shape_order(data, dims, arms) -> tuple[list, list]:
    """Each row's shape, and the distinct shapes ordered by arm and then by value."""
    shapes = data.shapes() if dims else [(int(n),) for n in data.columns["num_params"]]
    rank = {name: i for i, name in enumerate(_markers(dims))}
    first: dict = {}
    for shape, arm in zip(shapes, arms):
        first.setdefault(shape, (rank.get(str(arm), 0), shape))
    return shapes, sorted(first, key=lambda shape: first[shape])


def _shape_name(data, shape: tuple, dims) -> str:
    if not dims:
        return f"{shape[0]:,}"
    names = [n for n in ("width", "depth", "mlp_dim", "patch_size", "image_size") if n in data.columns]
    return " × ".join(_number(v) for n, v in zip(names, shape) if n in dims)


def _exponent_title(exponent: dict, dim: str) -> str:
    name = _arm_name(dim)
    if exponent["status"] == "unidentified":
        return f"{name}: unidentified\n(the runs do not fix its exponent)"
    text = f"{name} $\\propto$ t$^{{\\,{exponent['estimate']:.3f}}}$"
    if exponent["low"] is not None:
        text += f"\n90 %: {exponent['low']:.3f} to {exponent['high']:.3f}"
    return text + ("; edge" if exponent["status"] == "edge" else "")
