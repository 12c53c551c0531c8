"""What the figures of a law draw: its curves and optima, the budgets of its runs, and their points."""

from __future__ import annotations

import numpy as np

from sovit.law.exponents import optimum_of
from sovit.ledger.measurements import levels

CHUNK = 4000  # optima solved at once
MAX_POINTS = 5000  # more are pixels in the SVG too: as paths they would make a file of megabytes


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
    tiled, budget = np.tile(theta, (len(ln_compute), 1)), np.repeat(ln_compute, len(theta))
    flat = [optimum_of(fit.family, tiled[i : i + CHUNK], budget[i : i + CHUNK]) for i in range(0, len(tiled), CHUNK)]
    return np.concatenate(flat).reshape(len(ln_compute), len(theta), -1)


def along(fit, dim: str, x: np.ndarray, kind: str, budget: float) -> np.ndarray:
    """The law's loss with `dim` at x [n] and the rest at the centre, at one budget of FLOPs or of images."""
    table = {d: np.full(len(x), fit.data.centre[d]) for d in fit.model.dims} | {dim: x}
    if fit.geometry is None:
        return fit.predict(table | dict(num_examples=np.full(len(x), budget)))
    geometry = fit.geometry
    images = budget / 3 / geometry.flops(table, head=True) if kind == "train_flops" else np.full(len(x), budget)
    return fit.predict(table | dict(num_examples=images, compute=geometry.flops(table, head=False) * images))


def thinned(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def points(axis, x, y, group, colours, **style) -> None:
    """Points in the colours of their groups, later groups above earlier ones."""
    order = np.argsort(group, kind="stable")
    inks = np.array(colours)[group[order]]
    axis.scatter(x[order], y[order], c=inks, linewidths=0, zorder=3, rasterized=len(x) > MAX_POINTS, **style)


def markers(dims) -> dict[str, str]:
    return dict(zip(("centre", *dims, "corner"), ("o", *"^sv<>"[: len(dims)], "P")))
