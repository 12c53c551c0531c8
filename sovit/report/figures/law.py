"""The figures of one fitted law. Every compute axis says which compute it is."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sovit.law.bootstrap import interval
from sovit.law.design_matrix import star
from sovit.law.exponents import Growth
from sovit.law.forms import WHOLE_SHAPE
from sovit.report.figures.law_lines import along, budget_levels, markers, optimal_path, points, thinned
from sovit.report.figures.style import (
    COLUMN,
    COMPUTE,
    DASHED,
    DIMENSIONS,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PALE,
    arm_name,
    band,
    curve_label,
    dimension_axis,
    finish,
    flops_label,
    grid,
    loss_axis,
    mark,
    ramp,
    spread_labels,
    styled,
)

DIAMOND = dict(marker="D", ms=4.2, mfc="white")
MAX_LINES = 9  # budgets that get a line of their own
SHADE = "#f3f3f3"


@styled
def fit_by_dimension(fit, data) -> Figure | None:
    """One panel a dimension: measured losses of its arm against it, the law at each budget, the optimum marked.

    Along a curve the other dimensions stay at the centre of the design and the budget is spent exactly, on as many
    images as it pays for; where the runs stand on no common FLOPs, a curve is a number of images instead. None where the
    design is no star (an isoFLOP line has no shape that differs in one dimension alone).
    """
    dims = fit.model.dims
    _, arms = star(data.columns, dims)
    if not all(dim in arms for dim in dims):
        return None
    kind, group, budgets = budget_levels(fit, data)
    colours = ramp(len(budgets))
    figure, ((*axes,),) = grid(1, len(dims), 2.6, sharey=True)
    lows = [data.y.min()]
    for axis, dim in zip(axes, dims):
        mine = (arms == dim) | (arms == "centre")
        values = data.columns[dim][mine].astype(float)
        points(axis, data.columns[dim][mine], data.y[mine], group[mine], colours, s=11, alpha=0.9)
        x = np.geomspace(values.min() / 1.12, values.max() * 1.12, 201)
        for g in thinned(len(budgets), 7):
            loss = along(fit, dim, x, kind, budgets[g])
            axis.plot(x, loss, color=colours[g], zorder=2)
            lowest = int(np.nanargmin(loss))
            lows.append(loss[lowest])
            if 0 < lowest < len(x) - 1:
                axis.plot(x[lowest], loss[lowest], **DIAMOND, mec=colours[g], mew=1.1, ls="", zorder=4)
            if dim == dims[-1]:
                label = flops_label(budgets[g]) if kind == "train_flops" else f"{budgets[g]:,.0f}"
                curve_label(axis, 1.03, loss[-1], label, colours[g])
        dimension_axis(axis, values)
        axis.set_xlabel(DIMENSIONS[dim])
    axes[0].set_ylabel(METRICS.get(data.metric, data.metric))
    loss_axis(axes[0], np.array([min(lows), data.y.max()]))
    spread_labels(axes[-1])
    header = "training FLOPs\n(3 × forward × images)" if kind == "train_flops" else "images seen"
    axes[-1].text(1.0, 1.03, header, transform=axes[-1].transAxes, fontsize=7, va="bottom", ha="center")
    handles = [
        mark("run", marker="o", ms=3.5, color=GREY),
        mark(f"law “{fit.form}”", color=GREY),
        mark("its minimum, other dimensions at the centre", **DIAMOND, mec=GREY),
    ]
    return finish(figure, handles)


@styled
def isoflop(fit, data) -> Figure | None:
    """Loss against model size at equal training FLOPs. Curves: shapes on the law's own optimal path; dots: its valley.

    Size is forward FLOPs of one image. None where the runs stand on no common FLOPs, the law cannot rank shapes, or its
    optimum is nowhere near the sizes run.
    """
    kind, group, budgets = budget_levels(fit, data)
    if kind != "train_flops" or fit.geometry is None or fit.form not in WHOLE_SHAPE:
        return None
    _, arms = star(data.columns, fit.model.dims)
    colours, size = ramp(len(budgets)), data.columns["forward_flops"].astype(float)
    low, high = np.log(fit.data.compute_range)
    path = np.exp(optimal_path(fit, np.linspace(low - 9, high + 9, 161), fit.theta[None])[:, 0])  # [T, K]
    table = dict(zip(fit.model.dims, path.T))
    path_size, with_head = (fit.geometry.flops(table, head=head) for head in (False, True))
    keep = (path_size > size.min() / 1.5) & (path_size < size.max() * 1.5)
    if not keep.any():
        return None
    figure, ((axis,),) = grid(1, 1, 3.2, COLUMN + 0.6)
    valley = []
    for g in thinned(len(budgets), MAX_LINES):
        loss = fit.predict(table | dict(num_examples=budgets[g] / 3 / with_head))
        axis.plot(path_size[keep], loss[keep], color=colours[g], zorder=2)
        curve_label(axis, 1.02, loss[keep][-1], flops_label(budgets[g]), colours[g])
        valley.append((path_size[loss.argmin()], loss.min()))
    here = {arm: marker for arm, marker in markers(fit.model.dims).items() if (arms == arm).any()}
    for arm, marker in here.items():
        mine = arms == arm
        points(axis, size[mine], data.y[mine], group[mine], colours, s=13, marker=marker, alpha=0.85)
    optimum = dict(color=INK, lw=0.9, ls=DASHED, marker="D", ms=4, mfc="white")
    axis.plot(*np.array(valley).T, **optimum, zorder=4)
    axis.set_xscale("log")
    if np.ptp(np.log10(axis.get_xlim())) < 1.5:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("model size: forward FLOPs of one image")
    axis.set_ylabel(METRICS.get(data.metric, data.metric))
    loss_axis(axis, np.array([data.y.min(), *np.array(valley)[:, 1], data.y.max()]))
    spread_labels(axis)
    header = dict(transform=axis.transAxes, fontsize=7, va="bottom", ha="center")
    axis.text(1.02, 1.03, "training FLOPs\n(3 × forward\n× images)", **header)
    handles = [mark(arm_name(arm), marker=marker, ms=4, color=GREY) for arm, marker in here.items()]
    return finish(figure, [*handles, mark("law’s optimum", **optimum)], ncols=3)


@styled
def optimal_shape(fit, recommendation=None) -> Figure | None:
    """Optimal value of each dimension against compute with both bands; dashed beyond the runs, values run shaded.

    recommendation: the one to mark, or None. None where the law does not say what a shape costs.
    """
    if not fit.exponents or "num_params" in fit.exponents:
        return None
    dims = fit.model.dims
    low, high = np.log(fit.data.compute_range)
    star_at = None if recommendation is None else float(recommendation.forward_flops) * recommendation.num_examples
    far = max(high + np.log(10), 0 if star_at is None else np.log(star_at) + 0.3)
    ln_compute = np.unique(np.concatenate([np.linspace(low, high, 13), np.linspace(high, far, 7)]))
    line = np.exp(optimal_path(fit, ln_compute, fit.theta[None])[:, 0])  # [T, K]
    bands = _bands(fit, ln_compute)
    narrow = len(dims) > 3
    figure, ((*axes,),) = grid(1, len(dims), 2.85)
    for k, (axis, dim) in enumerate(zip(axes, dims)):
        _path(axis, OKABE_ITO[k], ln_compute, line[:, k], {kind: ends[:, k] for kind, ends in bands.items()}, high)
        values = np.array(fit.data.grid[dim])
        axis.axhspan(values.min(), values.max(), color=SHADE, lw=0, zorder=0)
        for value in values:
            axis.axhline(value, color="white", lw=0.8, zorder=0.5)
        if star_at is not None:
            best = getattr(recommendation.shape, dim)
            axis.plot(star_at, best, marker="*", ms=8, color=INK, mec="white", mew=0.5, ls="", zorder=5)
        bottom, top = min(values.min(), line[:, k].min()) / 1.25, max(values.max(), line[:, k].max()) * 1.25
        dimension_axis(axis, values, "y", (max(bottom, values.min() / 6), min(top, values.max() * 6)))
        axis.set_title(_exponent_title(fit.exponents[dim], dim, narrow), linespacing=1.35, fontsize=7 if narrow else 8)
    handles: list[Artist] = [mark("law’s optimum", color=GREY), mark("beyond the runs", color=GREY, ls=DASHED)]
    if bands:
        handles += [band("90 %, parametric bootstrap", 0.5), band("90 %, cluster bootstrap", 0.22)]
    handles.append(Patch(facecolor=SHADE, edgecolor=PALE, lw=0.5, label="values run"))
    if recommendation is not None:
        label = f"recommended at {flops_label(recommendation.train_flops)} training FLOPs"
        handles.append(mark(label, marker="*", ms=7, color=INK))
    return finish(figure, handles, COMPUTE, ncols=3)


def _bands(fit, ln_compute: np.ndarray) -> dict[str, np.ndarray]:
    """Ends of the interval of each optimal dimension [T, K, 2], by kind of bootstrap."""
    bands = {}
    for kind, draws in fit.draws.items():
        widen = fit.diagnostics.draws.t_over_z if kind == "random_effects" else 1.0
        many = np.exp(optimal_path(fit, ln_compute, np.array(draws)))  # [T, R, K]
        bands[kind] = np.array([[interval(values, widen) for values in at.T] for at in many])
    return bands


def _path(axis, colour: str, ln_compute: np.ndarray, line: np.ndarray, bands: dict, high: float) -> None:
    """One dimension's optimum with its bands; `high` is ln compute of the largest run."""
    compute = np.exp(ln_compute)
    for kind, alpha in (("pairs", 0.16), ("random_effects", 0.32)):
        if kind in bands:
            axis.fill_between(compute, *bands[kind].T, color=colour, alpha=alpha, lw=0, zorder=1)
    for part, dashes in ((ln_compute <= high + 1e-9, "-"), (ln_compute >= high - 1e-9, DASHED)):
        axis.plot(compute[part], line[part], color=colour, ls=dashes, zorder=3)
    axis.axvline(np.exp(high), color=GREY, lw=0.6, ls=":", zorder=2)
    axis.set_xscale("log")
    axis.set_xlim(compute[0] / 1.1, compute[-1] * 1.1)


def _exponent_title(exponent: Growth, dim: str, narrow: bool = False) -> str:
    name = arm_name(dim)
    if exponent.status == "unidentified":
        return f"{name}: unidentified\n" + ("(no exponent)" if narrow else "(the runs do not fix its exponent)")
    text = f"{name} $\\propto$ t$^{{\\,{exponent.estimate:.3f}}}$"
    if exponent.low is not None:
        text += f"\n90 %: {exponent.low:.3f} to {exponent.high:.3f}"
    return text + (("\nedge" if narrow else "; edge") if exponent.status == "edge" else "")
