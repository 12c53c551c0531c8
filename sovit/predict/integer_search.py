"""The best whole shape under hardware rules, exactly: branch and bound over all shapes that can be built. Numpy only.

At a fixed number of images every law that ranks shapes falls with each size, at fixed sizes it falls with the images,
and FLOPs and parameters rise with every size. So no shape in a box of the lattice beats the box's largest sizes trained
on as many images as its smallest shape is paid for. A box is dropped where that bound is no better than a shape already
found; what is left is halved. No convexity is used, and no part of the lattice is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm

import numpy as np

from sovit import UserError
from sovit.predict.law_at_budget import TOKENS, Target
from sovit.spec.shape import Shape

SIZES = ("width", "depth", "mlp_dim")
CHUNK = 4096  # boxes halved at once
MAX_CELLS = 200_000  # boxes looked at before a count of shapes is given up
SLACK = 1e-12  # relative: what rounding may add to a bound


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

    def misfit(self, shape: Shape) -> str:
        """Why these rules forbid a shape, in words; "" where they allow it."""
        caps = (self.max_params, shape.num_params), (self.max_forward_flops, shape.forward_flops)
        if any(cap is not None and value > cap for cap, value in caps):
            return "larger than the rules allow"
        return "not in the multiples of the rules" if any(getattr(shape, n) % s for n, s in self.steps.items()) else ""


@dataclass(frozen=True)
class Lattice:
    """All shapes that rules and budget allow: x = step x index for each size, at each (patch_size, image_size).

    allowed(table) is False beyond the caps and where the budget does not pay for one image; it never comes back as a
    size grows. low, high [K]: first and last index, by size; `pairs` [G, 2].
    """

    target: Target
    allowed: Callable[[Mapping], np.ndarray]
    steps: np.ndarray
    low: np.ndarray
    pairs: np.ndarray

    def table(self, index: np.ndarray, pair: np.ndarray) -> dict[str, np.ndarray]:
        """index [n, K], pair [n] -> the values by dimension."""
        patch_size, image_size = self.pairs[pair].T
        sizes = (index * self.steps).astype(float)  # whole numbers, but the root of a search squares very large ones
        return dict(zip(SIZES, sizes.T)) | dict(patch_size=patch_size, image_size=image_size)

    def loss(self, sizes: np.ndarray, pair: np.ndarray, paid: np.ndarray | None = None) -> np.ndarray:
        """Loss of `sizes` [n, K] trained on the images that the shapes `paid` [n, K] (None = the same) pay for."""
        table = self.table(sizes, pair)
        return self.target.loss(table, images=self.target.images(table if paid is None else self.table(paid, pair)))


def lattice(target: Target, rules: Rules, held: Mapping | None = None) -> Lattice:
    """held: patch_size or image_size that all shapes have. Raises UserError where no shape keeps the rules."""
    geometry, dims, grid = target.geometry, target.dims, target.fit.data.grid
    steps = np.array(list(rules.steps.values()))
    low = np.ones(len(SIZES), int)
    for k, name in enumerate(SIZES):
        if name in target.absent():
            low[k] = max(1, int(np.ceil(min(grid[name]) / steps[k])))
        elif name not in dims:  # the law has no term for it: as it was run
            low[k] = max(1, round(getattr(geometry, name) / steps[k]))
    pairs = target.run_pairs()
    for k, name in enumerate(TOKENS):
        if held and name in held:
            pairs = pairs[pairs[:, k] == held[name]]
    if not len(pairs):
        said = ", ".join(f"{name}={value:g}" for name, value in held.items()) if held else "a patch_size that was run"
        raise UserError(f"no image_size that was run is a multiple of {said}; run a pair that is")

    def allowed(table: Mapping) -> np.ndarray:
        fits = target.images(table) >= 1
        if rules.max_params is not None:
            fits = fits & (geometry.num_params(table) <= rules.max_params)
        if rules.max_forward_flops is not None:
            fits = fits & (geometry.flops(table, head=False) / geometry.flops_scale <= rules.max_forward_flops)
        return fits

    made = Lattice(target, allowed, steps, low, pairs)
    if not allowed(made.table(np.tile(low, (len(pairs), 1)), np.arange(len(pairs)))).any():
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

    @property
    def several(self) -> np.ndarray:
        """Which hold more than one shape [n]."""
        return np.any(self.low < self.high, axis=1)

    def take(self, which: np.ndarray) -> Boxes:
        return Boxes(self.low[which], self.high[which], self.pair[which])

    def join(self, other: Boxes) -> Boxes:
        parts = zip((self.low, self.high, self.pair), (other.low, other.high, other.pair))
        return Boxes(*map(np.concatenate, parts))

    def halves(self) -> Boxes:
        """Each box in two, along the size in which it is widest on the log scale."""
        rows, k = np.arange(len(self)), np.argmax(self.high / self.low, axis=1)
        low, high = self.low[rows, k], self.high[rows, k]
        middle = np.clip(np.floor(np.sqrt(low * high.astype(float))).astype(int), low, high - 1)
        first_high, second_low = self.high.copy(), self.low.copy()
        first_high[rows, k], second_low[rows, k] = middle, middle + 1
        return Boxes(self.low, first_high, self.pair).join(Boxes(second_low, self.high, self.pair))

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Every shape of the boxes, one a row: index [., K] and pair [.]."""
        parts = [
            np.stack(np.meshgrid(*map(np.arange, low, high + 1), indexing="ij"), -1).reshape(-1, len(low))
            for low, high in zip(self.low, self.high)
        ]
        return np.concatenate(parts), np.repeat(self.pair, [len(part) for part in parts])


Best = tuple[dict[str, int], float]  # a shape by dimension, and its loss


def minimise(grid: Lattice, near: Mapping) -> Best:
    """The shape of least predicted loss and that loss: exact. `near`: a guess of the sizes, which only saves time."""
    boxes = _root(grid)
    guess = np.floor(np.array([near[n] for n in SIZES]) / grid.steps).astype(int)
    corners = np.stack(np.meshgrid(*[[0, 1]] * len(SIZES), indexing="ij"), -1).reshape(-1, len(SIZES))
    first = np.clip(guess + corners, grid.low, None)
    trial = np.concatenate([np.tile(first, (len(grid.pairs), 1)), boxes.low])
    best = _better(grid, trial, np.r_[np.repeat(np.arange(len(grid.pairs)), len(first)), boxes.pair], ({}, np.inf))
    boxes = boxes.take(boxes.several)
    bound = grid.loss(boxes.high, boxes.pair, paid=boxes.low)
    while len(boxes):
        order = np.argsort(bound, kind="stable")
        now, later = order[:CHUNK], order[CHUNK:]
        new = boxes.take(now).halves()
        new = new.take(grid.allowed(grid.table(new.low, new.pair)))
        middle = np.floor(np.sqrt(new.low * new.high)).astype(int)
        best = _better(grid, np.concatenate([middle, new.low]), np.tile(new.pair, 2), best)
        new = new.take(new.several)
        boxes = boxes.take(later).join(new)
        bound = np.concatenate([bound[later], grid.loss(new.high, new.pair, paid=new.low)])
        open_ = bound < best[1] * (1 - SLACK)
        boxes, bound = boxes.take(open_), bound[open_]
    return best


def region(grid: Lattice, most: float) -> Boxes | None:
    """All shapes of loss at most `most`; None where more than MAX_CELLS boxes would have to be looked at."""
    boxes, seen = _root(grid), 0
    found = boxes.take(np.zeros(len(boxes), bool))
    while len(boxes):
        seen += len(boxes)
        if seen > MAX_CELLS:
            return None
        inside = grid.loss(boxes.low, boxes.pair, paid=boxes.high) <= most
        inside &= grid.allowed(grid.table(boxes.high, boxes.pair))
        found = found.join(boxes.take(inside))
        bound = grid.loss(boxes.high, boxes.pair, paid=boxes.low)
        boxes = boxes.take(~inside & boxes.several & (bound <= most * (1 + SLACK))).halves()
        boxes = boxes.take(grid.allowed(grid.table(boxes.low, boxes.pair)))
    return found


def _root(grid: Lattice) -> Boxes:
    """One box for each pair: from the least sizes to the largest that any shape with a size can have."""
    low, pair = np.tile(grid.low, (len(grid.pairs), 1)), np.arange(len(grid.pairs))
    fits = grid.allowed(grid.table(low, pair))
    low, pair = low[fits], pair[fits]
    high = low.copy()
    for k, name in enumerate(SIZES):
        jump = 1 << 40 if name in grid.target.dims else 0  # more than any size: found by halving the jump
        while jump:
            alone = low.copy()  # the others at their least, so that no shape is left out
            alone[:, k] = high[:, k] + jump
            high[:, k] = np.where(grid.allowed(grid.table(alone, pair)), alone[:, k], high[:, k])
            jump //= 2
    return Boxes(low, high, pair)


def _better(grid: Lattice, index: np.ndarray, pair: np.ndarray, best: Best) -> Best:
    """The best of the shapes index [n, K], pair [n], and the best so far."""
    table = grid.table(index, pair)
    loss = np.where(grid.allowed(table), grid.loss(index, pair), np.inf)
    i = int(loss.argmin()) if len(loss) else -1
    return (
        ({n: int(values[i]) for n, values in table.items()}, float(loss[i])) if i >= 0 and loss[i] < best[1] else best
    )
