"""Position embeddings and patch kernels at another image or patch size.

Always resize from the tensors that were trained or stored, straight to the size that is wanted: every function takes the
size it comes from and the size it goes to, so nothing needs a chain. One resize is the best that its matrix can do. A
chain is never better: of kernels, 8 -> 4 -> 8 keeps 4 x 4 numbers of 8 x 8, and 4 -> 8 -> 4 is not the first one either
(the images that it is right for were resized twice), although going up alone loses nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sovit import UserError
from sovit.spec.shape import Shape

# ours -> torch's, antialiased where they make smaller, as Pillow and timm resize images. "bicubic" is timm's choice for
# both tensors, "linear" FlexiViT's
METHODS = {"bicubic": "bicubic", "linear": "bilinear"}


def resize_positions(
    pos: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int = 0, method: str = "bicubic"
) -> Tensor:
    """Position embeddings [1, P + h*w, D] of one grid -> [1, P + h'*w', D] of another; grids are (rows, columns).

    The first `num_prefix` = P rows (class token, registers) stay as they are. "bicubic" is timm's
    (timm.layers.resample_abs_pos_embed, bit for bit in float32; that one computes in float32 whatever it is given, this
    one in float64 for float64), "linear" FlexiViT's (arXiv 2212.08013; jax.image.resize of big_vision
    models/proj/flexi/vit.py). At the same grid `pos` itself. Raises UserError for a grid that is not the tensor's, and
    for an unknown method.
    """
    _check_method(method)
    (rows, columns), (new_rows, new_columns) = _pair(old_grid, "grid"), _pair(new_grid, "grid")
    if pos.ndim != 3 or pos.shape[0] != 1 or pos.shape[1] != num_prefix + rows * columns:
        raise UserError(
            f"position embeddings {tuple(pos.shape)} are not of {num_prefix} prefix tokens and a grid of {rows} x"
            f" {columns}; give the grid that they were made for"
        )
    if (rows, columns) == (new_rows, new_columns):
        return pos
    grid = pos[:, num_prefix:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = grid.to(torch.promote_types(pos.dtype, torch.float32))  # half precision is too coarse to interpolate in
    grid = F.interpolate(grid, (new_rows, new_columns), mode=METHODS[method], align_corners=False, antialias=True)
    resized = grid.permute(0, 2, 3, 1).reshape(1, new_rows * new_columns, -1).to(pos.dtype)
    return torch.cat([pos[:, :num_prefix], resized], 1)


def resize_patches(kernel: Tensor, new_size: int | tuple[int, int], method: str = "bicubic") -> Tensor:
    """Patch kernel [D, C, p, p] -> [D, C, q, q] by the pseudo-inverse resize, FlexiViT, arXiv 2212.08013, section 3.4.

    With B the matrix that resizes a patch from p to q pixels a side, the new kernel is (B^T)^+ w. For q >= p a patch and
    its kernel resized together give the token that they gave before, exactly; for q < p this is the least-squares kernel
    over white-noise patches, |B^T w' - w| at its least. "bicubic" is timm's (timm.layers.resample_patch_embed), "linear"
    the paper's, but antialiased: without that, 16 -> 4 reads every second row of pixels alone. B is a Kronecker product
    of one matrix for rows and one for columns, so two small products do it, and their matrices are kept: cheap enough
    for every training step. Differentiable in the kernel; at the same size the kernel itself. Sides may differ:
    `new_size` is q or (rows, columns). Raises UserError for what is no kernel, no size and no method.
    """
    _check_method(method)
    if kernel.ndim != 4:
        raise UserError(
            f"a patch kernel has the shape [D, C, p, p], this tensor {tuple(kernel.shape)}; give the kernel"
        )
    new_rows, new_columns = _pair((new_size, new_size) if isinstance(new_size, int) else new_size, "patch size")
    rows, columns = kernel.shape[-2:]
    if (rows, columns) == (new_rows, new_columns):
        return kernel
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    down = _inverse_resize(rows, new_rows, method, dtype, kernel.device)  # [q, p]
    across = _inverse_resize(columns, new_columns, method, dtype, kernel.device)
    with torch.autocast(kernel.device.type, enabled=False):
        return (down @ kernel.to(dtype) @ across.T).to(kernel.dtype)


def resize_state(state: Mapping[str, Tensor], old: Shape, new: Shape, method: str = "bicubic") -> dict[str, Tensor]:
    """The weights of `new` from those of `old`: only pos_embed and patch_embed.proj.weight change, the rest is shared.

    "bicubic" gives what timm's create_model(..., img_size=, patch_size=) makes of a checkpoint. Raises UserError where
    the shapes differ in more than image_size and patch_size, or the weights are not of `old`.
    """
    if old.replace(image_size=new.image_size, patch_size=new.patch_size) != new:
        was, wanted = old.to_dict(), new.to_dict()
        name = next(n for n in was if was[n] != wanted[n] and n not in ("image_size", "patch_size"))
        raise UserError(
            f"{name}={was[name]} cannot become {wanted[name]} by resizing; only image_size and patch_size can change"
        )
    for name in ("pos_embed", "patch_embed.proj.weight"):
        if name not in state:
            raise UserError(f"the weights lack {name}; only a Vision Transformer with learned positions can be resized")
    kernel = state["patch_embed.proj.weight"]
    if kernel.shape[-2:] != (old.patch_size, old.patch_size):
        raise UserError(
            f"patch_embed.proj.weight {tuple(kernel.shape)} is not of patch_size={old.patch_size}; give the shape that"
            " the weights were made for"
        )
    before, after = old.image_size // old.patch_size, new.image_size // new.patch_size
    grids = (before, before), (after, after)
    return {
        **state,
        "pos_embed": resize_positions(state["pos_embed"], *grids, old.num_prefix_tokens, method),
        "patch_embed.proj.weight": resize_patches(kernel, new.patch_size, method),
    }


@functools.lru_cache(maxsize=256)
def _inverse_resize(old: int, new: int, method: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B^T)^+ [new, old] of the matrix B [new, old] that resizes a line of pixels; computed once, in float64."""
    with torch.inference_mode(False), torch.no_grad():  # kept from a validation, it must still serve training
        image = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]  # its rows resized are B itself
        resize = F.interpolate(image, (new, old), mode=METHODS[method], align_corners=False, antialias=True)[0, 0]  # B
        return torch.linalg.pinv(resize.T).to(dtype=dtype, device=device)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise UserError(f"method={method!r} of resizing is unknown; choose one of {', '.join(METHODS)}")


def _pair(size: tuple[int, int], what: str) -> tuple[int, int]:
    if len(size) != 2 or not all(isinstance(n, int) and n >= 1 for n in size):
        raise UserError(f"{what} {size!r} is not (rows, columns) of at least 1; give two whole numbers")
    return size[0], size[1]
