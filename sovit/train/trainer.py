"""Train one trunk and measure its branches."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import Batch, open_data
from sovit.data.captions import open_captions
from sovit.encoder.flexivit import at_patch_size
from sovit.encoder.model import build, parameter_groups
from sovit.encoder.probe import probe_branches
from sovit.encoder.trained import base_of
from sovit.encoder.weights import save_weights
from sovit.files import CannotWrite, write_atomic
from sovit.ledger.provenance import provenance
from sovit.ledger.records import read_record, write_record
from sovit.ledger.schema import new_row
from sovit.spec.run import Run
from sovit.train.checkpoint import Checkpoints, check_fits
from sovit.train.evaluate import validate
from sovit.train.finetune import begin, stored_names
from sovit.train.loop import Diverged, Interrupted, OutOfMemory, fit, is_out_of_memory, schedule
from sovit.train.siglip import Pairs, build_pair, pair_loss, row_columns, validate_pairs

SAVE_SECONDS = 60.0  # between periodic checkpoints


def train(
    run: Run,
    runs_dir: Path | str = "runs",
    device: str = "cpu",
    on_progress: Callable[[dict], None] = lambda progress: None,
    save_seconds: float = SAVE_SECONDS,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict]:
    """Train whatever branches of `run` have no record yet, probe those without one, and return the rows of all of them.

    Resumes from the checkpoints of an earlier, killed or shorter, call; on a CPU the records are then bit for bit
    those of an uninterrupted run. A damaged checkpoint is said on standard error and the one before it taken. A
    non-finite loss ends its branch (or, on the trunk, all later ones) as `diverged`.

    Raises UserError where data and shape do not fit together, OutOfMemory where model or image do not fit into memory and
    CannotWrite where a state that is needed cannot be kept, both of them UserErrors; Interrupted, its state saved, as
    soon as `should_stop()`.
    """
    pending = [n for n in run.budgets if read_record(runs_dir, run.trunk_id, run.run_id(n)) is None]
    if pending:
        try:
            Trainer(run, Path(runs_dir), device, on_progress, save_seconds, should_stop).train(pending)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # where smaller parts of a batch do not help
                raise OutOfMemory("for the model and its optimiser", error) from error
            raise
    if run.probe:
        probe_branches(run, runs_dir, device)
    rows = [read_record(runs_dir, run.trunk_id, run.run_id(n)) for n in run.budgets]
    return [row for row in rows if row is not None]  # none lacks by now


class Trainer:
    """The state of one trunk in training: model, optimiser, position, and the seconds it has taken."""

    def __init__(
        self,
        run: Run,
        runs_dir: Path,
        device: str,
        on_progress: Callable[[dict], None],
        save_seconds: float,
        should_stop: Callable[[], bool],
    ):
        self.run, self.runs_dir, self.device, self.on_progress = run, runs_dir, device, on_progress
        self.save_seconds, self.should_stop = save_seconds, should_stop
        self.folder = runs_dir / run.trunk_id
        shape = run.shape
        self.sources = {  # patch size -> the same images, with labels for its patches
            size: open_data(run.data, run.preset, shape.image_size, size, run.data_seed, device)
            for size in run.recipe.patch_sizes or (shape.patch_size,)
        }
        self.source = self.sources[shape.patch_size]
        self.captions = open_captions(run.data, self.source) if run.recipe.objective == "siglip" else None
        check_readout(run, self.source.readout)
        self.num_classes = self.source.num_classes
        self.flops_per_example = run.train_flops(run.budgets[-1], self.num_classes) / run.budgets[-1]
        self.base = base_of(run, runs_dir) if run.base else None
        self.micro_batch: int | None = None  # where a batch did not fit into memory: images that did
        self.saved_at = time.monotonic()
        self._begin()
        self.checkpoints = Checkpoints(self.folder, run.trunk_id, run.recipe.batch_size)
        write_atomic(self.folder / "config.json", json.dumps(run.to_dict(), indent=2) + "\n")

    def _begin(self) -> None:
        """The state before the first step."""
        recipe = self.run.recipe
        if self.base:
            model = begin(self.run, self.base, self.num_classes)
            self.stored: tuple[str, ...] | None = stored_names(model, self.base)
        elif self.captions:
            model = build_pair(self.run.shape, recipe, self.captions, self.run.init_seed)
            self.stored = None
        else:
            model = build(self.run.shape, self.num_classes, recipe.parametrisation, self.run.init_seed)
            self.stored = None  # all of it
        self.model: Any = model.to(self.device)
        self.forward = {size: at_patch_size(self.model, self.run.shape, size) for size in self.sources}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, recipe.weight_decay), lr=0.0, betas=(recipe.beta1, recipe.beta2), fused=True
        )
        self.step, self.seconds, self.spent = 0, 0.0, 0.0  # spent: seconds since the last record, for its bill
        self.window: torch.Tensor | None = None  # of `fit`, where a stop cut one

    def train(self, pending: list[int]) -> None:
        for i, n in enumerate(pending):
            branch = self._resume(n)
            self._forget(n)
            try:
                if branch is None:
                    self._train_trunk(n, pending[i:])
            except Diverged as error:
                for later in pending[i:]:
                    self._record(later, "diverged", error=f"trunk: {error}", spent_flops=None)
                break
            # the branch leaves the trunk here; its own state is dropped afterwards
            try:
                self._advance(n // self.run.recipe.batch_size, n, pending[i:])
                metrics = self._measure()
                size = self._save_weights(n)
                self._record(n, "ok", **metrics, **size)  # last: it says that its branch is complete, weights included
            except Diverged as error:
                self._record(n, "diverged", error=f"cooldown: {error}", spent_flops=None)
        self.checkpoints.drop_latest()

    def _train_trunk(self, num_examples: int, pending: list[int]) -> None:
        """Train up to where the branch to `num_examples` leaves the trunk; keep the state there and where others left."""
        batch = self.run.recipe.batch_size
        end = self.run.trunk_examples(num_examples)
        others = {self.run.trunk_examples(n) for n in self.run.budgets}
        for examples in sorted({n for n in others if self.step * batch < n < end} | {end}):
            self._advance(examples // batch, None, pending)
            self.checkpoints.save_point(self._state(None), examples)

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
            raise Diverged(self.step)  # the last step spoilt the weights after its own loss was found finite
        return metrics

    def _advance(self, end: int, branch: int | None, pending: list[int]) -> None:
        """Train up to step `end`: on the trunk (branch=None), or in the cooldown towards `branch` examples."""
        run, recipe = self.run, self.run.recipe
        batch = recipe.batch_size
        cooldown = None if branch is None else range(run.trunk_examples(branch) // batch, branch // batch)
        timescale = recipe.rsqrt_examples // batch if recipe.schedule == "rsqrt" else None

        patch_size = run.shape.patch_size  # of the last batch asked for, whose loss is taken before the next one is

        def batch_at(step: int) -> Batch | Pairs:
            nonlocal patch_size
            patch_size = run.patch_size_at(step)
            found = self.sources[patch_size].train(step * batch, batch)
            return Pairs(found.images, self.captions.train(step * batch, batch)) if self.captions else found

        precision = partial(
            torch.autocast, self.device.partition(":")[0], torch.bfloat16, enabled=recipe.precision == "bfloat16"
        )

        def loss_fn(b: Batch) -> tuple[torch.Tensor, int]:
            with precision():
                logits = self.forward[patch_size](b.images).flatten(0, -2)
            return F.cross_entropy(logits.float(), b.labels.flatten(), reduction="sum"), b.labels.numel()

        def learning_rate_at(step: int) -> float:
            factor = schedule(step, warmup=recipe.warmup_examples // batch, timescale=timescale, cooldown=cooldown)
            return recipe.peak_lr * factor

        def on_window(step: int, loss: float, seconds: float) -> None:
            done_now = step - self.step
            self._reached(step, seconds, None)
            self._log(branch, loss)
            todo = self._examples_left(branch, pending) / batch
            rate = done_now / seconds
            self.on_progress(
                {
                    "trunk_id": run.trunk_id,
                    "shape": run.label,
                    "num_classes": self.num_classes,
                    "phase": "trunk" if branch is None else "cooldown",
                    "examples": step * batch,
                    "share": 1 - todo * batch / run.total_examples,
                    "loss": loss,
                    "images_per_second": rate * batch,
                    "flops_per_second": rate * batch * self.flops_per_example,
                    "seconds_left": todo / rate,
                    "window_seconds": seconds,
                }
            )
            if time.monotonic() - self.saved_at > self.save_seconds:
                try:
                    self._save_latest(branch)
                except CannotWrite as error:  # there may be room the next time
                    self.saved_at = time.monotonic()
                    say(f"{error}; training goes on")

        def on_split(micro_batch: int) -> None:
            self.micro_batch = micro_batch
            say(f"out of memory: {run.trunk_id} goes on with {micro_batch} images at a time, the same batch a step")

        try:
            fit(
                [p for p in self.model.parameters() if p.requires_grad],
                self.optimizer,
                batch_at,
                partial(pair_loss, self.model, precision=precision) if self.captions else loss_fn,
                learning_rate_at,
                range(self.step, end),
                clip_norm=recipe.clip_norm,
                on_window=on_window,
                should_stop=self.should_stop,
                window=self.window,
                micro_batch=self.micro_batch,
                on_split=on_split,
                pairwise=self.captions is not None,
            )
        except Interrupted as stop:
            self._reached(stop.step, stop.seconds, stop.window)
            self._save_latest(branch)
            raise

    def _reached(self, step: int, seconds: float, window: torch.Tensor | None) -> None:
        self.step, self.seconds, self.spent = step, self.seconds + seconds, self.spent + seconds
        self.window = window

    def _examples_left(self, branch: int | None, pending: list[int]) -> int:
        run, position = self.run, self.step * self.run.recipe.batch_size
        last = run.trunk_examples(pending[-1])
        if branch is None:
            return last - position + sum(run.cooldown_examples(n) for n in pending)
        rest = [n for n in pending if n > branch]
        return branch - position + (last - run.trunk_examples(branch)) + sum(run.cooldown_examples(n) for n in rest)

    # files -------------------------------------------------------------------------------------------------------------

    def _save_weights(self, num_examples: int) -> dict:
        """Write the branch's weights; return what the row of a fine-tuning says of their file."""
        run_id = self.run.run_id(num_examples)
        path = self.folder / f"{run_id}.safetensors"
        if self.base is None:
            save_weights(self.model, path, run_id)
            return {}
        save_weights(self.model, path, run_id, self.stored, base_sha256=self.base.sha256)
        return {"stored_bytes": path.stat().st_size}

    def _base_facts(self) -> dict:
        """What the row of a fine-tuning says of where it began."""
        if self.base is None:
            return {}
        return {
            "base_image_size": self.base.shape.image_size,
            "base_patch_size": self.base.shape.patch_size,
            "base_examples": self.base.num_examples,
            "base_train_flops": self.base.train_flops,
        }

    def _state(self, branch: int | None) -> dict:
        return {
            "trunk_id": self.run.trunk_id,
            "base_sha256": self.base.sha256 if self.base else None,
            "branch": branch,
            "step": self.step,
            "seconds": self.seconds,
            "spent": self.spent,
            "window": self.window,
            "micro_batch": self.micro_batch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _save_latest(self, branch: int | None) -> None:
        self.checkpoints.save_latest(self._state(branch))
        self.saved_at = time.monotonic()

    def _resume(self, num_examples: int) -> int | None:
        """Go on from the furthest sound state from which the branch to `num_examples` can be reached.

        Returns the branch that it is on: `num_examples`, or None for the trunk, be it at its very beginning.
        """
        leaves = self.run.trunk_examples(num_examples)
        base_sha256 = self.base.sha256 if self.base else None
        check = partial(check_fits, model=self.model, optimizer=self.optimizer, base_sha256=base_sha256)
        state = self.checkpoints.furthest(num_examples, leaves, check)
        if state is None:
            if self.step:
                self._begin()
            return None
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.spent = state["step"], state["seconds"], state["spent"]
        window = state.get("window")  # older files lack it and the next one
        self.window = None if window is None else window.to(self.device)
        self.micro_batch = self.micro_batch or state.get("micro_batch")
        return state["branch"]

    def _forget(self, num_examples: int) -> None:
        """Drop the lines of metrics.jsonl that will be written again, and one that a kill cut short."""
        path = self.folder / "metrics.jsonl"
        leaves = self.run.trunk_examples(num_examples) // self.run.recipe.batch_size
        if not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                metrics = json.loads(line)
                step, branch = metrics["step"], metrics["branch"]
                again = step > self.step and (branch == num_examples or (branch is None and step <= leaves))
                if not again:
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def _log(self, branch: int | None, loss: float) -> None:
        position = {"step": self.step, "examples": self.step * self.run.recipe.batch_size, "branch": branch}
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps({**position, "train_loss": loss, "seconds": round(self.seconds, 3)}) + "\n")
        except OSError as error:
            raise CannotWrite(path, error) from error

    def _record(self, num_examples: int, status: str, **more) -> None:
        row = new_row(
            self.run,
            num_examples,
            status=status,
            num_classes=self.num_classes,
            **more,
            **(row_columns(self.source, self.captions) if self.captions else {"zero_line": self.source.zero_line}),
            data_key=self.source.content_key,
            micro_batch=self.micro_batch or self.run.recipe.batch_size,
            seconds=round(self.seconds, 3),
            spent_seconds=round(self.spent, 3),
            **self._base_facts(),
            **provenance(device_name(self.device)),
        )
        write_record(self.runs_dir, row)
        self.spent = 0.0


def say(line: str) -> None:
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # what `main` shows of the progress
    print(f"{clear}sovit: {line}", file=sys.stderr, flush=True)


def check_readout(run: Run, readout: str) -> None:
    """A source with a label a patch needs a shape without pooling, and the other way round; a caption fits any."""
    if run.recipe.objective == "siglip":
        return
    if (readout == "tokens") != (run.shape.pool == "none"):
        need = "pool=none" if readout == "tokens" else "pool=avg, map or token"
        raise UserError(
            f"pool={run.shape.pool!r} does not fit {run.data}:{run.preset}, whose labels are {readout}; use {need}"
        )


def check_device(device: str) -> None:
    """Raise UserError for a device that torch does not have here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used ({reason}); use cpu, or a device that torch has") from None


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu x{torch.get_num_threads()}"
