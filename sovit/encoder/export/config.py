"""The formats of an exported encoder: the config of a Shape in another library's words, and what these cannot say."""

from __future__ import annotations

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
    if lacking := _lacking(shape, format):
        able = [name for name in FORMATS if not _lacking(shape, name)]
        raise UserError(f"--format {format} cannot express {lacking}; use --format {' or '.join(able)}")
    return FORMATS[format](shape)


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
    """config.json of SiglipVisionModel; `sovit_pool`, for which it has no word, is read by sovit.encoder alone."""
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


FORMATS = {
    "timm": _timm_config,
    "siglip": _siglip_config,
    "vit": _vit_config,
    "nanovlm": _nanovlm_config,
    "sovit": _sovit_config,
}
