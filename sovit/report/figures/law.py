"""The figures of one fitted law. Every compute axis says which compute it is."""

from __future__ import annotations

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sovit.law.bootstrap import interval
from sovit.law.design_matrix import star
from sovit.law.exponents import Growth, optimum_of
from sovit.law.forms import WHOLE_SHAPE
from sovit.ledger.measurements import levels
from sovit.report.figures.style import (
    COLUMN,
    COMPUTE,
    DIMENSIONS,
    GREY,
    INK,
    METRICS,
    OKABE_ITO,
    PAGE,
    PALE,
    arm_name,
    curve_label,
    dimension_axis,
    flops_label,
    legend_row,
    loss_axis,
    number_text,
    panels,
    ramp,
    spread_labels,
    styled,
)

CHUNK = 4000  # optima solved at once


MAX_POINTS = 5000  # more are pixels in the SVG too: as paths they would make a file of megabytes


MAX_LINES = 9  # budgets that get a line of their own in a figure


MAX_SHAPES = 60  # shapes that get a row of their own in a figure


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
    shown = _thinned(len(budgets), 7)
    figure, axes = panels(
        1, len(dims), PAGE, 2.6, sharey=True, right=0.895, left=0.075, bottom=0.17, top=0.88, wspace=0.08
    )
    measured = data.columns
    lows = [data.y.min()]
    for axis, dim in zip(axes, dims):
        mine = (arms == dim) | (arms == "centre")
        values = measured[dim][mine].astype(float)
        _points(axis, measured[dim][mine], data.y[mine], group[mine], colours, s=11, alpha=0.9)
        for g in shown:
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
    legend_row(figure, handles, 0.065)
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
    dims, geometry = fit.model.dims, fit.geometry
    _, arms = star(data.columns, dims)
    colours = ramp(len(budgets))
    size = data.columns["forward_flops"].astype(float)
    low, high = np.log(fit.data.compute_range)
    path = np.exp(optimal_path(fit, np.linspace(low - 9, high + 9, 161), fit.theta[None])[:, 0])  # [T, K]
    table = dict(zip(dims, path.T))
    path_size = geometry.flops(table, head=False)
    with_head = geometry.flops(table, head=True)
    keep = (path_size > size.min() / 1.5) & (path_size < size.max() * 1.5)
    if not keep.any():
        return None
    figure, (axis,) = panels(1, 1, COLUMN + 0.6, 3.2, left=0.125, right=0.86, bottom=0.13, top=0.84)
    valley = []
    for g in _thinned(len(budgets), MAX_LINES):
        budget = budgets[g]
        images = budget / 3 / with_head
        loss = fit.predict(table | dict(num_examples=images))
        axis.plot(path_size[keep], loss[keep], color=colours[g], zorder=2)
        curve_label(axis, 1.02, loss[keep][-1], flops_label(budget), colours[g])
        best = int(loss.argmin())
        valley.append((path_size[best], loss[best]))
    for arm, marker in _markers(dims).items():
        here = arms == arm
        _points(axis, size[here], data.y[here], group[here], colours, s=13, marker=marker, alpha=0.85)
    axis.plot(*np.array(valley).T, color=INK, lw=0.9, ls=(0, (3, 2)), marker="D", ms=4, mfc="white", mec=INK, zorder=4)
    axis.set_xscale("log")
    if np.ptp(np.log10(axis.get_xlim())) < 1.5:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: flops_label(value)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("model size: forward FLOPs of one image")
    axis.set_ylabel(METRICS.get(data.metric, data.metric))
    loss_axis(axis, np.array([data.y.min(), *np.array(valley)[:, 1], data.y.max()]))
    spread_labels(axis)
    handles = [
        Line2D([], [], ls="", marker=m, ms=4, color=GREY, label=arm_name(a))
        for a, m in _markers(dims).items()
        if (arms == a).any()
    ]
    handles.append(
        Line2D([], [], color=INK, lw=0.9, ls=(0, (3, 2)), marker="D", ms=4, mfc="white", label="law’s optimum")
    )
    legend_row(figure, handles, 0.1, ncols=3)
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
    dims, grid = fit.model.dims, fit.data.grid
    low, high = np.log(fit.data.compute_range)
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
        widen = fit.diagnostics.draws.t_over_z if kind == "random_effects" else 1.0
        many = np.exp(optimal_path(fit, ln_compute, np.array(draws)))  # [T, R, K]
        bands[kind] = np.array([[interval(at[:, k], widen) for k in range(len(dims))] for at in many])  # [T, K, 2]
    narrow = len(dims) > 3
    top = 0.71 if narrow else 0.76
    figure, axes = panels(
        1, len(dims), PAGE, 2.85, left=0.05, right=0.985, bottom=0.165, top=top, wspace=0.17 + 0.08 * narrow
    )
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
                getattr(recommendation.shape, dim),
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
        dimension_axis(axis, values, "y", (max(bottom, values.min() / 6), min(top, values.max() * 6)))
        axis.set_xlim(compute[0] / 1.1, compute[-1] * 1.1)
        axis.set_title(_exponent_title(fit.exponents[dim], dim, narrow), linespacing=1.35, fontsize=7 if narrow else 8)
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
        label = f"recommended at {flops_label(recommendation.train_flops)} training FLOPs"
        handles.append(Line2D([], [], ls="", marker="*", ms=7, color=INK, label=label))
    legend_row(figure, handles, 0.04, ncols=3)
    return figure


def budget_levels(fit, data) -> tuple[str, np.ndarray, np.ndarray]:
    """(column, group [n], budgets [G]): the column on whose levels the runs stand, training FLOPs where they do."""
    found = {}
    for name in ("train_flops", "num_examples"):
        if name in data.columns and (name != "train_flops" or fit.geometry is not None or not fit.model.dims):
            found[name] = levels(data.columns[name])
    # runs of equal FLOPs have few levels of it; runs of equal images have few levels of those
    name = min(found, key=lambda n: (len(found[n][1]), n != "train_flops"))
    return name, *found[name]


def optimal_path(fit, ln_compute: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """ln of the optimal dimensions at each ln compute [T] (head apart), for each theta [R, P]: [T, R, K]."""
    geometry = fit.geometry  # the closed form below needs none
    form, centre, grid = fit.shape_form, fit.centre, fit.data.grid
    tiled, budget = np.tile(theta, (len(ln_compute), 1)), np.repeat(ln_compute, len(theta))
    flat = [
        optimum_of(form, centre, tiled[i : i + CHUNK], geometry, grid, budget[i : i + CHUNK])
        for i in range(0, len(tiled), CHUNK)
    ]
    return np.concatenate(flat).reshape(len(ln_compute), len(theta), -1)


def _along(fit, dim: str, x: np.ndarray, kind: str, budget: float) -> np.ndarray:
    """The law's loss with `dim` at x [n] and the rest at the centre, at one budget of FLOPs or of images."""
    table = {d: np.full(len(x), fit.data.centre[d]) for d in fit.model.dims} | {dim: x}
    if fit.geometry is None:
        return fit.predict(table | dict(num_examples=np.full(len(x), budget)))
    geometry = fit.geometry
    images = budget / 3 / geometry.flops(table, head=True) if kind == "train_flops" else np.full(len(x), budget)
    return fit.predict(table | dict(num_examples=images, compute=geometry.flops(table, head=False) * images))


def _thinned(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _points(axis, x, y, group, colours, **style) -> None:
    """Points in the colours of their groups, later groups above earlier ones."""
    order = np.argsort(group, kind="stable")
    inks = np.array(colours)[group[order]]
    axis.scatter(x[order], y[order], c=inks, linewidths=0, zorder=3, rasterized=len(x) > MAX_POINTS, **style)


def _markers(dims) -> dict[str, str]:
    return dict(zip(("centre", *dims, "corner"), ("o", *"^sv<>"[: len(dims)], "P")))


def _arm_colour(name: str, dims) -> str:
    """Arms in the colours of `optimal_shape`, centre and corners in black and grey."""
    if name in dims:
        return OKABE_ITO[list(dims).index(name)]
    return {"centre": INK, "corner": GREY}.get(name, OKABE_ITO[0])


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
    return " × ".join(number_text(v) for n, v in zip(names, shape) if n in dims)


def _exponent_title(exponent: Growth, dim: str, narrow: bool = False) -> str:
    name = arm_name(dim)
    if exponent.status == "unidentified":
        return f"{name}: unidentified\n" + ("(no exponent)" if narrow else "(the runs do not fix its exponent)")
    text = f"{name} $\\propto$ t$^{{\\,{exponent.estimate:.3f}}}$"
    if exponent.low is not None:
        text += f"\n90 %: {exponent.low:.3f} to {exponent.high:.3f}"
    return text + (("\nedge" if narrow else "; edge") if exponent.status == "edge" else "")
