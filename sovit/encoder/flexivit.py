"""One trunk at several patch sizes (FlexiViT, arXiv 2212.08013): its weights, stored at one size, are read at any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sovit.encoder.model import build
from sovit.encoder.resize import resize_state
from sovit.spec.run import Run
from sovit.spec.shape import Shape

METHOD = "linear"  # of resizing, as in the paper


def at_patch_size(model: Any, shape: Shape, patch_size: int) -> Callable[[Tensor], Tensor]:
    """images -> what `model`, of `shape`, gives when it reads them by patches of another size.

    Kernel and positions are resized from those of the model at every call, the positions linearly as in the paper, so that
    gradients reach the stored ones and nothing is resized twice. At the shape's own size it is the model itself.
    """
    if patch_size == shape.patch_size:
        return model
    new = shape.replace(patch_size=patch_size)
    with torch.device("meta"):
        form = build(new, model.num_classes)  # the modules at the new size, without weights

    def forward(images: Tensor) -> Tensor:
        weights = resize_state(dict(model.named_parameters()), shape, new, METHOD)
        return torch.func.functional_call(form, weights, (images,), strict=True)

    return forward


def resize_method(run: Run | None) -> str:
    """How the weights of a run are resized after it: as they were in it, else as timm does it (see sovit.encoder.resize)."""
    return METHOD if run and run.recipe.patch_sizes else "bicubic"
