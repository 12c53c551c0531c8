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


def minimise(grid: Lattice, near: Mapping) -> tuple[dict, float]:
    """The shape of least predicted loss and that loss: exact. `near`: a guess of the sizes, which only saves time."""
    low, high, pair = _root(grid)
    guess = np.array([near[n] for n in SIZES]) / grid.steps
    corners = np.stack(np.meshgrid(*[[0, 1]] * len(SIZES), indexing="ij"), -1).reshape(-1, len(SIZES))
    first = np.clip(np.floor(guess).astype(int) + corners, grid.low, None)
    trial = np.concatenate([np.tile(first, (len(grid.pairs), 1)), low])
    trial_pair = np.concatenate([np.repeat(np.arange(len(grid.pairs)), len(first)), pair])
    best, best_loss = _better(grid, trial, trial_pair, None, np.inf)
    low, high, pair = _several(low, high, pair)
    bound = grid.loss(high, pair, paid=low)
    while len(low):
        take = np.argsort(bound, kind="stable")
        now, later = take[:CHUNK], take[CHUNK:]
        new_low, new_high, new_pair = _halves(low[now], high[now], pair[now])
        fits = grid.allowed(grid.table(new_low, new_pair))
        new_low, new_high, new_pair = new_low[fits], new_high[fits], new_pair[fits]
        middle = np.floor(np.sqrt(new_low * new_high)).astype(int)
        best, best_loss = _better(grid, middle, new_pair, best, best_loss)
        best, best_loss = _better(grid, new_low, new_pair, best, best_loss)
        new_low, new_high, new_pair = _several(new_low, new_high, new_pair)
        low, high, pair = (
            np.concatenate([a[later], b]) for a, b in ((low, new_low), (high, new_high), (pair, new_pair))
        )
        bound = np.concatenate([bound[later], grid.loss(new_high, new_pair, paid=new_low)])
        open_ = bound < best_loss * (1 - SLACK)
        low, high, pair, bound = low[open_], high[open_], pair[open_], bound[open_]
    return best, best_loss


def region(grid: Lattice, most: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """All shapes of loss at most `most`, as boxes: first and last index [n, K] and pair [n]. None beyond MAX_CELLS."""
    low, high, pair = _root(grid)
    found: list = []
    seen = 0
    while len(low):
        seen += len(low)
        if seen > MAX_CELLS:
            return None
        inside = (grid.loss(low, pair, paid=high) <= most) & grid.allowed(grid.table(high, pair))
        found.append((low[inside], high[inside], pair[inside]))
        open_ = ~inside & (low < high).any(1) & (grid.loss(high, pair, paid=low) <= most * (1 + SLACK))
        low, high, pair = _halves(low[open_], high[open_], pair[open_])
        fits = grid.allowed(grid.table(low, pair))
        low, high, pair = low[fits], high[fits], pair[fits]
    return tuple(np.concatenate(part) for part in zip(*found))  # type: ignore[return-value]


def every(low: np.ndarray, high: np.ndarray, pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every shape of the boxes of a region, one a row: index [n, K] and pair [n]."""
    ranges = zip(low, high + 1)
    parts = [
        np.stack(np.meshgrid(*map(np.arange, *ends), indexing="ij"), -1).reshape(-1, low.shape[1]) for ends in ranges
    ]
    return np.concatenate(parts), np.repeat(pair, [len(part) for part in parts])


def _root(grid: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One box for each pair: from the least sizes to the largest that any shape with a size can have."""
    low = np.tile(grid.low, (len(grid.pairs), 1))
    pair = np.arange(len(grid.pairs))
    fits = grid.allowed(grid.table(low, pair))
    low, pair = low[fits], pair[fits]
    high = low.copy()
    for k, name in enumerate(SIZES):
        if name not in grid.target.dims:
            continue
        jump = 1 << 40  # more than any size: found by halving the jump
        while jump:
            trial = high.copy()
            trial[:, k] += jump
            # the others at their least, so that no shape is left out
            alone = low.copy()
            alone[:, k] = trial[:, k]
            high = np.where(grid.allowed(grid.table(alone, pair))[:, None], trial, high)
            jump //= 2
    return low, high, pair


def _several(low, high, pair):
    """The boxes that hold more than one shape."""
    several = (low < high).any(1)
    return low[several], high[several], pair[several]


def _halves(low, high, pair):
    """Each box in two, along the size in which it is widest on the log scale."""
    rows = np.arange(len(low))
    k = np.argmax(high / low, axis=1)
    middle = np.floor(np.sqrt(low[rows, k] * high[rows, k].astype(float))).astype(int)
    middle = np.clip(middle, low[rows, k], high[rows, k] - 1)
    first_high, second_low = high.copy(), low.copy()
    first_high[rows, k], second_low[rows, k] = middle, middle + 1
    return np.concatenate([low, second_low]), np.concatenate([first_high, high]), np.concatenate([pair, pair])


def _better(grid: Lattice, index, pair, best, best_loss):
    table = grid.table(index, pair)
    fits = grid.allowed(table)
    if fits.any():
        loss = np.where(fits, grid.loss(index, pair), np.inf)
        i = int(loss.argmin())
        if loss[i] < best_loss:
            return {n: int(values[i]) for n, values in table.items()}, float(loss[i])
    return best, best_loss
