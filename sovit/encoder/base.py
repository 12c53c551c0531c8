"""The weights that a fine-tuning starts from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sovit.spec.run import Run
from sovit.spec.shape import Shape


@dataclass(frozen=True)
class Base:
    """Where a fine-tuning starts: `weights` by name in timm, on the CPU, at `shape`'s size.

    run: the base's own, None of a timm model, whose weights have no task head and whose images were normalised by
    `mean` and `std`. num_examples: of the base itself; train_flops: of it and all that it was fine-tuned from; None where
    unknown.
    """

    name: str
    shape: Shape
    weights: dict[str, Tensor]
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: Run | None = None
    train_flops: int | None = None
    num_examples: int | None = None

    @property
    def columns(self) -> dict:
        """What the row of a fine-tuning says of where it began."""
        return {
            "base_image_size": self.shape.image_size,
            "base_patch_size": self.shape.patch_size,
            "base_examples": self.num_examples,
            "base_train_flops": self.train_flops,
        }
