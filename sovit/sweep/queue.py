"""A study as a queue of trials that many workers share, on Optuna's storage."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sovit import UserError, reason
from sovit.encoder.few_shot import lacks_probe
from sovit.files import check_name, is_locked, locked
from sovit.ledger.few_shot_columns import probe_of
from sovit.ledger.ledger import read_ledger, update_ledger
from sovit.ledger.records import read_record, record_row, write_record
from sovit.ledger.schema import ANSWERED
from sovit.signals import without_password
from sovit.spec.any_run import AnyRun
from sovit.spec.shape import TRAINED

MAX_ATTEMPTS = 4  # of one trunk in one launch, deaths of its worker counted
STORAGE = "SOVIT_WORKER_STORAGE"  # environment: the store's URL, whose password stands in no file
# Exit statuses of a worker that left of its own accord. Any other, Python's 1 of a traceback among them, is a death.
NOTHING_WAITS, CANNOT_WRITE, STOPPED = 0, os.EX_IOERR, 130


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """A journal file (`journal:PATH`), or any database URL that SQLAlchemy opens.

    Raises UserError for SQLite, which loses and repeats trials under two workers.
    """
    kind, _, rest = url.partition(":")
    if kind.startswith("sqlite"):
        raise UserError(
            f"--storage {without_password(url)}: SQLite repeats and loses trials; leave --storage out (a journal) or use postgresql+psycopg://"
        )
    if kind != "journal":
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # SQLAlchemy and drivers raise many kinds
            raise UserError(without_password(f"cannot open --storage {url}: {reason(error)}; check the URL")) from None
    path = Path(rest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path), JournalLock(path))  # type: ignore[arg-type]  # Optuna exports no base
        return optuna.storages.JournalStorage(backend)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
    except Exception as error:  # a record that is no JSON, or lacks a field, or is of another version
        why = f"{type(error).__name__}: {reason(error)}"
        raise UserError(
            f"the journal {path} is damaged ({why}); delete it: it is made again from the records"
        ) from None


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


def open_study(
    name: str, storage: optuna.storages.BaseStorage, runs: Sequence[AnyRun], metric: str = "val_loss"
) -> optuna.Study:
    """Create or reopen the study. A design may grow, by trunks or budgets; anything else is another study.

    Raises UserError where the name is taken by a different design or by one with another metric as its value.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
    design, before = {run.trunk_id: list(run.budgets) for run in runs}, study.user_attrs.get("design", {})
    if any(not set(budgets) <= set(design.get(trunk, ())) for trunk, budgets in before.items()):
        raise UserError(f"a study named {name!r} with another design exists; give this one another name with --name")
    value = study.user_attrs.get("metric", metric)
    if value != metric:
        raise UserError(f"the study {name!r} exists with {value} as its value, not {metric}; give another --name")
    for key, now in (("metric", metric), ("design", design)):
        if study.user_attrs.get(key) != now:
            study.set_user_attr(key, now)
    return study


class Sweep:
    """Where a study keeps its things, and what is done of it. `metric`: the column that is a trial's value."""

    def __init__(
        self,
        name: str,
        runs: Sequence[AnyRun],
        runs_dir: Path,
        ledger: Path,
        storage: str | None = None,
        metric: str = "val_loss",
    ):
        check_name(name)
        self.name, self.runs_dir, self.ledger, self.metric = name, Path(runs_dir), Path(ledger), metric
        self.storage = storage or f"journal:{self.runs_dir / name}.journal"
        self.runs = {run.trunk_id: run for run in runs}
        if len(self.runs) != len(runs):
            raise UserError(f"study {name!r} names one trunk twice; remove the repeat")
        needed = probe_of(metric)
        for run in runs:
            if needed not in ("", run.probe):
                raise UserError(
                    f"the metric {metric} of study {name!r} needs probe={needed}, its runs have {run.probe or 'none'}"
                )
        self._done: dict[str, dict] = {}  # trunk_id -> row of its largest budget; what is done stays done
        there = read_ledger(self.ledger) if self.ledger.exists() and self.ledger.stat().st_size else []
        self.in_ledger = {row["run_id"]: row for row in there if row["status"] in ANSWERED}

    def lock(self):
        return locked(self.runs_dir / f"{self.name}.lock")

    def rows(self, run: AnyRun) -> list[dict | None]:
        """The answered row of each branch, from its record and the ledger; None where it is still to be had."""
        return [self._row(run, run_id) for run_id in run.run_ids]

    def _row(self, run: AnyRun, run_id: str) -> dict | None:
        record = read_record(self.runs_dir, run.trunk_id, run_id)
        return {**self.in_ledger.get(run_id, {}), **(record or {})} or None

    def refuse_other_rows(self) -> None:
        """Raise UserError where the ledger holds rows of another design, as the study's own guard may be deleted."""
        asked = {run_id for run in self.runs.values() for run_id in run.run_ids}
        for run_id in self.in_ledger:
            if run_id not in asked:
                raise UserError(
                    f"{self.ledger} holds {run_id}, which this design does not ask for;"
                    " give another design another name with --name"
                )

    def answer(self, run: AnyRun) -> dict | None:
        """The row of a run's largest budget, once each of its branches is answered and probed; None before."""
        row = self._done.get(run.trunk_id)
        for run_id in () if row else run.run_ids:
            row = self._row(run, run_id)
            if row is None or lacks_probe(run, row):
                return None
        return self._done.setdefault(run.trunk_id, row or {})

    def is_done(self, run: AnyRun) -> bool:
        return self.answer(run) is not None

    def restore_records(self) -> None:
        """What stands in the ledger but is still to be probed gets its record back: it is probed, not trained again.

        Raises UserError where its weights are gone.
        """
        for run in self.runs.values():
            for run_id, row in zip(run.run_ids, self.rows(run)):
                if row is None or not lacks_probe(run, row):
                    continue
                if not (self.runs_dir / run.trunk_id / f"{run_id}.safetensors").exists():
                    raise UserError(
                        f"{run_id} is not probed on {run.probe}, and its weights are not in {self.runs_dir};"
                        " copy them there, or train anew with other --runs and --results"
                    )
                if read_record(self.runs_dir, run.trunk_id, run_id) is None:
                    write_record(self.runs_dir, row)

    def pending(self) -> list[AnyRun]:
        return [run for run in self.runs.values() if not self.is_done(run)]

    def collect(self) -> list[Any]:
        """Merge all records, failed ones too, into the ledger; return its rows."""
        rows = []
        for run in self.runs.values():
            for path in sorted((self.runs_dir / run.trunk_id / "records").glob("*.json")):
                if path.stem in run.run_ids and (row := record_row(path)):
                    rows.append(row | {"study": self.name})
        return update_ledger(self.ledger, rows) if rows else list(self.in_ledger.values())


def reconcile(sweep: Sweep, study: optuna.Study, launch: str) -> int:
    """Make the queue agree with the records; return how many runs wait for their base. Call it under `sweep.lock()`."""
    attended, answered, given_up = _read_trials(sweep, study, launch)
    num_blocked = 0
    for trunk, run in sweep.runs.items():
        if trunk in attended:
            continue
        if (row := sweep.answer(run)) is not None:
            value = row.get(sweep.metric)
            if trunk not in answered and value is not None:  # the store was deleted: rebuild it
                study.add_trial(_trial(run, launch, value=value))
        elif trunk not in given_up:
            base = run.base.rpartition("-")[0]
            if base in sweep.runs and base not in given_up and not sweep.is_done(sweep.runs[base]):
                num_blocked += 1
            else:
                study.add_trial(_trial(run, launch, state=TrialState.WAITING))
    return num_blocked


def _trial(run: AnyRun, launch: str, **how: Any) -> optuna.trial.FrozenTrial:
    """A trial that says of its run enough for a worker to train it.

    One fixed range for each parameter, wide enough for any study: values are given, never sampled.
    """
    said = {"trunk_id": run.trunk_id, "run": run.to_dict(), "run_ids": list(run.run_ids), "launch": launch}
    of_type = {
        int: optuna.distributions.IntDistribution(0, 2**32),
        float: optuna.distributions.FloatDistribution(0.0, sys.float_info.max),
        str: optuna.distributions.CategoricalDistribution(TRAINED),
    }
    ranges = {name: of_type[type(value)] for name, value in run.numbers.items()}
    return optuna.create_trial(params=run.numbers, distributions=ranges, user_attrs=said | run.parts, **how)


def _read_trials(sweep: Sweep, study: optuna.Study, launch: str) -> tuple[set[str], set[str], set[str]]:
    """Tell FAIL to the trials of workers that died; return trunks that wait or run, are answered, and are given up."""
    attended, answered = set(), set()
    attempts: dict[str, int] = {}
    for trial in study.get_trials(deepcopy=False):
        trunk = trial.user_attrs.get("trunk_id", "")
        run = sweep.runs.get(trunk)
        died = trial.state == TrialState.RUNNING and not is_locked(sweep.runs_dir / str(trunk) / "lock")
        if died and not _tell(study, trial.number, state=TrialState.FAIL):
            attended.add(trunk)  # its worker told it since it was read; the next look says how it ended
            continue
        if not died and trial.state in (TrialState.RUNNING, TrialState.WAITING):
            attended.add(trunk)
        if trial.state == TrialState.COMPLETE and run and trial.user_attrs.get("run_ids") == list(run.run_ids):
            answered.add(trunk)
        if trial.user_attrs.get("launch") == launch and trial.state in (TrialState.RUNNING, TrialState.FAIL):
            attempts[trunk] = attempts.get(trunk, 0) + (MAX_ATTEMPTS if "error" in trial.user_attrs else 1)
    return attended, answered, {t for t, n in attempts.items() if n >= MAX_ATTEMPTS and t not in attended}


def _tell(study: optuna.Study, trial: optuna.Trial | int, value: float | None = None, **how) -> bool:
    """Tell a trial, and return whether it was still to be told: a worker and a reconciler may both be about to."""
    try:
        study.tell(trial, value, **how)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # told before Optuna's look at it, or after
        if _state(study, trial) == TrialState.RUNNING:
            raise
        return False
    return True


def _state(study: optuna.Study, trial: optuna.Trial | int) -> TrialState:
    number = trial if isinstance(trial, int) else trial.number
    return next(found.state for found in study.get_trials(deepcopy=False) if found.number == number)


@dataclass(frozen=True)
class Snapshot:
    """How the queue stands at one moment.

    done: trunk_id -> the row of its largest budget. num_pending: trunks that are not done. in_training: those of them that
    a living process holds, of this launch or another. is_waiting: whether a worker would find something to do.
    num_abandoned: trials whose worker left without a result: it died, or was stopped.
    """

    done: dict[str, dict]
    num_pending: int
    in_training: tuple[str, ...]
    is_waiting: bool
    num_abandoned: int


def look(sweep: Sweep, study: optuna.Study, launch: str) -> Snapshot:
    """Make the queue agree with the records, and say how it stands."""
    with sweep.lock():
        reconcile(sweep, study, launch)
        trials = study.get_trials(deepcopy=False)
    # in this order: what is taken up is held before the lock is free, and what is no longer held may be done
    held = [trunk for trunk in sweep.runs if is_locked(sweep.runs_dir / trunk / "lock")]
    done = {trunk: row for trunk, run in sweep.runs.items() if (row := sweep.answer(run)) is not None}
    in_training = tuple(trunk for trunk in held if trunk not in done)
    waits = any(trial.state == TrialState.WAITING for trial in trials)
    num_abandoned = sum(trial.state == TrialState.FAIL and "error" not in trial.user_attrs for trial in trials)
    return Snapshot(done, len(sweep.runs) - len(done), in_training, waits, num_abandoned)


def is_waiting(study: optuna.Study) -> bool:
    return any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))
