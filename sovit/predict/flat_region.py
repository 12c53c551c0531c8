"""What is as good: all shapes that can be built whose loss the law puts within one noise s.d. of the best. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sovit.predict.integer_search import SIZES, Lattice, region

SEARCH = 8.0  # a survey spans this factor below and above the real optimum
SURVEY = dict(width=32, depth=32, mlp_dim=48)  # most values a dimension in a survey
MAX_LISTED = 50  # shapes that are listed
MAX_COMPARED = 50_000  # shapes that are compared one by one for that list


@dataclass(frozen=True)
class FlatRegion:
    """The shapes within one noise s.d. (`within`, of ln loss) of the best.

    exact: `count` and `ranges` (least and largest value by dimension) are of all feasible shapes; else, where they are
    too many to count, of the `surveyed` ones, a thinned lattice around the optimum, and open_above names the dimensions
    in which the region reaches its end. shapes, best first: all where they are few, else the best MLP dim of each width
    and depth (`listed` says which). regret: of each over the best; regret_high: 95th percentile over the draws of its
    excess over each draw's own optimum.
    """

    within: float
    noise_source: str
    count: int
    exact: bool
    surveyed: int | None
    ranges: dict[str, list[int]]
    open_above: list[str]
    listed: str
    shapes: list[dict]


def flat_region(grid: Lattice, near: Mapping, best: Mapping, best_loss: float, least: np.ndarray | None) -> FlatRegion:
    """The flat region around `best`.

    near: sizes of the real optimum; least [R]: the loss of each of the first draws' own optimum, None without.
    """
    at, noise = grid.target, grid.target.fit.noise
    most = best_loss * float(np.exp(noise.sd))
    boxes = region(grid, most)
    if boxes is None or (count := int(np.prod(boxes.high - boxes.low + 1, axis=1).sum())) > MAX_COMPARED:
        index, pair = _survey(grid, near)
    else:
        index, pair = boxes.shapes()
    table, loss = grid.table(index, pair), grid.loss(index, pair)
    inside = loss <= most
    found, loss = {n: column[inside].astype(int) for n, column in table.items()}, loss[inside]
    open_above = []
    if boxes is not None:
        ends = {n: np.concatenate([grid.table(end, boxes.pair)[n] for end in (boxes.low, boxes.high)]) for n in at.dims}
    else:
        found, loss = {n: np.append(column, best[n]) for n, column in found.items()}, np.append(loss, best_loss)
        ends, count = found, len(set(zip(*found.values())))
        open_above = [n for n in at.dims if n in SURVEY and found[n].max() >= table[n].max()]
    shapes = _listed(found, loss, best, best_loss)
    worst = [None] * len(shapes)
    if least is not None:
        some = {n: np.array([s[n] for s in shapes], float) for n in best}
        worst = np.quantile(at.loss(some, at.draws()[0][: len(least)]) / least[:, None] - 1, 0.95, axis=0).tolist()
    return FlatRegion(
        within=noise.sd,
        noise_source=noise.source,
        count=count,
        exact=boxes is not None,
        surveyed=None if boxes is not None else len(index),
        ranges={n: [int(ends[n].min()), int(ends[n].max())] for n in at.dims},
        open_above=open_above,
        listed="all" if len(shapes) == count else "the best MLP dim of each width and depth",
        shapes=[shape | dict(regret_high=x) for shape, x in zip(shapes, worst)],
    )


def _listed(found: Mapping, loss: np.ndarray, best: Mapping, best_loss: float) -> list[dict]:
    """At most MAX_LISTED shapes, the best first; where there are more, one for each value of all but mlp_dim."""
    order, first = np.argsort(loss, kind="stable"), np.array([best[n] for n in found])
    table = np.stack([column[order] for column in found.values()], 1)  # [n, D]
    rest = (table != first).any(1)
    table, loss = np.concatenate([first[None], table[rest]]), np.append(best_loss, loss[order][rest])
    if len(table) > MAX_LISTED:
        others = [k for k, n in enumerate(found) if n != "mlp_dim"]
        heads = np.sort(np.unique(table[:, others], axis=0, return_index=True)[1])
        table, loss = table[heads], loss[heads]
    regret = np.maximum(0.0, loss / best_loss - 1).tolist()
    return [dict(zip(found, x)) | dict(regret=r) for x, r in zip(table[:MAX_LISTED].tolist(), regret)]


def _survey(grid: Lattice, near: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """A thinned lattice of feasible shapes around the real optimum: index [n, K] and pair [n]."""
    indices = []
    for k, name in enumerate(SIZES):
        least = int(grid.low[k])
        low, high = (max(least, round(near[name] * factor / grid.steps[k])) for factor in (1 / SEARCH, SEARCH))
        values = np.unique(np.geomspace(low, high, SURVEY[name]).round().astype(int))
        indices.append(values if name in grid.target.dims else np.array([least]))
    mesh = np.stack(np.meshgrid(*indices, np.arange(len(grid.pairs)), indexing="ij"), -1).reshape(-1, len(SIZES) + 1)
    mesh = mesh[grid.allowed(grid.table(mesh[:, :-1], mesh[:, -1]))]
    return mesh[:, :-1], mesh[:, -1]
