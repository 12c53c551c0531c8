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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sovit import UserError
from sovit.kinds import AnyRun, on_base, vlm_runs
from sovit.ledger import OUTPUTS, locked, write_atomic
from sovit.run import Run, keys, override
from sovit.status import status_text, study_status
from sovit.stop import stop_on_signal, this_command
from sovit.sweep import (
    CANNOT_WRITE,
    MAX_ATTEMPTS,
    NOTHING_WAITS,
    STOPPED,
    Snapshot,
    Sweep,
    look,
    open_storage,
    open_study,
)
from sovit.vlm_run import VlmRun

POLL_SECONDS = 0.5
DRAW_SECONDS = 2.0  # between two drawings of the status
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
    look_again = partial(look, sweep, study, token)
    plan_path = _write_plan(sweep, device, token)
    command = [*(worker_command or (sys.executable, "-m", "sovit.sweep")), str(plan_path)]
    alive = locked(plan_path)  # what says that this launch is
    crew = Crew(command, sweep.runs_dir / f"{sweep.name}.log")
    with crew.log, alive, stop_on_signal(second_interrupt=signal.default_int_handler) as should_stop:
        try:
            _attend(sweep, crew, workers, look_again, should_stop)
        except KeyboardInterrupt:  # a second Ctrl-C
            crew.kill()
        finally:
            crew.end()
            plan_path.unlink(missing_ok=True)
            rows = sweep.collect()
        now = look_again()  # what ended last is told so
        if should_stop() and now.num_pending:
            done = f"{len(now.done)} of {len(sweep.runs)} trunks done"
            raise KeyboardInterrupt(f"{sweep.name}: stopped with {done}; go on with: {this_command()}")
    return rows


def _write_plan(sweep: Sweep, device: str, token: str) -> Path:
    """Write what the workers of this launch read, and the design, which stays for `sovit status`."""
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
    write_atomic(sweep.runs_dir / f"{sweep.name}.design.json", json.dumps(design))
    return plan_path


def _attend(
    sweep: Sweep, crew: Crew, workers: int, look_again: Callable[[], Snapshot], should_stop: Callable[[], bool]
) -> None:
    """Start workers, replace those that died, and show how things stand, until all is done or should stop.

    A worker that left of its own accord, asked to or because it cannot write, is not replaced; nor is one that died where
    deaths were seen MAX_ATTEMPTS times in a row without a trial taken up or a trunk done: they cannot work here.
    """
    before = now = look_again()
    for _ in range(min(workers, now.num_pending)):
        crew.start()
    willing, in_vain = True, 0
    with _display(sweep, now) as show:
        while not should_stop():
            if not crew.processes and not now.in_training:
                if not (willing and in_vain < MAX_ATTEMPTS and now.is_waiting):
                    break
                crew.start()  # who trained it for another launch has died: do it again
            time.sleep(POLL_SECONDS)
            ended, now = crew.take_ended(), look_again()
            dead = [process for process in ended if process.returncode not in (NOTHING_WAITS, CANNOT_WRITE, STOPPED)]
            willing = willing and all(process in dead or process.returncode == NOTHING_WAITS for process in ended)
            if dead:
                got_on = now.num_abandoned > before.num_abandoned or len(now.done) > len(before.done)
                in_vain, before = 0 if got_on else in_vain + 1, now
            replaced = in_vain < MAX_ATTEMPTS and now.num_pending > 0 and not should_stop()
            for _ in dead if replaced else ():
                crew.start()
            show(now, [f"{sweep.name}: {_death(process, replaced)}; see {crew.log.name}" for process in dead])
        show(look_again(), [])


def _death(process: subprocess.Popen, replaced: bool) -> str:
    code = process.returncode
    how = f"exit status {code}" if code > 0 else f"signal {-code} ({signal.strsignal(-code)})"
    return f"worker {process.pid} died with {how} and is {'replaced' if replaced else 'not replaced'}"


class Crew:
    """The worker processes of one launch."""

    def __init__(self, command: Sequence[str], log: Path):
        self.command, self.log = list(command), open(log, "a")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        quiet, log = subprocess.DEVNULL, self.log
        self.processes.append(subprocess.Popen(self.command, env=self.environment, stdin=quiet, stdout=log, stderr=log))

    def take_ended(self) -> list[subprocess.Popen]:
        """Those that ended since the last call, which leave the crew."""
        ended = [process for process in self.processes if process.poll() is not None]
        self.processes = [process for process in self.processes if process not in ended]
        return ended

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def end(self) -> None:
        """Ask the workers to save and leave; kill those that have not within STOP_SECONDS, or at a second Ctrl-C."""
        until = time.monotonic() + STOP_SECONDS
        living = [process for process in self.processes if process.poll() is None]
        try:
            for process in living:
                process.terminate()
            if living:
                print(f"\nstopping: waiting for {len(living)} workers to save (Ctrl-C: leave at once)", file=sys.stderr)
            for process in living:
                process.wait(max(0.0, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        if killed := sum(process.poll() is None for process in living):
            print(f"{killed} workers did not save in time and were killed; their last save stands", file=sys.stderr)
        self.kill()
        for process in living:
            process.wait()


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


@contextlib.contextmanager
def _display(sweep: Sweep, before: Snapshot) -> Iterator[Callable[[Snapshot, Sequence[str]], None]]:
    """A line for each trunk that ends and for what else is to be said; on a terminal, `sovit status` below them."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    said, drawn = set(before.done), 0.0

    def show(now: Snapshot, lines: Sequence[str]) -> None:
        nonlocal drawn
        ended = [trunk for trunk in now.done if trunk not in said]
        if ended:
            sweep.collect()
        for trunk in ended:
            said.add(trunk)
            lines = [*lines, f"[{len(said)}/{len(sweep.runs)}] {_result(sweep, trunk, now.done[trunk])}"]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if live and time.monotonic() - drawn > DRAW_SECONDS:
            drawn = time.monotonic()
            live.update(Text(status_text(study_status(sweep.name, sweep.runs_dir))))

    with live or contextlib.nullcontext():
        yield show


def _result(sweep: Sweep, trunk: str, last: dict) -> str:
    run = sweep.runs[trunk]
    value, name = last.get(sweep.metric), "loss" if sweep.metric == "val_loss" else sweep.metric
    loss = f"{name} {value:.4f}" if value is not None else last["status"]
    cost = f"{last['train_flops']:.2e} FLOPs" if last["train_flops"] else f"{last['num_examples']:,} images"
    rate = f" lr {run.recipe.peak_lr:g}" if isinstance(run, Run) else ""
    return f"{trunk} {run.label} seed {run.init_seed}{rate}: {loss} at {cost}, {last['seconds'] or 0:.0f} s"


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

    def study() -> int:
        check_workers(options)
        runs = [run.replace(study=options.name) for run in overridden(make_runs(), options.overrides)]
        ledger = options.results / f"{options.name}.jsonl"
        sweep = Sweep(options.name, runs, options.runs, ledger, options.storage, metric)
        if options.dry_run:
            return dry_run(sweep, options)
        run_sweep(sweep, options.workers, options.device)
        fitted = not vlm_runs(runs)
        choice = "" if metric == "val_loss" or not (next_command or fitted) else f" --metric {metric}"
        print(f"next: {next_command or ('sovit fit' if fitted else 'sovit track')} {sweep.ledger}{choice}")
        return int(bool(sweep.pending()))

    return exit_status(study)


def exit_status(study: Callable[[], int]) -> int:
    """The exit status of a study; 2 where it raises UserError and 130 where it is stopped, which it says in one line."""
    try:
        return study()
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130


def check_workers(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")


def dry_run(sweep: Sweep, options: argparse.Namespace) -> int:
    """Print what a launch would train, and how long that takes."""
    from sovit.plan import print_plan
    from sovit.train import check_device

    check_device(options.device)
    print_plan(sweep, options.workers, options.device, options.json)
    return 0


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
