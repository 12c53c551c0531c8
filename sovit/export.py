"""Checkpoint -> a timm folder that timm and transformers load with equal outputs; law -> an encoder's config alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from sovit import UserError
from sovit.run import Run
from sovit.shape import Shape

FORMATS = ("timm",)


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


def load_branch(run_id: str, runs_dir: Path | str):
    """Rebuild the trained model of one branch in eval mode: (model, run). Raises UserError where it is not there."""
    import safetensors.torch

    from sovit.data import NORMALISATION
    from sovit.model import build

    folder = Path(runs_dir) / run_id.rpartition("-")[0]
    weights = folder / f"{run_id}.safetensors"
    if not (folder / "config.json").exists() or not weights.exists():
        known = sorted(p.stem for p in Path(runs_dir).glob("*/*.safetensors"))
        hint = f"it has {len(known)}, such as {known[0]}" if known else "it has none; train a study first"
        raise UserError(f"no trained run {run_id!r} under {runs_dir}; {hint}")
    run = Run.from_dict(json.loads((folder / "config.json").read_text()))
    state = safetensors.torch.load_file(weights)
    model = build(run.shape, state["head.weight"].shape[0], mean_std=NORMALISATION[run.data])
    model.load_state_dict(state)
    return model.eval(), run


def export_timm(run_id: str, runs_dir: Path | str, out: Path | str) -> dict:
    """Write the encoder of one branch as a timm folder, load it again by timm and transformers, and compare.

    Returns {"out", "run_id", "timm_max_difference", "transformers_max_difference" (None where transformers is not
    installed)}. Raises RuntimeError if timm's reload differs in a single bit; the folder is written in full or not at all.
    """
    import timm
    import torch

    model, run = load_branch(run_id, runs_dir)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose a folder that can be written") from None
    _save_timm(model, run, staging)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, run.shape.image_size, run.shape.image_size, generator=generator)
    with torch.no_grad():
        expected, features = model(images), model.forward_features(images)
        reloaded = timm.create_model(f"local-dir:{staging}", pretrained=True).eval()
        difference = (reloaded(images) - expected).abs().max().item()
    if difference != 0.0:
        raise RuntimeError(f"timm's reload of {run_id} differs by {difference:g}")
    report = {
        "out": str(out),
        "run_id": run_id,
        "timm_max_difference": difference,
        "transformers_max_difference": _transformers_difference(staging, images, features),
    }
    _replace_folder(staging, out)
    return report


def _save_timm(model, run: Run, folder: Path) -> None:
    import timm.models

    timm.models.save_for_hf(model, folder, model_args=run.shape.timm_kwargs, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)  # given twice, transformers' TimmWrapper refuses it
    path.write_text(json.dumps(config, indent=2) + "\n")
    shape = run.shape
    (folder / "README.md").write_text(
        f"# {shape.label}, patch {shape.patch_size}, {shape.image_size} px\n\n"
        f"A Vision Transformer trained by sovit on `{run.data}:{run.preset}`: {shape.num_params:,} parameters,"
        f" {shape.forward_flops:,} FLOPs an image (2 per multiply-add), run `{run.trunk_id}`.\n\n"
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


def _replace_folder(staging: Path, out: Path) -> None:
    import shutil

    old = None
    if out.exists():
        if not (out / "config.json").exists() and any(out.iterdir()):
            shutil.rmtree(staging)
            raise UserError(f"{out} holds something else than an exported encoder; choose another folder with --out")
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    staging.chmod(0o755)
    staging.rename(out)
    if old:
        shutil.rmtree(old)
