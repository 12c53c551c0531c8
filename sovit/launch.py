"""Launch a sweep: worker processes, a live display, the ledger as it grows; and the command line of a study file."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sovit import UserError
from sovit.ledger import is_locked, locked, write_atomic
from sovit.run import Run, override
from sovit.stop import stop_on_signal, this_command
from sovit.sweep import MAX_ATTEMPTS, Sweep, is_waiting, open_storage, open_study, reconcile

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0  # that workers have to save what they are at


def launch(sweep: Sweep, workers: int, device: str = "cpu", worker_command: Sequence[str] = ()) -> list[dict]:
    """Run what is pending with `workers` processes and return the ledger's rows.

    SIGINT (Ctrl-C) and SIGTERM are passed on to the workers, which save what they are at and leave; then KeyboardInterrupt
    is raised with the words to be said. A second Ctrl-C kills the workers. Nothing is lost by either: a relaunch resumes.
    """
    sweep.refuse_other_rows()
    sweep.restore_records()
    storage = open_storage(sweep.storage)
    with locked(sweep.ledger.with_suffix(".lock")):
        pass  # a folder that cannot be written is found now, not after the training
    with sweep.lock():
        study = open_study(sweep.name, storage, list(sweep.runs.values()), sweep.metric)
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
        "metric": sweep.metric,
        "runs": [run.to_dict() for run in sweep.runs.values()],
    }
    plan_path = sweep.runs_dir / f"{sweep.name}.{token}.plan.json"  # of this launch: two may run at once
    write_atomic(plan_path, json.dumps(plan))
    design = plan | {"command": sys.orig_argv, "folder": os.getcwd()}
    write_atomic(sweep.runs_dir / f"{sweep.name}.design.json", json.dumps(design))  # stays, for `sovit status`
    command = list(worker_command) or [sys.executable, "-m", "sovit.sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
    log = open(sweep.runs_dir / f"{sweep.name}.log", "a")

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, str(plan_path)], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )

    def waits() -> bool:
        with sweep.lock():
            reconcile(sweep, study, token)
            return is_waiting(study)

    processes: list[subprocess.Popen] = []
    alive = locked(plan_path)  # what says that this launch is
    with alive, stop_on_signal(second_interrupt=signal.default_int_handler) as should_stop:
        try:
            _attend(sweep, workers, processes, start, waits, should_stop)
        except KeyboardInterrupt:  # a second Ctrl-C
            for process in processes:
                process.kill()
        finally:
            _end(processes)
            log.close()
            plan_path.unlink(missing_ok=True)
            rows = sweep.collect()
        waits()  # what ended last is told so
        if should_stop() and (left := sweep.pending()):
            done = f"{len(sweep.runs) - len(left)} of {len(sweep.runs)} trunks done"
            raise KeyboardInterrupt(f"{sweep.name}: stopped with {done}; go on with: {this_command()}")
    return rows


def _attend(sweep: Sweep, workers: int, processes: list[subprocess.Popen], start, waits, should_stop) -> None:
    """Start workers, replace those that were killed, and show how things stand, until all is done or should stop.

    A worker that left of its own accord, asked to or because it cannot write, is not replaced.
    """
    pending = len(sweep.pending())
    processes += [start() for _ in range(min(workers, pending))]
    restarts, willing = MAX_ATTEMPTS * pending, True
    with _display(sweep) as show:
        while not should_stop():
            if not processes and not sweep.in_training():
                if not (willing and restarts and waits()):
                    break
                restarts -= 1  # who trained it for another launch has died: do it again
                processes.append(start())
            time.sleep(POLL_SECONDS)
            for process in [p for p in processes if p.poll() is not None]:
                processes.remove(process)
                willing = willing and process.returncode <= 0
                if process.returncode < 0 and restarts and sweep.pending() and not should_stop():
                    restarts -= 1
                    processes.append(start())
            show(len(processes))


def _end(processes: list[subprocess.Popen]) -> None:
    """Ask the workers to save and leave; kill those that have not within STOP_SECONDS, or at a second Ctrl-C."""
    until = time.monotonic() + STOP_SECONDS
    processes = [process for process in processes if process.poll() is None]
    try:
        for process in processes:
            process.terminate()
        if processes:
            print(f"\nstopping: waiting for {len(processes)} workers to save (Ctrl-C: leave at once)", file=sys.stderr)
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    if killed := sum(process.poll() is None for process in processes):
        print(f"{killed} workers did not save in time and were killed; their last save stands", file=sys.stderr)
    for process in processes:
        process.kill()
        process.wait()


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
    flops_of = {t: r.total_flops for t, r in sweep.runs.items()}
    total, before = sum(flops_of.values()), sum(flops_of[t] for t in done)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def show(workers: int) -> None:
        for trunk, run in sweep.runs.items():
            if trunk not in done and sweep.is_done(run):
                done.add(trunk)
                sweep.collect()
                last = sweep.last(run)
                value, name = last.get(sweep.metric), "loss" if sweep.metric == "val_loss" else sweep.metric
                loss = f"{name} {value:.4f}" if value is not None else last["status"]
                console.print(
                    f"[{len(done)}/{len(sweep.runs)}] {trunk} {run.label} seed {run.init_seed}"
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


def study_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The options that every study has."""
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
    return parser


def main(
    doc: str,
    name: str,
    make_runs: Callable[[], list[Run]],
    argv: Sequence[str] | None = None,
    metric: str = "val_loss",
    next_command: str = "sovit fit",
) -> int:
    """What `python studies/X.py` does. `metric`: the column of the ledger that the study is after, a trial's value.

    next_command: what is to be done with the ledger, said at the end.

    Returns the exit status: 0 done, 1 a run failed, 2 bad input.
    """
    options = study_parser(doc, name).parse_intermixed_args(argv)
    try:
        if options.workers < 1:
            raise UserError(f"--workers {options.workers} must be at least 1")
        runs = [run.replace(study=options.name) for run in overridden(make_runs(), options.overrides)]
        ledger = options.results / f"{options.name}.jsonl"
        sweep = Sweep(options.name, runs, options.runs, ledger, options.storage, metric)
        if options.dry_run:
            from sovit.plan import print_plan
            from sovit.train import check_device

            check_device(options.device)
            print_plan(sweep, options.workers, options.device, options.json)
            return 0
        run_sweep(sweep, options.workers, options.device)
        choice = "" if metric == "val_loss" else f" --metric {metric}"
        print(f"next: {next_command} {sweep.ledger}{choice}")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130
    return int(bool(sweep.pending()))


def overridden(runs: Sequence[Run], assignments: Sequence[str]) -> list[Run]:
    """`override` each run. A fine-tuning whose base stands before it goes on from that base as it is now.

    Raises UserError where that has no branch any more that the fine-tuning begins at.
    """
    found: list[Run] = []
    now: dict[str, str] = {}  # run_id -> what a branch is called once its run is overridden, "" where it is gone
    for run in runs:
        new = override(run, assignments)
        if new.base in now:
            if not now[new.base]:
                raise UserError(
                    f"{' '.join(assignments)} takes away {run.base}, at which fine-tunings of this study begin;"
                    " leave budgets as they are"
                )
            new = new.replace(base=now[new.base])
        now |= {run.run_id(n): new.run_id(n) if n in new.budgets else "" for n in run.budgets}
        found.append(new)
    return found


def run_sweep(sweep: Sweep, workers: int, device: str = "cpu") -> list[dict]:
    """Launch, and say in one line what came of it. Opens the data first, so that bad input stops here, not in a worker.

    Raises UserError for a device, data or base that cannot be had, shapes that do not fit the data, and data that changed
    since a part of the study was trained.
    """
    from sovit.contrastive import pair_baselines
    from sovit.data import baselines, open_data
    from sovit.probe import check_same_data, open_probe
    from sovit.train import check_device, check_readout

    check_device(device)
    sweep.refuse_missing_bases()
    pending, sources, probes = sweep.pending(), {}, set()
    for run in sweep.runs.values() if pending else ():
        shape = run.shape
        key = (run.data, run.preset, shape.image_size, shape.patch_size)
        if key not in sources:
            sources[key] = open_data(*key, 0, device)
            known = baselines if run.recipe.objective == "classification" else pair_baselines
            print(f"{run.data}:{run.preset} at {shape.image_size} px: {known(sources[key])}", flush=True)
        for size in run.recipe.patch_sizes:
            other = (*key[:-1], size)
            if other not in sources:
                sources[other] = open_data(*other, 0, device)
        check_readout(run, sources[key].readout)
        if run.probe and (run.probe, shape.image_size, shape.patch_size) not in probes:
            probes.add((run.probe, shape.image_size, shape.patch_size))
            probe_data = open_probe(run.probe, shape.image_size, shape.patch_size, device)
            print(f"probe: {probe_data}", flush=True)
            check_same_data(sweep.in_ledger.values(), probe_data)
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
