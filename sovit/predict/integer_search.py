"""The best whole shape under hardware rules and all that are as good, exactly: branch and bound over a lattice of shapes.

Every law that ranks shapes falls with each size and with the images, and FLOPs rise with every size. So no shape in a box
of the lattice beats the box's largest sizes trained on as many images as its smallest shape is paid for. A box is dropped
where that bound is no better than a shape already found; what is left is halved. No convexity is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm, prod

import numpy as np

from sovit import UserError
from sovit.predict.law_at_budget import TOKENS, Target

SIZES = ("width", "depth", "mlp_dim")
MAX_CELLS = 200_000  # boxes looked at before a count of shapes is given up
SLACK = 1e-12  # relative: what rounding may add to a bound
MAX_LISTED = 50  # shapes of a flat region that are listed
MAX_COMPARED = 500_000  # shapes that are compared one by one for that list


@dataclass(frozen=True)
class Rules:
    """What can be built: each size a multiple, and caps on the encoder (parameters; forward FLOPs of one image)."""

    head_dim: int
    width_multiple: int = 1
    depth_multiple: int = 1
    mlp_multiple: int = 8
    max_params: float | None = None
    max_forward_flops: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value >= 1:
                raise UserError(f"{name}={value} is too small; give at least 1")

    @property
    def steps(self) -> dict[str, int]:
        return dict(width=lcm(self.head_dim, self.width_multiple), depth=self.depth_multiple, mlp_dim=self.mlp_multiple)


@dataclass(frozen=True)
class Lattice:
    """All shapes that rules and budget allow: x = step x index for each size, at each (patch_size, image_size).

    steps, low [K]: step and first index, by size; pairs [G, 2].
    """

    target: Target
    rules: Rules
    steps: np.ndarray
    low: np.ndarray
    pairs: np.ndarray

    def table(self, index: np.ndarray, pair: np.ndarray) -> dict[str, np.ndarray]:
        """index [n, K], pair [n] -> the values by dimension."""
        sizes = (index * self.steps).astype(float)  # whole numbers, but the root of a search squares very large ones
        return dict(zip(SIZES, sizes.T)) | dict(zip(TOKENS, self.pairs[pair].T))

    def allowed(self, index: np.ndarray, pair: np.ndarray) -> np.ndarray:
        """Which shapes keep to the caps and are paid one image; False never comes back as a size grows."""
        table, geometry = self.table(index, pair), self.target.geometry
        return (
            (self.target.images(table) >= 1)
            & (geometry.num_params(table) <= (self.rules.max_params or np.inf))
            & (geometry.flops(table, head=False) / geometry.flops_scale <= (self.rules.max_forward_flops or np.inf))
        )

    def loss(self, sizes: np.ndarray, pair: np.ndarray, paid: np.ndarray | None = None) -> np.ndarray:
        """Loss of `sizes` [n, K] trained on the images that the shapes `paid` [n, K] (None = the same) pay for."""
        images = None if paid is None else self.target.images(self.table(paid, pair))
        return self.target.loss(self.table(sizes, pair), images=images)


def lattice(target: Target, rules: Rules, held: Mapping | None = None) -> Lattice:
    """held: patch_size or image_size that all shapes have. Raises UserError where no shape keeps the rules."""
    steps, low = np.array(list(rules.steps.values())), np.ones(len(SIZES), int)
    for k, name in enumerate(SIZES):
        if name in target.absent():
            low[k] = max(1, int(np.ceil(min(target.fit.data.grid[name]) / steps[k])))
        elif name not in target.dims:  # the law has no term for it: as it was run
            low[k] = max(1, round(getattr(target.geometry, name) / steps[k]))
    pairs = target.run_pairs()
    for name, value in (held or {}).items():
        pairs = pairs[pairs[:, TOKENS.index(name)] == value]
    if not len(pairs):
        said = ", ".join(f"{name}={value:g}" for name, value in held.items()) if held else "a patch_size that was run"
        raise UserError(f"no image_size that was run is a multiple of {said}; run a pair that is")
    made = Lattice(target, rules, steps, low, pairs)
    if not made.allowed(np.tile(low, (len(pairs), 1)), np.arange(len(pairs))).any():
        least = " x ".join(f"{n} {x}" for n, x in zip(SIZES, low * steps))
        raise UserError(
            f"no shape keeps to the rules: the smallest, {least}, does not; raise a cap or lower a multiple"
        )
    return made


@dataclass(frozen=True)
class Boxes:
    """Boxes of the lattice, n of them: first and last index by size [n, K], and the pair [n]."""

    low: np.ndarray
    high: np.ndarray
    pair: np.ndarray

    def __len__(self) -> int:
        return len(self.pair)

    def take(self, which: np.ndarray) -> Boxes:
        return Boxes(self.low[which], self.high[which], self.pair[which])

    def join(self, other: Boxes) -> Boxes:
        parts = zip((self.low, self.high, self.pair), (other.low, other.high, other.pair))
        return Boxes(*map(np.concatenate, parts))

    def halves(self, grid: Lattice) -> Boxes:
        """Each box of several shapes in two, along the size in which it is widest on the log scale, if it allows any."""
        boxes = self.take(np.any(self.low < self.high, axis=1))
        rows, k = np.arange(len(boxes)), np.argmax(boxes.high / boxes.low, axis=1)
        low, high = boxes.low[rows, k], boxes.high[rows, k]
        middle = np.clip(np.floor(np.sqrt(low * high.astype(float))).astype(int), low, high - 1)
        first_high, second_low = boxes.high.copy(), boxes.low.copy()
        first_high[rows, k], second_low[rows, k] = middle, middle + 1
        both = Boxes(boxes.low, first_high, boxes.pair).join(Boxes(second_low, boxes.high, boxes.pair))
        return both.take(grid.allowed(both.low, both.pair))

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Every shape of the boxes, one a row: index [., K] and pair [.]."""
        parts = [
            np.stack(np.meshgrid(*map(np.arange, low, high + 1), indexing="ij"), -1).reshape(-1, len(low))
            for low, high in zip(self.low, self.high)
        ]
        return np.concatenate(parts), np.repeat(self.pair, [len(part) for part in parts])


Best = tuple[dict[str, int], float]  # a shape by dimension, and its loss


def minimise(grid: Lattice, near: Mapping) -> Best:
    """Find the shape of least predicted loss, and that loss: exact. `near`: a guess of the sizes, which only saves time."""
    guess = np.floor(np.array([near[n] for n in SIZES]) / grid.steps).astype(int)
    corners = np.stack(np.meshgrid(*[[0, 1]] * len(SIZES), indexing="ij"), -1).reshape(-1, len(SIZES))
    first = np.tile(np.clip(guess + corners, grid.low, None), (len(grid.pairs), 1))
    best = _better(grid, first, np.repeat(np.arange(len(grid.pairs)), len(corners)), ({}, np.inf))
    boxes = _root(grid)
    while len(boxes):
        middle = np.floor(np.sqrt(boxes.low * boxes.high.astype(float))).astype(int)
        best = _better(grid, np.concatenate([middle, boxes.low]), np.tile(boxes.pair, 2), best)
        bound = grid.loss(boxes.high, boxes.pair, paid=boxes.low)
        boxes = boxes.take(bound < best[1] * (1 - SLACK)).halves(grid)
    return best


def region(grid: Lattice, most: float) -> tuple[Boxes, bool]:
    """All shapes of loss at most `most`, and True; or False, and a part of them, where MAX_CELLS boxes do not suffice."""
    boxes, seen = _root(grid), 0
    found = boxes.take(np.zeros(len(boxes), bool))
    while len(boxes):
        seen += len(boxes)
        if seen > MAX_CELLS:
            return found, False
        inside = grid.loss(boxes.low, boxes.pair, paid=boxes.high) <= most
        inside &= grid.allowed(boxes.high, boxes.pair)
        found = found.join(boxes.take(inside))
        bound = grid.loss(boxes.high, boxes.pair, paid=boxes.low)
        boxes = boxes.take(~inside & (bound <= most * (1 + SLACK))).halves(grid)
    return found, True


def _root(grid: Lattice) -> Boxes:
    """One box for each pair: from the least sizes to the largest that any shape with a size can have."""
    low, pair = np.tile(grid.low, (len(grid.pairs), 1)), np.arange(len(grid.pairs))
    fits = grid.allowed(low, pair)
    low, pair = low[fits], pair[fits]
    high = low.copy()
    for k, name in enumerate(SIZES):
        jump = 1 << 40 if name in grid.target.dims else 0  # more than any size: found by halving the jump
        while jump:
            alone = low.copy()  # the others at their least, so that no shape is left out
            alone[:, k] = high[:, k] + jump
            high[:, k] = np.where(grid.allowed(alone, pair), alone[:, k], high[:, k])
            jump //= 2
    return Boxes(low, high, pair)


def _better(grid: Lattice, index: np.ndarray, pair: np.ndarray, best: Best) -> Best:
    """The best of the shapes index [n, K], pair [n], and the best so far."""
    loss = np.where(grid.allowed(index, pair), grid.loss(index, pair), np.inf)
    i = int(loss.argmin())
    if not loss[i] < best[1]:
        return best
    return {n: int(values[0]) for n, values in grid.table(index[i : i + 1], pair[i : i + 1]).items()}, float(loss[i])


@dataclass(frozen=True)
class FlatRegion:
    """The shapes within one noise s.d. (`within`, of ln loss) of the best.

    count, ranges: of all of them, least and largest value by dimension; where not `exact`, of at least so many. shapes: at
    most MAX_LISTED, best first; regret: of each over the best; regret_high: 95th percentile over the draws of its excess
    over each draw's own optimum.
    """

    within: float
    noise_source: str
    count: int
    exact: bool
    ranges: dict[str, list[int]]
    shapes: list[dict]


def flat_region(grid: Lattice, best: Mapping[str, int], best_loss: float, least: np.ndarray | None) -> FlatRegion:
    """Find the flat region around `best`. least [R]: the loss of each of the first draws' own optimum, None without."""
    at, noise = grid.target, grid.target.fit.noise
    boxes, exact = region(grid, best_loss * float(np.exp(noise.sd)))
    low, high = (grid.table(end, boxes.pair) for end in (boxes.low, boxes.high))
    ends = {n: [best[n], *low[n].tolist(), *high[n].tolist()] for n in at.dims}
    count = sum(prod(sides) for sides in (boxes.high - boxes.low + 1).tolist())  # beyond 64 bits in places
    table = {n: np.array([x], float) for n, x in best.items()}
    if 0 < count <= MAX_COMPARED:
        every = grid.table(*boxes.shapes())
        other = np.any([column != best[n] for n, column in every.items()], axis=0)
        table = {n: np.append(x, every[n][other]) for n, x in table.items()}
    loss = at.loss(table)
    order = np.argsort(loss, kind="stable")[:MAX_LISTED]  # the best itself stands first
    regret = np.maximum(0.0, loss[order] / best_loss - 1).tolist()
    worst: list = [None] * len(order)
    if least is not None:
        excess = at.loss({n: x[order] for n, x in table.items()}, at.draws()[0][: len(least)]) / least[:, None] - 1
        worst = np.quantile(excess, 0.95, axis=0).tolist()
    listed = zip(*(x[order].astype(int).tolist() for x in table.values()))
    return FlatRegion(
        within=noise.sd,
        noise_source=noise.source,
        count=max(count, 1),
        exact=exact,
        ranges={n: [int(min(values)), int(max(values))] for n, values in ends.items()},
        shapes=[dict(zip(table, x)) | dict(regret=r, regret_high=w) for x, r, w in zip(listed, regret, worst)],
    )
