"""The formats of an exported encoder: the config of a Shape in another library's words, and what these cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sovit import UserError
from sovit.spec.shape import Shape

LAYER_NORM_EPS = 1e-6  # timm's; ViTConfig's own default is 1e-12
ACTIVATION = "gelu"  # erf's, as in timm's blocks and MAP head; SiglipVisionConfig's own default is the tanh form


def config_of(shape: Shape, format: str) -> dict:
    """The configuration of an encoder of this shape, as the config.json of a format (FORMATS).

    Raises UserError for an unknown format, or a shape that the format cannot express.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    lacks = FORMATS[format].lacks(shape)
    if lacks:
        able = [name for name in FORMATS if not FORMATS[name].lacks(shape)]
        raise UserError(f"--format {format} cannot express {lacks}; use --format {' or '.join(able)}")
    return FORMATS[format].config(shape)


# what a format cannot say, in words, "" if it can say all ------------------------------------------------------------


def _nothing(shape: Shape) -> str:
    return ""


def _beyond_siglip(shape: Shape) -> str:
    """SigLIP and nanoVLM: patch tokens alone, biases everywhere."""
    found = {
        "a class token": shape.pool == "token",
        "registers": shape.num_registers > 0,
        "layer scale": shape.layer_scale,
        "qkv without bias": not shape.qkv_bias,
    }
    return ", ".join(words for words, there in found.items() if there)


def _beyond_vit(shape: Shape) -> str:
    """ViTModel: always a class token, and nothing pooled but it."""
    found = {
        f"pool={shape.pool}, which has no class token": shape.pool != "token",
        "registers": shape.num_registers > 0,
        "layer scale": shape.layer_scale,
    }
    return ", ".join(words for words, there in found.items() if there)


# configs -------------------------------------------------------------------------------------------------------------


def _timm_config(shape: Shape) -> dict:
    """config.json of timm: `timm.create_model('local-dir:DIR')` builds it."""
    size = [3, shape.image_size, shape.image_size]
    return {
        "architecture": "vit_base_patch16_224",  # the entry point; model_args override every dimension
        "num_classes": 0,
        "num_features": shape.width,
        "model_args": shape.timm_kwargs,
        "pretrained_cfg": {"tag": "sovit", "input_size": size, "fixed_input_size": True, "crop_pct": 1.0},
    }


def _transformers_config(shape: Shape, model_type: str, architecture: str) -> dict:
    return {
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


def _siglip_config(shape: Shape) -> dict:
    """config.json of SiglipVisionModel. `sovit_pool`, which it has no word for, is read by sovit.encoder.open alone."""
    return {
        **_transformers_config(shape, "siglip_vision_model", "SiglipVisionModel"),
        "hidden_act": ACTIVATION,
        "layer_norm_eps": LAYER_NORM_EPS,
        "vision_use_head": shape.pool == "map",
        "sovit_pool": shape.pool,
    }


def _vit_config(shape: Shape) -> dict:
    """config.json of ViTModel."""
    return {
        **_transformers_config(shape, "vit", "ViTModel"),
        "hidden_act": ACTIVATION,
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": shape.qkv_bias,
    }


def _sovit_config(shape: Shape) -> dict:
    """config.json of sovit.encoder.hf_model.SovitVisionModel."""
    return {
        **_transformers_config(shape, "sovit_vision", "SovitVisionModel"),
        "pool": shape.pool,
        "num_registers": shape.num_registers,
        "qkv_bias": shape.qkv_bias,
        "layer_scale": shape.layer_scale,
    }


def _nanovlm_config(shape: Shape) -> dict:
    """The vision fields of nanoVLM's VLMConfig (it reads patch tokens and has no pooling head)."""
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


class Format(NamedTuple):
    config: Callable[[Shape], dict]
    lacks: Callable[[Shape], str]


FORMATS = {
    "timm": Format(_timm_config, _nothing),
    "siglip": Format(_siglip_config, _beyond_siglip),
    "vit": Format(_vit_config, _beyond_vit),
    "nanovlm": Format(_nanovlm_config, _beyond_siglip),
    "sovit": Format(_sovit_config, _nothing),
}
