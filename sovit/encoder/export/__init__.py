"""Trained run -> a folder that timm, transformers or nanoVLM load with equal outputs; law -> an encoder's config alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from sovit import UserError, __version__
from sovit.data import NORMALISATION
from sovit.encoder.export.formats import check_format, config_of, tensors_of
from sovit.files import as_umask, beside, write_atomic
from sovit.ledger.records import find_branch
from sovit.spec.run import Run
from sovit.spec.shape import Shape

MARK = "sovit.json"  # in every exported folder, which another export may replace
EXPORTED = {MARK, "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}  # what one may hold
MAX_SIDE = 4096  # pixels of a resized export
MAX_PATCHES = 128 * 128  # of a resized export: four times those of Gemma3


def write_config(shape: Shape, format: str, out: Path) -> Path:
    """config.json of an untrained encoder of this shape. Raises UserError as `config_of`."""
    path = Path(out) / "config.json"
    write_atomic(path, json.dumps(config_of(shape, format), indent=2) + "\n")
    return path


def export_encoder(
    run_id: str,
    runs_dir: Path | str,
    out: Path | str,
    image_size: int | None = None,
    patch_size: int | None = None,
    format: str = "timm",
) -> dict:
    """Write the encoder of one branch as a folder of FORMATS, load it again by its own library, and compare.

    image_size, patch_size: where given, the trained weights are resized to them, without training.

    Returns {"format", "out", "run_id"} and what `roundtrip_check` measured: of nanoVLM, which no library loads, what its
    GELU moves, the folder unread. Raises UserError for a run that is not there, a format or size that cannot be and for an
    `out` that holds something else; RuntimeError if the reload differs. `out` is written in full or not at all.

    >>> sovit.export_encoder("2da54a192d-80", "runs", "encoder", format="timm")["format"]
    'timm'
    """
    check_format(format)
    run_id = find_branch(run_id, runs_dir)
    asked, out = out, Path(out).resolve()  # of a link what it leads to is replaced
    _check_replaceable(out)
    from sovit.encoder.export.model_card import card
    from sovit.encoder.export.roundtrip_check import roundtrip_check
    from sovit.encoder.trained import load_branch

    model, run = load_branch(run_id, runs_dir)
    sizes = {"image_size": image_size, "patch_size": patch_size}
    shape = run.shape.replace(**{name: size for name, size in sizes.items() if size is not None})
    config = config_of(shape, format)
    if shape != run.shape:
        model = _resized(model, run, shape)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = beside(out)
        staging.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose a folder that can be written") from None
    try:
        _save(model, NORMALISATION[run.data], shape, format, config, staging)
        (staging / "README.md").write_text(card(run_id, run, shape, runs_dir, format), encoding="utf-8")
        measured = {"format": format, "run_id": run_id, **roundtrip_check(model, shape, format, staging)}
        _write_json(staging / MARK, {"sovit": __version__, **measured})
        if out.exists():  # aside first: a kill while it is deleted must not leave a part of it under its name
            out.rename(earlier := staging.with_name(staging.name + ".old"))
            staging.rename(out)
            shutil.rmtree(earlier)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {"out": str(asked), **measured}


def report_text(report: dict) -> str:
    """One line of what the reload measured."""
    if report["format"] == "nanovlm":
        text = "{out}: nanoVLM's tanh form of GELU moves tokens by {tokens_max_difference:.1e} (s.d. {tokens_std:.2f})"
    else:
        text = (
            "{out}: read again as {format}, tokens differ by {tokens_max_difference:.1e} at most, pooled features by"
            " {pooled_max_difference:.1e}"
        )
    return text.format_map(report)


def _check_replaceable(out: Path) -> None:
    """Only an empty folder or an earlier export of ours may be replaced."""
    if out == Path.cwd():
        raise UserError(f"{out} is the folder that you are in, which cannot be replaced; name another with --out")
    if out.exists() and not (out / MARK).exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} holds something else than an exported encoder; choose another folder with --out")
    strange = sorted({path.name for path in out.iterdir()} - EXPORTED) if out.is_dir() else []
    if strange:
        raise UserError(
            f"{out} holds {strange[0]}, which no export wrote; move it away, or choose another folder with --out"
        )


def _resized(model: Any, run: Run, shape: Shape) -> Any:
    from sovit.encoder.model import build
    from sovit.encoder.resize import resize_method, resize_state

    if shape.image_size > MAX_SIDE:
        raise UserError(f"image_size={shape.image_size} is too large to resize to; give at most {MAX_SIDE}")
    if shape.num_patches > MAX_PATCHES:
        raise UserError(
            f"image_size={shape.image_size} in patches of {shape.patch_size} makes {shape.num_patches:,} tokens, at most"
            f" {MAX_PATCHES:,} are exported; give a smaller image or larger patches"
        )
    resized: Any = build(shape, model.num_classes, mean_std=NORMALISATION[run.data])
    resized.load_state_dict(resize_state(model.state_dict(), run.shape, shape, resize_method(run)))
    resized.pretrained_cfg["crop_pct"] = model.pretrained_cfg["crop_pct"]
    return resized.eval()


def _save(model: Any, mean_std: tuple[float, float], shape: Shape, format: str, config: dict, folder: Path) -> None:
    """Weights, config.json and, where images are not prepared by the weights themselves, how they are."""
    if format == "timm":
        import timm.models

        timm.models.save_for_hf(model, str(folder), model_args=shape.timm_kwargs, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["model_args"].pop("num_classes", None)  # given twice, transformers' TimmWrapper refuses it
    else:
        from safetensors.torch import save_file

        tensors = {name: t.contiguous() for name, t in tensors_of(model.state_dict(), format, *mean_std).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    as_umask(folder / "model.safetensors")
    if format not in ("timm", "nanovlm"):
        processor = _processor(shape.image_size, *mean_std, model.pretrained_cfg["crop_pct"])
        _write_json(folder / "preprocessor_config.json", processor)
    _write_json(folder / "config.json", config)


def _processor(image_size: int, mean: float, std: float, crop_pct: float) -> dict:
    """What timm's own evaluation does with our pretrained_cfg: short side to image_size / crop_pct, the middle cut out."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(image_size / crop_pct)},
        "resample": 3,  # bicubic, in Pillow's numbers
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [std] * 3,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
