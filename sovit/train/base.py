"""What every training does, whatever is trained: windows, log, progress, checkpoints, stops, records."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sovit import UserError
from sovit.files import CannotWrite, write_atomic
from sovit.ledger.records import read_record, write_record
from sovit.train.checkpoint import Checkpoints
from sovit.train.loop import Interrupted, OutOfMemory, Position, Task, fit, is_out_of_memory
from sovit.train.progress import say


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


@dataclass(frozen=True)
class Hooks:
    """What a training tells, and asks of, whoever started it. save_seconds: between periodic checkpoints."""

    on_progress: Callable[[dict], None] = lambda progress: None
    save_seconds: float = 60.0
    should_stop: Callable[[], bool] = lambda: False


def train_pending(
    kind: Callable[..., Trainer], run: Any, runs_dir: Path | str, device: str, hooks: Hooks
) -> list[dict]:
    """Train whatever branches of `run` have no record yet, write the record of each as soon as it is had; return all.

    Raises OutOfMemory where model or optimiser do not fit, Interrupted as soon as `should_stop()`, and what `kind` raises.
    """

    def rows() -> dict[int, dict | None]:
        return {n: read_record(runs_dir, run.trunk_id, run.run_id(n)) for n in run.budgets}

    pending = [n for n, row in rows().items() if row is None]
    if pending:
        try:
            for row in kind(run, Path(runs_dir), device, hooks).rows(pending):
                write_record(Path(runs_dir), row)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # where smaller parts of a batch do not help
                raise OutOfMemory("for the model and its optimiser", error) from error
            raise
    return [row for row in rows().values() if row is not None]  # none lacks by now


class Trainer:
    """A run in training: where it stands, and the files of its folder. Subclasses know what is trained.

    at: the position. flops_per_example, total_examples: of what is being trained, for the progress. said: more facts for
    the progress.
    """

    flops_per_example: float
    total_examples: int

    def __init__(self, run: Any, runs_dir: Path, device: str, hooks: Hooks, batch_size: int):
        self.run, self.device, self.hooks, self.batch_size = run, device, hooks, batch_size
        self.folder = runs_dir / run.trunk_id
        self.at = Position()
        self.said: dict = {}
        self.saved_at = time.monotonic()

    def rows(self, pending: list[int]) -> Iterator[dict]:
        """Train the branches to `pending` examples; yield the row of each, when all else of it is on the disk."""
        raise NotImplementedError

    def weights(self) -> dict:
        """What a checkpoint holds beside the position."""
        raise NotImplementedError

    def open_folder(self) -> None:
        """Write config.json and look for checkpoints; called when nothing more can be refused."""
        self.checkpoints = Checkpoints(self.folder, self.run.trunk_id, self.batch_size)
        write_atomic(self.folder / "config.json", json.dumps(self.run.to_dict(), indent=2) + "\n")

    def advance(self, task: Task, stop: int, branch: int | None, phase: str, left: int) -> None:
        """Train up to step `stop`, on the trunk (branch=None) or on the branch to `branch` examples.

        left: examples still to train after that. Every window is logged, told and now and then saved. Raises as `fit`,
        the state saved where it was interrupted, and CannotWrite.
        """

        def on_window(loss: float, steps: int, seconds: float) -> None:
            self._log(branch, loss)
            todo = left + (stop - self.at.step) * self.batch_size
            images_per_second = steps * self.batch_size / seconds
            self.hooks.on_progress(
                {
                    "trunk_id": self.run.trunk_id,
                    "shape": self.run.label,
                    **self.said,
                    "phase": phase,
                    "examples": self.at.step * self.batch_size,
                    "share": 1 - todo / self.total_examples,
                    "loss": loss,
                    "images_per_second": images_per_second,
                    "flops_per_second": images_per_second * self.flops_per_example,
                    "seconds_left": todo / images_per_second,
                    "window_seconds": seconds,
                }
            )
            if time.monotonic() - self.saved_at > self.hooks.save_seconds:
                try:
                    self._save_latest(branch)
                except CannotWrite as error:  # there may be room the next time
                    self.saved_at = time.monotonic()
                    say(f"{error}; training goes on")

        try:
            fit(task, self.at, stop, on_window=on_window, on_split=self.say_split, should_stop=self.hooks.should_stop)
        except Interrupted:
            self._save_latest(branch)
            raise

    def say_split(self, rows: int) -> None:
        say(f"out of memory: {self.run.trunk_id} goes on with {rows} images at a time, the same batch a step")

    def autocast(self, bfloat16: bool) -> torch.autocast:
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=bfloat16)

    # files ---------------------------------------------------------------------------------------------------------------

    def state(self, branch: int | None) -> dict:
        return {"trunk_id": self.run.trunk_id, "branch": branch, **vars(self.at), **self.weights()}

    def _save_latest(self, branch: int | None) -> None:
        self.checkpoints.save_latest(self.state(branch))
        self.saved_at = time.monotonic()

    def go_to(self, state: dict) -> None:
        """Stand where a checkpoint was written."""
        window = state.get("window")  # older files lack it and micro_batch
        window = None if window is None else window.to(self.device)
        rows = self.at.micro_batch or state.get("micro_batch")
        self.at = Position(state["step"], state["seconds"], state["spent"], window, rows)

    def forget(self, branch: int, leaves: int) -> None:
        """Drop the lines of metrics.jsonl that will be written again, and one that a kill cut short.

        leaves: the step at which the branch to `branch` examples leaves the trunk.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                step, of = (json.loads(line)[name] for name in ("step", "branch"))
                if step <= self.at.step or not (of == branch or (of is None and step <= leaves)):
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def _log(self, branch: int | None, loss: float) -> None:
        line: dict = {"step": self.at.step, "examples": self.at.step * self.batch_size, "branch": branch}
        line |= {"train_loss": loss, "seconds": round(self.at.seconds, 3)}
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # of the disk, and no failure of the run
            raise CannotWrite(path, error) from error
