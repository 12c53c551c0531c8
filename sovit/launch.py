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
from sovit.kinds import AnyRun, num_images, on_base, vlm_runs
from sovit.ledger import OUTPUTS, is_locked, locked, write_atomic
from sovit.run import Run, keys, override
from sovit.stop import stop_on_signal, this_command
from sovit.sweep import MAX_ATTEMPTS, Sweep, is_waiting, open_storage, open_study, reconcile
from sovit.vlm_run import VlmRun

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
    done = {r.trunk_id for r in sweep.runs.values() if sweep.is_done(r)}
    meter = Meter(sweep, done)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def show(workers: int) -> None:
        for trunk, run in sweep.runs.items():
            if trunk not in done and sweep.is_done(run):
                done.add(trunk)
                sweep.collect()
                last = sweep.last(run)
                value, name = last.get(sweep.metric), "loss" if sweep.metric == "val_loss" else sweep.metric
                loss = f"{name} {value:.4f}" if value is not None else last["status"]
                cost = f"{last['train_flops']:.2e} FLOPs" if last["train_flops"] else f"{last['num_examples']:,} images"
                rate = f" lr {run.recipe.peak_lr:g}" if isinstance(run, Run) else ""
                console.print(
                    f"[{len(done)}/{len(sweep.runs)}] {trunk} {run.label} seed {run.init_seed}{rate}:"
                    f" {loss} at {cost}, {last['seconds'] or 0:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )
        if live:
            under_way = {}
            for trunk in sweep.runs:
                path = sweep.runs_dir / trunk / "progress.json"
                if trunk not in done and is_locked(sweep.runs_dir / trunk / "lock") and path.exists():
                    under_way[trunk] = json.loads(path.read_text())
            head = f"{sweep.name}: {len(done)}/{len(sweep.runs)} trunks, {meter.text(done, under_way, workers)}"
            live.update(Text("\n".join([head, *("  " + progress_text(p) for p in under_way.values())])))

    if live:
        with live:
            yield show
    else:
        yield show
    show(0)


class Meter:
    """How far a sweep is and how long it has to go, for its display.

    The share is of training FLOPs; where the study has vision-language models, whose FLOPs nobody knows beforehand, of
    images. There the time left is told from the latest pace of each kind of run, and not before each that is left has one.
    """

    def __init__(self, sweep: Sweep, done: set[str]):
        self.runs, self.started, self.before = sweep.runs, time.monotonic(), set(done)
        self.unit = "images" if vlm_runs(list(sweep.runs.values())) else "FLOPs"
        self.size = {trunk: float(self._size(run)) for trunk, run in self.runs.items()}
        self.pace: dict[str, float] = {}  # language model, "" for an encoder -> images or FLOPs a second of one worker

    def _size(self, run: AnyRun) -> int:
        return run.total_flops if self.unit == "FLOPs" and isinstance(run, Run) else num_images(run)

    def text(self, done: set[str], under_way: dict[str, dict], workers: int) -> str:
        share = {trunk: 1.0 for trunk in done} | {trunk: p["share"] for trunk, p in under_way.items()}
        total, spent = sum(self.size.values()), sum(self.size[t] * s for t, s in share.items())
        left = self._seconds_left(share, spent, under_way, workers)
        of = f"{total:.2e}" if self.unit == "FLOPs" else f"{total:,.0f}"
        clock = "estimating" if left is None else f"{left / 60:.0f} min left"
        return f"{spent / total:.0%} of {of} {self.unit}, {workers} workers, {clock}"

    def _seconds_left(self, share: dict, spent: float, under_way: dict[str, dict], workers: int) -> float | None:
        if self.unit == "FLOPs":
            gained = spent - sum(self.size[t] for t in self.before)
            return (
                (time.monotonic() - self.started) * (sum(self.size.values()) - spent) / gained if gained > 0 else None
            )
        for trunk, progress in under_way.items():
            run = self.runs[trunk]
            self.pace[_reader(run)] = progress["flops_per_second" if isinstance(run, Run) else "images_per_second"]
        left = 0.0
        for trunk, run in self.runs.items():
            if share.get(trunk, 0.0) < 1:
                if not self.pace.get(_reader(run)):
                    return None
                size = run.total_flops if isinstance(run, Run) else run.num_examples
                left += (1 - share.get(trunk, 0.0)) * size / self.pace[_reader(run)]
        return left / max(1, workers)


def _reader(run: AnyRun) -> str:
    return run.language_model if isinstance(run, VlmRun) else ""


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
        help="typed override of a field of every run that has it, such as recipe.peak_lr=0.004 or, of a"
        " vision-language model, stages.0.num_examples=4000",
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes, one thread each (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan with FLOPs and estimated time; train nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    parser.add_argument("--name", default=name, help="name of the study, its ledger and its store")
    parser.add_argument("--storage", help="Optuna storage (default: a journal file beside the runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    parser.add_argument("--results", type=Path, default=OUTPUTS, help=f"where the ledger is kept (default {OUTPUTS})")
    parser.add_argument("--device", default="cpu")
    return parser


def main(
    doc: str,
    name: str,
    make_runs: Callable[[], Sequence[AnyRun]],
    argv: Sequence[str] | None = None,
    metric: str = "val_loss",
    next_command: str = "",
) -> int:
    """What `python studies/X.py` does. `metric`: the column of the ledger that the study is after, a trial's value.

    next_command: what is to be done with the ledger, said at the end; a law is fitted where nothing else is said, but of
    vision-language models there is none.

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
        fitted = not vlm_runs(runs)
        choice = "" if metric == "val_loss" or not (next_command or fitted) else f" --metric {metric}"
        print(f"next: {next_command or ('sovit fit' if fitted else 'sovit track')} {sweep.ledger}{choice}")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130
    return int(bool(sweep.pending()))


def overridden(runs: Sequence[AnyRun], assignments: Sequence[str]) -> list[AnyRun]:
    """`override` each run by what it has a field for. A run that begins at a branch of another, or reads that encoder, goes
    on from it as it is now.

    Raises UserError for a key that no run has, and where that branch is gone.
    """
    known = dict.fromkeys(key for run in runs for key in keys(run))
    for assignment in assignments:
        key, equals, _ = assignment.partition("=")
        if not equals or key not in known:
            raise UserError(f"unknown key in {assignment!r}; keys are {', '.join(known)}")
    owner = {run_id: run for run in runs for run_id in run.run_ids}
    changed: dict[str, AnyRun] = {}  # by trunk_id before

    def change(run: AnyRun) -> AnyRun:
        if run.trunk_id in changed:
            return changed[run.trunk_id]
        own = set(keys(run))
        new = override(run, [a for a in assignments if a.partition("=")[0] in own])
        if new.base == run.base and run.base in owner:
            num_examples = int(run.base.rpartition("-")[2])
            base = change(owner[run.base])
            if num_examples not in base.budgets:
                raise UserError(
                    f"{' '.join(assignments)} takes away {run.base}, at which other runs of this study begin;"
                    " leave budgets as they are"
                )
            new = on_base(new, base.run_id(num_examples))
        changed[run.trunk_id] = new
        return new

    return [change(run) for run in runs]


def run_sweep(sweep: Sweep, workers: int, device: str = "cpu") -> list[dict]:
    """Launch, and say in one line what came of it. Opens data and models first: bad input stops here, not in a worker.

    Raises UserError for a device, data, model or base that cannot be had, shapes that do not fit the data, and data that
    changed since a part of the study was trained.
    """
    from sovit.train import check_device

    check_device(device)
    sweep.refuse_missing_bases()
    pending = sweep.pending()
    if pending:
        _open_data(sweep, [run for run in sweep.runs.values() if isinstance(run, Run)], device)
        _open_parts(vlm_runs(pending), sweep.runs_dir, device)
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


def _open_data(sweep: Sweep, runs: Sequence[Run], device: str) -> None:
    """Open the data that encoders are trained and probed on, and say what knowing nothing scores there."""
    from sovit.contrastive import pair_baselines
    from sovit.data import baselines, open_data
    from sovit.probe import check_same_data, open_probe
    from sovit.train import check_readout

    sources, probes = {}, set()
    for run in runs:
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


def _open_parts(runs: Sequence[VlmRun], runs_dir: Path, device: str) -> None:
    """Open what vision-language models are made of and asked: each thing once, and none of it is kept."""
    if not runs:
        return
    from sovit.encoder import open_encoder
    from sovit.vlm.language_model import open_language_model
    from sovit.vlm.projectors import PROJECTORS
    from sovit.vlm.questions import open_questions

    asked: set[tuple] = set()
    for run in runs:
        place = (run.data, run.preset, run.image_size, run.families)
        if place not in asked:
            questions = open_questions(*place[:-1], run.data_seed, families=run.families)
            print(
                f"{run.data}:{run.preset} at {run.image_size} px: questions of {', '.join(questions.families)}",
                flush=True,
            )
            if run.num_val > questions.num_val:
                raise UserError(
                    f"num_val={run.num_val} of {run.trunk_id}: there are {questions.num_val} images to validate on"
                )
            asked.add(place)
        name = run.projector.partition("?")[0]
        if name not in PROJECTORS:
            raise UserError(f"projector={run.projector!r} is unknown; choose one of {', '.join(PROJECTORS)}")
    for name in dict.fromkeys(run.language_model for run in runs):
        words = open_language_model(name)
        print(f"{name}: {sum(p.numel() for p in words.model.parameters()):,} parameters", flush=True)
    for name in dict.fromkeys(run.encoder for run in runs if run.control != "blind"):
        # what this study trains is not there yet
        if name.partition(":")[0] in ("timm", "hf"):
            open_encoder(name, runs_dir, device)
