"""What is done, running, waiting and failed of a study: read from its files alone, at any moment, without disturbing it.

The design (which trunks, which budgets) is `runs/<study>.design.json`, which every launch writes and leaves there; what
is done are the records and the ledger's rows; what runs are the trunks whose lock is held, with their progress.json; a
launch is alive while it holds its plan file's lock. Optuna's store is not asked. Without a design file, the ledger's rows
stand in for the design.
"""

from __future__ import annotations

import glob
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import OUTPUTS, PUBLISHED, UserError
from sovit.files import is_locked
from sovit.ledger.ledger import designed_ledger, read_ledger, study_ledger
from sovit.ledger.records import record_path
from sovit.ledger.schema import row_label
from sovit.spec.any_run import AnyRun, run_from_dict
from sovit.sweep.trunks import Costs, Trunk, date_of, is_answered, read_json, read_trunk

STALE_SECONDS, STALE_WINDOWS = 60.0, 4  # without word for longer than both: it is said so


@dataclass(frozen=True)
class StudyStatus:
    """The state of a study, as `--json` prints it; `status_text` puts it in words.

    state: running (a launch or a trunk is alive), stopped (not all is done and nothing runs), done, or unknown (nothing
    runs, and no design says what is still to be done).
    trunks: total, done, running, waiting, failed (a branch ended with an error; the next launch tries it again).
    measurements: rows: total (asked for), ok, diverged, failed, missing.
    train_flops: 3 x (encoder + task head): done (billed by the rows, and run by live workers since), left, total;
    head_counted: whether it is known how many classes there are; uncounted: vision-language models of which no row and no
    worker says yet what an image costs.
    flops_per_second: of the live workers together. seconds_left: until the last trunk ends, None where nothing runs, a
    worker is silent or nothing was measured yet. worker_seconds_left: of one worker, for all that is left.
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
    worker_seconds_left: float | None
    workers: list[dict]
    waiting: list[dict]
    problems: list[dict]
    metric: str
    best: list[dict]
    resume: str | None


def study_status(name: str, runs_dir: Path, results_dir: Path | None = None) -> StudyStatus:
    """Read the state of study `name`.

    Raises UserError for a study that is not there, or files that cannot be read.
    """
    runs_dir = Path(runs_dir)
    design = _design(name, runs_dir, results_dir)
    rows = _read_rows(design, runs_dir)
    if not design.known and not rows:
        raise UserError(_unknown(name, runs_dir, [design.ledger.parent] if results_dir else [OUTPUTS, PUBLISHED]))
    plans = runs_dir.glob(f"{glob.escape(name)}.{8 * '[0-9a-f]'}.plan.json")
    launches = [date_of(plan) for plan in plans if is_locked(plan)]
    trunks = [read_trunk(run, rows, runs_dir, min(launches, default=0.0)) for run in design.runs.values()]
    running, waiting = ([t for t in trunks if t.state == state] for state in ("running", "waiting"))
    counts = _count_trunks(trunks, rows)
    cost = Costs(trunks, rows)
    workers = [_worker(trunk, cost.flops(trunk, trunk.left)) for trunk in running]
    silent = any(worker["stale"] for worker in workers)
    state = "running" if running or launches else "stopped" if counts["waiting"] or counts["failed"] else "done"
    state = state if design.known or state == "running" else "unknown"
    return StudyStatus(
        study=name,
        state=state,
        design_known=design.known,
        ledger=str(design.ledger),
        runs=str(runs_dir),
        launches=len(launches),
        trunks=counts,
        measurements=_count_rows(design, rows),
        train_flops=cost.totals(trunks, rows),
        flops_per_second=sum(worker["flops_per_second"] or 0 for worker in workers if not worker["stale"]),
        seconds_left=None
        if silent
        else _finish_seconds(*(list(map(cost.seconds_left, ts)) for ts in (running, waiting))),
        worker_seconds_left=_total(map(cost.seconds_left, trunks)),
        workers=workers,
        waiting=[_about(t.run) | {"train_flops_left": cost.flops(t, t.left)} for t in waiting],
        problems=[_problem(row) for row in rows.values() if row["status"] != "ok"],
        metric=design.metric,
        best=_best(list(rows.values()), design.metric),
        resume=design.resume if state == "stopped" else None,
    )


@dataclass(frozen=True)
class _Design:
    """What a study asks for. runs: by trunk_id, in the order of the queue; known: False where only rows are there."""

    runs: dict[str, AnyRun]
    known: bool
    ledger: Path
    metric: str
    resume: str | None

    @property
    def asked(self) -> set[str]:
        """The run_ids of all branches."""
        return {run_id for run in self.runs.values() for run_id in run.run_ids}


def _design(name: str, runs_dir: Path, results_dir: Path | None) -> _Design:
    path = runs_dir / f"{name}.design.json"
    ledger = study_ledger(name, results_dir, runs_dir)
    if not path.exists():
        return _Design({}, False, ledger, "val_loss", None)
    written = read_json(path)
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
    resume = command if folder == Path.cwd() else f"cd {shlex.quote(str(folder))} && {command}"
    return _Design({run.trunk_id: run for run in runs}, True, ledger, metric, resume)


def _read_rows(design: _Design, runs_dir: Path) -> dict[str, Any]:
    """run_id -> its row: the records before the ledger."""
    ledger = design.ledger
    rows: dict[str, Any] = (
        {row["run_id"]: row for row in read_ledger(ledger)} if ledger.exists() and ledger.stat().st_size else {}
    )
    for trunk, run in design.runs.items():
        for run_id in run.run_ids:
            row = read_json(record_path(runs_dir, trunk, run_id))
            if row and "status" in row and not (row["status"] == "failed" and is_answered(rows.get(run_id))):
                rows[run_id] = row
    return {run_id: row for run_id, row in rows.items() if run_id in design.asked} if design.known else rows


def _unknown(name: str, runs_dir: Path, results_dirs: list[Path]) -> str:
    known = {p.stem for folder in results_dirs for p in folder.glob("*.jsonl")}
    known |= {p.name.removesuffix(".design.json") for p in runs_dir.glob("*.design.json")}
    there = f"there are {', '.join(sorted(known))}" if known else "there is none; launch one first"
    return f"no study {name!r} in {' or '.join(map(str, [runs_dir, *results_dirs]))}; {there}"


# trunks and rows ----------------------------------------------------------------------------------------------------


def _about(run: AnyRun) -> dict:
    return {"trunk_id": run.trunk_id, "shape": run.label, "init_seed": run.init_seed}


def _worker(trunk: Trunk, flops_left: float) -> dict:
    said, silent = trunk.said, max(0.0, time.time() - trunk.said["date"])
    keys = ("share", "loss", "images_per_second", "flops_per_second", "seconds_left")
    return {
        **_about(trunk.run),
        "phase": said.get("phase", "starting") if trunk.missing else "probing",
        **{key: said.get(key) for key in keys},
        "silent_seconds": silent,
        "stale": silent > max(STALE_SECONDS, STALE_WINDOWS * said.get("window_seconds", 0.0)),
        "train_flops_left": flops_left,
    }


def _total(seconds: Iterable[float | None]) -> float | None:
    """The sum; None where a part of it is unknown."""
    found = list(seconds)
    return None if None in found else sum(each or 0.0 for each in found)


def _finish_seconds(running: Sequence[float | None], waiting: Sequence[float | None]) -> float | None:
    """Seconds until the last trunk ends, the workers that run now sharing what waits."""
    total = _total([*running, *waiting])
    return max(total / len(running), *(each or 0.0 for each in running)) if running and total is not None else None


def _count_trunks(trunks: Sequence[Trunk], rows: Mapping[str, Any]) -> dict[str, int]:
    states = {row["trunk_id"]: "done" for row in rows.values()}
    states |= {row["trunk_id"]: "failed" for row in rows.values() if row["status"] == "failed"}
    states |= {trunk.run.trunk_id: trunk.state for trunk in trunks}  # of a design they know better
    found = list(states.values())
    return {"total": len(found)} | {s: found.count(s) for s in ("done", "running", "waiting", "failed")}


def _count_rows(design: _Design, rows: Mapping[str, Any]) -> dict[str, int]:
    statuses = [row["status"] for row in rows.values()]
    total = len(design.asked if design.known else rows)
    counts = {status: statuses.count(status) for status in ("ok", "diverged", "failed")}
    return {"total": total, **counts, "missing": total - len(rows)}


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
