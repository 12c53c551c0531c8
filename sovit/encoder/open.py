"""One small interface over vision towers: trained runs of sovit, timm models, transformers models.

    open_encoder("3aa5591831-184320")          a trained branch, by its run_id, from runs/
    open_encoder("random:3aa5591831-184320")   the same network as it was before training: the control
    open_encoder("timm:vit_base_patch16_224"), open_encoder("timm:local-dir:FOLDER")
    open_encoder("hf:google/siglip-base-patch16-224"), open_encoder("hf:FOLDER")

Two traps that it closes. "The last layer" has two meanings: transformers' `hidden_states[-1]` stands before the final
norm for SigLIP, ViT and DINOv2, `last_hidden_state` behind it; here the caller says which. And what stands before the patch
tokens (class token, registers) is known by the tower, not guessed by the caller: of SigLIP, which has no class token, a
"drop the first token" would take a real patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit import UserError, reason
from sovit.data import NORMALISATION
from sovit.encoder.model import build
from sovit.encoder.trained import load_branch


@dataclass(frozen=True)
class Preprocess:
    """How an image in [0, 1] becomes the tower's input; `crop` and `crop_pct` say what was done to photographs first."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str = "bicubic"  # or "bilinear"
    crop: str = "squash"  # the whole image made square, or "center": the short side resized, the middle cut out
    crop_pct: float = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Square images [B, 3, H, W] in [0, 1], of any size -> [B, 3, image_size, image_size], normalised."""
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode=self.resample, antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


@dataclass(frozen=True)
class Encoder:
    """A tower in eval mode, its parameters frozen. `depth` counts blocks; `grid` patches a side: N = grid^2 tokens.

    tokens(images, layer, norm)  patch tokens [B, N, D] in raster order, prefix tokens dropped
    pooled(images)               [B, D], as the tower itself sums an image up (see `open_encoder`)
    Both take what `preprocess` makes.
    """

    name: str
    module: nn.Module
    width: int
    depth: int
    grid: int
    num_prefix_tokens: int
    preprocess: Preprocess
    hidden: Callable[[Tensor, int], Tensor]  # (images, block) -> output of that block, [B, prefix + N, D]
    final_norm: Callable[[Tensor], Tensor]
    pooled: Callable[[Tensor], Tensor]

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def tokens(self, images: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
        """Patch tokens [B, N, D] of `images` [B, 3, S, S] behind block `layer` (0 the first, -1 the last).

        `norm`: through the tower's final norm, whichever layer is read. Raises UserError for a block that is not there.
        """
        if not -self.depth <= layer < self.depth:
            raise UserError(f"layer={layer} of {self.name} does not exist; give {-self.depth} to {self.depth - 1}")
        x = self.hidden(images, layer % self.depth)[:, self.num_prefix_tokens :]
        return self.final_norm(x) if norm else x


def open_encoder(name: str, runs_dir: Path | str = "runs", device: str = "cpu") -> Encoder:
    """Open a tower by the names of this module's docstring.

    `pooled` is, for sovit and timm, what the tower hands to its task head (MAP head, mean, class token), the mean of the
    normed patch tokens where nothing is pooled; for transformers SigLIP's MAP head, else the normed class token, else
    the mean of the normed patch tokens. Raises UserError for what cannot be opened.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return timm_encoder(name, open_timm(rest).to(device))
    if kind == "hf":
        return _tower(name, rest, device)
    if kind == "random":
        trained, run = load_branch(rest, runs_dir)  # for its number of classes, which moves the draw of all weights
        model = build(
            run.shape, trained.num_classes, run.recipe.parametrisation, run.init_seed, NORMALISATION[run.data]
        )
    elif not rest:
        model, run = load_branch(name, runs_dir)
    else:
        raise UserError(f"encoder {name!r} is of no known kind; give a run_id, random:RUN_ID, timm:NAME or hf:NAME")
    return timm_encoder(name, model.to(device))


# timm ----------------------------------------------------------------------------------------------------------------


def timm_encoder(name: str, model: Any) -> Encoder:
    """An Encoder of a timm model of the Vision Transformer family. Raises UserError for another family."""
    import timm.data

    if not all(hasattr(model, attribute) for attribute in ("blocks", "patch_embed", "forward_intermediates")):
        raise UserError(f"{name} is no plain Vision Transformer (no blocks or patch embedding); give one that is")
    record = timm.data.resolve_model_data_config(model)
    height, width = model.patch_embed.img_size
    rows, columns = model.patch_embed.grid_size
    if height != width or rows != columns:
        raise UserError(f"{name} reads images of {height} x {width}; only square ones are read here, open it as such")

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
        module=_frozen(model),
        width=model.embed_dim,
        depth=len(model.blocks),
        grid=rows,
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


def open_timm(name: str) -> Any:
    """A timm model with its weights and no task head: NAME, or local-dir:FOLDER. Raises UserError."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub client and safetensors raise a dozen unrelated kinds
        raise UserError(
            f"timm:{name} cannot be opened ({reason(error)}); check the name and the network, or give local-dir:FOLDER"
        ) from error


# transformers --------------------------------------------------------------------------------------------------------

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


def _tower(name: str, location: str, device: str) -> Encoder:
    try:
        import transformers

        from sovit.encoder import hf_model
    except ImportError:
        raise UserError(f"{name} needs transformers; run: pip install 'sovit[vlm]'") from None
    try:
        # said in so many words: left out, transformers asks on the terminal whether to run a repository's own code
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=False)
        kind = config.model_type
        if kind not in TOWERS:
            raise UserError(f"{name} is a {kind!r}; the towers read here are {', '.join(sorted(TOWERS))}")
        # what does not fit or is missing, transformers would draw at random: it is told, and refused below
        more: dict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if kind == "vit":
            more["add_pooling_layer"] = False  # a BERT-like pooler, which checkpoints seldom have
        library: Any = hf_model if kind == hf_model.SovitVisionConfig.model_type else transformers
        tower, found = getattr(library, TOWERS[kind]).from_pretrained(location, **more)
        if found["mismatched_keys"]:
            tensor, there, wanted = min(found["mismatched_keys"])
            raise UserError(
                f"{name} does not fit its config.json: {tensor} is {tuple(there)}, by the config {tuple(wanted)}; mend it"
            )
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{name} lacks {len(missing)} of the tensors of a {TOWERS[kind]}, such as {missing[0]}; save it anew"
            )
        tower = tower.eval().to(device)
        config = tower.config  # of a model of text and image, the image side's own
        record = transformers.AutoImageProcessor.from_pretrained(location, trust_remote_code=False).to_dict()
        preprocess = _preprocess(name, record, config.image_size)
    except UserError:
        raise
    except Exception as error:  # transformers and the hub client raise a dozen unrelated kinds
        raise UserError(
            f"{name} cannot be opened ({reason(error)}); check the name and the network, or give a folder with"
            " config.json, model.safetensors and preprocessor_config.json"
        ) from error
    image_size = preprocess.image_size
    # DINOv2 resizes its positions to what comes; its published weights have those of 518 px and a processor of 224
    if image_size != config.image_size and not (kind.startswith("dinov2") and image_size % config.patch_size == 0):
        raise UserError(f"{name} reads {config.image_size} px, its processor makes {image_size}; mend the processor")
    grid = image_size // config.patch_size
    parameters = {n for n, _ in tower.named_parameters()}
    has_class = bool(parameters & {"embeddings.cls_token", "embeddings.class_embedding"})
    prefix = has_class + getattr(config, "num_register_tokens", 0)
    norm = next(getattr(tower, n) for n in ("post_layernorm", "layernorm", "norm") if hasattr(tower, n))

    def hidden(images: Tensor, block: int) -> Tensor:
        x = tower(images, output_hidden_states=True).hidden_states[block + 1]  # [0] is the embedding
        assert x.shape[1] == prefix + grid**2, f"{name}: {x.shape[1]} tokens, {prefix} + {grid}^2 known"
        return x

    def pooled(images: Tensor) -> Tensor:
        if getattr(config, "vision_use_head", kind.startswith("siglip")) or kind == "sovit_vision":
            return tower(images).pooler_output
        x = hidden(images, config.num_hidden_layers - 1)
        if getattr(config, "sovit_pool", "") == "avg":  # our exports': trained with the norm behind the mean
            return norm(x.mean(1))
        x = norm(x)
        return x[:, 0] if has_class else x.mean(1)

    return Encoder(
        name=name,
        module=_frozen(tower),
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        grid=grid,
        num_prefix_tokens=prefix,
        preprocess=preprocess,
        hidden=hidden,
        final_norm=norm,
        pooled=pooled,
    )


def _preprocess(name: str, record: dict, image_size: int) -> Preprocess:
    """What an image processor does, in our words; image_size: of the tower, where the processor names no square."""
    try:
        cropped = bool(record.get("do_center_crop"))
        size = dict(record["crop_size"] if cropped else record["size"]).get("height") or image_size
        found = Preprocess(
            image_size=size,
            mean=tuple(record["image_mean"]),
            std=tuple(record["image_std"]),
            resample=RESAMPLE.get(int(record["resample"]), "bicubic"),
            crop="center" if cropped else "squash",
            crop_pct=size / size_before_crop(record) if cropped else 1.0,
        )
        if len(found.mean) != 3 or len(found.std) != 3 or not min(found.std) > 0:
            raise ValueError(f"image_mean={found.mean}, image_std={found.std}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the preprocessor_config.json of {name} does not say how images are made ({error!r}); mend it"
        ) from None
    return found


def size_before_crop(record: dict) -> int:
    """Pixels of the short side that a transformers image processor resizes to before it cuts out the middle."""
    size = dict(record["size"])
    return size.get("shortest_edge") or size["height"]


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)
