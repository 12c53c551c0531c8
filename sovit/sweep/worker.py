"""Launch a list of runs as an Optuna study: N worker processes, every trunk exactly once, whatever is killed when.

Optuna is the queue and the record of a sweep; the record files are the truth. A trunk is done when each of its branches
has a record (or a row in the ledger), whatever the study says. The pattern, because no Optuna storage recovers a
killed worker by itself:

- each trunk in training holds `runs/<trunk_id>/lock` with flock, which the kernel frees when the process dies;
- `reconcile`, under one lock for the study, tells FAIL to every RUNNING trial whose trunk is not locked, tells COMPLETE
  to what has all its records, and enqueues every trunk that is neither done, waiting nor running;
- a worker asks for a trial only under that lock and only if one is waiting: on an empty queue, Optuna's samplers would
  make up a point that nobody asked for;
- a worker tells its trial without that lock: what `reconcile` read as RUNNING may be told when it comes to tell it;
- the launcher knows of the queue what one `Snapshot` says, and looks nowhere else;
- a run whose base is another run of the study (a fine-tuning; a vision-language model on that encoder) is enqueued when
  that one is done, or has been given up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import TrialState

from sovit import UserError
from sovit.files import CannotWrite
from sovit.ledger.provenance import provenance
from sovit.ledger.records import read_record, write_record
from sovit.ledger.schema import failed_row
from sovit.signals import stop_on_signal
from sovit.spec.any_run import AnyRun, run_from_dict
from sovit.sweep.queue import (
    CANNOT_WRITE,
    NOTHING_WAITS,
    STOPPED,
    STORAGE,
    Sweep,
    _state,
    _tell,
    is_waiting,
    open_storage,
    reconcile,
)
from sovit.train.progress import write_progress

WAIT_SECONDS = 0.2  # between two looks at the lock of a trunk that another study trains
LOOK_SECONDS = 0.01  # that a look at a lock may hold it at most
BLOCKED_SECONDS = 1.0  # between two looks at a queue in which all that is left waits for its base


def work(plan_path: Path, train: Callable[..., list[dict]] | None = None) -> int:
    """Pull trials until none waits. Returns the exit status: NOTHING_WAITS, CANNOT_WRITE, or STOPPED if asked to leave.

    train: of the run's kind where none is given.
    """
    with stop_on_signal() as should_stop:
        try:
            return _work(json.loads(Path(plan_path).read_text(encoding="utf-8")), train, should_stop)
        except (UserError, OSError) as error:  # no run's failure: a full disk or a lost store fails all that waits, too
            print(f"sovit: {error}", file=sys.stderr)
            return CANNOT_WRITE


def _work(plan: dict, train: Callable[..., list[dict]] | None, should_stop: Callable[[], bool]) -> int:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs = [run_from_dict(d) for d in plan["runs"]]
    storage = os.environ.get(STORAGE, plan["storage"])
    sweep = Sweep(plan["name"], runs, Path(plan["runs_dir"]), Path(plan["ledger"]), storage, plan["metric"])
    study = optuna.load_study(study_name=sweep.name, storage=open_storage(sweep.storage))

    def go_on() -> bool:  # without its launcher a worker ends the trunk it is on, and stops
        return os.getppid() == plan["launcher"] and not should_stop()

    while go_on():
        with sweep.lock():
            num_blocked = reconcile(sweep, study, plan["launch"])
            waits = is_waiting(study)
            if not waits and not num_blocked:
                return NOTHING_WAITS
            if waits:
                trial = study.ask()
                run = run_from_dict(trial.user_attrs["run"])  # the study may have grown since this launch
                folder = sweep.runs_dir / run.trunk_id
                folder.mkdir(parents=True, exist_ok=True)
                holder = open(folder / "lock", "a", encoding="utf-8")
                ours = _try_lock(holder)
        if not waits:  # someone trains what is waited for; should he die, it is enqueued again
            time.sleep(BLOCKED_SECONDS)
            continue
        with holder:
            if ours or _await_lock(sweep, study, trial, holder, go_on):
                os.utime(holder.fileno())  # since when it is held
                try:
                    how = {"device": plan["device"], "should_stop": should_stop}
                    _run_trial(sweep, study, trial, run, partial(train or trainer(run), **how))
                except KeyboardInterrupt as stop:  # no failure either: whoever goes on tells the trial
                    print(f"sovit: {run.trunk_id} {stop}; launch the study again to go on", file=sys.stderr)
    return STOPPED


def _await_lock(sweep: Sweep, study: optuna.Study, trial: optuna.Trial, holder, go_on: Callable[[], bool]) -> bool:
    """Wait for a trunk that another study trains, but not with everyone behind us; return whether it is ours to train.

    It is not where a stop is asked for, or where `reconcile` found nobody at it in between and gave it up.
    """
    while go_on():
        time.sleep(WAIT_SECONDS)
        with sweep.lock():  # so that nobody tells the trial between the look at it and the lock
            if _state(study, trial) != TrialState.RUNNING:
                return False
            if _try_lock(holder):
                return True
    return False


def _try_lock(file) -> bool:
    """Lock a file unless another process holds it. One that only looks holds it for a moment, which is waited for."""
    until = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_SECONDS / 10)


def _run_trial(sweep: Sweep, study: optuna.Study, trial: optuna.Trial, run: AnyRun, train: Callable) -> None:
    def only_in_ledger(n: int) -> bool:
        return run.run_id(n) in sweep.in_ledger and not read_record(sweep.runs_dir, run.trunk_id, run.run_id(n))

    # branches that have a record stay in the run, which says what of the trunk is paid for
    budgets = tuple(n for n in run.budgets if not only_in_ledger(n))
    todo = run.with_budgets(budgets) if budgets else run
    try:
        if not sweep.is_done(run):
            train(todo, sweep.runs_dir, on_progress=partial(write_progress, sweep.runs_dir))
    except CannotWrite:
        raise
    except Exception as error:  # whatever a run dies of is recorded, and the sweep goes on
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        why = kind + str(error).partition("\n")[0]
        _record_failure(sweep, todo, why)
        return _tell_result(study, trial, None, why)
    last = sweep.answer(run)
    if last is None:
        raise ValueError(f"run={run.trunk_id} was trained and is not done")
    reason = f"no {sweep.metric}" if last["status"] == "ok" else f"{last['status']}: {last.get('error')}"
    _tell_result(study, trial, last.get(sweep.metric), reason)


def _tell_result(study: optuna.Study, trial: optuna.Trial, value: float | None, error: str) -> None:
    """Tell how a run ended. Where the trial is told already, the records are the truth."""
    if value is not None:
        _tell(study, trial, value)
        return
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr("error", error)
    _tell(study, trial, state=TrialState.FAIL)


def _record_failure(sweep: Sweep, run: AnyRun, reason: str) -> None:
    for n in run.budgets:
        if read_record(sweep.runs_dir, run.trunk_id, run.run_id(n)) is None:
            write_record(sweep.runs_dir, failed_row(run, n, reason, **provenance("unknown")))


def trainer(run: AnyRun) -> Callable[..., list[dict]]:
    """What trains a run of its kind."""
    import torch

    torch.set_num_threads(1)
    if run.kind == "vlm":
        from sovit.vlm.trainer import train as train_vlm

        return train_vlm
    from sovit.train.trainer import train

    return train


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
