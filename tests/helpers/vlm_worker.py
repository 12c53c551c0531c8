"""A sweep's worker that saves at every look at the loss, and says whom it trains: for test_vlm_sweep.py. Not a test."""

import os
import sys
from pathlib import Path

from sovit.sweep import worker as sweep


def train(run, runs_dir, device, **more):
    with open(Path(runs_dir) / "begun", "a") as file:
        file.write(f"{run.trunk_id} {os.getpid()}\n")
    return sweep.trainer(run)(run, runs_dir, device, save_seconds=0.0, **more)


if __name__ == "__main__":
    sys.exit(sweep.work(Path(sys.argv[1]), train))
