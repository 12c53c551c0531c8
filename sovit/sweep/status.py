"""What is done, running, waiting and failed of a study: read from its files alone, without disturbing it.

The design is `runs/<study>.design.json`, which every launch leaves there. Records and the ledger's rows say what is done.
A trunk runs while its lock is held, a launch while its plan file's lock is. Optuna's store is not asked.
"""

from __future__ import annotations

import glob
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import OUTPUTS, PUBLISHED, UserError
from sovit.encoder.few_shot import lacks_probe
from sovit.files import is_locked
from sovit.ledger.ledger import designed_ledger, read_ledger, study_ledger
from sovit.ledger.records import record_path
from sovit.ledger.schema import ANSWERED, is_number, row_label
from sovit.spec.any_run import AnyRun, run_from_dict
from sovit.spec.run import Run

STALE_SECONDS, STALE_WINDOWS = 60.0, 4  # without word for longer than both: it is said so


@dataclass(frozen=True)
class StudyStatus:
    """The state of a study, as `--json` prints it; `status_text` puts it in words.

    state: running (a launch or a trunk is alive), stopped (not all is done and nothing runs), done, or unknown (nothing
    runs, and no design says what is still to be done).
    trunks: total, done, running, waiting, failed (a branch ended with an error; the next launch tries it again).
    measurements: rows: total (asked for), ok, diverged, failed, missing.
    train_flops: done (billed by the rows, and run by live workers since), left, total. The task head is counted once it is
    known how many classes there are, a vision-language model once something on its language model was measured.
    flops_per_second: of the live workers together. seconds_left: what is left at that rate; None where nothing runs, a
    worker is silent or nothing was measured yet.
    workers: of each trunk in training, what it last said, `silent_seconds` ago. problems: branches that failed or diverged.
    best: the best row of each objective and training budget (within 3 %), the largest budget first, with its `metric`.
    resume: the command that goes on, of a stopped study.
    """

    study: str
    state: str
    design_known: bool
    ledger: str
    runs: str
    launches: int
    trunks: dict[str, int]
    measurements: dict[str, int]
    train_flops: dict[str, float]
    flops_per_second: float
    seconds_left: float | None
    workers: list[dict]
    waiting: list[dict]
    problems: list[dict]
    metric: str
    best: list[dict]
    resume: str | None


def study_status(name: str, runs_dir: Path, results_dir: Path | None = None) -> StudyStatus:
    """Read the state of study `name`. Raises UserError where it is not there or cannot be read."""
    design = _design(name, runs_dir, results_dir)
    rows = _read_rows(design, runs_dir)
    if not design.known and not rows:
        raise UserError(_unknown(name, runs_dir, [design.ledger.parent] if results_dir else [OUTPUTS, PUBLISHED]))
    plans = runs_dir.glob(f"{glob.escape(name)}.{8 * '[0-9a-f]'}.plan.json")
    launches = [_date_of(plan) for plan in plans if is_locked(plan)]
    trunks = [_read_trunk(run, rows, runs_dir, min(launches, default=0.0)) for run in design.runs]
    running = [trunk for trunk in trunks if trunk.state == "running"]
    counts = _count_trunks(trunks, rows)
    workers = [_worker(trunk) for trunk in running]
    flops, rate = _train_flops(trunks, rows), sum(w["flops_per_second"] or 0 for w in workers if not w["stale"])
    state = "running" if running or launches else "stopped" if counts["waiting"] or counts["failed"] else "done"
    state = state if design.known or state == "running" else "unknown"
    statuses = [row["status"] for row in rows.values()]
    asked = sum(len(run.run_ids) for run in design.runs) if design.known else len(rows)
    return StudyStatus(
        study=name,
        state=state,
        design_known=design.known,
        ledger=str(design.ledger),
        runs=str(runs_dir),
        launches=len(launches),
        trunks=counts,
        measurements={"total": asked}
        | {status: statuses.count(status) for status in ("ok", "diverged", "failed")}
        | {"missing": asked - len(rows)},
        train_flops=flops,
        flops_per_second=rate,
        seconds_left=flops["left"] / rate if rate and not any(w["stale"] for w in workers) else None,
        workers=workers,
        waiting=[_about(trunk.run) for trunk in trunks if trunk.state == "waiting"],
        problems=[_problem(row) for row in rows.values() if row["status"] != "ok"],
        metric=design.metric,
        best=_best(list(rows.values()), design.metric),
        resume=design.resume if state == "stopped" else None,
    )


@dataclass(frozen=True)
class _Design:
    """What a study asks for. runs: in the order of the queue; known: False where only rows are there."""

    runs: Sequence[AnyRun]
    known: bool
    ledger: Path
    metric: str = "val_loss"
    resume: str | None = None


def _design(name: str, runs_dir: Path, results_dir: Path | None) -> _Design:
    path, ledger = runs_dir / f"{name}.design.json", study_ledger(name, results_dir, runs_dir)
    if not path.exists():
        return _Design([], False, ledger)
    written = _read_json(path)
    if written is None:
        raise UserError(f"{path} is damaged; delete it: the next launch writes it again")
    try:
        runs = [run_from_dict(d) for d in written["runs"]]
        command, folder, metric = shlex.join(written["command"]), Path(written["folder"]), written["metric"]
        ledger = designed_ledger(written) if results_dir is None else ledger
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks {error}; delete it: the next launch writes it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return _Design(
        runs, True, ledger, metric, command if folder == Path.cwd() else f"cd {shlex.quote(str(folder))} && {command}"
    )


def _read_rows(design: _Design, runs_dir: Path) -> dict[str, Any]:
    """run_id -> its row, the record before the ledger's; of a design no others."""
    ledger = design.ledger
    there = read_ledger(ledger) if ledger.exists() and ledger.stat().st_size else []
    rows: dict[str, Any] = {row["run_id"]: row for row in there}
    if not design.known:
        return rows
    found = {}
    for run_id, trunk in ((run_id, run.trunk_id) for run in design.runs for run_id in run.run_ids):
        row, record = rows.get(run_id), _read_json(record_path(runs_dir, trunk, run_id))
        if record and "status" in record and not (record["status"] == "failed" and _is_answered(row)):
            row = record
        if row:
            found[run_id] = row
    return found


def _unknown(name: str, runs_dir: Path, results_dirs: list[Path]) -> str:
    known = {p.stem for folder in results_dirs for p in folder.glob("*.jsonl")}
    known |= {p.name.removesuffix(".design.json") for p in runs_dir.glob("*.design.json")}
    there = f"there are {', '.join(sorted(known))}" if known else "there is none; launch one first"
    return f"no study {name!r} in {' or '.join(map(str, [runs_dir, *results_dirs]))}; {there}"


# trunks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trunk:
    """A run as it stands.

    state: done, running, waiting or failed. said: what the worker that trains it has said of itself, and `date`, when.
    images: still to be trained after what is on record; left: and after what its worker has done since.
    """

    run: AnyRun
    state: str
    said: dict
    images: float
    left: float


def _read_trunk(run: AnyRun, rows: Mapping[str, Any], runs_dir: Path, since: float) -> _Trunk:
    """A launch, the first of which began at `since`, tries earlier failures again."""
    folder = runs_dir / run.trunk_id
    own = {n: rows.get(run.run_id(n)) for n in run.budgets}
    records = {n: record_path(runs_dir, run.trunk_id, run.run_id(n)) for n in run.budgets}
    missing = [n for n, row in own.items() if not _is_answered(row)]
    failed = [n for n, row in own.items() if row and row["status"] == "failed" and _date_of(records[n]) >= since]
    state, said = "done", {}
    if missing or any(lacks_probe(run, row) for row in own.values() if row):
        state = "failed" if failed else "waiting"
        if is_locked(folder / "lock"):
            began, spoke = _date_of(folder / "lock"), _date_of(folder / "progress.json")
            said = ((_read_json(folder / "progress.json") or {}) if spoke >= began else {}) | {
                "date": max(began, spoke)
            }
            state, said = "running", said if missing else said | {"phase": "probing"}
    # as a worker trains it: branches that only the ledger knows have left no trunk here to go on from
    todo = run.with_budgets([n for n in run.budgets if n in missing or records[n].exists()] or run.budgets)
    images = sum(todo.new_examples(n) for n in missing)
    return _Trunk(run, state, said, images, min(images, (1 - said.get("share", 0.0)) * todo.total_examples))


def _read_json(path: Path) -> dict | None:
    """The object in a file; None where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_answered(row: dict | None) -> bool:
    return row is not None and row["status"] in ANSWERED


def _date_of(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _train_flops(trunks: Sequence[_Trunk], rows: Mapping[str, Any]) -> dict[str, float]:
    each: dict[str | None, float] = {}  # trunk_id or language model -> training FLOPs of an image
    num_classes: dict[tuple, int] = {}
    for trunk in trunks:
        said, run = trunk.said, trunk.run
        if said.get("images_per_second"):
            flops = said["flops_per_second"] / said["images_per_second"]
            each |= dict.fromkeys((run.trunk_id, run.parts.get("language_model")), flops)
        num_classes[run.data, run.preset] = said.get("num_classes") or num_classes.get((run.data, run.preset), 0)
    for row in rows.values():
        if row.get("train_flops"):
            each |= dict.fromkeys(
                (row["trunk_id"], row.get("language_model")), row["train_flops"] / row["num_examples"]
            )
        if row.get("num_classes"):
            num_classes[row.get("data"), row.get("preset")] = row["num_classes"]

    def of_image(run: AnyRun) -> float:
        if isinstance(run, Run):
            return run.train_flops(run.budgets[-1], num_classes[run.data, run.preset]) // run.budgets[-1]
        return each.get(run.trunk_id, each.get(run.parts["language_model"], 0.0))

    done = float(sum(row["spent_flops"] for row in rows.values() if is_number(row.get("spent_flops"))))
    done += sum(of_image(trunk.run) * (trunk.images - trunk.left) for trunk in trunks)
    left = float(sum(of_image(trunk.run) * trunk.left for trunk in trunks))
    return {"done": done, "left": left, "total": done + left}


# what is told --------------------------------------------------------------------------------------------------------


def _about(run: AnyRun) -> dict:
    return {"trunk_id": run.trunk_id, "shape": run.label, "init_seed": run.init_seed}


def _worker(trunk: _Trunk) -> dict:
    said, silent = trunk.said, max(0.0, time.time() - trunk.said["date"])
    keys = ("share", "loss", "images_per_second", "flops_per_second", "seconds_left")
    return {
        **_about(trunk.run),
        "phase": said.get("phase", "starting"),
        **{key: said.get(key) for key in keys},
        "silent_seconds": silent,
        "stale": silent > max(STALE_SECONDS, STALE_WINDOWS * said.get("window_seconds", 0.0)),
    }


def _count_trunks(trunks: Sequence[_Trunk], rows: Mapping[str, Any]) -> dict[str, int]:
    states = {row["trunk_id"]: "done" for row in rows.values()}
    states |= {row["trunk_id"]: "failed" for row in rows.values() if row["status"] == "failed"}
    states |= {trunk.run.trunk_id: trunk.state for trunk in trunks}  # of a design they know better
    found = list(states.values())
    return {"total": len(found)} | {s: found.count(s) for s in ("done", "running", "waiting", "failed")}


def _problem(row: dict) -> dict:
    keys = ("run_id", "trunk_id", "status", "num_examples", "init_seed", "error")
    return {key: row.get(key) for key in keys} | {"shape": row_label(row)}


def _best(rows: list[dict], metric: str) -> list[dict]:
    import numpy as np

    from sovit.ledger.measurements import levels

    usable = [r for r in rows if r["status"] == "ok" and r.get(metric) is not None and r.get("train_flops")]
    out = []
    for objective in dict.fromkeys(r.get("objective") for r in usable):  # whose losses cannot be compared
        ours = [r for r in usable if r.get("objective") == objective]
        group, centres = levels(np.array([r["train_flops"] for r in ours]))
        for g, centre in enumerate(centres.tolist()):
            here = [r for r, own in zip(ours, group) if own == g]
            best = min(here, key=lambda r: r[metric])
            found = {"train_flops": centre, "shape": row_label(best)}
            found |= {key: best.get(key) for key in (metric, "run_id", "init_seed")}
            out.append(found | {"num_rows": len(here), "num_shapes": len(set(map(row_label, here)))})
    return sorted(out, key=lambda row: -row["train_flops"])
