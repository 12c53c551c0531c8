"""FLOPs and parameters as smooth functions of the shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sovit.spec.shape import encoder_flops, encoder_params

BEND = 1e-20  # complex step: derivatives of the counts are exact


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
    counting: str = "exact"  # a key of shape.COUNTINGS

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def _sizes(self, dims: Mapping[str, np.ndarray]):
        """width, depth, mlp_dim, patches, patch_size."""
        width, depth, mlp_dim, patch, size = (
            dims.get(name, getattr(self, name)) for name in ("width", "depth", "mlp_dim", "patch_size", "image_size")
        )
        return width, depth, mlp_dim, (size / patch) ** 2, patch

    def flops(self, dims: Mapping[str, np.ndarray], head: bool):
        """Forward FLOPs of one image, task head included or not; real, complex or integer arrays."""
        width, depth, mlp_dim, patches, patch = self._sizes(dims)
        prefix = self.num_prefix_tokens
        if self.counting == "params_tokens":
            count = 2 * self.num_params(dims) * (patches + prefix)
        else:
            count = encoder_flops(width, depth, mlp_dim, patches, prefix, patch, self.pool, self.counting)
        if head:
            count = count + 2 * width * self.num_classes * (patches if self.pool == "none" else 1)
        return count * self.flops_scale

    def num_params(self, dims: Mapping[str, np.ndarray]):
        """Parameters of the encoder, task head apart; real, complex or integer arrays."""
        width, depth, mlp_dim, patches, patch = self._sizes(dims)
        count = encoder_params(width, depth, mlp_dim, patches, self.num_prefix_tokens, patch, self.pool)
        return count * self.params_scale

    def num_patches(self, dims: Mapping[str, np.ndarray]):
        """Patch tokens of one image, real."""
        return self._sizes(dims)[3]

    def log_flops(self, names, v: np.ndarray, head: bool) -> tuple[np.ndarray, np.ndarray]:
        """ln F [R] and its gradient [R, K] at v = ln x [R, K]."""
        return _bent(lambda dims: self.flops(dims, head), names, v)

    def log_params(self, names, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln N [R] and its gradient [R, K] at v = ln x [R, K]."""
        return _bent(self.num_params, names, v)

    def log_patches(self, names, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln of the patches of one image [R] and its gradient [R, K] at v = ln x [R, K]."""
        return _bent(lambda dims: self.num_patches(dims) + 0 * v[:, 0, None], names, v)


def _bent(count, names, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln count and its gradient at v = ln x [R, K], by complex step (a count is analytic in x: exact)."""
    bent = np.repeat(v[:, None].astype(complex), v.shape[1], 1)  # [R, K, K]
    bent += BEND * 1j * np.eye(v.shape[1])
    value = np.log(count({name: column for name, column in zip(names, np.exp(np.moveaxis(bent, 2, 0)))}))  # [R, K]
    return value[:, 0].real, value.imag / BEND
