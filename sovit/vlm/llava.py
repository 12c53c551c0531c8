"""The other way round: an exported sovit encoder as the vision tower of transformers' own Llava.

    model = llava_model(FOLDER, open_language_model("smollm2"))   # FOLDER: sovit export RUN_ID --format siglip|vit|sovit
    model.save_pretrained(OUT); LlavaForConditionalGeneration.from_pretrained(OUT)   # sovit's own format: import
                                                                                     # sovit.hf_model first

Llava reads `hidden_states[layer]`, before the final norm: layer -1 is `encoder.tokens(images, -1, norm=False)`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sovit import UserError
from sovit.encoder import Encoder, open_encoder
from sovit.vlm.language_model import LanguageModel

PROJECTORS = ("mlp2x_gelu",)  # the one that Llava's class has
STRATEGIES = ("full", "default")
TOWERS = ("siglip_vision_model", "vit", "sovit_vision")


def llava_model(
    encoder_dir: Path | str,
    language_model: LanguageModel,
    projector: str = "mlp2x_gelu",
    *,
    vision_feature_layer: int | Sequence[int] = -1,
    vision_feature_select_strategy: str | None = None,
    seed: int = 0,
) -> Any:
    """A LlavaForConditionalGeneration of an exported encoder, a new projector (drawn by `seed`) and a language model.

    In eval mode; the tower is frozen, projector and language model (a copy) are not. Images are prepared as
    `open_encoder(f"hf:{encoder_dir}").preprocess` does; each stands in the text as `config.image_seq_length` times
    `config.image_token_index`.

    vision_feature_layer: which of `hidden_states`, or several, side by side in channels; 0 is the embedding.
    vision_feature_select_strategy: "full", or "default", which drops the first token; None chooses what leaves the patch
    tokens. Raises UserError for a folder that cannot be opened or is no such tower, for "default" where the first
    token is a patch of the image, for a layer that is not there, and for another projector.
    """
    if projector not in PROJECTORS:
        raise UserError(f"projector={projector!r}: transformers' Llava has {', '.join(PROJECTORS)} alone; give that")
    encoder = _open_tower(encoder_dir)
    strategy = _strategy(encoder, vision_feature_select_strategy)
    layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else list(vision_feature_layer)
    for layer in layers:
        if not -encoder.depth - 1 <= layer <= encoder.depth:
            least, most = -encoder.depth - 1, encoder.depth
            raise UserError(f"vision_feature_layer={layer} of {encoder.name} does not exist; give {least} to {most}")
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower: Any = encoder.module
    text: Any = language_model.model
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(text.config),
        image_token_index=language_model.image_token_id,
        image_seq_length=encoder.grid**2 + (encoder.num_prefix_tokens if strategy == "full" else 0),
        projector_hidden_act="gelu",
        vision_feature_layer=layers[0] if isinstance(vision_feature_layer, int) else layers,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config).to(text.dtype)
    _fill(model.model.vision_tower, tower)
    _fill(model.model.language_model, text.base_model)
    _fill(model.lm_head, text.get_output_embeddings())
    model.model.vision_tower.requires_grad_(False)
    return model.eval()


def _open_tower(encoder_dir: Path | str) -> Encoder:
    folder = Path(encoder_dir)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no encoder; write one with sovit export RUN_ID --format siglip --out {folder}")
    if '"architecture"' in (folder / "config.json").read_text():  # timm's word; transformers has "architectures"
        raise UserError(
            f"{folder} is a timm folder, which Llava cannot hold; export it with --format siglip, vit or sovit"
        )
    encoder = open_encoder(f"hf:{folder}")
    kind = encoder.module.config.model_type  # type: ignore[union-attr]
    if kind not in TOWERS:
        raise UserError(f"{folder} is a {kind!r}; the towers that this puts into Llava are {', '.join(TOWERS)}")
    return encoder


def _strategy(encoder: Encoder, asked: str | None) -> Any:
    if asked is None:
        return "default" if encoder.num_prefix_tokens else "full"
    if asked not in STRATEGIES:
        raise UserError(f"vision_feature_select_strategy={asked!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if asked == "default" and not encoder.num_prefix_tokens:
        raise UserError(
            f'vision_feature_select_strategy="default" drops the first token, which is a patch of the image in'
            f' {encoder.name}; give "full"'
        )
    return asked


def _fill(module: Any, source: Any) -> None:
    """Copy the weights of `source`; of what it lacks, only ViT's pooler, which Llava never reads, may be left."""
    missing, unexpected = module.load_state_dict(source.state_dict(), strict=False)
    left = [name for name in missing if not name.startswith("pooler.")] + list(unexpected)
    if left:
        raise UserError(f"{type(module).__name__} has other tensors than {type(source).__name__}, such as {left[0]}")
