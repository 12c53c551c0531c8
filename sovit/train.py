"""Run -> records: one trunk trained once, and a cooldown branch from it at every budget.

    trunk     0 ────────●───────────────●──────────────────────────────●     warm-up, then constant or rsqrt
                        └─╲ budget 1    └───╲ budget 2                  └────────╲ budget 3    (1 - sqrt) cooldown

`python -m sovit.train RUN.json` needs torch and timm only. Files of a run, all under `runs/<trunk_id>/`:

    config.json            the Run
    metrics.jsonl          mean training loss, a line every WINDOW steps and one for each branch
    trunk-<examples>.pt    trunk state where a branch leaves it; kept, so that a new budget reuses the trunk
    latest.pt              state at the last periodic save, for resuming after a kill
    <run_id>.safetensors   the cooled-down model of one branch
    records/<run_id>.json  the measurement
    progress.json          what is being done now, for whoever watches
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import Batch, open_data
from sovit.evaluate import validate
from sovit.ledger import locked, new_row, provenance, read_record, write_atomic, write_record
from sovit.loop import Diverged, fit, schedule
from sovit.model import build, parameter_groups
from sovit.probe import probe_branches
from sovit.progress import progress_text
from sovit.run import Run

SAVE_SECONDS = 60.0  # between periodic checkpoints


def train(
    run: Run,
    runs_dir: Path | str = "runs",
    device: str = "cpu",
    on_progress: Callable[[dict], None] = lambda progress: None,
    save_seconds: float = SAVE_SECONDS,
) -> list[dict]:
    """Train whatever branches of `run` have no record yet, probe those without one, and return the rows of all of them.

    Resumes from the checkpoints of an earlier, killed or shorter, call; on a CPU the records are then bit for bit
    those of an uninterrupted run. A non-finite loss ends its branch (or, on the trunk, all later ones) as `diverged`.
    Raises UserError where data and shape do not fit together.
    """
    pending = [n for n in run.budgets if read_record(runs_dir, run.trunk_id, run.run_id(n)) is None]
    if pending:
        Trainer(run, Path(runs_dir), device, on_progress, save_seconds).train(pending)
    if run.probe:
        probe_branches(run, runs_dir, device)
    rows = [read_record(runs_dir, run.trunk_id, run.run_id(n)) for n in run.budgets]
    return [row for row in rows if row is not None]  # none lacks by now


class Trainer:
    """The state of one trunk in training: model, optimiser, position, and the seconds it has taken."""

    def __init__(self, run: Run, runs_dir: Path, device: str, on_progress: Callable[[dict], None], save_seconds: float):
        self.run, self.runs_dir, self.device, self.on_progress = run, runs_dir, device, on_progress
        self.save_seconds = save_seconds
        self.folder = runs_dir / run.trunk_id
        shape, recipe = run.shape, run.recipe
        self.source = open_data(run.data, run.preset, shape.image_size, shape.patch_size, run.data_seed, device)
        check_readout(run, self.source.readout)
        self.num_classes = self.source.num_classes
        self.model = build(shape, self.num_classes, recipe.parametrisation, run.init_seed).to(device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, recipe.weight_decay), lr=0.0, betas=(recipe.beta1, recipe.beta2), fused=True
        )
        self.step, self.seconds, self.spent = 0, 0.0, 0.0  # spent: seconds since the last record, for its bill
        self.saved_at = time.monotonic()
        self.flops_per_step = shape.train_flops_per_image(self.num_classes) * recipe.batch_size
        write_atomic(self.folder / "config.json", json.dumps(run.to_dict(), indent=2) + "\n")

    def train(self, pending: list[int]) -> None:
        batch = self.run.recipe.batch_size
        interrupted = self._resume(pending)
        self._forget(pending, interrupted)
        for i, n in enumerate(pending):
            try:
                if interrupted != n:
                    self._advance(range(self.step, self.run.trunk_examples(n) // batch), None, pending[i:])
                    self._save(self._trunk_path(n), None)
            except Diverged as error:
                for later in pending[i:]:
                    self._record(later, "diverged", error=f"trunk: {error}", spent_flops=None)
                return
            # the branch leaves the trunk here; its own state is dropped afterwards
            try:
                self._advance(range(self.step, n // batch), n, pending[i:])
                metrics = validate(self.model, self.source)
                loss = metrics["val_loss"]
                if loss is None or not math.isfinite(loss):
                    raise Diverged(self.step)  # the last step spoilt the weights after its own loss was found finite
                weights = {k: v.contiguous() for k, v in self.model.state_dict().items()}
                path = self.folder / f"{self.run.run_id(n)}.safetensors"
                safetensors.torch.save_file(weights, f"{path}.tmp", {"run_id": self.run.run_id(n)})
                os.replace(f"{path}.tmp", path)
                self._record(n, "ok", **metrics)  # last: a record says that its branch is complete, weights included
            except Diverged as error:
                self._record(n, "diverged", error=f"cooldown: {error}", spent_flops=None)
            interrupted = None
            self._load(self._trunk_path(n))
        (self.folder / "latest.pt").unlink(missing_ok=True)

    def _advance(self, steps: range, branch: int | None, pending: list[int]) -> None:
        """Train over `steps`: on the trunk (branch=None), or in the cooldown towards `branch` examples."""
        run, recipe = self.run, self.run.recipe
        batch = recipe.batch_size
        cooldown = None if branch is None else range(run.trunk_examples(branch) // batch, branch // batch)
        timescale = recipe.rsqrt_examples // batch if recipe.schedule == "rsqrt" else None

        def batch_at(step: int) -> Batch:
            return self.source.train(step * batch, batch)

        def loss_fn(b: Batch) -> torch.Tensor:
            return F.cross_entropy(self.model(b.images).flatten(0, -2), b.labels.flatten())

        def learning_rate_at(step: int) -> float:
            factor = schedule(step, warmup=recipe.warmup_examples // batch, timescale=timescale, cooldown=cooldown)
            return recipe.peak_lr * factor

        def on_window(step: int, loss: float, seconds: float) -> None:
            done_now = step - self.step
            self.step, self.seconds, self.spent = step, self.seconds + seconds, self.spent + seconds
            self._log(branch, loss)
            todo = self._examples_left(branch, pending) / batch
            rate = done_now / seconds
            self.on_progress(
                {
                    "trunk_id": run.trunk_id,
                    "shape": run.shape.label,
                    "num_classes": self.num_classes,
                    "phase": "trunk" if branch is None else "cooldown",
                    "examples": step * batch,
                    "share": 1 - todo * batch / run.total_examples,
                    "loss": loss,
                    "images_per_second": rate * batch,
                    "flops_per_second": rate * self.flops_per_step,
                    "seconds_left": todo / rate,
                    "window_seconds": seconds,
                }
            )
            if time.monotonic() - self.saved_at > self.save_seconds:
                self._save(self.folder / "latest.pt", branch)

        fit(
            self.model.parameters(),
            self.optimizer,
            batch_at,
            loss_fn,
            learning_rate_at,
            steps,
            clip_norm=recipe.clip_norm,
            on_window=on_window,
        )

    def _examples_left(self, branch: int | None, pending: list[int]) -> int:
        run, position = self.run, self.step * self.run.recipe.batch_size
        last = run.trunk_examples(pending[-1])
        if branch is None:
            return last - position + sum(run.cooldown_examples(n) for n in pending)
        rest = [n for n in pending if n > branch]
        return branch - position + (last - run.trunk_examples(branch)) + sum(run.cooldown_examples(n) for n in rest)

    # files -------------------------------------------------------------------------------------------------------------

    def _trunk_path(self, num_examples: int) -> Path:
        return self.folder / f"trunk-{self.run.trunk_examples(num_examples)}.pt"

    def _save(self, path: Path, branch: int | None) -> None:
        state = {
            "branch": branch,
            "step": self.step,
            "seconds": self.seconds,
            "spent": self.spent,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)
        self.saved_at = time.monotonic()

    def _load(self, path: Path) -> dict:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        return state

    def _resume(self, pending: list[int]) -> int | None:
        """Load the furthest state from which the first pending branch can be reached; return the branch it is on."""
        batch = self.run.recipe.batch_size
        first = self.run.trunk_examples(pending[0]) // batch
        reached = [(int(p.stem.split("-")[1]), p) for p in self.folder.glob("trunk-*.pt")]
        usable = [(examples, p) for examples, p in reached if examples // batch <= first]
        furthest = max((examples // batch for examples, _ in usable), default=0)
        latest = self.folder / "latest.pt"
        if latest.exists():
            state = torch.load(latest, map_location="cpu", weights_only=True)
            if state["branch"] == pending[0] or (state["branch"] is None and furthest < state["step"] <= first):
                self.spent = self._load(latest)["spent"]
                return state["branch"]
        if usable:
            examples, path = max(usable)
            spent = self._load(path)["spent"]
            self.spent = spent if examples // batch == first else 0.0  # what an earlier branch point spent is recorded
        return None

    def _forget(self, pending: list[int], branch: int | None) -> None:
        """Drop the lines of metrics.jsonl that will be written again, and one that a kill cut short."""
        path, batch = self.folder / "metrics.jsonl", self.run.recipe.batch_size
        if not path.exists():
            return
        first, last = (self.run.trunk_examples(n) // batch for n in (pending[0], pending[-1]))
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                metrics = json.loads(line)
                if metrics["branch"] is None:
                    again = min(self.step, first) < metrics["step"] <= last
                else:
                    again = metrics["branch"] in pending and (
                        metrics["branch"] != branch or metrics["step"] > self.step
                    )
                if not again:
                    kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def _log(self, branch: int | None, loss: float) -> None:
        position = {"step": self.step, "examples": self.step * self.run.recipe.batch_size, "branch": branch}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**position, "train_loss": loss, "seconds": round(self.seconds, 3)}) + "\n")

    def _record(self, num_examples: int, status: str, **more) -> None:
        row = new_row(
            self.run,
            num_examples,
            status=status,
            num_classes=self.num_classes,
            **more,
            zero_line=self.source.zero_line,
            data_key=self.source.content_key,
            seconds=round(self.seconds, 3),
            spent_seconds=round(self.spent, 3),
            **provenance(device_name(self.device)),
        )
        write_record(self.runs_dir, row)
        self.spent = 0.0


def check_readout(run: Run, readout: str) -> None:
    """A source with a label a patch needs a shape without pooling, and the other way round."""
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


def main(argv: list[str] | None = None) -> int:
    """`python -m sovit.train RUN.json [RUNS_DIR] [DEVICE]`: train one run from its JSON, as `Run.to_dict` writes it."""
    arguments = sys.argv[1:] if argv is None else argv
    if not 1 <= len(arguments) <= 3:
        print("usage: python -m sovit.train RUN.json [RUNS_DIR] [DEVICE]", file=sys.stderr)
        return 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    live = sys.stderr.isatty()

    def show(progress: dict) -> None:
        if live:
            print("\r\033[K" + progress_text(progress), end="", file=sys.stderr, flush=True)

    try:
        try:
            d = json.loads(Path(arguments[0]).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read the run {arguments[0]}: {error}") from None
        run, runs_dir, device = Run.from_dict(d), *(arguments[1:] + ["runs", "cpu"][len(arguments) - 1 :])
        check_device(device)
        with locked(Path(runs_dir) / run.trunk_id / "lock"):  # the one that a sweep's workers hold
            rows = train(run, runs_dir, device, show)
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    if live:
        print(file=sys.stderr)
    for row in rows:
        print(json.dumps({k: row[k] for k in ("run_id", "status", "num_examples", "val_loss", "val_error")}))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
