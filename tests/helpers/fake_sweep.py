"""A sweep whose training is a pause and a made-up number, for test_sweep.py. Not a test.

    fake_sweep.py PLAN                     a worker, started by the launcher
    fake_sweep.py launch FOLDER COUNT N    the launcher, with N workers on COUNT trunks

Everything else is the real thing: launcher, workers, locks, queue, record files. Each branch that is trained adds a
line to FOLDER/executions: "begin" before its pause, "end" after its record.
"""

import os
import sys
import time
from pathlib import Path

from sovit import UserError
from sovit.files import CannotWrite
from sovit.ledger.provenance import provenance
from sovit.ledger.records import read_record, write_record
from sovit.ledger.schema import new_row
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import queue
from sovit.sweep import worker as sweep
from sovit.sweep.launch import launch as launch_sweep

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
PAUSE = float(os.environ.get("SOVIT_TEST_PAUSE", "0.15"))


def runs(count, budgets=(1600,)):
    return [Run(SHAPE, Recipe(peak_lr=0.008), budgets, init_seed=i) for i in range(count)]


def loss_of(run, n):
    return 2.0 + run.init_seed / 1000 + 1 / n


def note(folder, *words):
    line = " ".join(map(str, words)) + "\n"
    handle = os.open(folder / "executions", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, line.encode())
    os.close(handle)


def fake_train(run, runs_dir, device, on_progress, should_stop):
    """Like sovit.train.trainer.train: trains the branches that have no record.

    Seed 555 needs more memory than there is, 666 fails, 777 diverges, 888 kills, 999 finds the disk full.
    """
    folder = Path(runs_dir).parent
    for n in run.budgets:
        if read_record(runs_dir, run.trunk_id, run.run_id(n)):
            continue
        if should_stop():
            raise KeyboardInterrupt("stopped")
        note(folder, "begin", run.run_id(n), os.getpid())
        time.sleep(PAUSE)
        if run.init_seed == 555:
            raise UserError("out of memory with one sample at a time")
        if run.init_seed == 999:
            raise CannotWrite("trunk-1280.pt", OSError(28, "No space left on device"))
        if run.init_seed == 666:
            raise RuntimeError("out of memory\nwith a second line")
        if run.init_seed == 888:
            os.kill(os.getpid(), 9)
        diverged = dict(status="diverged", error="trunk: not finite at step 3", spent_flops=None)
        answer = diverged if run.init_seed == 777 else dict(status="ok", val_loss=loss_of(run, n), val_error=0.5)
        write_record(runs_dir, new_row(run, n, num_classes=16, seconds=PAUSE, **answer, **provenance("fake")))
        note(folder, "end", run.run_id(n), os.getpid())


def opened(folder, some_runs, name="s", storage=None):
    runs_dir = Path(folder) / "runs"
    return queue.Sweep(
        name, [r.replace(study=name) for r in some_runs], runs_dir, Path(folder) / f"{name}.jsonl", storage
    )


def launch(folder, some_runs, workers=1, **more):
    found = opened(folder, some_runs, **more)
    return launch_sweep(found, workers, worker_command=[sys.executable, __file__])


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch(Path(sys.argv[2]), runs(int(sys.argv[3])), int(sys.argv[4]))
    else:
        sys.exit(sweep.work(Path(sys.argv[1]), fake_train))
