"""Released vision-language models as tables of dimensions, built on the meta device: no download, no memory.

A system is an encoder (a sovit Shape), a projector of sovit.vlm.projectors, and a causal language model of transformers.
Where our encoder's parameters are those of the released tower (SigLIP and its descendants) the tower is built by us;
CLIP (a norm before the blocks, no bias in the patch embedding) and InternViT (no final norm) are transformers' classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit import UserError
from sovit.encoder.model import build as build_encoder
from sovit.encoder.open import timm_encoder
from sovit.spec.named_shapes import named_shape
from sovit.spec.shape import Shape
from sovit.vlm.projectors import build as build_projector

OUR_TOWERS = {"siglip_vision_model", "idefics2_vision", "idefics3_vision", "smolvlm_vision"}


@dataclass(frozen=True)
class System:
    """`tower` and `family` are transformers' `model_type` of the encoder and of the whole ("" where it has no class).

    `shape.pool` is "token" where a class token stands before the patches, which is dropped, else "none".
    `feature_layer` counts blocks (-1 the last), `feature_norm` says whether they pass the final norm.
    `text` are the arguments of the language model's config. `entry` says how the image's tokens reach it. `max_tiles` counts
    the view of the whole image too.
    """

    title: str
    source: str
    tower: str
    shape: Shape
    projector: str
    text: dict[str, Any]
    preprocess: str
    options: dict[str, int] = field(default_factory=dict)
    family: str = ""
    feature_layer: int = -1
    feature_norm: bool = True
    entry: str = "replace placeholders among"
    max_tiles: int = 1
    stated_params: int | None = None  # of the whole, where no class of transformers can be counted


# the released parts ---------------------------------------------------------------------------------------------------


def _text(
    model_type: str, width: int, depth: int, mlp_dim: int, heads: int, kv_heads: int, words: int, **more: Any
) -> dict:
    sizes = dict(hidden_size=width, num_hidden_layers=depth, intermediate_size=mlp_dim, vocab_size=words)
    heads_of = dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    return dict(model_type=model_type, **sizes, **heads_of, tie_word_embeddings=False) | more


def _so400m(image_size: int) -> Shape:
    return named_shape("So400m/14", image_size=image_size, pool="none")


def _smollm2(width: int, depth: int, mlp_dim: int, heads: int, kv_heads: int, words: int, tied: bool) -> dict:
    return _text("llama", width, depth, mlp_dim, heads, kv_heads, words, tie_word_embeddings=tied)


def _gemma3(title: str, width: int, depth: int, mlp_dim: int, heads: int, kv_heads: int, head_dim: int) -> System:
    text = _text("gemma3_text", width, depth, mlp_dim, heads, kv_heads, 262_208, head_dim=head_dim)
    return System(
        title=title,
        source="arXiv 2503.19786",
        family="gemma3",
        tower="siglip_vision_model",
        shape=_so400m(896),
        projector="avgpool_rms_linear",
        options=dict(factor=4),
        text=text | dict(tie_word_embeddings=True),
        preprocess="squashed to 896 px, bilinear; pan and scan at inference only",
        entry="see each other both ways and replace placeholders among",
    )


def _llava(title: str, width: int, depth: int, mlp_dim: int, heads: int) -> System:
    return System(
        title=title,
        source="arXiv 2310.03744",
        family="llava",
        tower="clip_vision_model",
        shape=Shape(1024, 24, 4096, 64, 14, 336, "token"),
        feature_layer=-2,
        feature_norm=False,
        projector="mlp2x_gelu",
        text=_text("llama", width, depth, mlp_dim, heads, heads, 32_064),
        preprocess="padded to a square, 336 px, bicubic",
    )


def _smolvlm(title: str, shape: Shape, factor: int, text: dict, preprocess: str) -> System:
    return System(
        title=title,
        source="arXiv 2504.05299",
        family="smolvlm",
        tower="smolvlm_vision",
        shape=shape,
        projector="pixel_shuffle_linear",
        options=dict(factor=factor),
        text=text,
        preprocess=preprocess,
        max_tiles=17,
    )


def _internvl(title: str, text: dict) -> System:
    return System(
        title=title,
        source="arXiv 2504.10479",
        family="internvl",
        tower="internvl_vision",
        shape=Shape(1024, 24, 4096, 64, 14, 448, "token", layer_scale=True),
        feature_norm=False,
        projector="pixel_shuffle_mlp",
        text=text,
        preprocess="1 to 12 tiles of 448 px by aspect, and the whole, bicubic",
        max_tiles=13,
    )


_BASE_512 = named_shape("B/16@512", pool="none")
_TILES_512 = "long side 2048 px, tiles of 512 and the whole, Lanczos"

SYSTEMS: dict[str, System] = {
    "nanovlm-222m": System(
        title="nanoVLM v0.1",
        source="github.com/huggingface/nanoVLM",
        tower="siglip_vision_model",
        shape=named_shape("B/16@224", pool="none"),
        projector="pixel_shuffle_linear",
        text=_smollm2(576, 30, 1536, 9, 3, 49_152, tied=True),
        preprocess="squashed to 224 px",
        entry="stand before",
        stated_params=222_081_600,
    ),
    "nanovlm-460m": System(
        title="nanoVLM of October 2025",
        source="github.com/huggingface/nanoVLM",
        tower="siglip_vision_model",
        shape=_BASE_512,
        projector="pixel_shuffle_linear",
        options=dict(factor=4),
        text=_smollm2(960, 32, 2560, 15, 5, 49_218, tied=True),
        preprocess="long side to 2048 px, tiles of 512 and the whole",
        max_tiles=17,
    ),
    "smolvlm-256m": _smolvlm(
        "SmolVLM 256M", _BASE_512, 4, _smollm2(576, 30, 1536, 9, 3, 49_280, tied=False), _TILES_512
    ),
    "smolvlm-500m": _smolvlm(
        "SmolVLM 500M", _BASE_512, 4, _smollm2(960, 32, 2560, 15, 5, 49_280, tied=False), _TILES_512
    ),
    "smolvlm-2.2b": _smolvlm(
        "SmolVLM 2.2B",
        _so400m(378),
        3,
        _smollm2(2048, 24, 8192, 32, 32, 49_280, tied=False),
        "long side 1536 px, tiles of 384 (27 patches read 378) and the whole, Lanczos",
    ),
    "internvl3-1b": _internvl("InternVL3 1B", _text("qwen2", 896, 24, 4864, 14, 2, 151_674, tie_word_embeddings=True)),
    "internvl3-8b": _internvl("InternVL3 8B", _text("qwen2", 3584, 28, 18_944, 28, 4, 151_674)),
    "llava-1.5-7b": _llava("LLaVA-1.5 7B", 4096, 32, 11_008, 32),
    "llava-1.5-13b": _llava("LLaVA-1.5 13B", 5120, 40, 13_824, 40),
    "idefics2-8b": System(
        title="Idefics2 8B",
        source="arXiv 2405.02246",
        family="idefics2",
        tower="idefics2_vision",
        shape=_so400m(980),
        projector="perceiver",
        options=dict(mlp_dim=14_336),
        text=_text("mistral", 4096, 32, 14_336, 32, 8, 32_003),
        preprocess="own aspect, 378 to 980 px, bilinear, padding masked; or 4 tiles and the whole",
        max_tiles=5,
    ),
    "idefics3-8b": System(
        title="Idefics3 8B",
        source="arXiv 2408.12637",
        family="idefics3",
        tower="idefics3_vision",
        shape=_so400m(364),
        projector="pixel_shuffle_linear",
        text=_text("llama", 4096, 32, 14_336, 32, 8, 128_259),
        preprocess="long side up to 1456 px, tiles of 364 and the whole, Lanczos",
        max_tiles=17,
    ),
    "gemma3-4b": _gemma3("Gemma 3 4B", 2560, 34, 10_240, 8, 4, 256),
    "gemma3-12b": _gemma3("Gemma 3 12B", 3840, 48, 15_360, 16, 8, 256),
    "gemma3-27b": _gemma3("Gemma 3 27B", 5376, 62, 21_504, 32, 16, 128),
}


def find(name: str) -> System:
    """Raises UserError for a name that is not in the table."""
    if name not in SYSTEMS:
        raise UserError(f"unknown system {name!r}; choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


# built on the meta device --------------------------------------------------------------------------------------------


def build(system: System) -> nn.ModuleDict:
    """{"vision", "projector", "language_model"} on the meta device: every tensor has a shape and no memory."""
    transformers = _transformers()
    with torch.device("meta"):
        if system.tower in OUR_TOWERS:
            vision: Any = build_encoder(system.shape)
        else:
            vision = transformers.AutoModel.from_config(vision_config(system))
        text = transformers.AutoModelForCausalLM.from_config(text_config(system))
        width = system.text["hidden_size"]
        projector = build_projector(
            system.projector, system.shape.width, width, num_tokens=system.shape.num_patches, **system.options
        )
    return nn.ModuleDict(dict(vision=vision, projector=projector, language_model=text)).eval()


def build_reference(system: System) -> nn.Module | None:
    """transformers' own class of the whole system on the meta device, from its config; None where it has none."""
    if not system.family:
        return None
    transformers = _transformers()
    factor = system.options.get("factor", 2)
    more: dict[str, dict] = {
        "llava": dict(vision_feature_layer=system.feature_layer, vision_feature_select_strategy="default"),
        "idefics2": dict(perceiver_config=dict(hidden_size=system.text["hidden_size"])),
        "idefics3": dict(scale_factor=factor),
        "smolvlm": dict(scale_factor=factor),
        "internvl": dict(downsample_ratio=1 / factor),
        "gemma3": dict(mm_tokens_per_image=system.shape.num_patches // factor**2),
    }
    config = transformers.AutoConfig.for_model(
        system.family,
        vision_config=vision_config(system).to_dict(),
        text_config=text_config(system).to_dict(),
        tie_word_embeddings=system.text["tie_word_embeddings"],
        **more[system.family],
    )
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def vision_config(system: System) -> Any:
    shape = system.shape
    more: dict[str, Any] = {}
    if system.tower == "siglip_vision_model":
        more = dict(vision_use_head=False)
    elif system.tower == "internvl_vision":
        more = dict(attention_bias=shape.qkv_bias)
    return _transformers().AutoConfig.for_model(
        system.tower,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        intermediate_size=shape.mlp_dim,
        num_attention_heads=shape.num_heads,
        patch_size=shape.patch_size,
        image_size=shape.image_size,
        **more,
    )


def text_config(system: System) -> Any:
    sizes = dict(system.text)
    return _transformers().AutoConfig.for_model(sizes.pop("model_type"), **sizes)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("systems are built with transformers; run: pip install 'sovit[vlm]'") from None
    transformers.logging.set_verbosity_error()  # token ids of tokenizers that are not here
    return transformers


# what flows through, and what it weighs -------------------------------------------------------------------------------


def num_params(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def trace(system: System, modules: nn.ModuleDict, num_words: int = 32) -> dict[str, tuple[int, ...]]:
    """The shape of one image's tensors behind each stage, with `num_words` of text, as the modules give them."""
    shape, found = system.shape, {}
    text: Any = modules["language_model"]
    with torch.device("meta"):
        image = torch.empty(1, 3, shape.image_size, shape.image_size)
        patches = F.unfold(image, shape.patch_size, stride=shape.patch_size).transpose(1, 2)  # [1, N, 3 p²]
        found["image"], found["patches"] = image, patches
        found["encoder"], found["features"] = _features(system, modules["vision"], image)
        found["projector"] = modules["projector"](found["features"])
        words = text.get_input_embeddings()(torch.empty(1, num_words, dtype=torch.long))
        sequence = torch.cat((found["projector"], words), 1)
        n = sequence.shape[1]
        mask = torch.empty(1, 1, n, n, dtype=torch.bool)  # in full: what transformers makes itself, it reads values of
        found["sequence"] = sequence
        found["logits"] = text(inputs_embeds=sequence, attention_mask=mask, use_cache=False).logits
    return {stage: tuple(tensor.shape) for stage, tensor in found.items()}


def _features(system: System, vision: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """(what the block hands on [1, prefix + N, D], patch tokens [1, N, D]) of the system's feature layer."""
    if system.tower in OUR_TOWERS:
        encoder = timm_encoder(system.title, vision)
        block = system.feature_layer % encoder.depth
        return encoder.hidden(image, block), encoder.tokens(image, system.feature_layer, system.feature_norm)
    hidden = vision(image, output_hidden_states=True).hidden_states[system.feature_layer]
    return hidden, hidden[:, system.shape.num_prefix_tokens :]
