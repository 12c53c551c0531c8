"""Does choosing each run by what it tells pay? Strategies against each other on planted laws, by actual regret.

    nice -n 10 python -m analysis.next_run.active_sweep [--workers N] [--quick] [--out FILE.jsonl] [--also FILE]

Every episode (truth, strategy, seed) that is done is one line of OUT, so that a killed sweep goes on where it was. Beside
OUT stand the summary (.json) and the figure (a folder of that name). --also: lines of other strategies in the same
schema {truth, strategy, seed, curve: [{level, compute, regret_10x, ...}]}, for summary and figure. Cost: about 8
core-minutes; --quick: 2 seeds of 2 truths and strategies. The strategies are those of `analysis.next_run.simulated_contest`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from analysis.next_run import simulated_contest as contest
from analysis.next_run import summary
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic

SEEDS = {
    "next_run": 12,
    "cost_random": 12,
    "star": 8,
    "isoflop": 8,
    "random": 8,
    "v_optimal": 4,
}


def episodes(quick: bool) -> list[tuple[str, str, int]]:
    """(truth, strategy, seed) in the order to run: the two that the aim compares first."""
    if quick:
        return [(t, s, seed) for t in ("joint", "eq3") for s in ("next_run", "cost_random") for seed in range(2)]
    most = max(SEEDS.values())
    pair = [(t, s, seed) for seed in range(most) for t in contest.TRUTHS for s in ("next_run", "cost_random")]
    rest = [(t, s, seed) for seed in range(most) for s in list(SEEDS)[2:] for t in contest.TRUTHS if seed < SEEDS[s]]
    return pair + rest


def read(path: Path) -> list[dict]:
    """Finished episodes; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: a line cut short is run again", file=sys.stderr)
    return found


def run(todo: Sequence[tuple[str, str, int]], out: Path, workers: int) -> None:
    """Append each episode as it ends; several workers are processes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not out.read_text().endswith("\n"):  # what a kill cut short goes
        write_atomic(out, "".join(json.dumps(line) + "\n" for line in read(out)))
    with open(out, "a") as file:

        def keep(i: int, done: dict) -> None:
            file.write(json.dumps(done, allow_nan=False) + "\n")
            file.flush()
            print(f"{i}/{len(todo)} {done['truth']}, {done['strategy']}, seed {done['seed']}", flush=True)

        if workers == 1:
            for i, one in enumerate(todo, 1):
                keep(i, contest.episode(*one))
            return
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(contest.episode, *one) for one in todo]
            for i, job in enumerate(as_completed(jobs), 1):
                keep(i, job.result())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "active_sweep.jsonl", help="default %(default)s")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="episodes of other strategies")
    options = parser.parse_args(argv)
    out = options.out
    try:
        if options.workers < 1:
            raise UserError(f"--workers {options.workers} is too few; give 1 or more")
        missing = [path for path in options.also if not path.exists()]
        if missing:
            raise UserError(f"--also {missing[0]} does not exist; leave it out or make it first")
        todo = episodes(options.quick)
        done = {(e["truth"], e["strategy"], e["seed"]) for e in read(out)}
        left = [one for one in todo if one not in done]
        print(f"{len(todo)} episodes, {len(todo) - len(left)} of them done", flush=True)
        run(left, out, options.workers)
        lines = read(out) + [line for path in options.also for line in read(path)]
        found = summary.summary(lines)
        write_atomic(out.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
        from analysis.next_run.figures import active
        from sovit.report.figures import save

        save(active(found), out.with_suffix("") / "regret")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(summary.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
