"""FLOPs and parameters as smooth functions of the shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError
from sovit.spec.shape import DIMENSIONS, POOLS, encoder_flops, encoder_params


def positive(table: Mapping, name: str) -> np.ndarray:
    """A column as floats, all above zero. Raises UserError."""
    try:
        column = np.asarray(table[name], float)
    except (TypeError, ValueError):
        raise UserError(f"column {name!r} is not numeric; give numbers") from None
    bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
    if len(bad):
        raise UserError(
            f"{name}={float(column[bad[0]])} in row {bad[0]} is not a positive number; a power law needs one"
        )
    return column


@dataclass(frozen=True)
class Geometry:
    """What FLOPs and parameters need beyond the dimensions of a law: the values held fixed, and the task head.

    `flops_scale` is the data's own forward_flops over our count (geometric mean), `params_scale` the same of num_params;
    1 for rows that sovit wrote.
    """

    width: float | None = None
    depth: float | None = None
    mlp_dim: float | None = None
    patch_size: float | None = None
    image_size: float | None = None
    head_dim: int = 64
    pool: str = "avg"
    num_prefix_tokens: int = 0
    num_classes: int = 0
    flops_scale: float = 1.0
    params_scale: float = 1.0

    def _sizes(self, dims: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
        """width, depth, mlp_dim, patches, patch_size."""
        width, depth, mlp_dim, patch, size = (
            dims.get(name, getattr(self, name)) for name in ("width", "depth", "mlp_dim", "patch_size", "image_size")
        )
        return width, depth, mlp_dim, (size / patch) ** 2, patch

    def flops(self, dims: Mapping[str, np.ndarray], head: bool) -> Any:
        """Forward FLOPs of one image, task head included or not; real, complex or integer arrays."""
        width, depth, mlp_dim, patches, patch = self._sizes(dims)
        count = encoder_flops(width, depth, mlp_dim, patches, self.num_prefix_tokens, patch, self.pool)
        if head:
            count = count + 2 * width * self.num_classes * (patches if self.pool == "none" else 1)
        return count * self.flops_scale

    def num_params(self, dims: Mapping[str, np.ndarray]) -> Any:
        """Parameters of the encoder, task head apart; real, complex or integer arrays."""
        width, depth, mlp_dim, patches, patch = self._sizes(dims)
        count = encoder_params(width, depth, mlp_dim, patches, self.num_prefix_tokens, patch, self.pool)
        return count * self.params_scale

    def num_patches(self, dims: Mapping[str, np.ndarray]) -> Any:
        """Patch tokens of one image, real."""
        return self._sizes(dims)[3]


def geometry_of(table: Mapping, given: Mapping | None) -> Geometry | None:
    """FLOPs geometry: `given` over the most common value in the columns; an unsaid pool is the one that matches FLOPs.

    None where the rows do not say enough to count (no patch_size, or no width, as in language-model data).
    """
    whole = ("head_dim", "num_classes", "num_registers", "num_prefix_tokens")  # a ledger's columns are floats
    names = (*DIMENSIONS, *whole, "pool")
    known: dict = {}
    for name in names:
        said = [v for v in table[name].tolist() if v is not None] if name in table else []
        if said:
            values, counts = np.unique(said, return_counts=True)
            known[name] = values[counts.argmax()].item()
    known |= dict(given or {})
    unknown = [name for name in known if name not in names]
    if unknown:
        raise UserError(f"geometry has {unknown[0]!r}; it takes {', '.join(names)}")
    if any(known.get(name) is None for name in DIMENSIONS):
        return None
    known |= {name: int(known[name]) for name in whole if name in known}
    registers = known.pop("num_registers", 0)
    dims = {d: positive(table, d) for d in DIMENSIONS if d in table}
    forward = positive(table, "forward_flops") if "forward_flops" in table else None
    spent = None  # per image, head included: what tells "none" from "avg", whose encoders cost the same
    if {"train_flops", "num_examples"} <= set(table):
        spent = positive(table, "train_flops") / positive(table, "num_examples") / 3

    def with_pool(pool: str) -> Geometry:
        return Geometry(**{"num_prefix_tokens": registers + (pool == "token")} | known | {"pool": pool})

    def misfit(candidate: Geometry) -> float:
        off = np.abs(np.log(forward / candidate.flops(dims, head=False))).max()
        return round(off + (0.0 if spent is None else np.abs(np.log(spent / candidate.flops(dims, True))).max()), 9)

    if forward is None or "pool" in known:
        geometry = with_pool(known.get("pool", "avg"))
    else:
        geometry = min(map(with_pool, POOLS), key=misfit)
    params = positive(table, "num_params") if "num_params" in table else None
    return dataclasses.replace(
        geometry,
        flops_scale=_scale(forward, geometry.flops(dims, head=False)),
        params_scale=_scale(params, geometry.num_params(dims)),
    )


def _scale(said: np.ndarray | None, ours: Any) -> float:
    """What the rows' own counts [n] are of ours (geometric mean); 1 where they agree to 1e-6 or say nothing."""
    ratio = np.zeros(1) if said is None else np.log(said / ours)
    return float(np.exp(ratio.mean())) if np.abs(ratio).max() >= 1e-6 else 1.0
