"""Does a trained encoder see for a language model what an untrained one, or none at all, does not?

    python studies/vlm_thread.py --workers 2

Trains the encoder that the stream's law recommended at 2e12 FLOPs (the arm of results/stream_validation.jsonl), three
seeds, and on its frozen tokens a two-layer MLP projector and a two-layer language model, which answers the stream's own
questions (`marks`) and, beside them, plain facts of the scene that the encoder was never asked about. Two controls a
seed: the same encoder before its training, and a blind model. Decided beforehand: the trained encoder must have the
lower loss on `marks` than both, in each seed; the plain facts are told beside it, whatever they say, and so is the
trained encoder read behind its last block but one.

Cost: 3 trunks of 2e12 FLOPs and 12 small models, about 25 minutes of two cores. Expected: marks near the encoder's own
loss (1.24) against 2.77 for the blind model and little less for the random one; colours, which any random projection
keeps, may favour the random encoder.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from sovit import UserError, launch
from sovit.ledger import read_record, update_ledger, write_atomic
from sovit.run import Recipe, Run, budgets_for, learning_rate
from sovit.shape import Shape
from sovit.stop import stop_on_signal, this_command

SHAPE = Shape(32, 3, 672, head_dim=8, patch_size=4, image_size=16, pool="none")
BUDGET = 2e12
SEEDS = (10, 11, 12)
VLM_RECIPE = Recipe(peak_lr=0.003)
VLM_EXAMPLES = 32_000  # images, each asked every question


def runs() -> list[Run]:
    """The encoders."""
    recipe = Recipe(peak_lr=learning_rate(SHAPE))
    budgets = budgets_for(SHAPE, [BUDGET], 16, recipe.batch_size)
    return [Run(SHAPE, recipe, budgets, init_seed=seed, data_seed=seed) for seed in SEEDS]


def vlm_runs() -> list:
    """Trained, random and blind, for each seed; and the trained one read a block earlier, as LLaVA reads CLIP."""
    from sovit.vlm.train import VlmRun

    found = []
    for run in runs():
        (trained,) = run.run_ids
        seeds = dict(init_seed=run.init_seed, data_seed=100 + run.data_seed)  # scenes that the encoder did not see
        for encoder, layer in ((trained, -1), (f"random:{trained}", -1), ("", -1), (trained, -2)):
            found.append(VlmRun(encoder, VLM_RECIPE, VLM_EXAMPLES, layer=layer, **seeds))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="worker processes, one thread each (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan of the encoders and the arms; train nothing"
    )
    options = parser.parse_args(argv)
    arguments = ["--runs", str(options.runs), "--results", str(options.results), "--workers", str(options.workers)]
    status = launch.main(__doc__, "vlm_encoders", runs, arguments + ["--dry-run"] * options.dry_run)
    if options.dry_run:
        for run in vlm_runs():
            print(f"{run.run_id}  encoder {run.encoder or 'none'}, seed {run.init_seed}: {run.num_examples:,} images")
    if status or options.dry_run:
        return status
    ledger = options.results / "vlm_thread.jsonl"
    try:
        status = train_arms(vlm_runs(), options.workers, options.runs, ledger)
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(f"next: python analysis/vlm_arms.py {ledger}" if not status else f"go on with: {this_command()}")
    return status


def train_arms(arms: list, workers: int, runs_dir: Path, ledger: Path) -> int:
    """Train each arm that has no record, in a process of its own; put every row into the ledger as it comes.

    SIGINT and SIGTERM are passed on: the arms in training save and leave. Returns the worst exit status.
    """
    waiting, running, statuses = list(arms), {}, [0]
    with stop_on_signal() as should_stop:
        while running or (waiting and not should_stop()):
            while waiting and len(running) < workers and not should_stop():
                run = waiting.pop(0)
                plan = runs_dir / run.trunk_id / "run.json"
                write_atomic(plan, json.dumps(dataclasses.asdict(run)))
                command = [sys.executable, "-m", "sovit.vlm.train", str(plan), str(runs_dir)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                running[subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)] = run
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                statuses.append(process.returncode if process.returncode >= 0 else 1)
                row = read_record(runs_dir, run.trunk_id, run.run_id)
                if row is not None:
                    update_ledger(ledger, [row | {"study": "vlm_thread"}])
            for process in running if should_stop() else ():
                process.terminate()  # again and again: an arm that is only starting does not hear it yet
        return 130 if should_stop() else max(statuses)


if __name__ == "__main__":
    raise SystemExit(main())
