"""Run -> records: one trunk trained once, and a cooldown branch from it at every budget.

    trunk     0 ────────●───────────────●──────────────────────────────●     warm-up, then constant or rsqrt
                        └─╲ budget 1    └───╲ budget 2                  └────────╲ budget 3    (1 - sqrt) cooldown

`python -m sovit.train RUN.json` needs torch and timm only. Files of a run, all under `runs/<trunk_id>/`:

    config.json            the Run
    metrics.jsonl          mean training loss, a line every WINDOW steps and one for each branch
    trunk-<examples>.pt    trunk state where a branch leaves it; kept, so that a new budget reuses the trunk
    latest.pt              state at the last periodic save, or where a stop was asked for
    previous.pt            the one before it, should latest.pt be damaged
    <run_id>.safetensors   the cooled-down model of one branch; of a fine-tuning, what it does not share with its base;
                           of objective siglip, the text tower too
    records/<run_id>.json  the measurement
    progress.json          what is being done now, for whoever watches
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sovit import UserError
from sovit.files import is_locked, locked
from sovit.signals import stop_on_signal, this_command
from sovit.spec.run import Run
from sovit.train.base import check_device
from sovit.train.loop import Interrupted, OutOfMemory
from sovit.train.progress import progress_text, say, write_progress
from sovit.train.trainer import train


def train_here(
    run: Any, runs_dir: Path | str, device: str = "cpu", train: Callable[..., list[dict]] = train
) -> list[dict]:
    """`train`, of a Run or of another kind, at a terminal: one line of progress, alone on its trunk, stopped by a signal.

    Raises what `train` does, but where it was stopped KeyboardInterrupt with the words to be said.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    live = sys.stderr.isatty()

    def show(progress: dict) -> None:
        write_progress(runs_dir, progress)
        if live:
            print("\r\033[K" + progress_text(progress), end="", file=sys.stderr, flush=True)

    check_device(device)
    lock = Path(runs_dir) / run.trunk_id / "lock"  # the one that a sweep's workers hold
    if is_locked(lock):
        say(f"waiting for who trains {run.trunk_id} already")
    try:
        with locked(lock), stop_on_signal() as should_stop:
            return train(run, runs_dir, device, on_progress=show, should_stop=should_stop)
    except Interrupted as stop:
        where = f"with the state in {Path(runs_dir) / run.trunk_id}; go on with: {this_command()}"
        raise KeyboardInterrupt(f"{stop}, {where}") from None
    finally:
        if live:
            print(file=sys.stderr)


def main(
    argv: list[str] | None = None,
    module: str = "sovit.train",
    read: Callable[[dict], Any] = Run.from_dict,
    train: Callable[..., list[dict]] = train,
) -> int:
    """`python -m sovit.train RUN.json [RUNS_DIR] [DEVICE]`: train one run from its JSON, as `Run.to_dict` writes it.

    Returns 0 done, 1 diverged or out of memory, 2 bad input, 130 stopped.
    """
    arguments = sys.argv[1:] if argv is None else argv
    usage = f"usage: python -m {module} RUN.json [RUNS_DIR] [DEVICE]"
    asked = bool({"-h", "--help"} & set(arguments))
    if asked or not 1 <= len(arguments) <= 3:
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        path, runs_dir, device = arguments + ["runs", "cpu"][len(arguments) - 1 :]
        try:
            d = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read the run {path}: {error}") from None
        rows = train_here(read(d), runs_dir, device, train)
    except (KeyboardInterrupt, UserError) as error:
        if str(error):  # else stopped before it had begun
            say(str(error))
        return 130 if isinstance(error, KeyboardInterrupt) else 1 if isinstance(error, OutOfMemory) else 2
    for row in rows:
        print(json.dumps({k: row[k] for k in ("run_id", "status", "num_examples", "val_loss", "val_error")}))
    return 0 if all(row["status"] == "ok" for row in rows) else 1
