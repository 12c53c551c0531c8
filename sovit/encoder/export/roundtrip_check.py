"""An exported folder, loaded again by the library that it is for and compared with the trained model.

In float32 two right implementations differ in their last bits, as much as a wrong epsilon of a norm would. So what is
judged is the same comparison in float64, where equal arithmetic agrees to 1e-12.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sovit import UserError
from sovit.encoder.from_timm import timm_encoder
from sovit.encoder.open import load_encoder
from sovit.spec.shape import Shape

TOLERANCE = 1e-9  # in float64, of the largest token, or pooled feature, where that is above 1
TIMM_WRAPPER_TOLERANCE = 1e-5  # of transformers' TimmWrapper, in float32: it may choose another attention kernel
# of nanoVLM's tokens, in their standard deviation: it computes the tanh form of GELU where we have erf's
NANOVLM_TOLERANCE = 0.1
FOLDED_TOLERANCE = 1e-5  # beside that: the convolution that the normalisation is folded into is rounded to float32 anew
COMPARED_FLOPS = 4e12  # of one comparison, which shows at most 4 images and at least 1


def check_timm(model: Any, shape: Shape, folder: Path) -> dict:
    """{"timm_max_difference", "transformers_max_difference" (None where transformers is not installed)}"""
    images = _images(shape)
    with torch.no_grad():
        reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        by_timm = (reloaded(images) - model(images)).abs().max().item()
        by_transformers = None
        if importlib.util.find_spec("transformers"):
            tower = _transformers().AutoModel.from_pretrained(folder).eval()
            features = tower(pixel_values=images).last_hidden_state
            by_transformers = (features - model.forward_features(images)).abs().max().item()
        ours, theirs = timm_encoder("trained", model), load_encoder(f"timm:local-dir:{folder}")
        same_tokens = torch.equal(theirs.tokens(images), ours.tokens(images))
    if by_timm != 0.0:
        raise _differs("timm's", f"by {by_timm:g}")
    if by_transformers is not None and not by_transformers <= TIMM_WRAPPER_TOLERANCE:
        raise _differs("transformers'", f"by {by_transformers:g}")
    if not same_tokens or theirs.preprocess != ours.preprocess:
        raise _differs("timm's", "in its preprocessing" if same_tokens else "in its tokens")
    return {"timm_max_difference": by_timm, "transformers_max_difference": by_transformers}


def _transformers() -> Any:
    """transformers, which reports a task head as unexpected, for which an encoder has no use, silenced."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_transformers(model: Any, shape: Shape, folder: Path) -> dict:
    """Largest differences of tokens [B, N, D] and pooled features [B, D], in float32 and in float64.

    Both ways of reading the folder are compared, transformers' own class and `sovit.encoder.open`; of SigLIP without its
    head, which has no pooled features of its own, sovit.encoder.open's stand alone.
    """
    version = _transformers().__version__
    ours, theirs = timm_encoder("trained", model), load_encoder(f"hf:{folder}")
    # a processor says the side before its crop, in whole pixels
    crop_pct = theirs.preprocess.crop_pct
    if math.floor(shape.image_size / ours.preprocess.crop_pct) == round(shape.image_size / crop_pct):
        ours = dataclasses.replace(ours, preprocess=dataclasses.replace(ours.preprocess, crop_pct=crop_pct))
    if theirs.preprocess != ours.preprocess:
        raise _differs("transformers'", "in its preprocessing")
    images = _images(shape)
    report: dict = {"transformers": version, "tolerance_float64": TOLERANCE}
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_float64")):
        batch = images.to(dtype)
        model.to(dtype)
        theirs.module.to(dtype)
        with torch.no_grad():
            tokens, pooled = ours.tokens(batch), ours.pooled(batch)
            output = theirs.module(pixel_values=batch)
            of_class = output.last_hidden_state[:, theirs.num_prefix_tokens :]
            found = {
                "tokens": (tokens, [of_class, theirs.tokens(batch)]),
                "pooled": (pooled, [theirs.pooled(batch)]),
            }
            if output.pooler_output is not None:
                found["pooled"][1].append(output.pooler_output)
        for what, (expected, read) in found.items():
            difference = max((other - expected).abs().max().item() for other in read)
            report[f"{what}_max_difference{suffix}"] = difference
            if dtype == torch.float64 and not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise _differs("transformers'", f"by {difference:g} in float64 ({what})")
    model.float()  # float64 held the same numbers
    return report


def check_nanovlm(model: Any, shape: Shape, folder: Path) -> dict:
    """Largest differences of the tokens that the arithmetic of nanoVLM's ViT makes of the written tensors.

    With erf's GELU in place of its own the tokens must be ours, in float64, images in [0, 1] for it and normalised for us;
    with its own, the tanh form, they are as near as it can come ("tokens_max_difference").
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    ours = timm_encoder("trained", model.double())
    images = _images(shape).double().sigmoid()  # in [0, 1]
    with torch.no_grad():
        expected = ours.tokens(ours.preprocess(images))
        exact, own = (
            (nanovlm_tokens(tensors, config, images, approximate) - expected).abs().max().item()
            for approximate in ("none", "tanh")
        )
    model.float()
    scale = expected.std().item()
    if not exact <= FOLDED_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise _differs("nanoVLM's", f"by {exact:g} beside its GELU")
    if not own <= NANOVLM_TOLERANCE * scale:
        raise UserError(
            f"nanoVLM computes the tanh form of GELU, which moves a token of this model by {own / scale:.3g} standard"
            f" deviations, more than {NANOVLM_TOLERANCE:g}; use --format siglip"
        )
    return {
        "tokens_max_difference": own,
        "tokens_max_difference_with_erf_float64": exact,
        "tokens_std": scale,
        "tolerance_in_std": NANOVLM_TOLERANCE,
    }


def nanovlm_tokens(tensors: dict[str, Tensor], config: dict, images: Tensor, approximate: str = "tanh") -> Tensor:
    """What nanoVLM's ViT (huggingface/nanoVLM, models/vision_transformer.py) makes of images [B, 3, S, S]: [B, N, D]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], config["vit_ln_eps"])

    embed = "patch_embedding.conv"
    x = F.conv2d(images, tensors[f"{embed}.weight"], tensors[f"{embed}.bias"], stride=config["vit_patch_size"])
    x = x.flatten(2).transpose(1, 2) + tensors["patch_embedding.position_embedding"]  # [B, N, D]
    for i in range(config["vit_n_blocks"]):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.ln1"), f"{block}.attn.qkv_proj").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (config["vit_n_heads"], -1)).transpose(1, 2) for part in qkv)  # [B, H, N, D/H]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.attn.out_proj")
        hidden = F.gelu(linear(norm(x, f"{block}.ln2"), f"{block}.mlp.fc1"), approximate=approximate)
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "layer_norm")


def _images(shape: Shape) -> Tensor:
    """A few random images, as they stand behind the normalisation."""
    count = max(1, min(4, int(COMPARED_FLOPS / shape.forward_flops)))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, shape.image_size, shape.image_size, generator=generator)  # [B, 3, H, W]


def _differs(whose: str, how: str) -> RuntimeError:
    return RuntimeError(f"{whose} reload of the export differs {how}; nothing was written")


CHECKS: dict[str, Callable[[Any, Shape, Path], dict]] = {
    "timm": check_timm,
    "siglip": check_transformers,
    "vit": check_transformers,
    "sovit": check_transformers,
    "nanovlm": check_nanovlm,
}
