"""MLflow, filled from the ledger and never written by training: `sovit track STUDY`.

One experiment a study, one flat run a row of its ledger: a shape at a budget with a seed. What was chosen are its params;
what came out stands in final/, skill/ (each skill) and groups that rows name themselves (probe/error), what it weighs and
costs in size/ and compute/; train/loss is the row's own curve over images seen: the trunk up to where its branch leaves
it, then that branch's cooldown. The tags `shape` and `budget` are to group and to filter by.

The store can be deleted: it is made again. A second fill adds only what is new, and the next fill completes one that was
killed. A row that changed (a failed run that was tried again) gets a new run; a row that left the ledger loses its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from datetime import datetime
from pathlib import Path

from sovit import UserError
from sovit.files import locked
from sovit.ledger.ledger import read_exclusions, read_ledger, study_ledger
from sovit.ledger.schema import is_number
from sovit.report.shown_rows import NOTE, ShownRow, curve, describe, number_of

LEDGER = "sovit.ledger"  # tag of an experiment: its ledger, from the store's folder, so that both may move together
LAYOUT = 3  # of what is written for a row; another number makes the next fill write every run again
RUN_ID, FILLED = "run_id", "sovit.filled"  # tags: the row that a run shows; what it was filled from, written last
EXPLAINED = """One run is one row of the ledger {ledger}: a shape trained up to one budget with one seed. `train/loss` is
its own curve, cooldown included, over images seen; `compute/train_flops` and its log10 stand at the same steps, for the
x-axis. Group by the tag `shape` or `budget` to average seeds; `tags.budget = "1e12"` keeps one budget. Select runs and
press Compare for parallel coordinates. MLflow shows 100 runs until more are loaded."""


def fill(study: str, results: Path | None = None, runs: Path = Path("runs"), store: Path | None = None) -> dict:
    """Make the store agree with a study's ledger. Returns what was done, as plain data.

    `study`: a name, whose ledger `ledger.study_ledger` finds, or the path of a ledger. Curves are read from
    RUNS/<trunk_id>/metrics.jsonl where there is one. The store is RUNS/mlflow.db unless said otherwise.
    Raises UserError for a ledger or a store that cannot be read, and for a store that shows another ledger of that name.
    """
    ledger = study_ledger(study, results, runs)
    rows, reasons = read_ledger(ledger), read_exclusions(ledger.parent / "exclusions.csv")
    for row in rows:
        if not is_number(row["num_examples"]) or row["num_examples"] < 1:
            raise UserError(
                f"{ledger}: row {row['run_id']} has num_examples={row['num_examples']!r}; give a whole number from 1"
            )
    store, name, started = store or runs / "mlflow.db", ledger.stem, time.monotonic()
    done = dict.fromkeys(("runs_added", "runs_updated", "runs_removed", "points_added"), 0)
    with locked(beside(store, ".lock")):
        client = open_store(store)
        experiment = _experiment(client, name, ledger, store)
        present = _runs(client, experiment)
        for shown in describe(name, rows, reasons):
            along = curve(shown.row, runs / shown.row["trunk_id"] / "metrics.jsonl")
            run, mark = present.pop(shown.row["run_id"], None), _mark(shown, along)
            if run and run.data.tags[FILLED] == mark:
                continue
            if run:  # what MLflow holds of a run cannot be changed: it is made anew
                client.delete_run(run.info.run_id)
            done["runs_updated" if run else "runs_added"] += 1
            done["points_added"] += _write(client, experiment, shown, along, mark)
        for run in present.values():
            client.delete_run(run.info.run_id)
        done["runs_removed"] = len(present)
    place = dict(study=name, ledger=str(ledger), store=str(store), experiment_id=experiment, rows=len(rows))
    return place | done | dict(seconds=round(time.monotonic() - started, 2))


def fill_text(done: dict) -> str:
    """What `fill` did, in one line."""
    said = [f"{n:,} {key.replace('_', ' ')}" for key, n in done.items() if key.startswith(("runs_", "points_")) and n]
    what = ", ".join(said) or "nothing new"
    return f"{done['study']}: {done['rows']} rows in {done['store']}: {what}, {done['seconds']:.1f} s"


def beside(store: Path, suffix: str) -> Path:
    """A file that belongs to a store, under a name that no sweep, and no other store, gives to its own."""
    return store.with_name(store.name + suffix)


def open_store(store: Path):
    """MLflow's client on an SQLite file, made if absent. Raises UserError for a file that is no such store."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # older releases set alembic's level again while they open a store
    try:
        if store.exists():
            with open(store, "rb") as file:  # what is no database at all, MLflow would try for minutes to open
                if file.read(16) not in (b"", b"SQLite format 3\0"):
                    raise OSError("not an SQLite file")
        client = MlflowClient(f"sqlite:///{store.resolve()}")
        client.search_experiments(max_results=1)
    except Exception as error:  # SQLAlchemy, sqlite3 and MLflow raise many kinds
        raise UserError(
            f"{store} cannot be used as a store ({str(error).splitlines()[0]}); give another store, or delete it: it is"
            " made again from the ledger"
        ) from None
    finally:
        logging.disable(disabled)
    return client


def _experiment(client, name: str, ledger: Path, store: Path) -> str:
    experiment = client.get_experiment_by_name(name)
    folder, own = store.resolve().parent, ledger.resolve()
    theirs = Path(os.path.normpath(folder / experiment.tags.get(LEDGER, own))) if experiment else own
    if theirs != own:
        raise UserError(
            f"{store} shows {theirs} under the name {name!r}, and would lose its runs to {own}; give another store, or"
            f" delete {store} if that ledger has moved: it is made again from the ledgers"
        )
    if experiment is None:
        artifacts = folder / "mlartifacts" / name
        experiment = client.get_experiment(client.create_experiment(name, artifact_location=artifacts.as_uri()))
    elif experiment.lifecycle_stage != "active":
        client.restore_experiment(experiment.experiment_id)
    tags = {LEDGER: os.path.relpath(own, folder), NOTE: EXPLAINED.format(ledger=ledger)}
    tags["mlflow.experimentKind"] = "custom_model_development"  # which pages MLflow shows
    for key, value in tags.items():
        if key not in experiment.tags:  # a user may have rewritten it
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def _runs(client, experiment: str) -> dict:
    """run_id of a row -> the run that shows it. Runs that others have put there are left alone."""
    found = client.search_runs([experiment], max_results=50_000)  # the most that MLflow gives at once
    return {run.data.tags[RUN_ID]: run for run in found if FILLED in run.data.tags}


def _mark(shown: ShownRow, along: list[tuple]) -> str:
    """Changes when anything that a run is filled from does."""
    source = [LAYOUT, dataclasses.asdict(shown), along]
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def _write(client, experiment: str, shown: ShownRow, along: list[tuple], mark: str) -> int:
    """Write a row as a new run, its mark last; return the number of points."""
    from mlflow.entities import Metric, Param, RunTag

    row = shown.row
    end = _milliseconds(row.get("date"))
    start = end - int(1000 * (number_of(row, "seconds") or 0))
    tags = {RUN_ID: row["run_id"], FILLED: "not yet"}
    run_id = client.create_run(experiment, start_time=start, tags=tags, run_name=shown.name).info.run_id
    points = [Metric(key, value, end, 0) for key, value in shown.metrics.items()]
    for examples, seconds, values in along:
        at = end if seconds is None else start + int(1000 * seconds)
        points += [Metric(key, value, at, examples) for key, value in values.items()]
    params = [Param(key, value) for key, value in shown.params.items()]
    # which sends no more than MLflow takes at once, 1000 points or 100 params
    client.log_batch(run_id, points, params, [RunTag(key, value) for key, value in shown.tags.items()])
    client.set_terminated(run_id, "FINISHED" if row["status"] == "ok" else "FAILED", end_time=end)
    client.set_tag(run_id, FILLED, mark)
    return len(points)


def _milliseconds(date: str | None) -> int:
    with contextlib.suppress(ValueError, TypeError):
        return int(1000 * datetime.fromisoformat(date or "").timestamp())
    return int(1000 * time.time())
