"""The figures of one fitted law. Every compute axis says which compute it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sovit.law.bootstrap import interval
from sovit.law.design_matrix import star
from sovit.law.exponents import Growth, optimum_of
from sovit.law.forms import WHOLE_SHAPE
from sovit.ledger.measurements import levels
from sovit.predict.law_at_budget import budgets_run
from sovit.predict.recommend import Recommendation
from sovit.report.figures.style import (
    COLUMN,
    COMPUTE,
    DASHED,
    DIAMOND,
    DIMENSIONS,
    GREY,
    INK,
    OKABE_ITO,
    PALE,
    TRAIN_FLOPS,
    dimension_axis,
    dimension_name,
    dots,
    finish,
    flops_axis,
    flops_label,
    grid,
    line_marks,
    line_with_bands,
    loss_axis,
    mark,
    metric_label,
    ramp,
    styled,
    thinned,
)

CHUNK = 4000  # optima solved at once
MAX_LINES = 7  # budgets that get a line of their own
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
    colours, shown = ramp(len(budgets)), thinned(len(budgets), MAX_LINES)
    figure, ((*axes,),) = grid(1, len(dims), 2.6, sharey=True)
    lows = [data.y.min()]
    for axis, dim in zip(axes, dims):
        mine = (arms == dim) | (arms == "centre")
        values = data.columns[dim][mine].astype(float)
        dots(axis, values, data.y[mine], c=np.array(colours)[group[mine]], s=11, alpha=0.9)
        x = np.geomspace(values.min() / 1.12, values.max() * 1.12, 201)
        for g in shown:
            loss = _along(fit, dim, x, kind, budgets[g])
            axis.plot(x, loss, color=colours[g], zorder=2)
            lowest = int(np.nanargmin(loss))
            lows.append(loss[lowest])
            if 0 < lowest < len(x) - 1:
                axis.plot(x[lowest], loss[lowest], **DIAMOND, mec=colours[g], mew=1.1, ls="", zorder=4)
        dimension_axis(axis, values)
        axis.set_xlabel(DIMENSIONS[dim])
    axes[0].set_ylabel(metric_label(data.metric))
    loss_axis(axes[0], np.array([min(lows), data.y.max()]))
    handles = [
        *_budget_marks(kind, budgets[shown], [colours[g] for g in shown]),
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
    colours, shown = ramp(len(budgets)), thinned(len(budgets), MAX_LINES)
    size = data.columns["forward_flops"].astype(float)
    low, high = np.log(fit.data.compute_range)
    path = np.exp(_optimal_path(fit, np.linspace(low - 9, high + 9, 161), fit.theta[None])[:, 0])  # [T, K]
    table = dict(zip(fit.model.dims, path.T))
    path_size, with_head = (fit.geometry.flops(table, head=head) for head in (False, True))
    keep = (path_size > size.min() / 1.5) & (path_size < size.max() * 1.5)
    if not keep.any():
        return None
    figure, ((axis,),) = grid(1, 1, 3.2, COLUMN + 0.6)
    valley = []
    for g in shown:
        loss = fit.predict(table | dict(num_examples=budgets[g] / 3 / with_head))
        axis.plot(path_size[keep], loss[keep], color=colours[g], zorder=2)
        valley.append((path_size[loss.argmin()], loss.min()))
    dots(axis, size, data.y, c=np.array(colours)[group], s=13, alpha=0.85)
    optimum = DIAMOND | dict(color=INK, lw=0.9, ls=DASHED)
    axis.plot(*np.array(valley).T, **optimum, zorder=4)
    flops_axis(axis, [*size, *np.array(valley)[:, 0]])
    axis.set_xlabel("model size: forward FLOPs of one image")
    axis.set_ylabel(metric_label(data.metric))
    loss_axis(axis, np.array([data.y.min(), *np.array(valley)[:, 1], data.y.max()]))
    marks = _budget_marks(kind, budgets[shown], [colours[g] for g in shown])
    return finish(figure, [*marks, mark("law’s optimum", **optimum)], ncols=3)


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
    line = np.exp(_optimal_path(fit, ln_compute, fit.theta[None])[:, 0])  # [T, K]
    bands = _bands(fit, ln_compute)
    figure, ((*axes,),) = grid(1, len(dims), 2.85)
    for k, (axis, dim) in enumerate(zip(axes, dims)):
        ends = [band[:, k].T for band in bands]
        line_with_bands(axis, np.exp(ln_compute), line[:, k], ends, np.exp(high), OKABE_ITO[k])
        values = np.array(fit.data.grid[dim])
        axis.axhspan(values.min(), values.max(), color=SHADE, lw=0, zorder=0)
        if star_at is not None:
            best = getattr(recommendation.shape, dim)
            axis.plot(star_at, best, marker="*", ms=8, color=INK, mec="white", mew=0.5, ls="", zorder=5)
        bottom, top = min(values.min(), line[:, k].min()) / 1.25, max(values.max(), line[:, k].max()) * 1.25
        dimension_axis(axis, values, "y", (max(bottom, values.min() / 6), min(top, values.max() * 6)))
        axis.set_title(_exponent_title(fit.exponents[dim], dim), linespacing=1.35, fontsize=7)
    handles = [*line_marks(bool(bands)), Patch(facecolor=SHADE, edgecolor=PALE, lw=0.5, label="values run")]
    if recommendation is not None:
        label = f"recommended at {flops_label(recommendation.train_flops)} training FLOPs"
        handles.append(mark(label, marker="*", ms=7, color=INK))
    return finish(figure, handles, COMPUTE, ncols=3)


@styled
def frontier(fit, rows: Sequence[Recommendation]) -> Figure:
    """Loss, encoder parameters and images of the best shape against training FLOPs (budgets rising), with both bands.

    Lines are the real-valued optimum, markers the best whole shapes.
    """
    budgets, last = np.array([row.train_flops for row in rows]), budgets_run(fit)[1]
    figure, ((*axes,),) = grid(1, 3, 2.8)
    for axis, name, colour in zip(axes, ("loss", "num_params", "num_examples"), OKABE_ITO):
        if name == "loss":
            line = [row.optimum_loss for row in rows]
            ends = [(row.loss_pairs_low, row.loss_pairs_high, row.loss_low, row.loss_high) for row in rows]
        else:
            sizes = [row.optimum_size[name] for row in rows]
            line = [size.estimate for size in sizes]
            ends = [(size.pairs_low, size.pairs_high, size.low, size.high) for size in sizes]
        bands: list = [] if None in ends[0] else list(np.array(ends).T.reshape(2, 2, -1))
        line_with_bands(axis, budgets, np.array(line), bands, last, colour)
        axis.plot(budgets, [getattr(row, name) for row in rows], **DIAMOND, ls="", mec=colour, zorder=4)
        axis.set(yscale="log", ylabel=DIMENSIONS.get(name, "images seen"))
    axes[0].set_ylabel(metric_label(fit.data.metric))
    loss_axis(axes[0], [row.loss for row in rows] + [x for four in ends for x in four if name == "loss"], pad=1.06)
    handles = [*line_marks(rows[0].loss_low is not None), mark("best whole shape", **DIAMOND, mec=INK)]
    return finish(figure, handles, TRAIN_FLOPS)


# curves of a law ------------------------------------------------------------------------------------------------------


def budget_levels(fit, data) -> tuple[str, np.ndarray, np.ndarray]:
    """(column, group [n], budgets [G]): the column on whose levels the runs stand, training FLOPs where they do."""
    found = {}
    for name in ("train_flops", "num_examples"):
        if name in data.columns and (name != "train_flops" or fit.geometry is not None or not fit.model.dims):
            found[name] = levels(data.columns[name])
    # runs of equal FLOPs have few levels of it; runs of equal images have few levels of those
    name = min(found, key=lambda n: (len(found[n][1]), n != "train_flops"))
    return name, *found[name]


def _budget_marks(kind: str, budgets: np.ndarray, colours: list) -> list:
    unit = "training FLOPs" if kind == "train_flops" else "images"
    return [mark(f"{flops_label(budget)} {unit}", color=colour) for budget, colour in zip(budgets, colours)]


def _along(fit, dim: str, x: np.ndarray, kind: str, budget: float) -> np.ndarray:
    """The law's loss with `dim` at x [n] and the rest at the centre, at one budget of FLOPs or of images."""
    table = {d: np.full(len(x), fit.data.centre[d]) for d in fit.model.dims} | {dim: x}
    images = np.full(len(x), budget)
    if fit.geometry is None:
        return fit.predict(table | dict(num_examples=images))
    if kind == "train_flops":
        images = budget / 3 / fit.geometry.flops(table, head=True)
    return fit.predict(table | dict(num_examples=images, compute=fit.geometry.flops(table, head=False) * images))


def _optimal_path(fit, ln_compute: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """ln of the optimal dimensions at each ln compute [T] (head apart), for each theta [R, P]: [T, R, K]."""
    tiled, budget = np.tile(theta, (len(ln_compute), 1)), np.repeat(ln_compute, len(theta))
    flat = [optimum_of(fit.family, tiled[i : i + CHUNK], budget[i : i + CHUNK]) for i in range(0, len(tiled), CHUNK)]
    return np.concatenate(flat).reshape(len(ln_compute), len(theta), -1)


def _bands(fit, ln_compute: np.ndarray) -> list[np.ndarray]:
    """Ends of the interval of each optimal dimension [T, K, 2], by the cluster and by the parametric bootstrap."""
    bands = []
    for kind in ("pairs", "random_effects") if fit.draws else ():
        widen = fit.diagnostics.draws.t_over_z if kind == "random_effects" else 1.0
        many = np.exp(_optimal_path(fit, ln_compute, np.array(fit.draws[kind])))  # [T, R, K]
        bands.append(np.array([[interval(values, widen) for values in at.T] for at in many]))
    return bands


def _exponent_title(exponent: Growth, dim: str) -> str:
    if exponent.status == "unidentified":
        return f"{dimension_name(dim)}: unidentified\n(no exponent)"
    text = f"{dimension_name(dim)} $\\propto$ t$^{{\\,{exponent.estimate:.3f}}}$"
    text += f" ({exponent.status})" if exponent.status != "ok" else ""
    return text if exponent.low is None else f"{text}\n90 %: {exponent.low:.3f} to {exponent.high:.3f}"
