"""One small interface over vision towers, whoever built them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit import UserError


@dataclass(frozen=True)
class Preprocess:
    """How an image in [0, 1] becomes the tower's input; `crop` and `crop_pct` say what was done to photographs first."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"  # or "bilinear"
    crop: str = "squash"  # the whole image made square, or "center": the short side resized, the middle cut out
    crop_pct: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Square images [B, 3, H, W] in [0, 1], of any size -> [B, 3, image_size, image_size], normalised."""
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode=self.resample, antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


@dataclass(frozen=True)
class Encoder:
    """A tower in eval mode, its parameters frozen. `depth` counts blocks; `grid` patches a side: N = grid^2 tokens.

    pooled: images -> [B, D], as the tower itself sums an image up (see `sovit.encoder.open.load_encoder`). It and `tokens`
    take what `preprocess` makes. Of what stands before the patch tokens (class token, registers) the tower knows.
    """

    name: str
    module: nn.Module
    width: int
    depth: int
    grid: int
    num_prefix_tokens: int
    preprocess: Preprocess
    hidden: Callable[[Tensor, int], Tensor]  # (images, block) -> output of that block, [B, prefix + N, D]
    final_norm: Callable[[Tensor], Tensor]
    pooled: Callable[[Tensor], Tensor]

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def tokens(self, images: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
        """Patch tokens [B, N, D] of `images` [B, 3, S, S] in raster order, behind block `layer` (0 the first, -1 the last).

        norm: through the tower's final norm, whichever layer is read. transformers' `hidden_states[-1]` stands before it,
        its `last_hidden_state` behind it. Raises UserError for a block that is not there.
        """
        if not -self.depth <= layer < self.depth:
            raise UserError(f"layer={layer} of {self.name} does not exist; give {-self.depth} to {self.depth - 1}")
        x = self.hidden(images, layer % self.depth)[:, self.num_prefix_tokens :]
        return self.final_norm(x) if norm else x
