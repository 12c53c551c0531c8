"""The model of a VlmRun: built as before its training, or opened with what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sovit import UserError
from sovit.encoder.open import Encoder, load_encoder
from sovit.encoder.weights import Unusable, load_weights, weights_digest
from sovit.spec.vlm_run import PARTS, Part, VlmRun
from sovit.vlm.language_model import open_language_model
from sovit.vlm.model import ModelOptions, VisionLanguageModel

MODULES = {"vision": "vision", "projector": "projector", "language_model": "lm"}  # part -> attribute of the model


def build(run: VlmRun, runs_dir: Path | str, device: str = "cpu") -> VisionLanguageModel:
    """The model of a run before its training, adapters in place. Raises UserError for a part that cannot be had."""
    language_model = open_language_model(run.language_model)
    encoder: Encoder | int
    if run.control == "blind":
        encoder = int(run.encoder.partition(":")[2])
    else:
        encoder = load_encoder(run.encoder, runs_dir, device)
        size = encoder.preprocess.image_size
        if run.base and size != run.image_size:  # sovit's own reads what is drawn for it, and nothing resampled
            raise UserError(
                f"{run.encoder} reads {size} px, the questions' images have {run.image_size}; set image_size={size}"
            )
    model = VisionLanguageModel(encoder, language_model, ModelOptions.of(run)).to(device)
    model.requires_grad_(False)
    for part in PARTS:
        module = getattr(model, MODULES[part])  # a text-only baseline has none
        if module is not None and any(stage.parts[part].mode == "lora" for stage in run.stages):
            add_adapters(module, run)
    if in_half(run):
        model.lm.to(torch.bfloat16)
    return model


def parts_digests(model: VisionLanguageModel) -> dict[str, str]:
    """What identifies the weights that a run begins with, and that its file does not hold where they stay frozen."""
    found = {"language_model_sha256": model.language_model.sha256}
    if model.encoder is not None:
        weights = {k: v for k, v in model.encoder.module.state_dict().items() if "lora_" not in k}
        found["encoder_sha256"] = weights_digest(weights)
    return found


def in_half(run: VlmRun) -> bool:
    """Whether the language model is held in bfloat16: casting its weights anew in each step would take a third of it."""
    return run.precision == "bfloat16" and all(stage.language_model.mode == "frozen" for stage in run.stages)


def add_adapters(module: Any, run: VlmRun) -> None:
    """Low-rank adapters beside every linear layer of `module`, in place; B = 0, so that nothing changes yet."""
    try:
        import peft
    except ImportError:
        raise UserError("mode=lora needs peft; run: pip install 'sovit[vlm]'") from None
    head = [name for name, m in module.named_modules() if name.endswith("lm_head")]
    linear = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and n not in head]
    if not linear:
        raise UserError(
            f"mode=lora: {type(module).__name__} has no linear layer to put an adapter beside; use mode=full"
        )
    config = peft.LoraConfig(r=run.lora_rank, lora_alpha=run.lora_alpha, target_modules=linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.init_seed)
        peft.inject_adapter_in_model(config, module)
    module.requires_grad_(False)


def trained_of(model: VisionLanguageModel, part: str, how: Part) -> dict[str, torch.nn.Parameter]:
    """Name in the model -> parameter, of what a stage trains of a part."""
    prefix = MODULES[part]
    module = getattr(model, prefix)
    if how.mode == "frozen" or module is None:
        return {}
    wanted = (lambda name: "lora_" in name) if how.mode == "lora" else (lambda name: "lora_" not in name)
    return {f"{prefix}.{name}": p for name, p in module.named_parameters() if wanted(name)}


def trained_names(model: VisionLanguageModel, run: VlmRun) -> list[str]:
    """Names of all parameters that any stage trains, in the order of the model's own."""
    names = {name for stage in run.stages for part in PARTS for name in trained_of(model, part, stage.parts[part])}
    return [name for name, _ in model.named_parameters() if name in names]


def read_run(run_id: str, runs_dir: Path | str = "runs") -> VlmRun:
    """What a vision-language model in `runs_dir` was trained as. Raises UserError for one that is not there."""
    folder = Path(runs_dir) / run_id.rpartition("-")[0]
    try:
        run = VlmRun.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, UserError) as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        what = f"no trained vision-language model {run_id!r} in {runs_dir}{why}"
        raise UserError(f"{what}; give a run_id of its study's ledger, as TRUNK-EXAMPLES") from None
    if run_id not in run.run_ids:
        raise UserError(f"{folder} holds {run.run_ids[0]}, not {run_id}; see the ledger's run_id")
    return run


def open_vlm(run_id: str, runs_dir: Path | str = "runs", device: str = "cpu") -> VisionLanguageModel:
    """A trained vision-language model, in eval mode, all of it frozen. Raises UserError for one that is not there."""
    run = read_run(run_id, runs_dir)
    path = Path(runs_dir) / run.trunk_id / f"{run_id}.safetensors"
    try:
        weights, said = load_weights(path)
    except Unusable as error:
        raise UserError(f"the weights of {run_id} cannot be read ({error}); train it again") from None
    model = build(run, runs_dir, device)
    names = trained_names(model, run)
    for part, sha256 in parts_digests(model).items():
        if said.get(part) not in (None, sha256):  # older files do not say
            raise UserError(
                f"{run_id} was trained with another {part.removesuffix('_sha256')} than is here now; train it again"
            )
    if set(weights) != set(names):
        raise UserError(f"{path} holds other parameters than {run_id} trains; train it again")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(weights[name])
    return model.float().eval()
