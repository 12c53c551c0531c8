"""Launch a list of runs as an Optuna study: N worker processes, every trunk exactly once, whatever is killed when.

Optuna is the queue and the record of a sweep; the record files are the truth. A trunk is done when each of its branches
has a record (or a row in the ledger), whatever the study says. The pattern, because no Optuna storage recovers a
killed worker by itself:

- each trunk in training holds `runs/<trunk_id>/lock` with flock, which the kernel frees when the process dies;
- `reconcile`, under one lock for the study, tells FAIL to every RUNNING trial whose trunk is not locked, tells COMPLETE
  to what has all its records, and enqueues every trunk that is neither done, waiting nor running;
- a worker asks for a trial only under that lock and only if one is waiting: on an empty queue, Optuna's samplers would
  make up a point that nobody asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from sovit import UserError
from sovit.ledger import (
    ANSWERED,
    locked,
    new_row,
    provenance,
    read_ledger,
    read_record,
    update_ledger,
    write_atomic,
    write_record,
)
from sovit.run import Run, override

MAX_ATTEMPTS = 4  # of one trunk in one launch, deaths of its worker counted
POLL_SECONDS = 0.5


# the study -----------------------------------------------------------------------------------------------------------


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """A journal file (`journal:PATH`), or any database URL that SQLAlchemy opens.

    Raises UserError for SQLite, which loses and repeats trials under two workers.
    """
    kind, _, rest = url.partition(":")
    if kind == "journal":
        path = Path(rest)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(path), JournalLock(path))
        try:
            return optuna.storages.JournalStorage(backend)
        except ValueError as error:  # json's error is one
            raise UserError(
                f"the journal {path} is damaged ({error}); delete it: it is made again from the records"
            ) from None
    if kind.startswith("sqlite"):
        raise UserError(
            f"--storage {url}: SQLite repeats and loses trials; leave --storage out (a journal) or use postgresql+psycopg://"
        )
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:  # SQLAlchemy and drivers raise many kinds
        raise UserError(f"cannot open --storage {url}: {str(error).splitlines()[0]}") from None


class JournalLock:
    """A lock on the journal that the kernel frees when its holder dies, and that mends what the holder left.

    Optuna's own lock outlives its process by 30 s; and what is appended to a half-written line spoils the journal.
    """

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        self.file = open(self.path, "r+b")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self.file.seek(0)
                self.file.truncate(self.file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()


def design_of(runs: Sequence[Run]) -> dict[str, list[int]]:
    """trunk_id -> budgets: what makes two designs the same."""
    return {run.trunk_id: list(run.budgets) for run in runs}


def open_study(name: str, storage: optuna.storages.BaseStorage, runs: Sequence[Run]) -> optuna.Study:
    """Create or reopen the study. A design may grow, by trunks or budgets; anything else is another study.

    Raises UserError where the name is taken by a different design.
    """
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
    design, before = design_of(runs), study.user_attrs.get("design", {})
    if any(not set(budgets) <= set(design.get(trunk, ())) for trunk, budgets in before.items()):
        raise UserError(f"a study named {name!r} with another design exists; give this one another name with --name")
    if design != before:
        study.set_user_attr("design", design)
    return study


class Sweep:
    """Where a study keeps its things, and what is done of it."""

    def __init__(self, name: str, runs: Sequence[Run], runs_dir: Path, ledger: Path, storage: str | None = None):
        self.name, self.runs_dir, self.ledger = name, Path(runs_dir), Path(ledger)
        self.storage = storage or f"journal:{self.runs_dir / name}.journal"
        self.runs = {run.trunk_id: run for run in runs}
        if len(self.runs) != len(runs):
            raise UserError(f"study {name!r} names one trunk twice; remove the repeat")
        self.in_ledger = {}
        if self.ledger.exists() and self.ledger.stat().st_size:
            self.in_ledger = {row["run_id"]: row for row in read_ledger(self.ledger) if row["status"] in ANSWERED}

    def lock(self):
        return locked(self.runs_dir / f"{self.name}.lock")

    def rows(self, run: Run) -> list[dict | None]:
        """The answered row of each branch, from its record or the ledger; None where it is still to be had."""
        return [read_record(self.runs_dir, run.trunk_id, i) or self.in_ledger.get(i) for i in run.run_ids]

    def refuse_other_rows(self) -> None:
        """Raise UserError where the ledger holds rows of another design, as the study's own guard may be deleted."""
        asked = {run_id for run in self.runs.values() for run_id in run.run_ids}
        for run_id in self.in_ledger:
            if run_id not in asked:
                raise UserError(
                    f"{self.ledger} holds {run_id}, which this design does not ask for;"
                    " give another design another name with --name"
                )

    def in_training(self) -> list[Run]:
        """What is not done and held by a living process, of this launch or another."""
        return [run for run in self.pending() if is_locked(self.runs_dir / run.trunk_id / "lock")]

    def is_done(self, run: Run) -> bool:
        return all(self.rows(run))

    def pending(self) -> list[Run]:
        return [run for run in self.runs.values() if not self.is_done(run)]

    def collect(self) -> list[dict]:
        """Merge all records, failed ones too, into the ledger; return its rows."""
        rows = []
        for run in self.runs.values():
            for path in sorted((self.runs_dir / run.trunk_id / "records").glob("*.json")):
                if path.stem in run.run_ids:
                    rows.append(json.loads(path.read_text()) | {"study": self.name})
        return update_ledger(self.ledger, rows) if rows else list(self.in_ledger.values())


def reconcile(sweep: Sweep, study: optuna.Study, launch: str) -> None:
    """Make the queue agree with the records. Call it under `sweep.lock()`."""
    waiting_or_running, attempts, answered = set(), {}, set()
    for trial in study.get_trials(deepcopy=False):
        trunk = trial.user_attrs.get("trunk_id")
        run = sweep.runs.get(trunk)
        if trial.state == TrialState.RUNNING and not is_locked(sweep.runs_dir / str(trunk) / "lock"):
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state in (TrialState.RUNNING, TrialState.WAITING):
            waiting_or_running.add(trunk)
        if trial.state == TrialState.COMPLETE and run and trial.user_attrs.get("run_ids") == list(run.run_ids):
            answered.add(trunk)
        if trial.user_attrs.get("launch") == launch and trial.state in (TrialState.RUNNING, TrialState.FAIL):
            given_up = MAX_ATTEMPTS if "error" in trial.user_attrs else 1
            attempts[trunk] = attempts.get(trunk, 0) + given_up
    for trunk, run in sweep.runs.items():
        attributes = {"trunk_id": trunk, "run": run.to_dict(), "run_ids": list(run.run_ids), "launch": launch}
        if sweep.is_done(run):
            value = sweep.rows(run)[-1]["val_loss"]
            if trunk not in answered | waiting_or_running and value is not None:  # the store was deleted: rebuild it
                study.add_trial(
                    optuna.create_trial(
                        value=value, params=params(run), distributions=distributions(run), user_attrs=attributes
                    )
                )
        elif trunk not in waiting_or_running and attempts.get(trunk, 0) < MAX_ATTEMPTS:
            study.enqueue_trial(params(run), user_attrs=attributes)


def params(run: Run) -> dict:
    """What Optuna's tables and plots show of a run."""
    shape, recipe = run.shape, run.recipe
    dims = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size")
    return {d: getattr(shape, d) for d in dims} | {
        "peak_lr": recipe.peak_lr,
        "init_seed": run.init_seed,
        "data_seed": run.data_seed,
    }


def distributions(run: Run) -> dict:
    """One fixed range for each parameter, wide enough for any study: a trial's values are given, never sampled."""
    fixed = {name: optuna.distributions.IntDistribution(0, 2**32) for name in params(run)}
    return fixed | {"peak_lr": optuna.distributions.FloatDistribution(0.0, 1e3)}


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look at once do not see each other
        except BlockingIOError:
            return True
    return False


# a worker ------------------------------------------------------------------------------------------------------------


def work(plan_path: Path, train: Callable[..., list[dict]] | None = None) -> int:
    """Pull trials until none waits. One process, one thread; `train` is sovit.train.train where none is given."""
    plan = json.loads(Path(plan_path).read_text())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = Sweep(
        plan["name"],
        [Run.from_dict(d) for d in plan["runs"]],
        Path(plan["runs_dir"]),
        Path(plan["ledger"]),
        plan["storage"],
    )
    study = optuna.load_study(study_name=sweep.name, storage=open_storage(sweep.storage))
    failed = 0
    while os.getppid() == plan["launcher"]:  # without its launcher a worker ends the trunk it is on, and stops
        with sweep.lock():
            reconcile(sweep, study, plan["launch"])
            if not any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False)):
                return failed
            trial = study.ask()
            run = Run.from_dict(trial.user_attrs["run"])  # the study may have grown since this launch
            holder = open(_made(sweep.runs_dir / run.trunk_id / "lock"), "a")
            ours = _try_lock(holder)
        if not ours:  # another study trains this trunk: wait for it, but not with everyone behind us
            fcntl.flock(holder, fcntl.LOCK_EX)
        for name, d in distributions(run).items():  # takes the enqueued values up into the trial
            suggest = trial.suggest_float if name == "peak_lr" else trial.suggest_int
            suggest(name, d.low, d.high)
        try:
            failed += _run_trial(sweep, study, trial, run, train or _torch_train(), plan["device"])
        finally:
            holder.close()
    return failed


def _run_trial(sweep: Sweep, study: optuna.Study, trial: optuna.Trial, run: Run, train, device: str) -> int:
    def only_in_ledger(n: int) -> bool:
        return run.run_id(n) in sweep.in_ledger and not read_record(sweep.runs_dir, run.trunk_id, run.run_id(n))

    # branches that have a record stay in the run, which says what of the trunk is paid for
    budgets = tuple(n for n in run.budgets if not only_in_ledger(n))
    todo = run.replace(budgets=budgets or run.budgets)
    progress_path = sweep.runs_dir / run.trunk_id / "progress.json"
    try:
        if not sweep.is_done(run):
            train(todo, sweep.runs_dir, device, on_progress=lambda p: write_atomic(progress_path, json.dumps(p)))
    except Exception as error:  # whatever a run dies of is recorded, and the sweep goes on
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _record_failure(sweep, todo, reason)
        _tell(study, trial, None, reason)
        return 1
    last = sweep.rows(run)[-1]
    _tell(study, trial, last["val_loss"], f"{last['status']}: {last.get('error')}")
    return 0


def _tell(study: optuna.Study, trial: optuna.Trial, value: float | None, error: str) -> None:
    # while this process waited for another study's trunk, reconcile may have told the trial; the records are the truth
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        if value is None:
            trial.set_user_attr("error", error)
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, value)


def _try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _record_failure(sweep: Sweep, run: Run, reason: str) -> None:
    for n in run.budgets:
        if read_record(sweep.runs_dir, run.trunk_id, run.run_id(n)) is None:
            row = new_row(run, n, status="failed", num_classes=0, error=reason, seconds=None, **provenance("unknown"))
            unknown = ("num_classes", "head_params", "head_flops", "train_flops", "spent_flops")
            write_record(sweep.runs_dir, row | dict.fromkeys(unknown))


def _torch_train():
    import torch

    from sovit.train import train

    torch.set_num_threads(1)
    return train


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# the launcher --------------------------------------------------------------------------------------------------------


def launch(sweep: Sweep, workers: int, device: str = "cpu", worker_command: Sequence[str] = ()) -> list[dict]:
    """Run what is pending with `workers` processes and return the ledger's rows. Ctrl-C stops it; relaunch resumes."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.refuse_other_rows()
    storage = open_storage(sweep.storage)
    with locked(sweep.ledger.with_suffix(".lock")):
        pass  # a folder that cannot be written is found now, not after the training
    with sweep.lock():
        study = open_study(sweep.name, storage, list(sweep.runs.values()))
        token = hashlib.sha256(f"{os.getpid()} {time.time_ns()}".encode()).hexdigest()[:8]
        reconcile(sweep, study, token)
    plan = {
        "name": sweep.name,
        "storage": sweep.storage,
        "runs_dir": str(sweep.runs_dir),
        "ledger": str(sweep.ledger),
        "launch": token,
        "launcher": os.getpid(),
        "device": device,
        "runs": [run.to_dict() for run in sweep.runs.values()],
    }
    plan_path = sweep.runs_dir / f"{sweep.name}.{token}.plan.json"  # of this launch: two may run at once
    write_atomic(plan_path, json.dumps(plan))
    command = list(worker_command) or [sys.executable, "-m", "sovit.sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
    log = open(sweep.runs_dir / f"{sweep.name}.log", "a")

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, str(plan_path)], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )

    pending = len(sweep.pending())
    processes = [start() for _ in range(min(workers, pending))]
    restarts, waited = MAX_ATTEMPTS * max(pending, 1), False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    try:
        with _display(sweep) as show:
            while True:
                if not processes and not sweep.in_training():
                    if not (waited and restarts and sweep.pending()):
                        break
                    restarts, waited = restarts - 1, False  # who trained it without us has died: do it again
                    processes.append(start())
                time.sleep(POLL_SECONDS)
                for process in [p for p in processes if p.poll() is not None]:
                    processes.remove(process)
                    if process.returncode < 0 and restarts and sweep.pending():  # killed: another takes its place
                        restarts -= 1
                        processes.append(start())
                waited = waited or not processes  # for a worker of another launch, whose launcher may be gone
                show(len(processes))
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to go on with {sweep.name}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        log.close()
        plan_path.unlink(missing_ok=True)
        rows = sweep.collect()
    with sweep.lock():  # what died last is told so
        reconcile(sweep, study, token)
    return rows


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


@contextlib.contextmanager
def _display(sweep: Sweep):
    """A live table of workers on a terminal; elsewhere a line for each trunk that ends."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from sovit.progress import progress_text

    console = Console(stderr=True)
    started, done = time.monotonic(), {r.trunk_id for r in sweep.runs.values() if sweep.is_done(r)}
    flops_of = {t: r.shape.train_flops_per_image() * r.total_examples for t, r in sweep.runs.items()}
    total, before = sum(flops_of.values()), sum(flops_of[t] for t in done)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def show(workers: int) -> None:
        for trunk, run in sweep.runs.items():
            if trunk not in done and sweep.is_done(run):
                done.add(trunk)
                sweep.collect()
                last = sweep.rows(run)[-1]
                loss = f"loss {last['val_loss']:.4f}" if last["val_loss"] is not None else last["status"]
                console.print(
                    f"[{len(done)}/{len(sweep.runs)}] {trunk} {run.shape.label} seed {run.init_seed}"
                    f" lr {run.recipe.peak_lr:g}: {loss} at {last['train_flops']:.2e} FLOPs, {last['seconds'] or 0:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )
        if live:
            spent, lines = sum(flops_of[t] for t in done), []
            for trunk in sweep.runs:
                path = sweep.runs_dir / trunk / "progress.json"
                if trunk not in done and is_locked(sweep.runs_dir / trunk / "lock") and path.exists():
                    progress = json.loads(path.read_text())
                    spent += progress["share"] * flops_of[trunk]
                    lines.append("  " + progress_text(progress))
            elapsed = time.monotonic() - started
            left = elapsed * (total - spent) / (spent - before) if spent > before else float("nan")
            clock = f"{left / 60:.0f} min left" if left == left else "estimating"
            head = f"{sweep.name}: {len(done)}/{len(sweep.runs)} trunks, {spent / total:.0%} of {total:.2e} FLOPs"
            live.update(Text("\n".join([f"{head}, {workers} workers, {clock}", *lines])))

    if live:
        with live:
            yield show
    else:
        yield show
    show(0)


# the command line of a study file ------------------------------------------------------------------------------------


def main(doc: str, name: str, make_runs: Callable[[], list[Run]], argv: Sequence[str] | None = None) -> int:
    """What `python studies/X.py` does. Returns the exit status: 0 done, 1 a run failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog=f"studies/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="typed override of a field of every run, such as recipe.peak_lr=0.004",
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes, one thread each (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan with FLOPs and estimated time; train nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    parser.add_argument("--name", default=name, help="name of the study, its ledger and its store")
    parser.add_argument("--storage", help="Optuna storage (default: a journal file beside the runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where the ledger is kept (default results)"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_intermixed_args(argv)
    try:
        if options.workers < 1:
            raise UserError(f"--workers {options.workers} must be at least 1")
        runs = [override(run, options.overrides).replace(study=options.name) for run in make_runs()]
        sweep = Sweep(options.name, runs, options.runs, options.results / f"{options.name}.jsonl", options.storage)
        if options.dry_run:
            from sovit.plan import print_plan

            print_plan(sweep, options.workers, options.device, options.json)
            return 0
        run_sweep(sweep, options.workers, options.device)
        print(f"next: python analysis/fit_laws.py {sweep.ledger}")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(bool(sweep.pending()))


def run_sweep(sweep: Sweep, workers: int, device: str = "cpu") -> list[dict]:
    """Launch, and say in one line what came of it. Opens the data first, so that bad input stops here, not in a worker.

    Raises UserError for a device or data that cannot be had, shapes that do not fit the data, and data that changed
    since a part of the study was trained.
    """
    from sovit.data import baselines, open_data
    from sovit.train import check_device, check_readout

    check_device(device)
    pending, sources = sweep.pending(), {}
    for run in sweep.runs.values() if pending else ():
        shape = run.shape
        key = (run.data, run.preset, shape.image_size, shape.patch_size)
        if key not in sources:
            sources[key] = open_data(*key, 0, device)
            print(f"{run.data}:{run.preset} at {shape.image_size} px: {baselines(sources[key])}", flush=True)
        check_readout(run, sources[key].readout)
        for row in filter(None, sweep.rows(run)):
            if row.get("data_key", sources[key].content_key) != sources[key].content_key:
                raise UserError(
                    f"the data of {run.data}:{run.preset} changed since {row['run_id']} was trained;"
                    " give the study another --name and --runs"
                )
    if not pending:
        print(f"{sweep.name}: all {len(sweep.runs)} trunks are done already", file=sys.stderr)
    rows = launch(sweep, workers, device)
    counts = {s: sum(row["status"] == s for row in rows) for s in ("ok", "diverged", "failed")}
    print(f"{sweep.name}: {sweep.ledger} has {len(rows)} rows: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    for row in rows:
        if row["status"] != "ok":
            print(f"  {row['run_id']} {row['status']}: {row.get('error')}", file=sys.stderr)
    if left := sweep.pending():
        log = sweep.runs_dir / f"{sweep.name}.log"
        print(
            f"{sweep.name}: {len(left)} trunks are not done; see {log}, and run the same command again", file=sys.stderr
        )
    return rows


if __name__ == "__main__":
    sys.exit(min(work(Path(sys.argv[1])), 1))
