"""How long the commands that must answer at once take, from the shell's point of view. Not a test.

    python tests/bench/bench_start.py [ROUNDS]

Each command is a fresh process; the commands take turns, ROUNDS (10) times after one that is not counted. The first row
is Python alone, which no command can go below.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAW = "results/stream_star_law/law.json --train-flops 3e12"
COMMANDS = (  # {out} is a path that does not exist yet
    "--help",
    "count B/16",
    f"predict {LAW}",
    "status stream_star",
    f"export {LAW} --config-only --format siglip --out {{out}}",
    "report results/stream_star.jsonl --out {out}",
)


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Of the clock, and of the processor: the second hardly sees what else the machine is doing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(rounds: int) -> None:
    taken: dict[str, list[tuple]] = {}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            calls = {"python": ["-c", "pass"]}
            calls |= {c: ["-m", "sovit", *c.format(out=f"{folder}/{i}").split()] for i, c in enumerate(COMMANDS)}
            for command, arguments in calls.items():
                took = seconds(arguments)
                if turn:
                    taken.setdefault(command, []).append(took)
    print(f"{rounds} rounds; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'best s':>7} {'median s':>9} {'processor s':>12}  command")
    for command, times in taken.items():
        clock, processor = zip(*times)
        print(f"{min(clock):7.3f} {statistics.median(clock):9.3f} {statistics.median(processor):12.3f}  {command}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
