"""FLOPs and parameters as smooth functions of the shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError
from sovit.spec.shape import DIMENSIONS, POOLS, encoder_flops, encoder_params

BEND = 1e-20  # complex step: derivatives of the counts are exact


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

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

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

    def log_flops(self, names: Sequence[str], v: np.ndarray, head: bool) -> tuple[np.ndarray, np.ndarray]:
        """ln F [R] and its gradient [R, K] at v = ln x [R, K]."""
        return _bent(lambda dims: self.flops(dims, head), names, v)

    def log_params(self, names: Sequence[str], v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln N [R] and its gradient [R, K] at v = ln x [R, K]."""
        return _bent(self.num_params, names, v)

    def log_patches(self, names: Sequence[str], v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln of the patches of one image [R] and its gradient [R, K] at v = ln x [R, K]."""
        return _bent(lambda dims: self.num_patches(dims) + 0 * v[:, 0, None], names, v)


def _bent(count: Callable[[dict], Any], names: Sequence[str], v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln count and its gradient at v = ln x [R, K], by complex step (a count is analytic in x: exact)."""
    bent = np.repeat(v[:, None].astype(complex), v.shape[1], 1)  # [R, K, K]
    bent += BEND * 1j * np.eye(v.shape[1])
    value = np.log(count({name: column for name, column in zip(names, np.exp(np.moveaxis(bent, 2, 0)))}))  # [R, K]
    return value[:, 0].real, value.imag / BEND


def geometry_of(table: Mapping, given: Mapping | None) -> Geometry | None:
    """FLOPs geometry: `given` over the most common value in the columns; an unsaid pool is the one that matches FLOPs.

    None where the rows do not say enough to count (no patch_size, or no width, as in language-model data).
    """
    known: dict = {}
    names = (*DIMENSIONS, "head_dim", "num_classes", "pool", "num_registers", "num_prefix_tokens")
    for name in names:
        given_here = [v for v in table[name].tolist() if v is not None] if name in table else []
        if given_here:
            values, counts = np.unique(given_here, return_counts=True)
            known[name] = values[counts.argmax()].item()
    known |= dict(given or {})
    for name in ("head_dim", "num_classes", "num_registers", "num_prefix_tokens"):  # a ledger's columns are floats
        if name in known:
            known[name] = int(known[name])
    unknown = [name for name in known if name not in (*names, "flops_scale", "params_scale")]
    if unknown:
        raise UserError(f"geometry has {unknown[0]!r}; it takes {', '.join(names)}")
    if any(known.get(name) is None for name in DIMENSIONS):
        return None
    registers = known.pop("num_registers", 0)

    def with_pool(pool: str) -> Geometry:
        return Geometry(**({"num_prefix_tokens": registers + (pool == "token")} | known | {"pool": pool}))

    dims = {d: positive(table, d) for d in DIMENSIONS if d in table}

    def scaled(geometry: Geometry, flops_scale: float) -> Geometry:
        """With what the rows' own counts are of ours, where that is not 1 to 1e-6."""
        params = np.zeros(1)
        if "num_params" in table and "params_scale" not in known:
            params = np.log(positive(table, "num_params") / geometry.num_params(dims))
        if np.abs(params).max() >= 1e-6:
            geometry = dataclasses.replace(geometry, params_scale=float(np.exp(params.mean())))
        return geometry if flops_scale == 1 else dataclasses.replace(geometry, flops_scale=flops_scale)

    if "forward_flops" not in table:
        return scaled(with_pool(known.get("pool", "avg")), 1.0)
    forward = positive(table, "forward_flops")
    spent = None  # per image, head included: what tells "none" from "avg", whose encoders cost the same
    if {"train_flops", "num_examples"} <= set(table):
        spent = positive(table, "train_flops") / positive(table, "num_examples") / 3
    tried: list[tuple] = []
    for pool in [known["pool"]] if "pool" in known else POOLS:
        candidate = with_pool(pool)
        ratio = np.log(forward / candidate.flops(dims, head=False))
        off = [np.abs(ratio).max(), 0.0 if spent is None else np.abs(np.log(spent / candidate.flops(dims, True))).max()]
        tried.append((round(sum(off), 9), len(tried), candidate, off[0], float(np.exp(ratio.mean()))))
    _, _, geometry, off, scale = min(tried, key=lambda t: t[:2])
    return scaled(geometry, 1.0 if off < 1e-6 or "flops_scale" in known else scale)
