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
from sovit.sweep import MAX_ATTEMPTS, Sweep, open_storage, open_study, reconcile

POLL_SECONDS = 0.5


def launch(sweep: Sweep, workers: int, device: str = "cpu", worker_command: Sequence[str] = ()) -> list[dict]:
    """Run what is pending with `workers` processes and return the ledger's rows. Ctrl-C stops it; relaunch resumes."""
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
    design = plan | {"metric": "val_loss", "command": sys.orig_argv, "folder": os.getcwd()}
    write_atomic(sweep.runs_dir / f"{sweep.name}.design.json", json.dumps(design))  # stays, for `sovit status`
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
        with locked(plan_path), _display(sweep) as show:  # the lock says that this launch is alive
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
                last = sweep.last(run)
                value, name = last.get(sweep.metric), "loss" if sweep.metric == "val_loss" else sweep.metric
                loss = f"{name} {value:.4f}" if value is not None else last["status"]
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


def main(
    doc: str,
    name: str,
    make_runs: Callable[[], list[Run]],
    argv: Sequence[str] | None = None,
    metric: str = "val_loss",
) -> int:
    """What `python studies/X.py` does. `metric`: the column of the ledger that the study is after, a trial's value.

    Returns the exit status: 0 done, 1 a run failed, 2 bad input.
    """
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
        print(f"next: python analysis/fit_laws.py {sweep.ledger}{choice}")
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
    from sovit.probe import check_same_data, open_probe
    from sovit.train import check_device, check_readout

    check_device(device)
    pending, sources, probes = sweep.pending(), {}, set()
    for run in sweep.runs.values() if pending else ():
        shape = run.shape
        key = (run.data, run.preset, shape.image_size, shape.patch_size)
        if key not in sources:
            sources[key] = open_data(*key, 0, device)
            print(f"{run.data}:{run.preset} at {shape.image_size} px: {baselines(sources[key])}", flush=True)
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
