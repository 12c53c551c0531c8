"""An exported folder, loaded again by the library that it is for and compared with the trained model.

In float32 two right implementations differ in their last bits, as much as a wrong epsilon of a norm would. So they are
compared in float64, where equal arithmetic agrees to 1e-12.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sovit import UserError
from sovit.encoder.from_timm import timm_encoder
from sovit.encoder.open import load_encoder
from sovit.encoder.tower import Encoder
from sovit.spec.shape import Shape

TOLERANCE = 1e-9  # of the largest token, or pooled feature, where that is above 1
# of nanoVLM's tokens, in their standard deviation: it computes the tanh form of GELU where we have erf's
NANOVLM_TOLERANCE = 0.1
FOLDED_TOLERANCE = 1e-5  # beside that: the convolution that the normalisation is folded into is rounded to float32 anew
COMPARED_FLOPS = 4e12  # of one comparison, which shows at most 4 images and at least 1


def roundtrip_check(model: Any, shape: Shape, format: str, folder: Path) -> dict:
    """Compare `folder`, an export of `model`, with it on random images.

    Returns {"tokens_max_difference", "pooled_max_difference"}; of nanoVLM, which pools nothing, {"tokens_max_difference"
    with erf's GELU, "tokens_max_difference_with_tanh" with its own, "tokens_std"}. Raises RuntimeError where they differ by
    more than their tolerance, and UserError where nanoVLM's GELU moves the tokens too far.
    """
    count = max(1, min(4, int(COMPARED_FLOPS / shape.forward_flops)))
    size = (count, 3, shape.image_size, shape.image_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [B, 3, H, W] in [0, 1]
    ours = timm_encoder("trained", model.double())
    try:
        with torch.no_grad():
            return (_check_nanovlm if format == "nanovlm" else _check)(ours, format, folder, images)
    finally:
        model.float()  # float64 held the same numbers


def _check(ours: Encoder, format: str, folder: Path, images: Tensor) -> dict:
    """Read by `sovit.encoder.open`, and by transformers' own class as who loads it reads it."""
    whose = "timm's" if format == "timm" else "transformers'"
    theirs = load_encoder(f"{'timm:local-dir' if format == 'timm' else 'hf'}:{folder}")
    record, expected = theirs.preprocess, ours.preprocess
    # a processor of transformers says the side before its crop, in whole pixels
    if math.floor(expected.image_size / expected.crop_pct) == round(record.image_size / record.crop_pct):
        record = dataclasses.replace(record, crop_pct=expected.crop_pct)
    if record != expected:
        raise _differs(whose, "in its preprocessing")
    theirs.module.double()
    x = ours.preprocess(images)
    tokens, pooled = [theirs.tokens(x)], [theirs.pooled(x)]
    if format != "timm":
        output = theirs.module(pixel_values=x)
        tokens.append(output.last_hidden_state[:, theirs.num_prefix_tokens :])
        if output.pooler_output is not None:
            pooled.append(output.pooler_output)
    report = {}
    for what, wanted, read in (("tokens", ours.tokens(x), tokens), ("pooled", ours.pooled(x), pooled)):
        difference = max((other - wanted).abs().max().item() for other in read)
        if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise _differs(whose, f"by {difference:g} ({what})")
        report[f"{what}_max_difference"] = difference
    return report


def _check_nanovlm(ours: Encoder, format: str, folder: Path, images: Tensor) -> dict:
    """Read by the arithmetic of nanoVLM's ViT, which takes images in [0, 1]."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    wanted = ours.tokens(ours.preprocess(images))
    exact, own = (
        (nanovlm_tokens(tensors, config, images, gelu) - wanted).abs().max().item() for gelu in ("none", "tanh")
    )
    scale = wanted.std().item()
    if not exact <= FOLDED_TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise _differs("nanoVLM's", f"by {exact:g} beside its GELU")
    if not own <= NANOVLM_TOLERANCE * scale:
        raise UserError(
            f"nanoVLM computes the tanh form of GELU, which moves a token of this model by {own / scale:.3g} standard"
            f" deviations, more than {NANOVLM_TOLERANCE:g}; use --format siglip"
        )
    return {"tokens_max_difference": exact, "tokens_max_difference_with_tanh": own, "tokens_std": scale}


def nanovlm_tokens(tensors: dict[str, Tensor], config: dict, images: Tensor, approximate: str) -> Tensor:
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


def _differs(whose: str, how: str) -> RuntimeError:
    return RuntimeError(f"{whose} reload of the export differs {how}; nothing was written")
