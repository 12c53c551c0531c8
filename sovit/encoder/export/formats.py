"""The formats of an exported encoder: config, tensor names, and which shapes a format cannot express."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sovit import UserError
from sovit.spec.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("timm", "siglip", "vit", "nanovlm", "sovit")
LAYER_NORM_EPS = 1e-6  # timm's; ViTConfig's own default is 1e-12
ACTIVATION = "gelu"  # erf's, as in timm's blocks and MAP head; SiglipVisionConfig's own default is the tanh form
CLASSES = {  # format -> model type and class in transformers
    "siglip": ("siglip_vision_model", "SiglipVisionModel"),
    "vit": ("vit", "ViTModel"),
    "sovit": ("sovit_vision", "SovitVisionModel"),
}
# timm's name of a module or tensor -> the format's; "blocks" is what blocks are numbered under. timm's own format keeps
# the names, sovit's puts `trunk.` before them. ViT's names are those that transformers 4 and 5 save.
NAMES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "siglip": {
        "patch_embed.proj": "embeddings.patch_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "norm": "post_layernorm",
        "blocks": "encoder.layers",
        "norm1": "layer_norm1",
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "attn_pool.latent": "head.probe",
        "attn_pool.in_proj_weight": "head.attention.in_proj_weight",
        "attn_pool.in_proj_bias": "head.attention.in_proj_bias",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        "attn_pool.mlp.fc1": "head.mlp.fc1",
        "attn_pool.mlp.fc2": "head.mlp.fc2",
    },
    "vit": {
        "cls_token": "embeddings.cls_token",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "pos_embed": "embeddings.position_embeddings",
        "norm": "layernorm",
        "blocks": "encoder.layer",
        "norm1": "layernorm_before",
        "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "nanovlm": {
        "patch_embed.proj": "patch_embedding.conv",
        "pos_embed": "patch_embedding.position_embedding",
        "norm": "layer_norm",
        "blocks": "blocks",
        "norm1": "ln1",
        "attn.qkv": "attn.qkv_proj",
        "attn.proj": "attn.out_proj",
        "norm2": "ln2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}


def check_format(format: str) -> None:
    """Raise UserError for a format that is not one of FORMATS."""
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is unknown; choose one of {', '.join(FORMATS)}")


def config_of(shape: Shape, format: str) -> dict:
    """The configuration of an encoder of this shape, as the config.json of a format (FORMATS).

    Raises UserError for an unknown format, or a shape that the format cannot express.
    """
    check_format(format)
    if lacking := _lacking(shape, format):
        able = [name for name in FORMATS if not _lacking(shape, name)]
        raise UserError(f"--format {format} cannot express {lacking}; use --format {' or '.join(able)}")
    if format == "timm":  # `timm.create_model('local-dir:DIR')` builds it
        size = [3, shape.image_size, shape.image_size]
        return {
            "architecture": "vit_base_patch16_224",  # the entry point; model_args override every dimension
            "num_classes": 0,
            "num_features": shape.width,
            "model_args": shape.timm_kwargs,
            "pretrained_cfg": {"tag": "sovit", "input_size": size, "fixed_input_size": True, "crop_pct": 1.0},
        }
    if format == "nanovlm":  # the vision fields of its VLMConfig
        return {
            "vit_hidden_dim": shape.width,
            "vit_inter_dim": shape.mlp_dim,
            "vit_patch_size": shape.patch_size,
            "vit_img_size": shape.image_size,
            "vit_n_heads": shape.num_heads,
            "vit_n_blocks": shape.depth,
            "vit_dropout": 0.0,
            "vit_ln_eps": LAYER_NORM_EPS,
            "vit_cls_flag": False,
        }
    model_type, architecture = CLASSES[format]
    config = {
        "model_type": model_type,
        "architectures": [architecture],
        "dtype": "float32",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "num_channels": 3,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    if format == "sovit":
        own = ("pool", "num_registers", "qkv_bias", "layer_scale")
        return config | {name: getattr(shape, name) for name in own}
    config |= {"hidden_act": ACTIVATION, "layer_norm_eps": LAYER_NORM_EPS}
    if format == "vit":
        return config | {"qkv_bias": shape.qkv_bias}
    # SigLIP has no word for sovit_pool, which sovit.encoder alone reads
    return config | {"vision_use_head": shape.pool == "map", "sovit_pool": shape.pool}


def _lacking(shape: Shape, format: str) -> str:
    """What of a shape a format cannot say, in words; "" if it can say all.

    SigLIP and nanoVLM have patch tokens alone and biases everywhere; ViTModel always has a class token, and pools it.
    """
    found = {  # words -> whether the shape has it, formats without it
        f"pool={shape.pool}, which has no class token": (shape.pool != "token", ("vit",)),
        "a class token": (shape.pool == "token", ("siglip", "nanovlm")),
        "registers": (shape.num_registers > 0, ("siglip", "nanovlm", "vit")),
        "layer scale": (shape.layer_scale, ("siglip", "nanovlm", "vit")),
        "qkv without bias": (not shape.qkv_bias, ("siglip", "nanovlm")),
    }
    return ", ".join(words for words, (there, without) in found.items() if there and format in without)


def tensors_of(state: Mapping[str, Tensor], format: str, mean: float, std: float) -> dict[str, Tensor]:
    """The tensors of a trained encoder under the names of a format other than timm's, without the task head.

    state: of a timm VisionTransformer. mean, std: of the images; nanoVLM shows them as they are in [0, 1], so that
    (x - mean) / std is folded into its convolution.
    """
    import torch

    state = {name: tensor.detach() for name, tensor in state.items() if not name.startswith("head.")}
    if format == "sovit":
        return {f"trunk.{name}": tensor for name, tensor in state.items()}
    names, prefix = NAMES[format], ""
    if format == "nanovlm":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("attn_pool.")}
        kernel, bias = state["patch_embed.proj.weight"].double(), state["patch_embed.proj.bias"].double()
        state["patch_embed.proj.weight"] = (kernel / std).float()
        state["patch_embed.proj.bias"] = (bias - kernel.sum((1, 2, 3)) * mean / std).float()
    if format == "siglip":
        prefix = "vision_model."  # without it transformers 4 draws every tensor anew and only warns
        state["pos_embed"] = state["pos_embed"][0]
        for kind in ("weight", "bias") if "attn_pool.latent" in state else ():
            query, key_value = (state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv"))
            state[f"attn_pool.in_proj_{kind}"] = torch.cat([query, key_value])
    found = {}
    for name, tensor in state.items():
        name = name.replace("fc_norm.", "norm.")  # of a mean-pooled timm ViT, whose final norm stands behind the mean
        block, stem, kind = re.fullmatch(r"(?:blocks(\.\d+\.))?(.+?)(\.weight|\.bias)?", name).groups("")  # type: ignore[union-attr]
        place = f"{names['blocks']}{block}" if block else ""
        theirs = names[stem]
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            found[f"{prefix}{place}{part}{kind}"] = piece
    return found
