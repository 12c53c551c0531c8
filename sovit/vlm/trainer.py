"""VlmRun -> one ledger row: a vision-language model trained in stages by the one optimisation loop, and evaluated.

    stage 1 ─────╲ stage 2 ─────╲     in each stage every part is frozen, trained in full or by low-rank adapters (LoRA,
                                      arXiv 2106.09685), each at a rate of its own; a new optimiser in each

`python -m sovit.vlm.trainer VLMRUN.json [RUNS_DIR] [DEVICE]` trains one. Files, all under `runs/<trunk_id>/`: config.json,
metrics.jsonl, latest.pt and previous.pt as of sovit.train; <run_id>.safetensors holds what was trained and nothing else;
records/<run_id>.json is the measurement.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.encoder.open import Encoder, open_encoder
from sovit.encoder.weights import Unusable, load_weights, save_weights, weights_digest
from sovit.files import CannotWrite, write_atomic
from sovit.ledger.provenance import provenance
from sovit.ledger.records import read_record, write_record
from sovit.ledger.schema import SCHEMA
from sovit.spec.vlm_run import PARTS, Part, Stage, VlmRun
from sovit.train.checkpoint import Checkpoints
from sovit.train.command import main
from sovit.train.loop import (
    Diverged,
    Interrupted,
    OutOfMemory,
    fit,
    is_out_of_memory,
    parts_of,
    schedule,
    within_memory,
)
from sovit.train.trainer import SAVE_SECONDS, device_name, say
from sovit.vlm.evaluate import validate
from sovit.vlm.language_model import open_language_model
from sovit.vlm.model import VisionLanguageModel, VlmBatch
from sovit.vlm.packing import NO_LABEL
from sovit.vlm.questions.questions import Questions, open_questions

MODULES = {"vision": "vision", "projector": "projector", "language_model": "lm"}  # part -> attribute of the model


def train(
    run: VlmRun,
    runs_dir: Path | str = "runs",
    device: str = "cpu",
    on_progress: Callable[[dict], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    save_seconds: float = SAVE_SECONDS,
) -> list[dict]:
    """Train `run` unless it has a record; return its row, in a list as sovit.train.trainer.train does.

    Resumes from the last sound state that an earlier, killed, call has saved, to the same bits on a CPU. A loss that is
    not finite is recorded as `diverged`. Raises UserError where a part is not there or does not fit the others,
    OutOfMemory, and Interrupted, its state saved, as soon as `should_stop()`.
    """
    known = read_record(runs_dir, run.trunk_id, run.run_ids[0])
    if known is not None:
        return [known]
    try:
        return [VlmTrainer(run, Path(runs_dir), device, on_progress, should_stop, save_seconds).train()]
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory("for the model and its optimiser", error) from error
        raise


def build(run: VlmRun, runs_dir: Path | str, device: str = "cpu") -> VisionLanguageModel:
    """The model of a run before its training, adapters in place. Raises UserError for a part that cannot be had."""
    language_model = open_language_model(run.language_model)
    encoder: Encoder | int
    if run.control == "blind":
        encoder = int(run.encoder.partition(":")[2])
    else:
        encoder = open_encoder(run.encoder, runs_dir, device)
        size = encoder.preprocess.image_size
        if run.base and size != run.image_size:  # sovit's own reads what is drawn for it, and nothing resampled
            raise UserError(
                f"{run.encoder} reads {size} px, the questions' images have {run.image_size}; set image_size={size}"
            )
    model = VisionLanguageModel(
        encoder, language_model, run.projector, run.layer, run.norm, run.template, run.layout, run.init_seed
    ).to(device)
    model.requires_grad_(False)
    for part in PARTS:
        module = getattr(model, MODULES[part])  # a blind model has no vision
        if module is not None and any(stage.parts[part].mode == "lora" for stage in run.stages):
            add_adapters(module, run)
    if in_half(run):
        model.lm.to(torch.bfloat16)
    return model


def parts_digests(model: VisionLanguageModel) -> dict[str, str]:
    """What identifies the weights that a run begins with, and that its file does not hold where they stay frozen."""
    found = {"language_model_sha256": model.words.sha256}
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


def check_validation(run: VlmRun, model: VisionLanguageModel, questions: Questions) -> None:
    """Raise UserError where validation could not be had at the end of what may be hours: it asks of all families."""
    if run.num_val > questions.num_val:
        raise UserError(
            f"num_val={run.num_val} of {run.data}:{run.preset} is too much; it has {questions.num_val} validation images"
        )
    asked = questions.ask("val", 0, run.num_val)
    if not any(not run.families or q.family in run.families for image in asked for q in image):
        raise UserError(
            f"no question of {', '.join(run.families)} about the first {run.num_val} validation images; raise num_val"
        )
    model.check_lengths([model.document([(q.question, q.answer) for q in image]) for image in asked], run.max_length)


class VlmTrainer:
    """A run in training: model, questions, position."""

    def __init__(self, run, runs_dir: Path, device: str, on_progress, should_stop, save_seconds: float):
        self.run, self.runs_dir, self.device, self.on_progress = run, runs_dir, device, on_progress
        self.should_stop, self.save_seconds = should_stop, save_seconds
        self.folder = runs_dir / run.trunk_id
        place = (run.data, run.preset, run.image_size, run.data_seed)
        self.questions = open_questions(*place, families=run.families)
        self.all_questions = open_questions(*place) if run.families else self.questions
        self.model = build(run, runs_dir, device)
        check_validation(run, self.model, self.all_questions)
        self.parts = parts_digests(self.model)  # as they are before anything is trained
        self.names = trained_names(self.model, run)
        self.parameters = dict(self.model.named_parameters())
        self.flops_per_image: dict[int, float] = {}  # stage -> what a step spends, of an image
        self.step, self.seconds = 0, 0.0
        self.window: torch.Tensor | None = None  # of `fit`, where a stop cut one
        self.micro_batch: int | None = None  # where a batch did not fit into memory: rows that did
        self.saved_at = time.monotonic()
        write_atomic(self.folder / "config.json", json.dumps(run.to_dict(), indent=2) + "\n")

    # data ----------------------------------------------------------------------------------------------------------------

    def batch_at(self, step: int) -> VlmBatch:
        start, count = step * self.run.batch_size, self.run.batch_size
        asked = self.questions.ask("train", start, count)
        documents = [self.model.document([(q.question, q.answer) for q in questions]) for questions in asked]
        return self.model.batch(documents, self.questions.images("train", start, count), self.run.max_length)

    def loss_fn(self, batch: VlmBatch) -> tuple[torch.Tensor, int]:
        kind = self.device.partition(":")[0]
        mixed = self.run.precision == "bfloat16" and not in_half(self.run)
        with torch.autocast(kind, torch.bfloat16, enabled=mixed):
            logits = self.model(batch)  # [L, V]
        labels = batch.labels[batch.labels != NO_LABEL]
        return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)

    # stages --------------------------------------------------------------------------------------------------------------

    def train(self) -> dict:
        run, row = self.run, self._row()
        checkpoints = self.checkpoints = Checkpoints(self.folder, run.trunk_id, run.batch_size)
        ends = [sum(s.num_examples for s in run.stages[: i + 1]) // run.batch_size for i in range(len(run.stages))]
        state = checkpoints.furthest(run.num_examples, 0, self._check)
        if state is not None:
            for name, value in state["model"].items():
                self.parameters[name].data.copy_(value)
            self.step, self.seconds = state["step"], state["seconds"]
            window = state["window"]
            self.window = None if window is None else window.to(self.device)
            self.micro_batch = state["micro_batch"]
        try:
            for i, (stage, end) in enumerate(zip(run.stages, ends)):
                start = end - stage.num_examples // run.batch_size
                # a state saved at a stage's very end goes on with the next one, which has an optimiser of its own
                resumed = state["optimizer"] if state is not None and start < self.step < end else None
                self._train_stage(i, stage, range(start, end), resumed)
            path = self.folder / f"{run.run_ids[0]}.safetensors"
            save_weights(self.model, path, run.run_ids[0], self.names, **self.parts)
            self.model.float()  # validation computes in float32, whatever training did
            metrics = validate(self.model, self.all_questions, run.num_val, run.max_length, run.families)
            if not math.isfinite(metrics["val_loss"]):
                raise Diverged(ends[-1])
            row |= {"status": "ok", **metrics}
        except Diverged as error:
            row |= {"status": "diverged", "error": str(error), "val_loss": None, "val_error": None}
        spent = sum(s.num_examples * self.flops_per_image.get(i, 0) for i, s in enumerate(run.stages))
        row |= {"train_flops": round(spent) or None, "spent_flops": round(spent) or None}
        row |= {"micro_batch": self.micro_batch, "seconds": round(self.seconds, 3)}
        row |= provenance(device_name(self.device))
        write_record(self.runs_dir, row)
        checkpoints.drop_latest()
        return row

    def _train_stage(self, number: int, stage: Stage, steps: range, resumed: dict | None) -> None:
        run, groups = self.run, []
        for p in self.parameters.values():
            p.requires_grad_(False)
        for part, how in stage.parts.items():
            ours = list(trained_of(self.model, part, how).values())
            for parameter in ours:
                parameter.requires_grad_(True)
            matrices, rest = [p for p in ours if p.ndim >= 2], [p for p in ours if p.ndim < 2]
            for parameters, decay in ((matrices, how.weight_decay), (rest, 0.0)):
                if parameters:
                    groups.append((how, {"params": parameters, "weight_decay": decay}))
        optimizer = torch.optim.AdamW([g for _, g in groups], lr=0.0, betas=(run.beta1, run.beta2), fused=True)
        if resumed is not None:
            optimizer.load_state_dict(resumed)
        self.flops_per_image[number] = self._count(steps.start)
        length = len(steps)

        def rates(step: int) -> list[float]:
            return [how.peak_lr * self._factor(step - steps.start, length, how) for how, _ in groups]

        def on_window(step: int, loss: float, seconds: float) -> None:
            rate = (step - self.step) * run.batch_size / seconds
            self.step, self.seconds, self.window = step, self.seconds + seconds, None
            self._log(loss)
            total = run.num_examples // run.batch_size
            self.on_progress(
                {
                    "trunk_id": run.trunk_id,
                    "shape": run.label,
                    "phase": f"stage {number + 1}",
                    "examples": step * run.batch_size,
                    "share": step / total,
                    "loss": loss,
                    "images_per_second": rate,
                    "flops_per_second": rate * self.flops_per_image[number],
                    "seconds_left": (total - step) * run.batch_size / rate,
                    "window_seconds": seconds,
                }
            )

            if time.monotonic() - self.saved_at > self.save_seconds:
                try:
                    self._save(optimizer)
                except CannotWrite as error:  # there may be room the next time
                    self.saved_at = time.monotonic()
                    say(f"{error}; training goes on")

        try:
            fit(
                [p for p in self.parameters.values() if p.requires_grad],
                optimizer,
                self.batch_at,
                self.loss_fn,
                rates,
                range(max(self.step, steps.start), steps.stop),
                clip_norm=run.clip_norm,
                on_window=on_window,
                should_stop=self.should_stop,
                window=self.window,
                micro_batch=self.micro_batch,
                on_split=self._split,
            )
        except Interrupted as stop:
            self.step, self.seconds, self.window = stop.step, self.seconds + stop.seconds, stop.window
            self._save(optimizer)
            raise

    def _factor(self, step: int, length: int, how: Part) -> float:
        """Multiplier of a part's peak rate at `step` of a stage of `length` steps."""
        run, warmup = self.run, round(how.warmup * length)
        if run.schedule == "cooldown":
            return schedule(
                step, warmup=warmup, timescale=None, cooldown=range(round((1 - run.cooldown) * length), length)
            )
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, length - warmup)
        return run.final_lr + (1 - run.final_lr) * 0.5 * (1 + math.cos(math.pi * share))

    def _split(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch
        say(f"out of memory: {self.run.trunk_id} goes on with {micro_batch} rows at a time, the same batch a step")

    def _count(self, step: int) -> float:
        """FLOPs of an image in the stage's steps, matrix products forward and backward, counted by torch on its first.

        It is the first to see a whole batch, and so the first for which memory may not do.
        """
        batch = self.batch_at(step)

        def attempt(rows: int) -> int:
            with FlopCounterMode(display=False) as counter:
                for part in parts_of(batch, rows):
                    self.loss_fn(part)[0].backward()
            return counter.get_total_flops()

        rows = min(self.micro_batch or len(batch[0]), len(batch[0]))
        flops, fitting = within_memory(attempt, rows)
        if fitting < rows:
            self._split(fitting)
        for p in self.parameters.values():
            p.grad = None
        return flops / self.run.batch_size

    # files ---------------------------------------------------------------------------------------------------------------

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        self.checkpoints.save_latest(
            {
                "trunk_id": self.run.trunk_id,
                "branch": self.run.num_examples,
                "spent": 0.0,
                "step": self.step,
                "seconds": self.seconds,
                "window": self.window,
                "micro_batch": self.micro_batch,
                "model": {name: self.parameters[name].data for name in self.names},
                "optimizer": optimizer.state_dict(),
            }
        )
        self.saved_at = time.monotonic()

    def _check(self, state: dict) -> None:
        """Raise Unusable for a state of another model."""
        try:
            found = {name: tuple(t.shape) for name, t in state["model"].items()}
        except (KeyError, AttributeError):
            raise Unusable("it holds no weights") from None
        if found != {name: tuple(self.parameters[name].shape) for name in self.names}:
            raise Unusable("it trains other parameters")

    def _log(self, loss: float) -> None:
        position = {"step": self.step, "examples": self.step * self.run.batch_size, "branch": self.run.num_examples}
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps({**position, "train_loss": loss, "seconds": round(self.seconds, 3)}) + "\n")
        except OSError as error:  # of the disk, and no failure of the run
            raise CannotWrite(path, error) from error

    def _row(self) -> dict:
        """What of the row is known before training."""
        run, model = self.run, self.model
        parts = {part: getattr(model, MODULES[part]) for part in PARTS}
        sizes = {
            f"{p}_params": sum(t.numel() for t in m.parameters()) if m is not None else 0 for p, m in parts.items()
        }
        trained = sum(self.parameters[name].numel() for name in self.names)
        last = {f"{part}_mode": run.stages[-1].parts[part].mode for part in PARTS}
        return {
            "schema": SCHEMA,
            "run_id": run.run_ids[0],
            "trunk_id": run.trunk_id,
            "objective": "vlm",
            "control": run.control,
            **run.columns,
            **last,
            "num_examples": run.num_examples,
            "num_image_tokens": model.num_image_tokens,
            "peak_lr": max(stage.projector.peak_lr for stage in run.stages),
            **sizes,
            "trained_params": trained,
            **self.parts,
            "encoder_width": model.encoder.width if model.encoder else None,
            "encoder_depth": model.encoder.depth if model.encoder else None,
        }


def read_run(run_id: str, runs_dir: Path | str = "runs") -> VlmRun:
    """What a vision-language model in `runs_dir` was trained as. Raises UserError for one that is not there."""
    folder = Path(runs_dir) / run_id.rpartition("-")[0]
    try:
        run = VlmRun.from_dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"no trained vision-language model {run_id!r} in {runs_dir} ({error}); see the ledger's run_id"
        ) from None
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


if __name__ == "__main__":
    sys.exit(main(module="sovit.vlm.trainer", read=VlmRun.from_dict, train=train))
