"""The tensors of a trained encoder under the names that other libraries give them.

timm's need no renaming: its names are ours. `state` is always the state dict of a timm VisionTransformer of `shape`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sovit.spec.shape import Shape

Tensors = Mapping[str, Tensor]  # by name
BLOCK = {  # format -> the names of a block's BLOCK_PARTS; ViT's as transformers 4 and 5 save them
    "siglip": ("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    "vit": ("layernorm_before", "layernorm_after", "attention.output.dense", "intermediate.dense", "output.dense"),
    "nanovlm": ("ln1", "ln2", "attn.out_proj", "mlp.fc1", "mlp.fc2"),
}
BLOCK_PARTS = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
MAP_HEAD = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
QUERY_KEY_VALUE = {
    "siglip": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "vit": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "nanovlm": ("attn.qkv_proj",),
}


def siglip_tensors(state: Tensors, shape: Shape) -> dict[str, Tensor]:
    """With the prefix `vision_model.`: without it transformers 4 draws every tensor anew and only warns."""
    named = {
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embedding.bias": state["patch_embed.proj.bias"],
        "embeddings.position_embedding.weight": state["pos_embed"][0],
        **_renamed(state, _final_norm(state), "post_layernorm"),
        **_blocks(state, shape, "siglip", "encoder.layers"),
    }
    if shape.pool == "map":
        named["head.probe"] = state["attn_pool.latent"]
        for kind in ("weight", "bias"):
            query_key_value = [state[f"attn_pool.{part}.{kind}"] for part in ("q", "kv")]
            named[f"head.attention.in_proj_{kind}"] = torch.cat(query_key_value)
        for ours, theirs in MAP_HEAD.items():
            named |= _renamed(state, f"attn_pool.{ours}", f"head.{theirs}")
    return {f"vision_model.{name}": tensor for name, tensor in named.items()}


def vit_tensors(state: Tensors, shape: Shape) -> dict[str, Tensor]:
    return {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        **_renamed(state, "patch_embed.proj", "embeddings.patch_embeddings.projection"),
        **_renamed(state, _final_norm(state), "layernorm"),
        **_blocks(state, shape, "vit", "encoder.layer"),
    }


def sovit_tensors(state: Tensors, shape: Shape) -> dict[str, Tensor]:
    return {f"trunk.{name}": tensor for name, tensor in state.items() if not name.startswith("head.")}


def nanovlm_tensors(state: Tensors, shape: Shape, mean: float, std: float) -> dict[str, Tensor]:
    """The ViT of nanoVLM. It is shown images in [0, 1] as they are, so (x - mean) / std is folded into its convolution."""
    kernel, bias = state["patch_embed.proj.weight"].double(), state["patch_embed.proj.bias"].double()
    return {
        "patch_embedding.conv.weight": (kernel / std).float(),
        "patch_embedding.conv.bias": (bias - kernel.sum((1, 2, 3)) * mean / std).float(),
        "patch_embedding.position_embedding": state["pos_embed"],
        **_renamed(state, _final_norm(state), "layer_norm"),
        **_blocks(state, shape, "nanovlm", "blocks"),
    }


def _blocks(state: Tensors, shape: Shape, format: str, place: str) -> dict[str, Tensor]:
    """The blocks; queries, keys and values apart where the format has them so."""
    named: dict[str, Tensor] = {}
    for i in range(shape.depth):
        for ours, theirs in zip(BLOCK_PARTS, BLOCK[format]):
            named |= _renamed(state, f"blocks.{i}.{ours}", f"{place}.{i}.{theirs}")
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(len(QUERY_KEY_VALUE[format]))
            for part_name, part in zip(QUERY_KEY_VALUE[format], parts, strict=True):
                named[f"{place}.{i}.{part_name}.{kind}"] = part
    return named


def _renamed(state: Tensors, ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}


def _final_norm(state: Tensors) -> str:
    """A mean-pooled timm ViT has its final norm behind the mean; its tokens go through it one by one."""
    return "norm" if "norm.weight" in state else "fc_norm"


TENSORS = {"siglip": siglip_tensors, "vit": vit_tensors, "sovit": sovit_tensors}
