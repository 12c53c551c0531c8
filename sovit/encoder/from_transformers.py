"""transformers models as towers: SigLIP, CLIP, ViT, DINOv2 and our own exports."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sovit import UserError, reason
from sovit.encoder.tower import Encoder, Preprocess

TOWERS = {  # model_type of the config -> class; a model of text and image gives its image side
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "sovit_vision": "SovitVisionModel",  # of sovit.encoder.hf_model
}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def transformers_encoder(name: str, location: str, device: str) -> Encoder:
    """The tower `location`, a folder or a name of the hub. Raises UserError for what cannot be opened."""
    tower, record = _opened(name, location)
    tower = tower.eval().requires_grad_(False).to(device)
    config = tower.config  # of a model of text and image, the image side's own
    for field, wanted in (("num_channels", 3), ("image_size", "one side"), ("patch_size", "one side")):
        if not isinstance(value := getattr(config, field), int) or (field == "num_channels" and value != wanted):
            raise UserError(f"{name} has {field}={value}; only {wanted} is read here, give a tower of it")
    kind, preprocess = config.model_type, _preprocess(name, record, config.image_size)
    image_size = preprocess.image_size
    # DINOv2 resizes its positions to what comes; its published weights have those of 518 px and a processor of 224
    if image_size != config.image_size and not kind.startswith("dinov2"):
        raise UserError(f"{name} reads {config.image_size} px, its processor makes {image_size}; mend the processor")
    grid = image_size // config.patch_size
    parameters = {n for n, _ in tower.named_parameters()}
    has_class = bool(parameters & {"embeddings.cls_token", "embeddings.class_embedding"})
    prefix = has_class + getattr(config, "num_register_tokens", 0)
    norm = next(getattr(tower, n) for n in ("post_layernorm", "layernorm", "norm") if hasattr(tower, n))

    def hidden(images: Tensor, block: int) -> Tensor:
        x = tower(images, output_hidden_states=True).hidden_states[block + 1]  # [0] is the embedding
        if x.shape[1] != prefix + grid**2:
            raise UserError(f"{name} gives {x.shape[1]} tokens, not {prefix} + {grid}^2; its config.json is another's")
        return x

    def pooled(images: Tensor) -> Tensor:
        if getattr(config, "vision_use_head", kind.startswith("siglip")) or kind == "sovit_vision":
            return tower(images).pooler_output
        x = hidden(images, config.num_hidden_layers - 1)
        if getattr(config, "sovit_pool", "") == "avg":  # our exports': trained with the norm behind the mean
            return norm(x.mean(1))
        x = norm(x)
        return x[:, 0] if has_class else x.mean(1)

    depth = config.num_hidden_layers
    return Encoder(name, tower, config.hidden_size, depth, grid, prefix, preprocess, hidden, norm, pooled)


def _opened(name: str, location: str) -> tuple[Any, dict]:
    """The model with all of its weights, and what its image processor is made of."""
    try:
        import transformers

        from sovit.encoder import hf_model
    except ImportError:
        raise UserError(f"{name} needs transformers; run: pip install 'sovit[vlm]'") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        # said in so many words: left out, transformers asks on the terminal whether to run a repository's own code
        kind = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False).model_type
        if kind not in TOWERS:
            raise UserError(f"{name} is a {kind!r}; the towers read here are {', '.join(sorted(TOWERS))}")
        # what does not fit or is missing, transformers would draw at random: it is told, and refused below
        more: dict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if kind == "vit":
            more["add_pooling_layer"] = False  # a BERT-like pooler, which checkpoints seldom have
        library: Any = hf_model if kind == hf_model.SovitVisionConfig.model_type else transformers
        tower, found = getattr(library, TOWERS[kind]).from_pretrained(location, **more)
        record = transformers.AutoImageProcessor.from_pretrained(location, trust_remote_code=False).to_dict()
    except UserError:
        raise
    except Exception as error:  # transformers and the hub client raise a dozen unrelated kinds
        raise UserError(
            f"{name} cannot be opened ({reason(error)}); check the name and the network, or give a folder with"
            " config.json, model.safetensors and preprocessor_config.json"
        ) from error
    for tensor, there, wanted in found["mismatched_keys"]:
        said = f"{tensor} is {tuple(there)}, by the config {tuple(wanted)}"
        raise UserError(f"{name} does not fit its config.json: {said}; mend it")
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{name} lacks {len(missing)} of the tensors of a {TOWERS[kind]}, such as {missing[0]}; save it anew"
        )
    return tower, record


def _preprocess(name: str, record: dict, image_size: int) -> Preprocess:
    """What an image processor does, in our words; image_size: of the tower, where the processor names no square.

    Its rescale_factor, from pixels of 0..255, goes into mean and std, which here are of pixels in [0, 1].
    """
    try:
        cropped = bool(record.get("do_center_crop"))
        before = dict(record["size"])  # of the crop
        made = dict(record["crop_size"] if cropped else before)
        size = made.get("height") or image_size
        if made.get("width", size) != size:
            raise ValueError(f"{size} x {made['width']} px; only square images are read here")
        if others := [flag for flag in ("do_pad", "do_flip_channel_order") if record.get(flag)]:
            raise ValueError(f"{others[0]}=true, which is not done here")
        if record.get("do_resize") is False and cropped:
            raise ValueError("do_resize=false before a crop")
        if record["resample"] not in RESAMPLE:
            raise ValueError(f"resample={record['resample']}, not bilinear (2) or bicubic (3)")
        scale = 255 * float(record.get("rescale_factor", 1 / 255)) if record.get("do_rescale", True) else 255.0
        normalised = record.get("do_normalize", True)
        mean, std = (record["image_mean"], record["image_std"]) if normalised else ((0.0,) * 3, (1.0,) * 3)
        found = Preprocess(
            image_size=size,
            mean=tuple(value / scale for value in mean),
            std=tuple(value / scale for value in std),
            resample=RESAMPLE[record["resample"]],
            crop="center" if cropped else "squash",
            crop_pct=size / (before.get("shortest_edge") or before["height"]) if cropped else 1.0,
        )
        if len(found.mean) != 3 or len(found.std) != 3 or not min(found.std) > 0:
            raise ValueError(f"image_mean={found.mean}, image_std={found.std}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the preprocessor_config.json of {name} does not say how images are made ({error!r}); mend it"
        ) from None
    return found
