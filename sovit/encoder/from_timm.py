"""timm models: opened as a tower, or as the base of a fine-tuning if they are of the family that is built here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError, reason
from sovit.encoder.model import build
from sovit.encoder.tower import Encoder, Preprocess
from sovit.encoder.weights import weights_digest
from sovit.spec.named_shapes import Named
from sovit.spec.run import Run
from sovit.spec.shape import Shape

NOTHING = (nn.Identity, nn.Dropout, DropPath)  # modules that do nothing once training is over


def open_timm(name: str) -> Any:
    """A timm model with its weights and no task head: NAME, or local-dir:FOLDER. Raises UserError."""
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub client and safetensors raise a dozen unrelated kinds
        raise UserError(
            f"timm:{name} cannot be opened ({reason(error)}); check the name and the network, or give local-dir:FOLDER"
        ) from error


def timm_encoder(name: str, model: Any) -> Encoder:
    """An Encoder of a timm model of the Vision Transformer family. Raises UserError for another family.

    A patch that does not divide the image leaves its last rows and columns unread, as the network itself does.
    """
    _check_tower(name, model)
    record = timm.data.resolve_model_data_config(model)

    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size[0]

    def hidden(images: Tensor, block: int) -> Tensor:
        (found,) = model.forward_intermediates(
            images, [block], return_prefix_tokens=prefix > 0, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        x = found if torch.is_tensor(found) else torch.cat(found[::-1], 1)  # timm gives (patches, prefix)
        if x.shape[1] != prefix + grid**2:
            raise UserError(f"{name} gives {x.shape[1]} tokens, not {prefix} + {grid}^2; give a plain ViT")
        return x

    # a mean-pooled timm ViT has its final norm behind the mean; its tokens go through it one by one
    norm = model.norm if not isinstance(model.norm, nn.Identity) else getattr(model, "fc_norm", model.norm)

    def pooled(images: Tensor) -> Tensor:
        x = model.forward_head(model.forward_features(images), pre_logits=True)  # [B, D], or [B, N, D] unpooled
        return x if x.ndim == 2 else x[:, prefix:].mean(1)

    return Encoder(
        name=name,
        module=model.eval().requires_grad_(False),
        width=model.embed_dim,
        depth=len(model.blocks),
        grid=grid,
        num_prefix_tokens=prefix,
        preprocess=Preprocess(
            image_size=model.patch_embed.img_size[0],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            resample="bilinear" if record["interpolation"] == "bilinear" else "bicubic",
            crop="squash" if record["crop_mode"] == "squash" else "center",
            crop_pct=record["crop_pct"],
        ),
        hidden=hidden,
        final_norm=norm,
        pooled=pooled,
    )


def _check_tower(name: str, model: Any) -> None:
    """Refuse what is no row of blocks, each of which keeps every token of one patch embedding and its width."""
    method = getattr(model, "forward_intermediates", None)
    for found, wanted in (
        (isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList)), "list of blocks"),
        (getattr(getattr(model, "patch_embed", None), "grid_size", None), "grid of patches"),
        (
            method and "return_prefix_tokens" in inspect.signature(method).parameters,
            "full set of tokens behind a block",
        ),
        (hasattr(model, "norm"), "final norm"),
    ):
        if not found:
            said = f"a {type(model).__name__} has no {wanted}; give one such as vit_base_patch16_224"
            raise UserError(f"{name} is no plain Vision Transformer: {said}")
    channels = next(p for p in model.patch_embed.parameters() if p.ndim == 4).shape[1]  # of the first kernel
    if channels != 3:
        raise UserError(
            f"{name} reads images of in_chans={channels}; only red, green, blue is read here, give one of 3"
        )
    _check_square(name, model.patch_embed)


def _check_square(name: str, embed: Any) -> None:
    if any(len(set(sides)) > 1 for sides in (embed.img_size, embed.grid_size, embed.patch_size)):
        height, width = embed.img_size
        raise UserError(f"{name} reads images of {height} x {width}; only square ones are read here, open it as such")


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


def load_timm_base(name: str) -> Base:
    """Open `timm:NAME` or `timm:local-dir:FOLDER`, without its task head.

    The weights are those of `sovit.encoder.model.build` at the model's own size and give the model's own outputs. Positions
    that a model has for its patches alone (no_embed_class) get rows of zeros for the tokens before them, which is the same.
    Raises UserError for what cannot be opened or is no ViT of the family.
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

    image_size is what the model really reads: a So400m/14 "at 384" cuts its images off at 378. Raises UserError, with the
    first thing that differs, for a model that computes something else than `sovit.encoder.model.build(shape)` would.
    """

    found: object = _other_kind(model)
    if not found:
        _check_square(name, model.patch_embed)
        try:
            shape = _dimensions(model, model.global_pool or "none", model.num_reg_tokens)
            found = _difference(model, shape)
        except UserError as error:
            found = error
    if found:
        raise UserError(f"{name} is no plain ViT of the family: {found}; give one such as vit_base_patch16_224")
    return shape


def named_timm(name: str, **sizes: int) -> Named:
    """Count a timm model, built without weights; `sizes`: image_size and patch_size, where they are not its own.

    Parameters are the model's own. FLOPs are the shape's, once torch has counted the same. Raises UserError for a name
    that timm does not know, and for a model whose FLOPs are not those of a plain ViT of its dimensions.
    """
    words = {"image_size": "img_size", "patch_size": "patch_size"}
    if fixed := sorted(set(sizes) - set(words)):
        raise UserError(f"{fixed[0]} of {name} is timm's own; change image_size and patch_size alone, or write WxDxM")
    changes: dict[str, Any] = {words[field]: size for field, size in sizes.items()}
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0, **changes).eval()
    except Exception as error:  # timm raises a dozen unrelated kinds
        raise UserError(f"timm cannot build {name} ({reason(error)}); check the name and the sizes") from error
    _check_tower(name, model)
    size, prefix = model.patch_embed.img_size[0], model.num_prefix_tokens
    pool = "map" if model.global_pool == "map" else "token" if prefix else "avg"
    try:
        shape = _dimensions(model, pool, prefix - (pool == "token"))
    except UserError as error:
        raise UserError(f"{name} cannot be counted: {error}; give one such as vit_base_patch16_224") from None
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # so that every version of torch sees the two products
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size))
    beside = _other_kind(model) or _difference(model, shape)
    if counter.get_total_flops() != shape.forward_flops:
        flops = f"{counter.get_total_flops():,} FLOPs an image, not the {shape.forward_flops:,} of a plain ViT"
        raise UserError(f"{name} cannot be counted: {beside}, with {flops}; give one such as vit_base_patch16_224")
    more = sum(p.numel() for p in model.parameters()) - shape.num_params
    beside = beside or ("it has positions for the patches alone" if more else "")
    unread = f"its patches read {shape.image_size} of {size} px" if shape.image_size != size else ""
    return Named(shape, more, "; ".join(filter(None, (beside, unread))))


def _other_kind(model: Any) -> str:
    """In what the class of a model or of its blocks differs from ours, "" where it does not."""
    if type(model) is not VisionTransformer:  # exactly this one: the classes made from it compute something else
        return f"it is a {type(model).__name__}, not a VisionTransformer"
    block = model.blocks[0]
    mlp = getattr(block, "mlp", block)
    if type(block) is not Block or not hasattr(mlp, "fc1"):
        return f"its blocks are {type(block).__name__}s of {type(mlp).__name__}"
    return ""


def _dimensions(model: Any, pool: Any, num_registers: int) -> Shape:
    """The Shape of a model's dimensions, as its first block has them. Raises UserError where it has no such."""
    block, width, patch_size = model.blocks[0], model.embed_dim, model.patch_embed.patch_size[0]
    attention: Any = getattr(block, "attn", None)
    if not hasattr(getattr(block, "mlp", None), "fc1") or not hasattr(attention, "qkv"):
        raise UserError(f"its blocks are {type(block).__name__}s, without plain attention and MLP")
    return Shape(
        width=width,
        depth=len(model.blocks),
        mlp_dim=block.mlp.fc1.out_features,
        head_dim=getattr(attention, "head_dim", width // attention.num_heads),
        patch_size=patch_size,
        image_size=model.patch_embed.grid_size[0] * patch_size,
        pool=pool,
        num_registers=num_registers,
        qkv_bias=getattr(attention.qkv, "bias", None) is not None,
        layer_scale=hasattr(getattr(block, "ls1", None), "gamma"),
    )


def _difference(model: Any, shape: Shape) -> str:
    """The first part in which a model differs from what is built of its shape, "" where none does."""
    with torch.device("meta"):
        ours, theirs = _parts(build(shape)), _parts(model)
    for part in [*theirs, *ours]:
        if theirs.get(part) != ours.get(part):
            return f"{part} is {theirs.get(part, 'missing')} there and {ours.get(part, 'missing')} here"
    return ""


def _parts(model: Any) -> dict[str, object]:
    """What a model computes with, by name: every module but the head with its own words for itself."""
    parts: dict[str, object] = {
        "a class token": model.has_class_token,
        "a mean over registers": bool(model.pool_include_prefix and model.num_prefix_tokens),
        "learned positions": model.pos_embed is not None,
    }
    for name, module in model.named_modules():
        if name and name != "head":
            words = f"{type(module).__name__}({module.extra_repr()})"
            parts[name] = "nothing" if isinstance(module, NOTHING) else words
    return parts
