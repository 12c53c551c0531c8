"""What is done, running, waiting and failed of a study: read from its files alone, at any moment, without disturbing it.

The design (which trunks, which budgets) is `runs/<study>.design.json`, which every launch writes and leaves there; what
is done are the records and the ledger's rows; what runs are the trunks whose lock is held, with their progress.json; a
launch is alive while it holds its plan file's lock. Optuna's store is not asked. For a study launched without a design
file, the trunks that have a config.json or a row stand in for the design.
"""

from __future__ import annotations

import glob
import heapq
import json
import math
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from sovit import UserError
from sovit.fewshot import lacks_probe
from sovit.kinds import AnyRun, run_from_dict
from sovit.ledger import ANSWERED, designed_ledger, is_locked, is_number, is_vlm, read_ledger, record_path
from sovit.plan import clock
from sovit.run import Run
from sovit.vlm_run import VlmRun

STALE_SECONDS, STALE_WINDOWS = 60.0, 4  # without word for longer than both: it is said so
MAX_LISTED = 8  # waiting trunks, budgets and problems that are named in the text; all are in the plain data


@dataclass(frozen=True)
class Design:
    """What a study asks for. runs: by trunk_id, in the order of the queue; known: False where the rows stand in for it."""

    runs: dict[str, AnyRun]
    known: bool
    ledger: Path
    metric: str
    resume: str | None


def study_status(name: str, runs_dir: Path, results_dir: Path | None = None) -> dict:
    """The state of study `name` as plain data; `status_text` puts it in words.

    state            running: a launch or a trunk of it is alive; stopped: not all is done and nothing runs; done;
                     unknown: nothing runs, and no design says what is still to be done
    trunks           total, done, running, waiting, failed (a branch ended with an error: the next launch tries it again)
    measurements     total, ok, diverged, failed, missing
    train_flops      done (billed by the rows, and run by live workers since), left, total; 3 x (encoder + task head);
                     uncounted: vision-language models of which no row and no worker says yet what an image costs
    flops_per_second of the live workers together
    seconds_left     None where nothing runs, a worker is silent or nothing was measured yet; worker_seconds_left: of
                     one worker, for all that is left
    workers          one for each running trunk: its last progress, `silent_seconds` since, `stale` if that is long
    waiting, problems (failed and diverged branches, with why), best (of each budget, the largest first)

    Raises UserError for a study that is not there, or files that cannot be read.
    """
    runs_dir = Path(runs_dir)
    design = _design(name, runs_dir, results_dir)
    in_ledger = _ledger_rows(design.ledger)
    if not design.known and not design.runs and not in_ledger:
        raise UserError(_unknown(name, runs_dir, design.ledger.parent))
    rows = dict(in_ledger)
    for trunk, run in design.runs.items():
        for run_id in run.run_ids:
            row = _read_json(record_path(runs_dir, trunk, run_id))
            if row and "status" in row and not (row["status"] == "failed" and _answered(rows.get(run_id))):
                rows[run_id] = row
    asked = {i for run in design.runs.values() for i in run.run_ids}
    if design.known:
        rows = {i: row for i, row in rows.items() if i in asked}
    missing = {t: [n for n in r.budgets if not _answered(rows.get(r.run_id(n)))] for t, r in design.runs.items()}
    launches = _live_launches(name, runs_dir)
    unprobed = {
        t for t, r in design.runs.items() if any(lacks_probe(r, rows[i]) for i in r.run_ids if _answered(rows.get(i)))
    }
    todo = [t for t in design.runs if missing[t] or t in unprobed]
    running = [t for t in todo if is_locked(runs_dir / t / "lock")]
    in_error = {r["trunk_id"]: r["run_id"] for r in rows.values() if r["status"] == "failed"}
    failed = [
        t
        for t, run_id in in_error.items()
        if t not in running and _date(record_path(runs_dir, t, run_id)) >= min(launches, default=0.0)
    ]  # a launch tries again what failed before it began
    waiting = [t for t in todo if t not in running and t not in failed]

    cost = _costs(design, rows, runs_dir)
    workers = [_worker(design.runs[t], runs_dir) | ({} if missing[t] else {"phase": "probing"}) for t in running]
    left, in_flight = _left(design, rows, missing, workers, cost, runs_dir)
    silent = any(w["stale"] for w in workers)
    statuses = [row["status"] for row in rows.values()]
    billed = sum(v for row in rows.values() if isinstance(v := row.get("spent_flops"), (int, float)))
    seconds = _seconds_left(design, rows, missing, workers, left)
    seconds |= {w["trunk_id"]: w["seconds_left"] for w in workers if w["seconds_left"] is not None}
    num_asked = len(asked) if design.known else len(rows.keys() | asked)
    trunks = {row["trunk_id"] for row in rows.values()} | set(design.runs)
    state = "running" if running or launches else "stopped" if waiting or failed else "done"
    return {
        "study": name,
        "state": state if design.known or state == "running" else "unknown",
        "design_known": design.known,
        "ledger": str(design.ledger),
        "runs": str(runs_dir),
        "launches": len(launches),
        "trunks": {
            "total": len(trunks),
            "done": len(trunks) - len(running) - len(waiting) - len(failed),
            "running": len(running),
            "waiting": len(waiting),
            "failed": len(failed),
        },
        "measurements": {
            "total": num_asked,
            **{status: statuses.count(status) for status in ("ok", "diverged", "failed")},
            "missing": num_asked - len(rows),
        },
        "train_flops": {
            "done": billed + in_flight,
            "left": sum(left.values()),
            "total": billed + in_flight + sum(left.values()),
            "head_counted": all(
                cost[t] > _per_image(r) or r.recipe.objective != "classification"
                for t, r in design.runs.items()
                if isinstance(r, Run)
            ),
            "uncounted": sum(not cost[t] for t in design.runs if missing[t]),
        },
        "flops_per_second": sum(w["flops_per_second"] or 0 for w in workers if not w["stale"]),
        "seconds_left": _finish(running, waiting, seconds) if running and not silent else None,
        "worker_seconds_left": None if None in seconds.values() else sum(v or 0 for v in seconds.values()),
        "workers": [w | {"train_flops_left": left[w["trunk_id"]]} for w in workers],
        "waiting": [_named(design.runs[t]) | {"train_flops_left": left[t]} for t in waiting],
        "problems": [_problem(row) for row in rows.values() if row["status"] != "ok"],
        "metric": design.metric,
        "best": _best(list(rows.values()), design.metric),
        "resume": design.resume if state == "stopped" else None,
    }


# what is asked for ---------------------------------------------------------------------------------------------------


def _design(name: str, runs_dir: Path, results_dir: Path | None) -> Design:
    path = runs_dir / f"{name}.design.json"
    ledger = Path(results_dir or "results") / f"{name}.jsonl"
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
        here = folder == Path.cwd()
        own = designed_ledger(written)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks {error}; delete it: the next launch writes it again") from None
    if results_dir is None:
        ledger = own
    resume = command if here else f"cd {shlex.quote(str(folder))} && {command}"
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


def _ledger_rows(path: Path) -> dict[str, dict]:
    return {row["run_id"]: row for row in read_ledger(path)} if path.exists() and path.stat().st_size else {}


def _unknown(name: str, runs_dir: Path, results_dir: Path) -> str:
    known = {p.stem for p in results_dir.glob("*.jsonl")}
    known |= {p.name.removesuffix(".design.json") for p in runs_dir.glob("*.design.json")}
    known |= {str(c["study"]) for c in map(_read_json, runs_dir.glob("*/config.json")) if c and c.get("study")}
    there = f"there are {', '.join(sorted(known))}" if known else "there is none; launch one first"
    return f"no study {name!r} in {runs_dir} or {results_dir}; {there}"


def _live_launches(name: str, runs_dir: Path) -> list[float]:
    """Since when each launch that is alive has been so."""
    plans = runs_dir.glob(f"{glob.escape(name)}.{8 * '[0-9a-f]'}.plan.json")
    return [_date(plan) for plan in plans if is_locked(plan)]


# what is done of it --------------------------------------------------------------------------------------------------


def _answered(row: dict | None) -> bool:
    return row is not None and row["status"] in ANSWERED


def _costs(design: Design, rows: dict, runs_dir: Path) -> dict[str, float]:
    """trunk_id -> training FLOPs of an image, head included as soon as rows or progress tell how many classes it has.

    Of a vision-language model, what its row or its worker says, else another of the same language model; 0 where none does.
    """
    num_classes: dict[tuple, int] = {}
    said_of: dict[str, float] = {}  # trunk_id -> FLOPs of an image
    like: dict[str, float] = {}
    for trunk, run in design.runs.items():
        here = [rows[i] for i in run.run_ids if i in rows]
        progress = _read_json(runs_dir / trunk / "progress.json") or {}
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
        else said_of.get(trunk, like.get(run.language_model, 0.0))
        for trunk, run in design.runs.items()
    }


def _per_image(run: Run, num_classes: int = 0) -> int:
    return run.train_flops(run.budgets[-1], num_classes) // run.budgets[-1]


def _left(design: Design, rows: dict, missing: dict, workers: list, cost: dict, runs_dir: Path) -> tuple[dict, float]:
    """trunk_id -> training FLOPs left; and the FLOPs that live workers have done since their last record."""
    left, in_flight = {}, 0.0
    share = {w["trunk_id"]: w["share"] for w in workers}
    for trunk, run in design.runs.items():
        if isinstance(run, VlmRun):
            total, images = run.num_examples, run.num_examples * bool(missing[trunk])
        else:
            # as a worker trains it: branches that only the ledger knows have left no trunk here to go on from
            here = [
                n for n in run.budgets if n in missing[trunk] or record_path(runs_dir, trunk, run.run_id(n)).exists()
            ]
            todo = run.replace(budgets=tuple(here) or run.budgets)
            total, images = todo.total_examples, sum(todo.new_examples(n) for n in missing[trunk])
        left[trunk] = cost[trunk] * float(images)
        if share.get(trunk) is not None:
            by_progress = cost[trunk] * (1 - share[trunk]) * total
            in_flight += max(0.0, left[trunk] - by_progress)
            left[trunk] = min(left[trunk], by_progress)
    return left, in_flight


def _worker(run: AnyRun, runs_dir: Path) -> dict:
    """A trunk in training: what it last said of itself since its lock was taken."""
    folder = runs_dir / run.trunk_id
    path = folder / "progress.json"
    since = _date(folder / "lock")
    progress = (_read_json(path) or {}) if _date(path) >= since else {}
    silent = max(0.0, time.time() - max(since, _date(path)))
    keys = ("share", "loss", "images_per_second", "flops_per_second", "seconds_left")
    return _named(run) | {
        "phase": progress.get("phase", "starting"),
        **{key: progress.get(key) for key in keys},
        "silent_seconds": silent,
        "stale": silent > max(STALE_SECONDS, STALE_WINDOWS * progress.get("window_seconds", 0.0)),
    }


def _date(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _named(run: AnyRun) -> dict:
    return {"trunk_id": run.trunk_id, "shape": run.label, "init_seed": run.init_seed}


def _label(row: dict) -> str:
    if row.get("kind") == "vlm":
        return f"{row.get('encoder')} {row.get('language_model')}"
    return "x".join(str(row.get(name, "?")) for name in ("width", "depth", "mlp_dim"))


def _problem(row: dict) -> dict:
    keys = ("run_id", "trunk_id", "status", "num_examples", "init_seed", "error")
    return {key: row.get(key) for key in keys} | {"shape": _label(row)}


def _best(rows: list[dict], metric: str) -> list[dict]:
    """The best row of each objective and training budget (within 3 %), the largest first; of how many shapes it is that."""
    import numpy as np

    from sovit.measurements import levels

    usable = [r for r in rows if r["status"] == "ok" and r.get(metric) is not None and r.get("train_flops")]
    out = []
    for objective in dict.fromkeys(r.get("objective") for r in usable):  # whose losses cannot be compared
        ours = [r for r in usable if r.get("objective") == objective]
        group, centres = levels(np.array([r["train_flops"] for r in ours]))
        for g, centre in enumerate(centres.tolist()):
            here = [r for r, own in zip(ours, group) if own == g]
            best = min(here, key=lambda r: r[metric])
            out.append(
                {
                    "train_flops": centre,
                    "shape": _label(best),
                    metric: best[metric],
                    "run_id": best["run_id"],
                    "init_seed": best.get("init_seed"),
                    "num_rows": len(here),
                    "num_shapes": len({_label(r) for r in here}),
                }
            )
    return sorted(out, key=lambda row: -row["train_flops"])


# how long it takes ---------------------------------------------------------------------------------------------------


def _seconds_left(
    design: Design, rows: dict, missing: dict, workers: list[dict], left: dict
) -> dict[str, float | None]:
    """trunk_id -> seconds of one worker for what is left of it; None where nothing like it was measured yet."""
    speeds = _speeds([row for row in rows.values() if not is_vlm(row)], workers, design)
    share = {w["trunk_id"]: w["share"] or 0.0 for w in workers}
    pace: dict[str, float] = {}  # language model -> seconds of an image
    for w in workers:
        run = design.runs[w["trunk_id"]]
        if isinstance(run, VlmRun) and w["images_per_second"]:
            pace[run.language_model] = 1 / w["images_per_second"]
    pace |= {
        row["language_model"]: row["seconds"] / row["num_examples"]
        for row in rows.values()
        if row.get("kind") == "vlm" and row["status"] == "ok" and is_number(row.get("seconds"))
    }
    found: dict[str, float | None] = {}
    for trunk, run in design.runs.items():
        if isinstance(run, Run) and left[trunk]:
            found[trunk] = _seconds(left[trunk], run, speeds)
        elif isinstance(run, VlmRun) and missing[trunk]:
            each = pace.get(run.language_model)
            found[trunk] = None if each is None else each * run.num_examples * (1 - share.get(trunk, 0.0))
    return found


def _speeds(rows, workers: list[dict], design: Design) -> dict[int, float]:
    """Forward FLOPs of an image -> training FLOP/s of one worker: as the rows measured it, else as live workers do."""
    spent: dict[int, list[float]] = {}
    for row in rows:
        if row.get("spent_flops") and row.get("spent_seconds") and row.get("forward_flops"):
            total = spent.setdefault(row["forward_flops"], [0.0, 0.0])
            total[0] += row["spent_flops"]
            total[1] += row["spent_seconds"]
    encoders = ((design.runs[w["trunk_id"]], w["flops_per_second"]) for w in workers)
    live = {run.shape.forward_flops: speed for run, speed in encoders if isinstance(run, Run)}
    measured = {forward: flops / seconds for forward, (flops, seconds) in spent.items()}
    return {forward: speed for forward, speed in (live | measured).items() if speed}


def _seconds(flops: float, run: Run, speeds: dict[int, float]) -> float | None:
    if not speeds:
        return None
    nearest = min(speeds, key=lambda forward: abs(math.log(forward / run.shape.forward_flops)))
    return flops / speeds[nearest]


def _finish(running: list[str], waiting: list[str], seconds: dict[str, float | None]) -> float | None:
    """Seconds until the last trunk ends, the workers that run now taking what waits in its order."""
    if any(seconds.get(t) is None for t in (*running, *waiting)):
        return None
    free = [seconds[t] or 0.0 for t in running]
    heapq.heapify(free)
    for trunk in waiting:
        heapq.heapreplace(free, free[0] + (seconds[trunk] or 0.0))
    return max(free)


# in words ------------------------------------------------------------------------------------------------------------


def status_text(s: dict) -> str:
    """The status in lines of at most 100 columns, but for commands, reasons and what vision-language models are made of."""
    t, m, f = s["trunks"], s["measurements"], s["train_flops"]
    counts = ", ".join(f"{t[k]} {k}" for k in ("running", "waiting", "failed") if t[k])
    counts = f" ({counts})" if counts else ""
    answered, head = m["ok"] + m["diverged"], ""
    if s["design_known"]:
        lines = [
            f"{s['study']}: {s['state']}; {t['done']} of {t['total']} trunks done{counts}, {answered} of {m['total']}"
            " measurements"
        ]
        if f["left"] and not f["head_counted"]:
            head = " (task head not counted before the first measurement)"
        if f["uncounted"]:
            head += f" ({f['uncounted']} vision-language models not counted before the first is measured)"
        share = f", {f['done'] / f['total']:.0%}" if f["total"] else ""  # of what diverged, nobody kept the bill
        lines.append(f"  FLOPs  {f['done']:.3g} of {f['total']:.3g} done{share}{head}")
    else:
        running = "running" if t["running"] else "nothing runs"
        lines = [
            f"{s['study']}: {running}; {t['done']} trunks done{counts}, {answered} measurements",
            f"  FLOPs  {f['done']:.3g} done; what else is asked for is not known without"
            f" {Path(s['runs']) / s['study']}.design.json",
        ]
    lines += _time_lines(s)
    if s["workers"]:
        header = ["trunk", "shape", "seed", "phase", "share", "loss", "images/s", "GFLOP/s", "left", ""]
        lines += ["", *_table([header, *map(_worker_cells, s["workers"])], "<<><>>>>><")]
    if s["waiting"]:
        names = [f"{w['shape']} seed {w['init_seed']}" for w in s["waiting"][:MAX_LISTED]]
        more = len(s["waiting"]) - len(names)
        lines += ["", "waiting", *_wrap(names + [f"and {more} more"] * (more > 0))]
    if s["best"]:
        rows = [
            [f"{b['train_flops']:.3g}", b["shape"], f"{b[s['metric']]:.4f}", f"{b['num_shapes']}", b["run_id"]]
            for b in s["best"][:MAX_LISTED]
        ]
        lines += ["", *_table([["train FLOPs", "best so far", s["metric"], "of shapes", "run"], *rows], "><>><")]
    if s["problems"]:
        lines += ["", *_problem_lines(s["problems"])]
    if s["resume"]:
        lines += ["", f"go on with: {s['resume']}"]
    elif s["state"] == "running" and not s["launches"]:
        lines += ["", "no launch of it is alive: what trains now ends its trunk, and nothing follows"]
    return "\n".join(lines)


def _time_lines(s: dict) -> list[str]:
    t = s["trunks"]
    if s["state"] == "running":
        if not t["running"]:
            return ["  time   workers are starting"] if t["waiting"] else []
        rate = f"{s['flops_per_second'] / 1e9:.3g} GFLOP/s by {t['running']} worker{'s' * (t['running'] != 1)}"
        if s["seconds_left"] is None:
            silent = any(w["stale"] for w in s["workers"])
            return [
                f"  time   {rate}; no estimate {'while one is silent' if silent else 'before the first measurement'}"
            ]
        lines = [f"  time   about {clock(s['seconds_left'])} left; {rate}"]
        made = "running at their own pace, waiting at the nearest measured shape's"
        return lines + [f"         (training steps alone; {made})"] * (t["waiting"] > 0)
    if s["train_flops"]["left"] and s["worker_seconds_left"] is not None:
        left = clock(s["worker_seconds_left"])
        return [f"  time   about {left} of one worker left, each trunk at the pace of the nearest measured"]
    return []


def _worker_cells(w: dict) -> list[str]:
    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return "" if w[key] is None else format(w[key] / scale, form)

    left = "" if w["seconds_left"] is None else clock(w["seconds_left"])
    silent = f"silent for {clock(w['silent_seconds'])}" if w["stale"] else ""
    numbers = [cell("share", ".0%"), cell("loss", ".3f"), cell("images_per_second", ",.0f")]
    rate = cell("flops_per_second", ",.1f", 1e9)
    return [w["trunk_id"], w["shape"], str(w["init_seed"]), w["phase"], *numbers, rate, left, silent]


def _problem_lines(problems: list[dict]) -> list[str]:
    """One line for the branches of a trunk that ended alike."""
    alike: dict[tuple, list[int]] = {}
    for p in problems:
        key = (p["status"], p["trunk_id"], p["shape"], p["init_seed"], p["error"])
        alike.setdefault(key, []).append(p["num_examples"])
    lines = [
        f"{status}: {trunk} {shape} seed {seed} at {', '.join(f'{n:,}' for n in sorted(examples))} images: {error}"
        for (status, trunk, shape, seed, error), examples in alike.items()
    ]
    return lines[:MAX_LISTED] + [f"and {len(lines) - MAX_LISTED} more"] * (len(lines) > MAX_LISTED)


def _table(rows: list[list[str]], sides: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths)).rstrip() for row in rows]


def _wrap(names: list[str], width: int = 98) -> list[str]:
    import textwrap

    return textwrap.wrap(", ".join(names), width, initial_indent="  ", subsequent_indent="  ")


def watch(name: str, runs_dir: Path, results_dir: Path | None, seconds: float) -> None:
    """Draw the status anew every so many seconds until nothing runs any more, or Ctrl-C."""
    import contextlib

    from rich.live import Live
    from rich.text import Text

    status = study_status(name, runs_dir, results_dir)
    with contextlib.suppress(KeyboardInterrupt), Live(Text(status_text(status)), auto_refresh=False) as live:
        while status["state"] == "running":
            time.sleep(seconds)
            status = study_status(name, runs_dir, results_dir)
            live.update(Text(status_text(status)), refresh=True)
