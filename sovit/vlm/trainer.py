"""VlmRun -> one ledger row: a vision-language model trained in stages by the one optimisation loop, and evaluated.

    stage 1 ─────╲ stage 2 ─────╲     in each stage every part is frozen, trained in full or by low-rank adapters (LoRA,
                                      arXiv 2106.09685), each at a rate of its own; a new optimiser in each

`python -m sovit.vlm.trainer VLMRUN.json [RUNS_DIR] [DEVICE]` trains one. Files, all under `runs/<trunk_id>/`: config.json,
metrics.jsonl, latest.pt and previous.pt as of sovit.train; <run_id>.safetensors holds what was trained and nothing else;
records/<run_id>.json is the measurement.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.encoder.weights import Unusable, save_weights
from sovit.ledger.provenance import provenance
from sovit.ledger.schema import SCHEMA
from sovit.spec.vlm_run import PARTS, Part, Stage, VlmRun
from sovit.train.base import Hooks, Trainer, device_name, train_pending
from sovit.train.command import main
from sovit.train.loop import Diverged, Task, parts_of, schedule, within_memory
from sovit.vlm.evaluate import validate
from sovit.vlm.model import VisionLanguageModel
from sovit.vlm.packing import NO_LABEL, Packed
from sovit.vlm.questions.questions import Questions, open_questions
from sovit.vlm.trained import MODULES, build, in_half, parts_digests, trained_names, trained_of


def train(run: VlmRun, runs_dir: Path | str = "runs", device: str = "cpu", **hooks: Any) -> list[dict]:
    """Train `run` unless it has a record; return its row, in a list as sovit.train.trainer.train does.

    hooks: fields of `sovit.train.base.Hooks`. Resumes from the last sound state that an earlier, killed, call has saved, to
    the same bits on a CPU. A loss that is not finite is recorded as `diverged`. Raises UserError where a part is not there
    or does not fit the others, OutOfMemory, and Interrupted, its state saved, as soon as `should_stop()`.
    """
    return train_pending(VlmTrainer, run, runs_dir, device, Hooks(**hooks))


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
    model.check_lengths([model.document_of(image) for image in asked], run.max_length)


class VlmTrainer(Trainer):
    """A run in training: model, questions, the optimiser of a stage."""

    def __init__(self, run: VlmRun, runs_dir: Path, device: str, hooks: Hooks):
        super().__init__(run, runs_dir, device, hooks, run.batch_size)
        place = (run.data, run.preset, run.image_size, run.data_seed)
        self.questions = open_questions(*place, families=run.families)
        self.all_questions = open_questions(*place) if run.families else self.questions
        self.model = build(run, runs_dir, device)
        check_validation(run, self.model, self.all_questions)
        self.parts = parts_digests(self.model)  # as they are before anything is trained
        self.names = trained_names(self.model, run)
        self.parameters = dict(self.model.named_parameters())
        self.total_examples, self.train_flops = run.num_examples, 0.0
        self.open_folder()

    # data ----------------------------------------------------------------------------------------------------------------

    def batch_at(self, step: int) -> Packed:
        start, count = step * self.run.batch_size, self.run.batch_size
        documents = [self.model.document_of(asked) for asked in self.questions.ask("train", start, count)]
        return self.model.batch(documents, self.questions.images("train", start, count), self.run.max_length)

    def loss_fn(self, batch: Packed) -> tuple[torch.Tensor, int]:
        with self.autocast(self.run.precision == "bfloat16" and not in_half(self.run)):
            logits = self.model(batch)  # [L, V]
        labels = batch.labels[batch.labels != NO_LABEL]
        return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)

    # stages --------------------------------------------------------------------------------------------------------------

    def rows(self, pending: list[int]) -> Iterator[dict]:
        run, row = self.run, self._row()
        state = self.checkpoints.furthest(run.num_examples, 0, self._check)
        if state is not None:
            for name, value in state["model"].items():
                self.parameters[name].data.copy_(value)
            self.go_to(state)
        self.forget(run.num_examples, 0)
        try:
            end = 0
            for i, stage in enumerate(run.stages):
                start, end = end, end + stage.num_examples // run.batch_size
                # a state saved at a stage's very end goes on with the next one, which has an optimiser of its own
                resumed = state["optimizer"] if state is not None and start < self.at.step < end else None
                self._train_stage(i, stage, range(start, end), resumed)
            path = self.folder / f"{run.run_ids[0]}.safetensors"
            save_weights(self.model, path, run.run_ids[0], self.names, **self.parts)
            self.model.float()  # validation computes in float32, whatever training did
            metrics = validate(self.model, self.all_questions, run.num_val, run.max_length, run.families)
            if not math.isfinite(metrics["val_loss"]):
                raise Diverged(end)
            row |= {"status": "ok", **metrics}
        except Diverged as error:
            row |= {"status": "diverged", "error": str(error), "val_loss": None, "val_error": None}
        flops = round(self.train_flops) or None
        yield {
            **row,
            "train_flops": flops,
            "spent_flops": flops,
            "micro_batch": self.at.micro_batch,
            "seconds": round(self.at.seconds, 3),
            **provenance(device_name(self.device)),
        }
        self.checkpoints.drop_latest()

    def _train_stage(self, number: int, stage: Stage, steps: range, resumed: dict | None) -> None:
        run, groups, trained = self.run, [], []
        self.model.requires_grad_(False)
        for part, how in stage.parts.items():
            ours = [p.requires_grad_(True) for p in trained_of(self.model, part, how).values()]
            trained += ours
            matrices, rest = [p for p in ours if p.ndim >= 2], [p for p in ours if p.ndim < 2]
            for parameters, decay in ((matrices, how.weight_decay), (rest, 0.0)):
                if parameters:
                    groups.append((how, {"params": parameters, "weight_decay": decay}))
        self.optimizer = torch.optim.AdamW([g for _, g in groups], lr=0.0, betas=(run.beta1, run.beta2), fused=True)
        if resumed is not None:
            self.optimizer.load_state_dict(resumed)
        self.flops_per_example = self._count(steps.start)
        self.train_flops += stage.num_examples * self.flops_per_example

        def rates(step: int) -> list[float]:
            return [how.peak_lr * self._factor(step - steps.start, len(steps), how) for how, _ in groups]

        task = Task(trained, self.optimizer, self.batch_at, self.loss_fn, rates, run.clip_norm)
        left = run.num_examples - steps.stop * run.batch_size
        self.advance(task, steps.stop, run.num_examples, f"stage {number + 1}", left)

    def _factor(self, step: int, length: int, how: Part) -> float:
        """Multiplier of a part's peak rate at `step` of a stage of `length` steps."""
        run, warmup = self.run, round(how.warmup * length)
        if run.schedule == "cooldown":
            cooldown = range(round((1 - run.cooldown) * length), length)
            return schedule(step, warmup=warmup, timescale=None, cooldown=cooldown)
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, length - warmup)
        return run.final_lr + (1 - run.final_lr) * 0.5 * (1 + math.cos(math.pi * share))

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

        rows = min(self.at.micro_batch or len(batch[0]), len(batch[0]))
        flops, fitting = within_memory(attempt, rows)
        if fitting < rows:
            self.at.micro_batch = fitting
            self.say_split(fitting)
        self.model.zero_grad()
        return flops / self.run.batch_size

    # files ---------------------------------------------------------------------------------------------------------------

    def weights(self) -> dict:
        trained = {name: self.parameters[name].data for name in self.names}
        return {"model": trained, "optimizer": self.optimizer.state_dict()}

    def _check(self, state: dict) -> None:
        """Raise Unusable for a state of another model."""
        if set(state.get("model", ())) != set(self.names):
            raise Unusable("it trains other parameters")

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


if __name__ == "__main__":
    sys.exit(main(module="sovit.vlm.trainer", read=VlmRun.from_dict, train=train))
