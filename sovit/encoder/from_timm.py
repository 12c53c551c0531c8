"""timm models: opened as a tower, or as the base of a fine-tuning if they are of the family that is built here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sovit import UserError, reason
from sovit.encoder.model import build
from sovit.encoder.tower import Encoder, Preprocess
from sovit.encoder.weights import weights_digest
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
    """An Encoder of a timm model of the Vision Transformer family. Raises UserError for another family."""
    if not all(hasattr(model, attribute) for attribute in ("blocks", "patch_embed", "forward_intermediates")):
        raise UserError(f"{name} is no plain Vision Transformer (no blocks or patch embedding); give one that is")
    record = timm.data.resolve_model_data_config(model)
    _check_square(name, model.patch_embed)

    def hidden(images: Tensor, block: int) -> Tensor:
        (found,) = model.forward_intermediates(
            images, [block], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return found if torch.is_tensor(found) else torch.cat(found[::-1], 1)  # timm gives (patches, prefix)

    # a mean-pooled timm ViT has its final norm behind the mean; its tokens go through it one by one
    norm = model.norm if not isinstance(model.norm, nn.Identity) else getattr(model, "fc_norm", model.norm)

    def pooled(images: Tensor) -> Tensor:
        x = model.forward_head(model.forward_features(images), pre_logits=True)  # [B, D], or [B, N, D] unpooled
        return x if x.ndim == 2 else x[:, model.num_prefix_tokens :].mean(1)

    return Encoder(
        name=name,
        module=model.eval().requires_grad_(False),
        width=model.embed_dim,
        depth=len(model.blocks),
        grid=model.patch_embed.grid_size[0],
        num_prefix_tokens=model.num_prefix_tokens,
        preprocess=Preprocess(
            image_size=record["input_size"][-1],
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

    def refused(found: object) -> UserError:
        return UserError(f"{name} is no plain ViT of the family: {found}; give one such as vit_base_patch16_224")

    kind = type(model)  # exactly this one: the classes made from it compute something else
    if kind is not VisionTransformer:
        raise refused(f"it is a {kind.__name__}, not a VisionTransformer")
    block = model.blocks[0]
    mlp, kind = getattr(block, "mlp", block), type(block)
    if kind is not Block or not hasattr(mlp, "fc1"):
        raise refused(f"its blocks are {kind.__name__}s of {type(mlp).__name__}")
    _check_square(name, model.patch_embed)
    patch_size = model.patch_embed.patch_size[0]
    try:
        shape = Shape(
            width=model.embed_dim,
            depth=len(model.blocks),
            mlp_dim=block.mlp.fc1.out_features,
            head_dim=block.attn.head_dim,
            patch_size=patch_size,
            image_size=model.patch_embed.grid_size[0] * patch_size,
            pool=model.global_pool or "none",
            num_registers=model.num_reg_tokens,
            qkv_bias=block.attn.qkv.bias is not None,
            layer_scale=hasattr(block.ls1, "gamma"),
        )
    except UserError as error:
        raise refused(error) from None
    with torch.device("meta"):
        ours, theirs = _parts(build(shape)), _parts(model)
    for part in [*theirs, *ours]:
        if theirs.get(part) != ours.get(part):
            raise refused(f"{part} is {theirs.get(part, 'missing')} there and {ours.get(part, 'missing')} here")
    return shape


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
