"""Launch a sweep: worker processes, a live display, the ledger as it grows."""

from __future__ import annotations

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
from typing import Any

from sovit import UserError
from sovit.files import locked, write_atomic
from sovit.signals import stop_on_signal, this_command, without_password
from sovit.sweep.queue import (
    CANNOT_WRITE,
    MAX_ATTEMPTS,
    NOTHING_WAITS,
    STOPPED,
    STORAGE,
    Snapshot,
    Sweep,
    look,
    open_storage,
    open_study,
)
from sovit.sweep.status import study_status
from sovit.sweep.status_text import status_text

POLL_SECONDS = 0.5
DRAW_SECONDS = 2.0  # between two drawings of the status
STOP_SECONDS = 60.0  # that workers have to save what they are at


def launch(sweep: Sweep, workers: int, device: str = "cpu", worker_command: Sequence[str] = ()) -> list[dict]:
    """Run what is pending with `workers` processes and return the ledger's rows.

    SIGINT and SIGTERM are passed on to the workers, which save and leave; then KeyboardInterrupt is raised with the words
    to be said. A second Ctrl-C kills the workers. A relaunch resumes.
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
    command = [*(worker_command or (sys.executable, "-m", "sovit.sweep.worker")), str(plan_path)]
    alive = locked(plan_path)  # what says that this launch is
    crew = Crew(command, sweep.runs_dir / f"{sweep.name}.log", sweep.storage)
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
    """Write what the workers of this launch read, and the design, which stays for `sovit status`; without a password."""
    plan: dict[str, Any] = {key: str(getattr(sweep, key)) for key in ("name", "runs_dir", "ledger", "metric")}
    plan |= {"storage": without_password(sweep.storage), "launch": token, "launcher": os.getpid(), "device": device}
    plan["runs"] = [run.to_dict() for run in sweep.runs.values()]
    plan_path = sweep.runs_dir / f"{sweep.name}.{token}.plan.json"  # of this launch: two may run at once
    write_atomic(plan_path, json.dumps(plan))
    design = plan | {"command": list(map(without_password, sys.orig_argv)), "folder": os.getcwd()}
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

    def __init__(self, command: Sequence[str], log: Path, storage: str):
        self.command, self.log = list(command), open(log, "a", encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2].resolve()), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, STORAGE: storage}
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
            try:
                live.update(Text(status_text(study_status(sweep.name, sweep.runs_dir))))
            except UserError as error:  # what cannot be shown must not end what is trained
                live.update(Text(f"no status: {error}"))

    with live or contextlib.nullcontext():
        yield show


def _result(sweep: Sweep, trunk: str, last: dict) -> str:
    run = sweep.runs[trunk]
    value, name = last.get(sweep.metric), "loss" if sweep.metric == "val_loss" else sweep.metric
    loss = f"{name} {value:.4f}" if value is not None else last["status"]
    cost = f"{last['train_flops']:.2e} FLOPs" if last["train_flops"] else f"{last['num_examples']:,} images"
    rate = f" lr {run.numbers['peak_lr']:g}" if "peak_lr" in run.numbers else ""
    return f"{trunk} {run.label} seed {run.init_seed}{rate}: {loss} at {cost}, {last['seconds'] or 0:.0f} s"
