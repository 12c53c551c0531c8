"""Shape -> a timm VisionTransformer, always through timm.create_model, so that every trained model can be exported."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from sovit import UserError
from sovit.spec.shape import Shape


def build(
    shape: Shape, num_classes: int = 0, parametrisation: str = "timm", seed: int | None = None, mean_std=(0.5, 0.5)
) -> nn.Module:
    """Build the model: images [B, 3, H, W] -> logits [B, C], or [B, N, C] where nothing is pooled (pool="none").

    `num_classes=0` gives features in place of logits. Weights are a function of `seed` alone (the global generator is
    left as it was); without a seed they come from the global generator. Under `torch.device("meta")` nothing is
    allocated. `mean_std` is the normalisation of the images, written into the model's own preprocessing record.
    Raises UserError for a head on every token beside registers: it would read them too, and they have no labels.
    """
    if num_classes and shape.pool == "none" and shape.num_registers:
        raise UserError(
            f"num_registers={shape.num_registers} does not fit pool=none with a task head; use num_registers=0"
        )
    pretrained_cfg = dict(
        architecture="vit_base_patch16_224",  # timm's entry point; every dimension is overridden
        tag="sovit",
        input_size=(3, shape.image_size, shape.image_size),
        fixed_input_size=True,
        mean=(mean_std[0],) * 3,
        std=(mean_std[1],) * 3,
        crop_pct=1.0,
        num_classes=num_classes,
        first_conv="patch_embed.proj",
        classifier="head",
        license="mit",
    )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = timm.create_model(
            "vit_base_patch16_224", num_classes=num_classes, pretrained_cfg=pretrained_cfg, **shape.timm_kwargs
        )
        if parametrisation == "fan_in":
            init_fan_in(model)
    return model


def init_fan_in(model: Any) -> None:
    """Standard parametrisation: matrices ~ fan_in^-0.5, a block's two output matrices also x (2 depth)^-0.5.

    timm's own initialisation (0.02 everywhere) suits width 768 = 0.02^-2 / 3.3; at width 32 it starts every block
    almost silent.
    """
    depth = len(model.blocks)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            std = module.in_features**-0.5
            if name.startswith("blocks.") and name.endswith((".attn.proj", ".mlp.fc2")):
                std *= (2 * depth) ** -0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = model.patch_embed.proj
    std = projection.weight[0].numel() ** -0.5
    nn.init.trunc_normal_(projection.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(projection.bias)
    nn.init.normal_(model.pos_embed, std=0.1)
    if isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=0.02)
        nn.init.zeros_(model.head.bias)


def parameter_groups(model: Any, weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices decay; vectors, tokens and positions do not."""
    skip = model.no_weight_decay() | {"attn_pool.latent", "reg_token", "text.words.weight", "text.positions"}
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (keep if p.ndim < 2 or name in skip else decay).append(p)
    return [dict(params=decay, weight_decay=weight_decay), dict(params=keep, weight_decay=0.0)]
