"""An exported folder, loaded again by the library that it is for and compared with the trained model.

In float32 two right implementations differ in their last bits, as much as a wrong epsilon of a norm would. So they are
compared in float64, where equal arithmetic agrees to 1e-12.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sovit import UserError
from sovit.encoder.from_timm import timm_encoder
from sovit.encoder.open import load_encoder
from sovit.encoder.tower import Encoder
from sovit.spec.shape import Shape

TOLERANCE = 1e-9  # of the largest token, or pooled feature, where that is above 1
# of nanoVLM's tokens, in their standard deviation: it computes the tanh form of GELU where we have erf's
NANOVLM_TOLERANCE = 0.1
COMPARED_FLOPS = 4e12  # of one comparison, which shows at most 4 images and at least 1


def roundtrip_check(model: Any, shape: Shape, format: str, folder: Path) -> dict:
    """Compare `folder`, an export of `model`, with it on random images.

    Returns {"tokens_max_difference", "pooled_max_difference"}; of nanoVLM, which pools nothing, {"tokens_max_difference",
    "tokens_std"} with its tanh form of GELU in the model. Raises RuntimeError where they differ by more than TOLERANCE, and
    UserError where nanoVLM's GELU moves the tokens too far.
    """
    count = max(1, min(4, int(COMPARED_FLOPS / shape.forward_flops)))
    size = (count, 3, shape.image_size, shape.image_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [B, 3, H, W] in [0, 1]
    ours = timm_encoder("trained", model.double())
    try:
        with torch.no_grad():
            return _check_nanovlm(ours, images) if format == "nanovlm" else _check(ours, format, folder, images)
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


def _check_nanovlm(ours: Encoder, images: Tensor) -> dict:
    """No library reads the folder, so what is measured is the one thing that nanoVLM computes otherwise."""
    x = ours.preprocess(images)
    exact = ours.tokens(x)
    for block in ours.module.blocks:  # type: ignore[union-attr]
        block.mlp.act = nn.GELU("tanh")  # type: ignore[union-attr]
    difference, scale = (ours.tokens(x) - exact).abs().max().item(), exact.std().item()
    for block in ours.module.blocks:  # type: ignore[union-attr]
        block.mlp.act = nn.GELU()  # type: ignore[union-attr]
    if not difference <= NANOVLM_TOLERANCE * scale:
        raise UserError(
            f"nanoVLM computes the tanh form of GELU, which moves a token of this model by {difference / scale:.3g}"
            f" standard deviations, more than {NANOVLM_TOLERANCE:g}; use --format siglip"
        )
    return {"tokens_max_difference": difference, "tokens_std": scale}


def _differs(whose: str, how: str) -> RuntimeError:
    return RuntimeError(f"{whose} reload of the export differs {how}; nothing was written")
