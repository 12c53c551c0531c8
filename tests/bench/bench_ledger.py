"""How long do 100,000 ledger rows take to read, and to fit? 25,000 trunks of a planted law at four budgets each.

python tests/bench/bench_ledger.py [--trunks 25000] [--fit FORM] [--keep FILE.jsonl]

CPU time is what a free core would take, give or take; memory is its largest resident set so far.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import planted_ledger as planted

from sovit.ledger.measurements import measurements
from sovit.ledger.records import dump_row
from sovit.ledger.schema import new_row
from sovit.spec.run import Recipe, Run, budgets_for, learning_rate
from sovit.spec.shape import Shape

WIDTHS, DEPTHS, MLP_DIMS = (16, 24, 32, 48, 64, 96), (1, 2, 3, 4, 6), (64, 128, 256, 512, 1024)
TRUNK_SD, ROW_SD = 0.003, 0.003


def big_rows(trunks: int, seed: int = 0):
    """Rows of `trunks` trunks: every shape of a full grid in turn, each time with another seed."""
    rng = np.random.default_rng(seed)
    shapes = [Shape(w, d, m, 8, 4, 16, "none") for w in WIDTHS for d in DEPTHS for m in MLP_DIMS]
    for i in range(trunks):
        shape = shapes[i % len(shapes)]
        recipe = Recipe(peak_lr=learning_rate(shape, 0.008, 0.5, 0.0))
        budgets = budgets_for(shape, planted.BUDGETS, planted.NUM_CLASSES, recipe.batch_size)
        run = Run(shape, recipe, budgets, init_seed=i // len(shapes), study="big")
        trunk = rng.normal(0, TRUNK_SD)
        for n in run.budgets:
            loss = planted.planted_loss(shape, n) * np.exp(trunk + rng.normal(0, ROW_SD))
            more = dict(val_loss=float(loss), val_error=0.5, zero_line=planted.ZERO_LINE, seconds=n / 1000)
            facts = dict(device="cpu x1", versions={"python": "3.12.3", "torch": "2.15.0"}, date="2026-11-21T20:00:00Z")
            yield new_row(run, n, status="ok", num_classes=planted.NUM_CLASSES, **more, **facts)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(label: str, call):
    start, used = time.perf_counter(), time.process_time()
    out = call()
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    print(f"{label:48} CPU {cpu:6.2f} s, wall {wall:6.2f} s, peak {peak_mib():6.0f} MiB", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", type=int, default=25_000)
    parser.add_argument("--fit", metavar="FORM", help="also the whole of `sovit fit` without bootstrap, of this form")
    parser.add_argument("--keep", type=Path, help="where the ledger is written, and read again if it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "big.jsonl"
        if not path.exists():
            with open(path, "w") as file:
                file.writelines(dump_row(row) + "\n" for row in big_rows(options.trunks))
        print(f"{path.stat().st_size / 1e6:.0f} MB; before anything {peak_mib():.0f} MiB")
        data = timed("measurements: read, merged, checked, counted", lambda: measurements([path]))
        print(f"{len(data.y):,} rows")
        if options.fit:
            from sovit.report.build import fit_ledgers

            done = timed(
                "sovit fit, read again, no bootstrap",
                lambda: fit_ledgers([path], form=options.fit, bootstrap=0, out=Path(folder) / "law"),
            )
            print(json.dumps({k: done[k] for k in ("num_rows", "num_trunks", "noise", "refused")}))


if __name__ == "__main__":
    sys.exit(main())
