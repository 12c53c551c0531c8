"""What does black-box search of shapes pay for a good shape at ten times the largest run? Optuna's TPE and GP, measured.

    nice -n 10 python -m analysis.next_run.opponents [--workers 2] [--seeds 20] [--out results/search_opponents.jsonl]

The opponents of `active.next_run` in analysis/next_run/simulated_contest.py, by its rules: they know the same pilot, search shapes within the
same values, pay for every run and for the pilot, and are scored by the true regret of what they recommend for 10 and 100
times the star's largest run. Compute is in stars.

A black box compares losses at one budget only, so each total is a search of its own. All of its runs have the largest
budget at which the total pays for NUM_TRIALS of them, at most that of the star's largest run; what is left then buys more of
them, up to MOST_TRIALS. The first trial is the pilot's best shape. Its best shape (gp: that of the lowest posterior mean) is
recommended

    tpe-24          as it is
    tpe-24-scaled   with its proportions kept and forward FLOPs of an image growing as compute^0.5
    tpe-at-target   as it is, searched at 10 times the largest run itself, where the total pays for AT_TARGET trials, and
                    BEYOND the values that the others run, as the optimum lies there

One JSON line a strategy and episode: {truth, strategy, seed, curve: [{level, compute, train_flops, num_trials, run_flops,
regret_10x, regret_100x}]}. A second call goes on where the first was stopped. Cost: about 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from analysis.next_run.simulated_contest import LARGEST, NOISE_SD, STAR_COST, TARGETS, TRUTHS, VALUES, World
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law import simulate as planted
from sovit.sweep.optuna_sampler import black_box

TOTALS = (0.03, 0.12, 0.28, 1.0, 3.0, 10.0, 30.0)  # stars
NUM_TRIALS = {"random": (24,), "tpe": (8, 24), "gp": (24,)}
MOST_TRIALS = {"random": 48, "tpe": 48, "gp": 24}  # a Gaussian process of more takes minutes
AT_TARGET = 3  # fewer trials at the target are no search
BEYOND = 2.5  # how far a search at the target may go above the values of the pool
SIZE_POWER = 0.5  # of forward FLOPs against compute, proportions kept (2203.15556)


def searches() -> list[str]:
    return [f"{kind}-{n}" for kind, many in NUM_TRIALS.items() for n in (*many, "at-target")]


def scaled(truth: planted.Truth, shape: np.ndarray, factor: float) -> np.ndarray:
    """The shape [3] of the same proportions with `factor` times the forward FLOPs, real numbers."""
    low, high = 0.01, 100.0
    for _ in range(50):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if truth.flops(middle * shape) < factor * truth.flops(shape) else (low, middle)
    return middle * shape


def episode(task: tuple[str, str, int]) -> list[dict]:
    """The lines of one search at every total: its shapes as they are, and with their proportions kept."""
    name, search, seed = task
    kind, _, rest = search.partition("-")
    world = World(name, seed)  # with its pilot measured and paid for
    truth, longest = world.truth, max(row["num_examples"] for row in world.rows)
    best_of_pilot = min((row for row in world.rows if row["num_examples"] == longest), key=lambda row: row["loss"])
    first = {d: best_of_pilot[d] for d in planted.DIMS}
    rng = np.random.default_rng([seed, 1])
    at_target = rest == "at-target"
    ranges = {d: (min(v), max(v) * (BEYOND if at_target else 1)) for d, v in VALUES.items()}
    labels = {search: False} if at_target else {search: False, f"{search}-scaled": True}
    curves: dict[str, list] = {label: [] for label in labels}
    before = None  # a total that buys nothing more than the one below it is left out
    for total in TOTALS:
        left = total * STAR_COST - world.spent
        run_flops = TARGETS["10x"] if at_target else min(LARGEST, left / int(rest))
        num_trials = min(MOST_TRIALS[kind], int(left / run_flops * (1 + 1e-9)))
        if (at_target and num_trials < AT_TARGET) or (num_trials, run_flops) == before:
            continue
        before = num_trials, run_flops

        def loss(shape: dict[str, float], compute=run_flops / 3) -> float:
            return float(truth.loss_at([shape[d] for d in planted.DIMS], compute) * np.exp(rng.normal(0, NOISE_SD)))

        found = black_box(kind, loss, ranges, num_trials, seed, [first])
        best = np.array([found.believed[d] for d in planted.DIMS], float)
        spent = world.spent + num_trials * run_flops
        point = dict(level=total, compute=spent / STAR_COST, train_flops=spent, run_flops=run_flops)
        for label, grows in labels.items():
            sizes = {m: (t / run_flops) ** SIZE_POWER if grows else 1.0 for m, t in TARGETS.items()}
            regrets = {f"regret_{m}": world.regret(scaled(truth, best, size), m) for m, size in sizes.items()}
            short = {name: float(f"{x:.6g}") for name, x in (point | regrets).items()}
            curves[label].append(short | dict(num_trials=num_trials))
    return [dict(truth=name, strategy=label, seed=seed, curve=curve) for label, curve in curves.items()]


# the command ---------------------------------------------------------------------------------------------------------


def finished(path: Path) -> list[dict]:
    """The lines of a file, without one that was cut off in the middle."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def todo(num_seeds: int, num_gp_seeds: int, done: Sequence[dict]) -> Iterator[tuple[str, str, int]]:
    """Truth, search and seed of every episode that has no line yet; seeds last, so that a part of it is of all truths."""
    known = {(line["truth"], line["strategy"], line["seed"]) for line in done}
    for seed in range(num_seeds):
        for search in searches():
            for name in TRUTHS:
                if (name, search, seed) not in known and (seed < num_gp_seeds or search[:2] != "gp"):
                    yield name, search, seed


def table(lines: Sequence[dict]) -> str:
    """Median (90th percentile) of the regret at 10x in per cent, a block a truth, a row a strategy, a column a total."""
    out = ["regret at 10x in %, median/90th percentile, by total compute in stars"]
    for name in dict.fromkeys(line["truth"] for line in lines):
        out += ["", f"{name:<26}{'n':>4}" + "".join(f"{total:>12g}" for total in TOTALS)]
        for strategy in dict.fromkeys(line["strategy"] for line in lines):
            curves = [line["curve"] for line in lines if (line["truth"], line["strategy"]) == (name, strategy)]
            cells = []
            for total in TOTALS:
                found = [100 * p["regret_10x"] for curve in curves for p in curve if p["level"] == total]
                cells.append(f"{np.median(found):.2f}/{np.quantile(found, 0.9):.1f}" if found else "-")
            out.append(f"  {strategy:<24}{len(curves):>4}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=20, help="episodes of a truth and strategy (default 20)")
    parser.add_argument("--gp-seeds", type=int, default=3, help="of the Gaussian process, which is slow (default 3)")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "search_opponents.jsonl")
    options = parser.parse_args(argv)
    try:
        if min(options.workers, options.seeds) < 1 or options.gp_seeds < 0:
            raise UserError(f"--workers {options.workers} --seeds {options.seeds}: give at least 1")
        lines = finished(options.out)
        write_atomic(options.out, text(lines))
        tasks = list(todo(options.seeds, options.gp_seeds, lines))
        with open(options.out, "a") as file, ProcessPoolExecutor(options.workers) as pool:
            for i, found in enumerate(pool.map(episode, tasks)):
                file.write(text(found))
                file.flush()
                lines += found
                print(f"{i + 1}/{len(tasks)} {' '.join(map(str, tasks[i]))}", file=sys.stderr, flush=True)
        write_atomic(options.out, text(sorted(lines, key=lambda line: (line["truth"], line["strategy"], line["seed"]))))
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(table(lines))
    return 0


def text(lines: Sequence[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
