"""What is done, running, waiting and failed of a study: read from its files alone, at any moment, without disturbing it.

The design (which trunks, which budgets) is `runs/<study>.design.json`, which every launch writes and leaves there; what
is done are the records and the ledger's rows; what runs are the trunks whose lock is held, with their progress.json; a
launch is alive while it holds its plan file's lock. Optuna's store is not asked. For a study launched without a design
file, the trunks that have a config.json or a row stand in for the design.
"""

from __future__ import annotations

import dataclasses
import glob
import heapq
import json
import math
import os
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import OUTPUTS, PUBLISHED, UserError
from sovit.encoder.few_shot import lacks_probe
from sovit.files import is_locked
from sovit.ledger.ledger import designed_ledger, read_ledger, study_ledger
from sovit.ledger.records import record_path
from sovit.ledger.schema import ANSWERED, is_number, is_vlm
from sovit.spec.any_run import AnyRun, run_from_dict
from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun

STALE_SECONDS, STALE_WINDOWS = 60.0, 4  # without word for longer than both: it is said so


MAX_LISTED = 8  # waiting trunks, budgets and problems that are named in the text; all are in the plain data


@dataclass(frozen=True)
class TrunkCounts:
    """failed: a branch ended with an error; the next launch tries it again."""

    total: int
    done: int
    running: int
    waiting: int
    failed: int


@dataclass(frozen=True)
class RowCounts:
    total: int  # asked for
    ok: int
    diverged: int
    failed: int
    missing: int


@dataclass(frozen=True)
class FlopCounts:
    """Training FLOPs, 3 x (encoder + task head). done: billed by the rows, and run by live workers since.

    head_counted: False before the first measurement tells how many classes there are. uncounted: vision-language models
    of which no row and no worker says yet what an image costs.
    """

    done: float
    left: float
    total: float
    head_counted: bool
    uncounted: int


@dataclass(frozen=True)
class WaitingTrunk:
    trunk_id: str
    shape: str
    init_seed: int
    train_flops_left: float


@dataclass(frozen=True)
class Worker:
    """A trunk in training: what it last said of itself since its lock was taken, `silent_seconds` ago."""

    trunk_id: str
    shape: str
    init_seed: int
    phase: str
    share: float | None
    loss: float | None
    images_per_second: float | None
    flops_per_second: float | None
    seconds_left: float | None
    silent_seconds: float
    stale: bool
    train_flops_left: float


@dataclass(frozen=True)
class Problem:
    """A branch that failed or diverged, and why."""

    run_id: str
    trunk_id: str
    status: str
    num_examples: int
    init_seed: int | None
    error: str | None
    shape: str


@dataclass(frozen=True)
class BestRow:
    """The best row of an objective and a training budget (within 3 %). value: of the study's metric."""

    train_flops: float
    shape: str
    value: float
    run_id: str
    init_seed: int | None
    num_rows: int
    num_shapes: int


@dataclass(frozen=True)
class StudyStatus:
    """The state of a study; `status_text` puts it in words.

    state: running (a launch or a trunk is alive), stopped (not all is done and nothing runs), done, or unknown (nothing
    runs, and no design says what is still to be done). flops_per_second: of the live workers together. seconds_left: None
    where nothing runs, a worker is silent or nothing was measured yet. worker_seconds_left: of one worker, for all that is
    left. best: of each budget, the largest first. resume: the command that goes on, of a stopped study.
    """

    study: str
    state: str
    design_known: bool
    ledger: str
    runs: str
    launches: int
    trunks: TrunkCounts
    measurements: RowCounts
    train_flops: FlopCounts
    flops_per_second: float
    seconds_left: float | None
    worker_seconds_left: float | None
    workers: list[Worker]
    waiting: list[WaitingTrunk]
    problems: list[Problem]
    metric: str
    best: list[BestRow]
    resume: str | None

    def to_dict(self) -> dict:
        """What `--json` prints; the value of a best row stands under the metric's name."""
        d = dataclasses.asdict(self)
        for row in d["best"]:
            row[self.metric] = row.pop("value")
        return d


def study_status(name: str, runs_dir: Path, results_dir: Path | None = None) -> StudyStatus:
    """Read the state of study `name`.

    Raises UserError for a study that is not there, or files that cannot be read.
    """
    study = _read_study(name, Path(runs_dir), results_dir)
    design, rows = study.design, study.rows
    launches = _live_launches(name, study.runs_dir)
    running, waiting, failed = _queue(study, min(launches, default=0.0))
    cost = _costs(study)
    progress = {trunk: _live_progress(study.runs_dir / trunk) for trunk in running}
    left, in_flight = _left(study, cost, progress)
    workers = [_worker(study, trunk, progress[trunk], left[trunk]) for trunk in running]
    amount = {
        trunk: left[trunk]
        if isinstance(run, Run)
        else run.total_examples * (1 - progress.get(trunk, {}).get("share", 0.0)) * bool(study.missing[trunk])
        for trunk, run in design.runs.items()
    }
    seconds = trunk_seconds(design.runs, amount, progress, rows.values())
    silent = any(worker.stale for worker in workers)
    finish = finish_seconds([seconds.get(t) for t in running], [seconds.get(t) for t in waiting])
    state = "running" if running or launches else "stopped" if waiting or failed else "done"
    num_trunks = len({row["trunk_id"] for row in rows.values()} | set(design.runs))
    num_done = num_trunks - len(running) - len(waiting) - len(failed)
    return StudyStatus(
        study=name,
        state=state if design.known or state == "running" else "unknown",
        design_known=design.known,
        ledger=str(design.ledger),
        runs=str(runs_dir),
        launches=len(launches),
        trunks=TrunkCounts(num_trunks, num_done, len(running), len(waiting), len(failed)),
        measurements=_count_rows(study),
        train_flops=_count_flops(study, cost, left, in_flight),
        flops_per_second=sum(worker.flops_per_second or 0 for worker in workers if not worker.stale),
        seconds_left=None if silent else finish,
        worker_seconds_left=None if None in seconds.values() else sum(v or 0 for v in seconds.values()),
        workers=workers,
        waiting=[WaitingTrunk(t, design.runs[t].label, design.runs[t].init_seed, left[t]) for t in waiting],
        problems=[_problem(row) for row in rows.values() if row["status"] != "ok"],
        metric=design.metric,
        best=_best(list(rows.values()), design.metric),
        resume=design.resume if state == "stopped" else None,
    )


@dataclass(frozen=True)
class Design:
    """What a study asks for. runs: by trunk_id, in the order of the queue; known: False where the rows stand in for it."""

    runs: dict[str, AnyRun]
    known: bool
    ledger: Path
    metric: str
    resume: str | None

    @property
    def asked(self) -> set[str]:
        """The run_ids of all branches."""
        return {run_id for run in self.runs.values() for run_id in run.run_ids}


@dataclass(frozen=True)
class _Study:
    """rows: by run_id, the records before the ledger; missing: trunk_id -> budgets without an answer."""

    design: Design
    rows: dict[str, dict]
    missing: dict[str, list[int]]
    runs_dir: Path


def _read_study(name: str, runs_dir: Path, results_dir: Path | None) -> _Study:
    design = _design(name, runs_dir, results_dir)
    rows = _ledger_rows(design.ledger)
    if not design.known and not design.runs and not rows:
        raise UserError(_unknown(name, runs_dir, [design.ledger.parent] if results_dir else [OUTPUTS, PUBLISHED]))
    for trunk, run in design.runs.items():
        for run_id in run.run_ids:
            row = _read_json(record_path(runs_dir, trunk, run_id))
            if row and "status" in row and not (row["status"] == "failed" and _answered(rows.get(run_id))):
                rows[run_id] = row
    if design.known:
        rows = {run_id: row for run_id, row in rows.items() if run_id in design.asked}
    missing = {t: [n for n in r.budgets if not _answered(rows.get(r.run_id(n)))] for t, r in design.runs.items()}
    return _Study(design, rows, missing, runs_dir)


def _design(name: str, runs_dir: Path, results_dir: Path | None) -> Design:
    path = runs_dir / f"{name}.design.json"
    ledger = study_ledger(name, results_dir, runs_dir)
    written = _read_json(path)
    if written is None and path.exists():
        raise UserError(f"{path} is damaged; delete it: the next launch writes it again")
    if written is None:
        configs = [c for c in map(_read_json, sorted(runs_dir.glob("*/config.json"))) if c and c.get("study") == name]
        runs = [_run(c, runs_dir / "*/config.json") for c in configs]
        return Design({run.trunk_id: run for run in runs}, False, ledger, "val_loss", None)
    try:
        runs = [_run(d, path) for d in written["runs"]]
        command, folder, metric = shlex.join(written["command"]), Path(written["folder"]), written["metric"]
        ledger = designed_ledger(written) if results_dir is None else ledger
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks {error}; delete it: the next launch writes it again") from None
    resume = command if folder == Path.cwd() else f"cd {shlex.quote(str(folder))} && {command}"
    return Design({run.trunk_id: run for run in runs}, True, ledger, metric, resume)


def _run(d: dict, path: Path) -> AnyRun:
    try:
        return run_from_dict(d)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict | None:
    """The object in a file; None where there is none, or a damaged one: it tells nothing, and is no reason to be silent."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _ledger_rows(path: Path) -> dict[str, Any]:
    return {row["run_id"]: row for row in read_ledger(path)} if path.exists() and path.stat().st_size else {}


def _unknown(name: str, runs_dir: Path, results_dirs: list[Path]) -> str:
    known = {p.stem for folder in results_dirs for p in folder.glob("*.jsonl")}
    known |= {p.name.removesuffix(".design.json") for p in runs_dir.glob("*.design.json")}
    known |= {str(c["study"]) for c in map(_read_json, runs_dir.glob("*/config.json")) if c and c.get("study")}
    there = f"there are {', '.join(sorted(known))}" if known else "there is none; launch one first"
    return f"no study {name!r} in {' or '.join(map(str, [runs_dir, *results_dirs]))}; {there}"


def _answered(row: dict | None) -> bool:
    return row is not None and row["status"] in ANSWERED


def _date(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _live_launches(name: str, runs_dir: Path) -> list[float]:
    """Since when each launch that is alive has been so."""
    plans = runs_dir.glob(f"{glob.escape(name)}.{8 * '[0-9a-f]'}.plan.json")
    return [_date(plan) for plan in plans if is_locked(plan)]


def _queue(study: _Study, since: float) -> tuple[list[str], list[str], list[str]]:
    """Trunks that run, wait and have failed. A launch, the first of which began at `since`, tries earlier failures again."""
    rows, folder = study.rows, study.runs_dir
    unprobed = {
        trunk
        for trunk, run in study.design.runs.items()
        if any(lacks_probe(run, rows[i]) for i in run.run_ids if _answered(rows.get(i)))
    }
    todo = [trunk for trunk in study.design.runs if study.missing[trunk] or trunk in unprobed]
    running = [trunk for trunk in todo if is_locked(folder / trunk / "lock")]
    in_error = {row["trunk_id"]: row["run_id"] for row in rows.values() if row["status"] == "failed"}
    failed = [t for t, i in in_error.items() if t not in running and _date(record_path(folder, t, i)) >= since]
    return running, [t for t in todo if t not in running and t not in failed], failed


def _live_progress(folder: Path) -> dict:
    """What the worker that holds a trunk's lock has said of itself; {} where nothing yet. `date`: when, or began."""
    path = folder / "progress.json"
    since, said = _date(folder / "lock"), _date(path)
    return ((_read_json(path) or {}) if said >= since else {}) | {"date": max(since, said)}


def _worker(study: _Study, trunk: str, progress: dict, left: float) -> Worker:
    run, silent = study.design.runs[trunk], max(0.0, time.time() - progress["date"])
    keys = ("share", "loss", "images_per_second", "flops_per_second", "seconds_left")
    said: dict = {key: progress.get(key) for key in keys}
    return Worker(
        trunk_id=trunk,
        shape=run.label,
        init_seed=run.init_seed,
        phase=progress.get("phase", "starting") if study.missing[trunk] else "probing",
        **said,
        silent_seconds=silent,
        stale=silent > max(STALE_SECONDS, STALE_WINDOWS * progress.get("window_seconds", 0.0)),
        train_flops_left=left,
    )


def _costs(study: _Study) -> dict[str, float]:
    """trunk_id -> training FLOPs of an image, head included as soon as rows or progress tell how many classes it has.

    Of a vision-language model, what its row or its worker says, else another of the same language model; 0 where none does.
    """
    num_classes: dict[tuple, int] = {}
    said_of: dict[str, float] = {}  # trunk_id -> FLOPs of an image
    like: dict[str, float] = {}
    for trunk, run in study.design.runs.items():
        here = [study.rows[i] for i in run.run_ids if i in study.rows]
        progress = _read_json(study.runs_dir / trunk / "progress.json") or {}
        if isinstance(run, VlmRun):
            said = [row["train_flops"] / run.num_examples for row in here if is_number(row.get("train_flops"))]
            if progress.get("images_per_second"):
                said.append(progress["flops_per_second"] / progress["images_per_second"])
            if said:
                said_of[trunk] = like[run.language_model] = said[0]
        elif (run.data, run.preset) not in num_classes:
            classes = [*(row.get("num_classes") for row in here), progress.get("num_classes")]
            if any(classes):
                num_classes[run.data, run.preset] = next(filter(None, classes))
    return {
        trunk: _per_image(run, num_classes.get((run.data, run.preset), 0))
        if isinstance(run, Run)
        else said_of.get(trunk, like.get(run.parts["language_model"], 0.0))
        for trunk, run in study.design.runs.items()
    }


def _per_image(run: Run, num_classes: int = 0) -> int:
    return run.train_flops(run.budgets[-1], num_classes) // run.budgets[-1]


def _left(study: _Study, cost: dict[str, float], progress: dict[str, dict]) -> tuple[dict[str, float], float]:
    """trunk_id -> training FLOPs left; and the FLOPs that live workers have done since their last record."""
    left, in_flight = {}, 0.0
    for trunk, run in study.design.runs.items():
        missing = study.missing[trunk]
        if isinstance(run, VlmRun):
            total, images = run.num_examples, run.num_examples * bool(missing)
        else:
            # as a worker trains it: branches that only the ledger knows have left no trunk here to go on from
            records = {n: record_path(study.runs_dir, trunk, run.run_id(n)) for n in run.budgets}
            here = [n for n in run.budgets if n in missing or records[n].exists()]
            todo = run.replace(budgets=tuple(here) or run.budgets)
            total, images = todo.total_examples, sum(todo.new_examples(n) for n in missing)
        left[trunk] = cost[trunk] * float(images)
        share = progress.get(trunk, {}).get("share")
        if share is not None:
            by_progress = cost[trunk] * (1 - share) * total
            in_flight += max(0.0, left[trunk] - by_progress)
            left[trunk] = min(left[trunk], by_progress)
    return left, in_flight


def _count_flops(study: _Study, cost: dict[str, float], left: dict[str, float], in_flight: float) -> FlopCounts:
    billed = sum(v for row in study.rows.values() if isinstance(v := row.get("spent_flops"), (int, float)))
    classifiers = {
        trunk: run
        for trunk, run in study.design.runs.items()
        if isinstance(run, Run) and run.recipe.objective == "classification"
    }
    return FlopCounts(
        done=billed + in_flight,
        left=sum(left.values()),
        total=billed + in_flight + sum(left.values()),
        head_counted=all(cost[trunk] > _per_image(run) for trunk, run in classifiers.items()),
        uncounted=sum(not cost[trunk] for trunk in study.design.runs if study.missing[trunk]),
    )


def _count_rows(study: _Study) -> RowCounts:
    statuses = [row["status"] for row in study.rows.values()]
    total = len(study.design.asked if study.design.known else study.rows.keys() | study.design.asked)
    ok, diverged, failed = (statuses.count(status) for status in ("ok", "diverged", "failed"))
    return RowCounts(total, ok, diverged, failed, missing=total - len(study.rows))


def trunk_seconds(
    runs: Mapping[str, AnyRun], left: Mapping[str, float], progress: Mapping[str, dict], rows: Iterable[dict]
) -> dict[str, float | None]:
    """Estimate the seconds that one worker needs for what is left of each trunk.

    runs, left, progress: by trunk_id. left: training FLOPs of an encoder, images of a vision-language model; trunks of
    which nothing is left are left out. progress: what live workers say of themselves, the `seconds_left` of which stand.
    rows: what was measured, which tells the pace of the rest: that of the nearest forward FLOPs, or of the same language
    model. None where nothing like it was measured yet.
    """
    paces = _paces(runs, progress, rows)
    found: dict[str, float | None] = {
        trunk: _seconds(amount, runs[trunk], paces) for trunk, amount in left.items() if amount
    }
    return found | {
        trunk: said["seconds_left"] for trunk, said in progress.items() if said.get("seconds_left") is not None
    }


def finish_seconds(running: Sequence[float | None], waiting: Sequence[float | None]) -> float | None:
    """Seconds until the last trunk ends, the workers that run now taking what waits in its order.

    running, waiting: seconds of one worker for each trunk. None where one of them is None, or nothing runs.
    """
    if not running or None in (*running, *waiting):
        return None
    free = [seconds or 0.0 for seconds in running]
    heapq.heapify(free)
    for seconds in waiting:
        heapq.heapreplace(free, free[0] + (seconds or 0.0))
    return max(free)


def _paces(runs: Mapping[str, AnyRun], progress: Mapping[str, dict], rows: Iterable[dict]) -> dict[int | str, float]:
    """Of one worker, as the rows measured it, else as live workers say.

    Forward FLOPs of an image -> training FLOP/s; language model -> images a second.
    """
    live: dict[int | str, float | None] = {}
    for trunk, said in progress.items():
        run = runs[trunk]
        if isinstance(run, Run):
            live[run.shape.forward_flops] = said.get("flops_per_second")
        else:
            live[run.parts["language_model"]] = said.get("images_per_second")
    spent: dict[int, tuple[float, float]] = {}
    measured: dict[int | str, float | None] = {}
    for row in rows:
        if row.get("kind") == "vlm":
            if row["status"] == "ok" and is_number(row.get("seconds")) and row["seconds"]:
                measured[row["language_model"]] = row["num_examples"] / row["seconds"]
        elif not is_vlm(row) and row.get("spent_flops") and row.get("spent_seconds") and row.get("forward_flops"):
            flops, seconds = spent.get(row["forward_flops"], (0.0, 0.0))
            spent[row["forward_flops"]] = flops + row["spent_flops"], seconds + row["spent_seconds"]
    measured |= {forward: flops / seconds for forward, (flops, seconds) in spent.items()}
    return {kind: pace for kind, pace in (live | measured).items() if pace}


def _seconds(amount: float, run: AnyRun, paces: dict[int | str, float]) -> float | None:
    if isinstance(run, Run):
        encoders = [kind for kind in paces if isinstance(kind, int)]
        nearest = min(encoders, key=lambda f: abs(math.log(f / run.shape.forward_flops)), default=None)
        pace = None if nearest is None else paces[nearest]
    else:
        pace = paces.get(run.parts["language_model"])
    return None if pace is None else amount / pace


def row_label(row: Mapping[str, Any]) -> str:
    """The shape of a row, or of a vision-language model its encoder and its language model."""
    if row.get("kind") == "vlm":
        return f"{row.get('encoder')} {row.get('language_model')}"
    return "x".join(str(row.get(name, "?")) for name in ("width", "depth", "mlp_dim"))


def _problem(row: dict) -> Problem:
    said: dict = {key: row.get(key) for key in ("run_id", "trunk_id", "status", "num_examples", "init_seed", "error")}
    return Problem(**said, shape=row_label(row))


def _best(rows: list[dict], metric: str) -> list[BestRow]:
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
            shapes = {row_label(r) for r in here}
            out.append(
                BestRow(
                    *(centre, row_label(best), best[metric], best["run_id"], best.get("init_seed")),
                    num_rows=len(here),
                    num_shapes=len(shapes),
                )
            )
    return sorted(out, key=lambda row: -row.train_flops)
