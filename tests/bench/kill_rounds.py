"""kill -9 at random moments, round after round: is a measurement lost, doubled, or made that nobody asked for?

    python tests/bench/kill_rounds.py [--rounds 50] [--quiet-rounds 5] [--seed 0] [--workers 3] [--json]

A round launches a fresh study of trivial points (fake_sweep.py) with three workers, kills one worker, then everything,
the launcher too, and launches again to the end. Every other kill comes at a random time; the others when a process is
seen in a phase drawn beforehand (PHASES), a random moment later. Processes note in shared memory what they are doing, so
that what a kill hit is known afterwards. In a quiet round nobody is killed. Exit status 0 where nothing was lost, doubled or
unasked, and in no round a worker died that was not killed.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("lost", "doubled", "unasked", "trials wrong", "launches failed", "dead workers")
PHASES = ("reconcile", "ask", "train", "record", "tell", "append", "merge")
NUM_TRUNKS, BUDGETS, PAUSE = 20, (1600, 3200), 0.01  # of a round's study; seconds a point
NOTE = 64  # bytes


# a launcher or worker that notes what it does -------------------------------------------------------------------------


class Note:
    """What this process is doing, `reconcile>append` say, where the process that kills can read it."""

    def __init__(self, folder: Path):
        path = folder / "phases" / str(os.getpid())
        path.write_bytes(bytes(NOTE))
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), NOTE)
        self.stack: list[str] = []
        self.enter("start")

    def enter(self, phase: str) -> None:
        self.stack.append(phase)
        self.write()

    def leave(self) -> None:
        self.stack.pop()
        self.write()

    def write(self) -> None:
        self.memory[:] = ">".join(self.stack).encode()[:NOTE].ljust(NOTE, b"\0")

    def around(self, owner, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def noted(*arguments, **more):
            self.enter(phase)
            try:
                return function(*arguments, **more)
            finally:
                self.leave()

        setattr(owner, name, noted)


def take_part(role: str, arguments: list[str]) -> int:
    """`launch FOLDER WORKERS`, or `work PLAN`."""
    folder = Path(arguments[0]) if role == "launch" else Path(arguments[0]).parent.parent
    note = Note(folder)
    import fake_sweep
    import optuna
    from optuna.storages.journal import JournalFileBackend

    from sovit.sweep import launch, queue
    from sovit.sweep import worker as sweep

    fake_sweep.PAUSE, launch.POLL_SECONDS = PAUSE, 0.05
    note.around(sweep, "reconcile", "reconcile")
    note.around(optuna.Study, "ask", "ask")
    note.around(fake_sweep, "fake_train", "train")
    note.around(fake_sweep, "write_record", "record")
    note.around(sweep, "_tell_result", "tell")
    note.around(JournalFileBackend, "append_logs", "append")
    note.around(queue, "reconcile", "reconcile")
    note.around(queue, "update_ledger", "merge")
    note.stack.clear()
    note.enter("between")
    if role == "work":
        try:
            return sweep.work(Path(arguments[0]), fake_sweep.fake_train)
        except BaseException:
            fake_sweep.note(folder, "died", "-", os.getpid())
            raise
    study = fake_sweep.opened(folder, design())
    command = [sys.executable, __file__, "work"]
    launch.launch(study, int(arguments[1]), worker_command=command)
    return int(bool(study.pending()))


def design():
    import fake_sweep

    return fake_sweep.runs(NUM_TRUNKS, BUDGETS)


# who kills -----------------------------------------------------------------------------------------------------------


class Victims:
    """The processes of one launch."""

    def __init__(self, folder: Path, workers: int):
        self.folder = folder
        for old in (folder / "phases").glob("*"):
            old.unlink()
        log = open(folder / "log", "a")
        command = [sys.executable, __file__, "launch", str(folder), str(workers)]
        self.launcher = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()

    def doing(self) -> dict[int, str]:
        """pid -> phases, the outermost first, of all processes that have lived."""
        notes = {int(p.name): p.read_bytes() for p in (self.folder / "phases").iterdir()}
        return {pid: note.rstrip(b"\0").decode() for pid, note in notes.items()}

    def living(self) -> set[int]:
        """Workers that run, those that have not yet noted anything among them."""
        found = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f"{self.folder}/".encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
        return found - {self.launcher.pid}

    def await_phase(self, phase: str, rng: random.Random, workers_only: bool, seconds: float = 10.0) -> int | None:
        """Look, without a pause, until somebody is in `phase` for the n-th time (n random); return who, or None."""
        sightings, seen, until = rng.randint(1, 8), {}, time.monotonic() + seconds
        while time.monotonic() < until and self.launcher.poll() is None:
            for pid, doing in self.doing().items():
                if workers_only and pid == self.launcher.pid:
                    continue
                inside = phase in doing.split(">")
                if inside and not seen.get(pid):
                    sightings -= 1
                    if not sightings:
                        return pid
                seen[pid] = inside
        return None

    def kill(self, pids) -> list[str]:
        """SIGKILL, noted beforehand in the file of executions; what each was doing."""
        import fake_sweep

        pids = [pid for pid in pids if state(pid) not in ("Z", None)]  # not who was done
        for pid in pids:
            fake_sweep.note(self.folder, "kill", "-", pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while any(state(pid) not in ("Z", None) for pid in pids):
            time.sleep(0.001)
        doing = self.doing()
        return [doing.get(pid, "start") for pid in pids]

    def kill_all(self) -> list[str]:
        hit = self.kill([self.launcher.pid, *self.living()])
        self.launcher.wait()
        while left := self.living():  # one that the launcher had just started
            hit += self.kill(left)
        return hit


def state(pid: int) -> str | None:
    """R, S, Z ... of a process, None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def one_round(folder: Path, rng: random.Random, workers: int, duration: float) -> list[str]:
    """Launch, kill one worker, kill everything. Returns what each victim was doing."""
    victims, hit = Victims(folder, workers), []
    started = time.monotonic()
    for everything in (False, True):
        chosen = None
        if rng.random() < 0.5:
            phase = rng.choice(PHASES[:-1] if not everything else PHASES)  # workers do not merge
            chosen = victims.await_phase(phase, rng, workers_only=not everything)
            time.sleep(rng.choice((0.0, rng.uniform(0, 0.002))))
        else:
            left = max(0.1, duration - (time.monotonic() - started))
            time.sleep(rng.uniform(0, left if everything else 0.7 * duration))
        if everything:
            hit += victims.kill_all()
        elif candidates := ([chosen] if chosen else sorted(victims.living())):
            hit += victims.kill([rng.choice(candidates)])
    return hit


def faults(folder: Path, before: dict[Path, tuple]) -> Counter:
    """What is wrong with a study that was launched to its end; `before`: its record files after the kills."""
    import fake_sweep
    import optuna
    from optuna.trial import TrialState

    from sovit.ledger.ledger import read_ledger
    from sovit.sweep import queue

    runs = {run_id: run for run in design() for run_id in run.run_ids}
    rows = {row["run_id"]: row for row in read_ledger(folder / "s.jsonl")}
    found = Counter()
    for run_id, run in runs.items():
        row = rows.get(run_id)
        found["lost"] += row is None or row["val_loss"] != fake_sweep.loss_of(run, row["num_examples"])
    records_now = records(folder)
    found["lost"] += sum(path not in records_now for path in before)
    found["doubled"] += sum(records_now.get(path, what) != what for path, what in before.items())  # written anew

    lines = [line.split() for line in (folder / "executions").read_text().splitlines()]
    killed, begun, ended = set(), {}, Counter()
    for word, run_id, pid in lines:
        if word == "kill":
            killed.add(pid)
        elif word == "died":  # by an error of its own
            found["dead workers"] += 1
        elif word == "begin":  # twice only where the first died of it
            found["doubled"] += run_id in begun and begun[run_id] not in killed or bool(ended[run_id])
            begun[run_id] = pid
        else:
            ended[run_id] += 1
    found["doubled"] += sum(n - 1 for n in ended.values())
    found["unasked"] += len((set(begun) | set(rows)) - set(runs))

    storage = queue.open_storage(f"journal:{folder}/runs/s.journal")
    trials = optuna.load_study(study_name="s", storage=storage).get_trials(deepcopy=False)
    found["unasked"] += sum("run" not in trial.user_attrs for trial in trials)
    complete = Counter(t.user_attrs.get("trunk_id") for t in trials if t.state == TrialState.COMPLETE)
    found["trials wrong"] += complete != {run.trunk_id: 1 for run in runs.values()}
    found["trials wrong"] += sum(not trial.state.is_finished() for trial in trials)
    return found


def records(folder: Path) -> dict[Path, tuple]:
    """What every record file is: a measurement made again would be another file."""
    found = (folder / "runs").glob("*/records/*.json")
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def kill_rounds(
    rounds: int, seed: int = 0, workers: int = 3, quiet_rounds: int = 0, on_round=lambda i, folder, found: None
) -> dict:
    """Run the rounds, quiet ones after the others; counts of FAULTS and of what the kills hit."""
    rng, started = random.Random(seed), time.monotonic()
    total, hit, interrupted, duration = Counter(), [], 0, 1.0
    for i in range(rounds + quiet_rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            (folder / "phases").mkdir()
            if i < rounds:
                hit += one_round(folder, rng, workers, duration)
            before = records(folder)
            interrupted += i < rounds and len(before) < NUM_TRUNKS * len(BUDGETS)
            began = time.monotonic()
            code = Victims(folder, workers).launcher.wait(120)
            share = 1 - len(before) / (NUM_TRUNKS * len(BUDGETS))
            if share > 0.5:  # how long a launch takes here and now, for the kills by the clock
                duration = (time.monotonic() - began) / share
            found = faults(folder, before) + Counter({"launches failed": int(code != 0)})
            total += found
            on_round(i, folder, found)
    return {
        "rounds": rounds,
        "quiet_rounds": quiet_rounds,
        "seed": seed,
        "workers": workers,
        "points": (rounds + quiet_rounds) * NUM_TRUNKS * len(BUDGETS),
        **{name: total[name] for name in FAULTS},
        "kills": len(hit),
        "rounds_interrupted": interrupted,  # some points were still to be done
        "hit": dict(Counter(what.split(">")[-1] for what in hit).most_common()),  # the innermost phase
        "hit_within": {phase: sum(phase in what.split(">") for what in hit) for phase in PHASES},
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quiet-rounds", type=int, default=5, help="rounds without kills (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def show(i, folder, found):
        of = options.rounds + options.quiet_rounds
        print(f"round {i + 1}/{of}: {dict(+found) or 'nothing lost'}", file=sys.stderr, flush=True)
        if +found:
            print((folder / "log").read_text(), (folder / "executions").read_text(), sep="\n", file=sys.stderr)

    result = kill_rounds(options.rounds, options.seed, options.workers, options.quiet_rounds, show)
    wrong = [f"{result[name]} {name}" for name in FAULTS]
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        rounds = f"{result['rounds']} rounds and {result['quiet_rounds']} quiet ones"
        print(f"{rounds}, {result['kills']} kills, {result['points']} points: {', '.join(wrong)}")
        print(f"killed within: {result['hit_within']}; innermost: {result['hit']}; {result['seconds']} s")
    return int(not all(line.startswith("0 ") for line in wrong))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
    if len(sys.argv) > 1 and sys.argv[1] in ("launch", "work"):
        sys.exit(take_part(sys.argv[1], sys.argv[2:]))
    sys.exit(main())
