"""Checkpoint -> a timm folder that timm and transformers load with equal outputs; law -> an encoder's config alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from sovit import UserError
from sovit.run import Run
from sovit.shape import Shape


def config_of(shape: Shape, format: str) -> dict:
    """The configuration of an untrained encoder of this shape, in the words of another library (CONFIGS).

    Raises UserError for an unknown format, or a shape that the format cannot express.
    """
    if format not in CONFIGS:
        raise UserError(f"--format {format!r} is unknown for a config; choose one of {', '.join(CONFIGS)}")
    return CONFIGS[format](shape)


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


def _siglip_config(shape: Shape) -> dict:
    """config.json of transformers' SiglipVisionModel (MAP head; no class token, no registers)."""
    _no_prefix(shape, "siglip")
    return {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "num_channels": 3,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": shape.pool == "map",
    }


def _nanovlm_config(shape: Shape) -> dict:
    """The vision fields of nanoVLM's VLMConfig (it reads patch tokens and has no pooling head)."""
    _no_prefix(shape, "nanovlm")
    return {
        "vit_hidden_dim": shape.width,
        "vit_inter_dim": shape.mlp_dim,
        "vit_patch_size": shape.patch_size,
        "vit_img_size": shape.image_size,
        "vit_n_heads": shape.num_heads,
        "vit_n_blocks": shape.depth,
        "vit_dropout": 0.0,
        "vit_ln_eps": 1e-6,
        "vit_cls_flag": False,
    }


def _no_prefix(shape: Shape, format: str) -> None:
    if shape.num_prefix_tokens or shape.layer_scale or not shape.qkv_bias:
        raise UserError(
            f"--format {format} has no class token, registers, layer scale or bias-free qkv; use --format timm"
        )


CONFIGS = {"timm": _timm_config, "siglip": _siglip_config, "nanovlm": _nanovlm_config}


def write_config(shape: Shape, format: str, out: Path) -> Path:
    from sovit.ledger import write_atomic

    path = Path(out) / "config.json"
    write_atomic(path, json.dumps(config_of(shape, format), indent=2) + "\n")
    return path


TRAINED_WORDS = {  # a value of Run.trained, in the card of a fine-tuned model
    "full": "all weights trained",
    "attention": "the attention's projections, the positions and the task head trained, all else frozen",
    "mlp": "the MLPs, the positions and the task head trained, all else frozen",
    "head": "the task head trained, all else frozen",
}
TOLERANCE = 1e-5  # of transformers' reload: it runs the same timm model, but may choose another attention kernel


def export_timm(
    run_id: str,
    runs_dir: Path | str,
    out: Path | str,
    image_size: int | None = None,
    patch_size: int | None = None,
) -> dict:
    """Write the encoder of one branch as a timm folder, load it again by timm and transformers, and compare.

    image_size, patch_size: where given, the weights are resized to them from the trained ones (sovit.resize), without
    training; positions linearly where the run drew its patch sizes, as it did then, else bicubically.

    Returns {"out", "run_id", "timm_max_difference", "transformers_max_difference" (None where transformers is not
    installed)}. Raises UserError for a run that is not there and for an `out` that holds something else, RuntimeError
    if timm's reload differs in a bit or transformers' by more than TOLERANCE; `out` is written in full or not at all.
    """
    from sovit.branches import load_branch

    model, run = load_branch(run_id, runs_dir)
    sizes = {"image_size": image_size, "patch_size": patch_size}
    shape = run.shape.replace(**{name: size for name, size in sizes.items() if size is not None})
    if shape != run.shape:
        model = _resized(model, run, shape)
    out = Path(out)
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose a folder that can be written") from None
    try:
        _save_timm(model, shape, staging)
        (staging / "README.md").write_text(_card(run_id, run, shape, runs_dir))
        report = {"out": str(out), "run_id": run_id, **_compare(model, shape, staging)}
        staging.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _check_replaceable(out: Path) -> None:
    """Only an empty folder or an earlier export of ours may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        tag = json.loads((out / "config.json").read_text())["pretrained_cfg"]["tag"]
    except (OSError, ValueError, KeyError, TypeError):
        tag = None
    if tag != "sovit":
        raise UserError(f"{out} holds something else than an exported encoder; choose another folder with --out")


def _compare(model, shape: Shape, folder: Path) -> dict:
    """Reload the folder by timm and by transformers and compare outputs, tokens and preprocessing on random images."""
    import timm
    import torch

    from sovit.encoder import open_encoder, timm_encoder

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, shape.image_size, shape.image_size, generator=generator)  # [B, 3, H, W]
    with torch.no_grad():
        reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        by_timm = (reloaded(images) - model(images)).abs().max().item()
        by_transformers = _transformers_difference(folder, images, model.forward_features(images))
        ours, theirs = timm_encoder("trained", model), open_encoder(f"timm:local-dir:{folder}")
        same_tokens = torch.equal(theirs.tokens(images), ours.tokens(images))
    if by_timm != 0.0:
        raise RuntimeError(f"timm's reload of the export differs by {by_timm:g}; nothing was written")
    if by_transformers is not None and by_transformers > TOLERANCE:
        raise RuntimeError(f"transformers' reload of the export differs by {by_transformers:g}; nothing was written")
    if not same_tokens or theirs.preprocess != ours.preprocess:
        what = "preprocessing" if same_tokens else "tokens"
        raise RuntimeError(f"timm's reload of the export has other {what}; nothing was written")
    return {"timm_max_difference": by_timm, "transformers_max_difference": by_transformers}


def _save_timm(model, shape: Shape, folder: Path) -> None:
    import timm.models

    timm.models.save_for_hf(model, str(folder), model_args=shape.timm_kwargs, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)  # given twice, transformers' TimmWrapper refuses it
    path.write_text(json.dumps(config, indent=2) + "\n")


def _resized(model, run: Run, shape: Shape):
    from sovit.data import NORMALISATION
    from sovit.flexi import resize_method
    from sovit.model import build
    from sovit.resize import resize_state

    resized = build(shape, model.num_classes, mean_std=NORMALISATION[run.data])
    resized.load_state_dict(resize_state(model.state_dict(), run.shape, shape, resize_method(run)))
    return resized.eval()


def _card(run_id: str, run: Run, shape: Shape, runs_dir: Path | str) -> str:
    """The model card: what it is, where its weights come from, what was done to them last."""
    from sovit.branches import base_of
    from sovit.flexi import resize_method

    def at(size: Shape) -> str:
        return f"{size.image_size} px, patch {size.patch_size}"

    lines = [
        f"A Vision Transformer trained by sovit on `{run.data}:{run.preset}`: {shape.num_params:,} parameters,"
        f" {shape.forward_flops:,} FLOPs an image (2 per multiply-add), run `{run_id}`."
    ]
    if run.recipe.patch_sizes:
        sizes = ", ".join(map(str, run.recipe.patch_sizes))
        lines += [f"Its patch size was drawn by batch in training, from {sizes} pixels (FlexiViT)."]
    if shape != run.shape:
        lines += [
            f"Its weights were trained at {at(run.shape)} and resized to {at(shape)}, without any training"
            f" there: positions, and patch kernels by FlexiViT's pseudo-inverse resize ({resize_method(run)})."
        ]
    while run.base:
        base = base_of(run, runs_dir)
        examples = run_id.rpartition("-")[2]
        lines += [
            f"Run `{run_id}` is a fine-tuning of `{base.name}` ({at(base.shape)}) to {at(run.shape)} on"
            f" `{run.data}:{run.preset}`: {TRAINED_WORDS[run.trained]}, {int(examples):,} examples."
        ]
        if base.run is None:
            lines += [f"The weights of `{base.name}` have the SHA-256 `{base.sha256}`."]
            break
        run_id, run = base.name, base.run
    text = "\n\n".join(lines)
    return f"# {shape.label}, patch {shape.patch_size}, {shape.image_size} px\n\n{text}\n\n" + (
        "```python\nimport timm\n\nmodel = timm.create_model('local-dir:PATH', pretrained=True)\n```\n"
    )


def _transformers_difference(folder: Path, images, features) -> float | None:
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        return None
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it reports the task head, which an encoder has no use for, as unexpected
    logging.disable_progress_bar()
    with torch.no_grad():
        tower = AutoModel.from_pretrained(folder).eval()
        hidden = tower(pixel_values=images).last_hidden_state
    return (hidden - features).abs().max().item()
