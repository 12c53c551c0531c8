"""Train one trunk and measure its branches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import Batch, open_data
from sovit.data.captions import open_captions
from sovit.encoder.model import build, parameter_groups
from sovit.encoder.probe import probe_branches
from sovit.encoder.resize import at_patch_size
from sovit.encoder.trained import base_of
from sovit.encoder.weights import save_weights
from sovit.ledger.provenance import provenance
from sovit.ledger.schema import new_row
from sovit.spec.run import Run
from sovit.train.base import Hooks, Trainer, device_name, train_pending
from sovit.train.checkpoint import check_fits
from sovit.train.evaluate import validate
from sovit.train.finetune import begin, stored_names
from sovit.train.loop import Diverged, Position, Task, schedule
from sovit.train.siglip import Pairs, build_pair, pair_loss, row_columns, validate_pairs


def train(run: Run, runs_dir: Path | str = "runs", device: str = "cpu", **hooks: Any) -> list[dict]:
    """Train whatever branches of `run` have no record yet, probe those without one, and return the rows of all of them.

    hooks: fields of `sovit.train.base.Hooks`. Resumes from the checkpoints of an earlier, killed or shorter, call; on a CPU
    the records are then bit for bit those of an uninterrupted run. A damaged checkpoint is said on standard error and the
    one before it taken. A non-finite loss ends its branch (or, on the trunk, all later ones) as `diverged`.

    Raises UserError where data and shape do not fit together, OutOfMemory where model or image do not fit into memory and
    CannotWrite where a state that is needed cannot be kept, both of them UserErrors; Interrupted, its state saved, as
    soon as `should_stop()`.
    """
    rows = train_pending(EncoderTrainer, run, runs_dir, device, Hooks(**hooks))
    return probe_branches(rows, run.probe, runs_dir, device) if run.probe else rows


class EncoderTrainer(Trainer):
    """One trunk in training: sources, model, optimiser."""

    def __init__(self, run: Run, runs_dir: Path, device: str, hooks: Hooks):
        super().__init__(run, runs_dir, device, hooks, run.recipe.batch_size)
        shape = run.shape
        self.sources = {  # patch size -> the same images, with labels for its patches
            size: open_data(run.data, run.preset, shape.image_size, size, run.data_seed, device)
            for size in run.recipe.patch_sizes or (shape.patch_size,)
        }
        self.source = self.sources[shape.patch_size]
        self.captions = open_captions(run.data, self.source) if run.recipe.objective == "siglip" else None
        check_readout(run, self.source.readout)
        self.num_classes = self.source.num_classes
        self.said = {"num_classes": self.num_classes}
        self.flops_per_example = run.train_flops(run.budgets[-1], self.num_classes) / run.budgets[-1]
        self.total_examples = run.total_examples
        self.base = base_of(run, runs_dir) if run.base else None
        self._begin()
        self.open_folder()

    def _begin(self) -> None:
        """The state before the first step."""
        run, recipe = self.run, self.run.recipe
        if self.base:
            model = begin(run, self.base, self.num_classes)
        elif self.captions:
            model = build_pair(run.shape, recipe, self.captions, run.init_seed)
        else:
            model = build(run.shape, self.num_classes, recipe.parametrisation, run.init_seed)
        self.stored = stored_names(model, self.base) if self.base else None  # None: all of it
        self.model: Any = model.to(self.device)
        self.forward = {size: at_patch_size(self.model, run.shape, size) for size in self.sources}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, recipe.weight_decay), lr=0.0, betas=(recipe.beta1, recipe.beta2), fused=True
        )
        self.at = Position(micro_batch=self.at.micro_batch)

    def rows(self, pending: list[int]) -> Iterator[dict]:
        run = self.run
        last = run.trunk_examples(pending[-1])
        for i, n in enumerate(pending):
            leaves = run.trunk_examples(n)
            after = last - leaves + sum(run.cooldown_examples(later) for later in pending[i + 1 :])
            branch = self._resume(n)
            self.forget(n, leaves // self.batch_size)
            try:
                if branch is None:
                    self._train_trunk(leaves, after + run.cooldown_examples(n))
            except Diverged as error:
                for later in pending[i:]:
                    yield self._row(later, "diverged", error=f"trunk: {error}", spent_flops=None)
                break
            # the branch leaves the trunk here; its own state is dropped afterwards
            try:
                self._advance(n, n, after)
                metrics = self._measure()
                row = self._row(n, "ok", **metrics, **self._save_weights(n))
            except Diverged as error:
                row = self._row(n, "diverged", error=f"cooldown: {error}", spent_flops=None)
            yield row  # last: it says that its branch is complete, weights included
        self.checkpoints.drop_latest()

    def _train_trunk(self, end: int, left: int) -> None:
        """Train up to `end` examples of the trunk; keep the state there, and where branches leave it on the way."""
        points = {self.run.trunk_examples(n) for n in self.run.budgets}
        for examples in sorted({n for n in points if self.at.step * self.batch_size < n < end} | {end}):
            self._advance(examples, None, left + end - examples)
            self.checkpoints.save_point(self.state(None), examples)

    def _advance(self, examples: int, branch: int | None, left: int) -> None:
        """Train up to `examples`: on the trunk (branch=None), or in the cooldown towards `branch` examples."""
        run, recipe, batch = self.run, self.run.recipe, self.batch_size
        cooldown = None if branch is None else range(run.trunk_examples(branch) // batch, branch // batch)
        timescale = recipe.rsqrt_examples // batch if recipe.schedule == "rsqrt" else None

        def learning_rate_at(step: int) -> float:
            factor = schedule(step, warmup=recipe.warmup_examples // batch, timescale=timescale, cooldown=cooldown)
            return recipe.peak_lr * factor

        precision = partial(self.autocast, recipe.precision == "bfloat16")
        task = Task(
            [p for p in self.model.parameters() if p.requires_grad],
            self.optimizer,
            self._batch_at,
            partial(pair_loss if self.captions else self._loss, self.model, precision=precision),
            learning_rate_at,
            recipe.clip_norm,
            pairwise=self.captions is not None,
        )
        self.advance(task, examples // batch, branch, "trunk" if branch is None else "cooldown", left)

    def _batch_at(self, step: int) -> Batch | Pairs:
        self.patch_size = self.run.patch_size_at(step)  # for the loss, which is taken before the next batch is drawn
        start = step * self.batch_size
        found = self.sources[self.patch_size].train(start, self.batch_size)
        return Pairs(found.images, self.captions.train(start, self.batch_size)) if self.captions else found

    def _loss(self, model: Any, batch: Batch, precision: Any) -> tuple[torch.Tensor, int]:
        with precision():
            logits = self.forward[self.patch_size](batch.images).flatten(0, -2)
        return F.cross_entropy(logits.float(), batch.labels.flatten(), reduction="sum"), batch.labels.numel()

    def _measure(self) -> dict[str, float | None]:
        """The metrics of the cooled-down model, for its row. Raises Diverged where they are not finite."""
        if self.captions:
            metrics = validate_pairs(self.model, self.source, self.captions)
        else:
            metrics = validate(self.model, self.source)
        for size in self.run.recipe.patch_sizes:
            at_size = validate(self.model, self.sources[size], self.forward[size])
            metrics |= {f"{name}@p{size}": at_size[name] for name in ("val_loss", "val_error")}
        loss = metrics["val_loss"]
        if loss is None or not math.isfinite(loss):
            raise Diverged(self.at.step)  # the last step spoilt the weights after its own loss was found finite
        return metrics

    def weights(self) -> dict:
        return {
            "base_sha256": self.base.sha256 if self.base else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _resume(self, num_examples: int) -> int | None:
        """Go on from the furthest sound state from which the branch to `num_examples` can be reached.

        Returns the branch that it is on: `num_examples`, or None for the trunk, be it at its very beginning.
        """
        base_sha256 = self.base.sha256 if self.base else None
        check = partial(check_fits, model=self.model, optimizer=self.optimizer, base_sha256=base_sha256)
        state = self.checkpoints.furthest(num_examples, self.run.trunk_examples(num_examples), check)
        if state is None:
            if self.at.step:
                self._begin()
            return None
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.go_to(state)
        return state["branch"]

    def _save_weights(self, num_examples: int) -> dict:
        """Write the branch's weights; return what the row of a fine-tuning says of their file."""
        run_id = self.run.run_id(num_examples)
        path = self.folder / f"{run_id}.safetensors"
        if self.base is None:
            save_weights(self.model, path, run_id)
            return {}
        save_weights(self.model, path, run_id, self.stored, base_sha256=self.base.sha256)
        return {"stored_bytes": path.stat().st_size}

    def _row(self, num_examples: int, status: str, **more: Any) -> dict:
        """The row of a branch; what was spent is billed by it."""
        base = self.base and {
            "base_image_size": self.base.shape.image_size,
            "base_patch_size": self.base.shape.patch_size,
            "base_examples": self.base.num_examples,
            "base_train_flops": self.base.train_flops,
        }
        row = new_row(
            self.run,
            num_examples,
            status=status,
            num_classes=self.num_classes,
            **more,
            **(row_columns(self.source, self.captions) if self.captions else {"zero_line": self.source.zero_line}),
            data_key=self.source.content_key,
            micro_batch=self.at.micro_batch or self.batch_size,
            seconds=round(self.at.seconds, 3),
            spent_seconds=round(self.at.spent, 3),
            **(base or {}),
            **provenance(device_name(self.device)),
        )
        self.at.spent = 0.0
        return dict(row)


def check_readout(run: Run, readout: str) -> None:
    """A source with a label a patch needs a shape without pooling, and the other way round; a caption fits any."""
    if run.recipe.objective == "siglip":
        return
    if (readout == "tokens") != (run.shape.pool == "none"):
        need = "pool=none" if readout == "tokens" else "pool=avg, map or token"
        raise UserError(
            f"pool={run.shape.pool!r} does not fit {run.data}:{run.preset}, whose labels are {readout}; use {need}"
        )
