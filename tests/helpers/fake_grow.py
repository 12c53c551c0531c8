"""A growing study whose training is a pause and a planted loss, for test_grow.py. Not a test.

    fake_grow.py PLAN                  a worker, started by the launcher
    fake_grow.py grow FOLDER [...]     studies/active_sweep.py in FOLDER, with its options

Everything else is the real thing: the picks, the launcher, the workers, records and ledger. Each branch that is trained adds
a line to FOLDER/executions.
"""

import importlib.util
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from sovit.law.checks import simulate as planted
from sovit.ledger.provenance import provenance
from sovit.ledger.records import read_record, write_record
from sovit.ledger.schema import new_row
from sovit.sweep import adaptive as grow
from sovit.sweep import worker as sweep
from sovit.sweep.launch import launch

PAUSE = float(os.environ.get("SOVIT_TEST_PAUSE", "0"))
TRUTH = planted.truth("stream")
NOISE = 0.004


def study():
    path = Path(__file__).parents[2] / "studies" / "active_sweep.py"
    spec = importlib.util.spec_from_file_location("active_sweep", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_of(run, n):
    """The planted loss with noise by trunk and by row, a function of the ids alone."""
    trunk, row = (np.random.default_rng(zlib.crc32(name.encode())) for name in (run.trunk_id, run.run_id(n)))
    noise = NOISE / np.sqrt(2) * (trunk.standard_normal() + row.standard_normal())
    return float(TRUTH.loss([run.shape.width, run.shape.depth, run.shape.mlp_dim], n) * np.exp(noise))


def fake_train(run, runs_dir, device, on_progress, should_stop):
    for n in run.budgets:
        if read_record(runs_dir, run.trunk_id, run.run_id(n)):
            continue
        if should_stop():
            raise KeyboardInterrupt("stopped")
        time.sleep(PAUSE)
        answer = dict(status="ok", val_loss=loss_of(run, n), val_error=0.5, zero_line=TRUTH.zero_line)
        write_record(runs_dir, new_row(run, n, num_classes=16, seconds=PAUSE, **answer, **provenance("fake")))
        with open(Path(runs_dir).parent / "executions", "a") as file:
            file.write(run.run_id(n) + "\n")


def here(found, workers, device):
    """Train in this process, without launcher and workers."""
    for run in found.pending():
        fake_train(run, found.runs_dir, device, None, lambda: False)
    return found.collect()


def launched(found, workers, device):
    return launch(found, workers, worker_command=[sys.executable, __file__])


def main(folder, *options, run=here):
    module, folder = study(), Path(folder)
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    return grow.main(module.__doc__, module.question, "active_stream", [*options, *places], run)


if __name__ == "__main__":
    if sys.argv[1] == "grow":
        sys.exit(main(*sys.argv[2:], run=launched))
    sys.exit(sweep.work(Path(sys.argv[1]), fake_train))
