"""What does black-box search of shapes pay for a good shape at ten times the largest run? Optuna's TPE and GP, measured.

    nice -n 10 python analysis/search_opponents.py [--workers 2] [--seeds 20] [--out results/search_opponents.jsonl]

The opponents of `active.next_run` on planted truths, by the rules of analysis/active_sweep.py: they know the same pilot,
search the same ranges of shapes, pay for every run, and are scored by the regret of what they recommend: the relative
excess of its true loss over the true optimum's, at 10 and 100 times the compute of the star's largest run. A total counts
the pilot; its unit is the cost of SoViT's star.

A black box compares losses at one budget only, so each total is a search of its own. All of its runs have the largest
budget at which the total pays for NUM_TRIALS of them, at most that of the star's largest run; what is left then buys more of
them, up to MOST_TRIALS. The first trial is the pilot's best shape. Its best shape (gp: that of the lowest posterior mean) is
recommended

    tpe-24          as it is
    tpe-24-scaled   with its proportions kept and forward FLOPs of an image growing as compute^0.5
    tpe-at-target   as it is, searched at 10 times the largest run itself: where the total pays for AT_TARGET trials

One JSON line a strategy and episode: {truth, strategy, seed, curve: [{compute, regret_10x, regret_100x, num_trials,
run_compute}]}. A second call goes on where the first was stopped. Cost: about 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from sovit import UserError, planted
from sovit.ledger import write_atomic
from sovit.search import black_box

TRUTHS = {
    "joint": ("joint", 0.0),
    "weak": ("weak", 0.0),
    "inter .4": ("inter", 0.4),
    "inter .8": ("inter", 0.8),
    "eq3": ("eq3", 0.0),
    "bounded": ("bounded", 0.0),
}
SD, RHO = 0.005, 0.5
TOTALS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # stars
NUM_TRIALS = {"random": (24,), "tpe": (8, 24), "gp": (24,)}
MOST_TRIALS = {"random": 48, "tpe": 48, "gp": 24}  # a Gaussian process of more takes minutes
AT_TARGET = 3  # fewer trials at the target are no search
SIZE_POWER = 0.5  # of forward FLOPs against compute, proportions kept (2203.15556)
RANGES = {"width": (304, 2432), "depth": (4, 96), "mlp_dim": (464, 9216)}
PILOT = ((608, 10, 928), (432, 7, 928), (864, 10, 656), (608, 14, 656), (432, 14, 1312), (864, 7, 1312), (608, 7, 656))


def searches() -> list[str]:
    return [f"{kind}-{n}" for kind, many in NUM_TRIALS.items() for n in (*many, "at-target")]


def law(name: str) -> planted.Truth:
    kind, frac = TRUTHS[name]
    return planted.truth(kind, frac=frac)


@cache
def best_loss(name: str, compute: float) -> float:
    truth = law(name)
    return float(truth.loss_at(truth.optimum(compute), compute))


def scaled(truth: planted.Truth, shape: np.ndarray, factor: float) -> np.ndarray:
    """The shape [3] of the same proportions with `factor` times the forward FLOPs, real numbers."""
    low, high = 0.01, 100.0
    for _ in range(80):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if truth.flops(middle * shape) < factor * truth.flops(shape) else (low, middle)
    return middle * shape


def episode(task: tuple[str, str, int]) -> list[dict]:
    """The lines of one search at every total: its shapes as they are and, where it is not at the target, scaled."""
    name, search, seed = task
    kind, _, rest = search.partition("-")
    truth, star = law(name), planted.sovit_star()
    pilot = planted.design(PILOT, planted.IMAGES)
    largest, unit = star.columns["compute"].max(), cost(star)
    losses = pilot.losses(truth) * planted.noise(pilot, SD, RHO, np.random.default_rng([seed, 0]))
    last = pilot.columns["num_examples"] == max(planted.IMAGES)
    first = dict(zip(planted.DIMS, pilot.shapes[last][losses[last].argmin()].astype(int).tolist()))
    rng = np.random.default_rng([seed, 1])
    curves: dict[str, list] = {}
    for total in TOTALS:
        left = total * unit - cost(pilot)
        if rest == "at-target":
            run_compute = 10 * largest
        else:
            run_compute = min(largest, left / int(rest))
        num_trials = min(MOST_TRIALS[kind], int(left / run_compute * (1 + 1e-9)))
        if rest == "at-target" and num_trials < AT_TARGET:
            continue

        def loss(shape: dict[str, int], run_compute=run_compute) -> float:
            return float(truth.loss_at(list(shape.values()), run_compute) * np.exp(SD * rng.standard_normal()))

        found = black_box(kind, loss, RANGES, num_trials, seed, [first])
        best = np.array([found.believed[d] for d in planted.DIMS], float)
        spent = (cost(pilot) + num_trials * run_compute) / unit
        point = dict(compute=spent, total=total, num_trials=num_trials, run_compute=run_compute / unit)
        for label in (search, f"{search}-scaled"):
            regrets = {}
            for times in (10, 100):
                target = times * largest
                grown = label != search
                shape = scaled(truth, best, (target / run_compute) ** SIZE_POWER) if grown else best
                regrets[f"regret_{times}x"] = float(truth.loss_at(shape, target) / best_loss(name, target) - 1)
            curves.setdefault(label, []).append(point | regrets | dict(shape=best.astype(int).tolist()))
    return [dict(truth=name, strategy=label, seed=seed, curve=curve) for label, curve in curves.items()]


def cost(design: planted.Design, branch: float = 0.2) -> float:
    """Forward FLOPs x images of the trunks, the longest branch of each in full and `branch` of every other."""
    compute = design.columns["compute"]
    longest = [compute[design.trunk == g].max() for g in range(design.trunk.max() + 1)]
    return float(sum(longest) * (1 - branch) + branch * compute.sum())


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
                if (name, f"{search}-scaled", seed) not in known and (seed < num_gp_seeds or search[:2] != "gp"):
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
                found = [100 * p["regret_10x"] for curve in curves for p in curve if p["total"] == total]
                cells.append(f"{np.median(found):.2f}/{np.quantile(found, 0.9):.1f}" if found else "-")
            out.append(f"  {strategy:<24}{len(curves):>4}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=20, help="episodes of a truth and strategy (default 20)")
    parser.add_argument("--gp-seeds", type=int, default=3, help="of the Gaussian process, which is slow (default 3)")
    parser.add_argument("--out", type=Path, default=Path("results/search_opponents.jsonl"))
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
