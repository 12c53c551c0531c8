"""Position embeddings and patch kernels at another image or patch size.

Always resize from the tensors that were trained or stored, straight to the size that is wanted. A chain is never better:
of kernels, 8 -> 4 -> 8 keeps 4 x 4 numbers of 8 x 8, and 4 -> 8 -> 4 is not the first one either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from sovit import UserError
from sovit.encoder.model import build
from sovit.spec.run import Run
from sovit.spec.shape import Shape

# ours -> torch's, antialiased where they make smaller, as Pillow and timm resize images. "bicubic" is timm's choice for
# both tensors, "linear" FlexiViT's
METHODS = {"bicubic": "bicubic", "linear": "bilinear"}


def resize_positions(pos: Tensor, old: int, new: int, num_prefix: int, method: str = "bicubic") -> Tensor:
    """Position embeddings [1, P + old^2, D] -> [1, P + new^2, D], computed in float32.

    The first `num_prefix` = P rows (class token, registers) stay as they are. "bicubic" is timm's, "linear" FlexiViT's
    (arXiv 2212.08013; jax.image.resize of big_vision models/proj/flexi/vit.py). At the same size `pos` itself.
    """
    return resample_abs_pos_embed(pos, [new] * 2, [old] * 2, num_prefix, interpolation=METHODS[method])


def resize_patches(kernel: Tensor, new_size: int, method: str = "bicubic") -> Tensor:
    """Patch kernel [D, C, p, p] -> [D, C, q, q] by the pseudo-inverse resize, FlexiViT, arXiv 2212.08013, section 3.4.

    With B the matrix that resizes a patch from p to q pixels a side, the new kernel is (B^T)^+ w. For q >= p a patch and
    its kernel resized together give the token that they gave before, exactly; for q < p this is the least-squares kernel
    over white-noise patches. "bicubic" is timm's (timm.layers.resample_patch_embed), "linear" the paper's, but
    antialiased: without that, 16 -> 4 reads every second row of pixels alone. B is a Kronecker product of one matrix for
    rows and one for columns, which is kept: cheap enough for every training step. At the same size the kernel itself.
    """
    if kernel.shape[-1] == new_size:
        return kernel
    dtype = torch.promote_types(kernel.dtype, torch.float32)  # half precision is too coarse
    inverse = _inverse_resize(kernel.shape[-1], new_size, method, dtype, kernel.device)  # [q, p]
    with torch.autocast(kernel.device.type, enabled=False):
        return (inverse @ kernel.to(dtype) @ inverse.T).to(kernel.dtype)


def resize_state(state: Mapping[str, Tensor], old: Shape, new: Shape, method: str = "bicubic") -> dict[str, Tensor]:
    """The weights of `new` from those of `old`: only pos_embed and patch_embed.proj.weight change, the rest is shared.

    "bicubic" gives what timm's create_model(..., img_size=, patch_size=) makes of a checkpoint. Raises UserError where
    the shapes differ in more than image_size and patch_size, or the weights are not of `old`.
    """
    was, wanted = old.to_dict(), new.to_dict()
    for name in was:
        if was[name] != wanted[name] and name not in ("image_size", "patch_size"):
            raise UserError(
                f"{name}={was[name]} cannot become {wanted[name]} by resizing; only image_size and patch_size can change"
            )
    kernel, pos = state["patch_embed.proj.weight"], state["pos_embed"]
    if kernel.shape[-1] != old.patch_size or pos.shape[1] != old.num_prefix_tokens + old.num_patches:
        raise UserError(
            f"a kernel {tuple(kernel.shape)} and positions {tuple(pos.shape)} are not of patch_size={old.patch_size},"
            f" image_size={old.image_size}; give the shape that the weights were made for"
        )
    before, after = (shape.image_size // shape.patch_size for shape in (old, new))
    return {
        **state,
        "pos_embed": resize_positions(pos, before, after, old.num_prefix_tokens, method),
        "patch_embed.proj.weight": resize_patches(kernel, new.patch_size, method),
    }


def at_patch_size(model: Any, shape: Shape, patch_size: int) -> Callable[[Tensor], Tensor]:
    """images -> what `model`, of `shape`, gives when it reads them by patches of another size.

    One trunk at several patch sizes (FlexiViT, arXiv 2212.08013): kernel and positions are resized from those of the model
    at every call, linearly as in the paper, so that gradients reach the stored ones and nothing is resized twice. At the
    shape's own size it is the model itself.
    """
    if patch_size == shape.patch_size:
        return model
    new = shape.replace(patch_size=patch_size)
    with torch.device("meta"):
        form = build(new, model.num_classes)  # the modules at the new size, without weights

    def forward(images: Tensor) -> Tensor:
        weights = resize_state(dict(model.named_parameters()), shape, new, "linear")
        return torch.func.functional_call(form, weights, (images,), strict=True)

    return forward


def resize_method(run: Run | None) -> str:
    """How the weights of a run are resized after it: as they were in it, else as timm does it."""
    return "linear" if run and run.recipe.patch_sizes else "bicubic"


@functools.lru_cache(maxsize=256)
def _inverse_resize(old: int, new: int, method: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B^T)^+ [new, old] of the matrix B [new, old] that resizes a line of pixels; computed once, in float64."""
    with torch.inference_mode(False), torch.no_grad():  # kept from a validation, it must still serve training
        image = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]  # its rows resized are B itself
        resize = F.interpolate(image, (new, old), mode=METHODS[method], align_corners=False, antialias=True)[0, 0]  # B
        return torch.linalg.pinv(resize.T).to(dtype=dtype, device=device)
