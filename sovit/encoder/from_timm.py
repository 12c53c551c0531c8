"""A timm model as the base of a fine-tuning: its Shape, if it is of the family that is built here, and its weights."""

from __future__ import annotations

from typing import Any

import timm.data
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from sovit import UserError
from sovit.encoder.base import Base
from sovit.encoder.model import build
from sovit.encoder.open import open_timm
from sovit.encoder.weights import weights_digest
from sovit.spec.shape import POOLS, Shape

NOTHING = (nn.Identity, nn.Dropout, DropPath)  # modules that do nothing once training is over


def load_timm_base(name: str) -> Base:
    """Open `timm:NAME` (pretrained, where the network is open) or `timm:local-dir:FOLDER`, without its task head.

    The weights are those of `sovit.encoder.model.build` at the model's own size and give the model's own outputs, for images
    normalised by Base.mean and Base.std. Positions that a model has for its patches alone (no_embed_class) get rows of
    zeros for the tokens before them, which is the same. Raises UserError for what cannot be opened or is no ViT of the
    family.
    """
    model = open_timm(name.removeprefix("timm:"))
    shape = shape_of_timm(model, name)
    weights = {n: t.detach().float() for n, t in model.state_dict().items() if not n.startswith("head.")}
    if model.no_embed_class and shape.num_prefix_tokens:
        zeros = weights["pos_embed"].new_zeros(1, shape.num_prefix_tokens, shape.width)
        weights["pos_embed"] = torch.cat([zeros, weights["pos_embed"]], 1)
    record = timm.data.resolve_model_data_config(model)
    mean, std = tuple(record["mean"]), tuple(record["std"])
    return Base(name, shape, weights, weights_digest(weights), mean, std)


def shape_of_timm(model: Any, name: str = "the timm model") -> Shape:
    """The Shape of a timm VisionTransformer, task head apart.

    image_size is what the model really reads: a So400m/14 "at 384" cuts its images off at 378. Raises UserError, in one
    line with the first thing that differs, for a model that computes something else than `sovit.encoder.model.build(shape)`
    would with the same weights: another class, rotary or no positions, a norm before the blocks or before the mean,
    another activation or MLP, parallel blocks.
    """

    def refuse(found: str) -> UserError:
        return UserError(f"{name} is no plain ViT of the family: {found}; give one such as vit_base_patch16_224")

    kind = type(model)  # exactly this one: the classes made from it compute something else
    if kind is not VisionTransformer:
        raise refuse(f"it is a {kind.__name__}, not a VisionTransformer")
    block = model.blocks[0]
    rows, columns = model.patch_embed.grid_size
    pool = model.global_pool or "none"
    kind = type(block)
    if kind is not Block or not hasattr(block.mlp, "fc1"):
        raise refuse(f"its blocks are {kind.__name__}s of {type(getattr(block, 'mlp', block)).__name__}")
    if rows != columns or len(set(model.patch_embed.patch_size)) > 1:
        height, width = model.patch_embed.img_size
        raise UserError(f"{name} reads images of {height} x {width}; only square ones are read here, open it as such")
    if pool not in POOLS:
        raise refuse(f"it pools by {pool!r}, not by one of {', '.join(POOLS)}")
    if model.has_class_token != (pool == "token"):
        raise refuse(f"it has {'a' if model.has_class_token else 'no'} class token beside pool={pool}")
    if model.pool_include_prefix and model.num_prefix_tokens:
        raise refuse("it pools its registers with its patches")
    if model.pos_embed is None:
        raise refuse("it has no learned positions")
    patch_size = model.patch_embed.patch_size[0]
    shape = Shape(
        width=model.embed_dim,
        depth=len(model.blocks),
        mlp_dim=block.mlp.fc1.out_features,
        head_dim=block.attn.head_dim,
        patch_size=patch_size,
        image_size=rows * patch_size,
        pool=pool,
        num_registers=model.num_reg_tokens,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=hasattr(block.ls1, "gamma"),
    )
    with torch.device("meta"):
        ours = _parts(build(shape))
    theirs = _parts(model)
    for part in [*theirs, *ours]:
        if theirs.get(part) != ours.get(part):
            there, here = theirs.get(part, "missing"), ours.get(part, "missing")
            raise refuse(f"{part} is {there} there and {here} here")
    return shape


def _parts(model: nn.Module) -> dict[str, str]:
    """What a model computes with, by name: every module but the head with its own words for itself."""
    parts = {}
    for name, module in model.named_modules():
        if name and name != "head":
            words = "nothing" if isinstance(module, NOTHING) else f"{type(module).__name__}({module.extra_repr()})"
            parts[name] = words
    return parts
