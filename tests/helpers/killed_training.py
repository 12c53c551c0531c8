"""Train a run in a child process and end it when its log has so many lines: RUN.json RUNS_DIR SIGNAL:LINES ...

KILL kills a training that saves at every window; INT and TERM ask the command `python -m sovit.train` to stop, which
saves by the clock alone. Prints how each child ended. Not a test: test_train.py starts it. One process imports torch,
and each attempt is a fork of it, so that ten kills cost no more than one start.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from sovit.spec.run import Run
from sovit.train.command import main as command
from sovit.train.trainer import train


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(run_path, runs_dir, *targets):
    torch.set_num_threads(1)
    run = Run.from_dict(json.loads(Path(run_path).read_text()))
    log = Path(runs_dir) / run.trunk_id / "metrics.jsonl"
    rng = random.Random(0)
    for target in targets:
        name, lines = target.split(":")
        child = os.fork()
        if not child:
            if name != "KILL":
                os._exit(command([run_path, runs_dir]))
            train(run, runs_dir, save_seconds=0)
            os._exit(0)
        while num_lines(log) < int(lines):
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit(f"training ended before line {lines}")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.Signals[f"SIG{name}"])
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
