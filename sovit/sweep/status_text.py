"""The status of a study as text for a terminal."""

from __future__ import annotations

import contextlib
import textwrap
import time
from pathlib import Path

from sovit.sweep.status import StudyStatus, study_status
from sovit.tables import clock, text_table

MAX_LISTED = 8  # waiting trunks, budgets and problems that are named; all are in the plain data


def status_text(s: StudyStatus) -> str:
    """The status in lines of at most 100 columns, but for commands, reasons and what vision-language models are made of."""
    lines = [*_head_lines(s), *_time_lines(s)]
    if s.workers:
        names = ["trunk", "shape", "seed", "phase", "share", "loss", "images/s", "GFLOP/s", "left", ""]
        lines += ["", text_table(names, map(_worker_cells, s.workers), left=("trunk", "shape", "phase", ""))]
    if s.waiting:
        listed = ", ".join(_first([f"{trunk['shape']} seed {trunk['init_seed']}" for trunk in s.waiting]))
        lines += ["", "waiting", textwrap.fill(listed, 98, initial_indent="  ", subsequent_indent="  ")]
    if s.best:
        cells = [
            (f"{row['train_flops']:.3g}", row["shape"], f"{row[s.metric]:.4f}", f"{row['num_shapes']}", row["run_id"])
            for row in s.best[:MAX_LISTED]
        ]
        names = ["train FLOPs", "best so far", s.metric, "of shapes", "run"]
        lines += ["", text_table(names, cells, left=("best so far", "run"))]
    if s.problems:
        lines += ["", *_first(_problem_lines(s.problems))]
    if s.resume:
        lines += ["", f"go on with: {s.resume}"]
    elif s.state == "running" and not s.launches:
        lines += ["", "no launch of it is alive: what trains now ends its trunk, and nothing follows"]
    return "\n".join(lines)


def _first(names: list[str]) -> list[str]:
    return names[:MAX_LISTED] + [f"and {len(names) - MAX_LISTED} more"] * (len(names) > MAX_LISTED)


def _head_lines(s: StudyStatus) -> list[str]:
    trunks, rows, flops = s.trunks, s.measurements, s.train_flops
    said = ", ".join(f"{trunks[name]} {name}" for name in ("running", "waiting", "failed") if trunks[name])
    said = f" ({said})" if said else ""
    answered = rows["ok"] + rows["diverged"]
    if not s.design_known:
        return [
            f"{s.study}: nothing runs; {trunks['done']} trunks done{said}, {answered} measurements",
            f"  FLOPs  {flops['done']:.3g} done; what else is asked for is not known without"
            f" {Path(s.runs) / s.study}.design.json",
        ]
    notes = ""
    if flops["left"] and not flops["head_counted"]:
        notes = " (task head not counted before the first measurement)"
    if flops["uncounted"]:
        notes += f" ({flops['uncounted']} vision-language models not counted before the first is measured)"
    # of what diverged, nobody kept the bill
    share = f", {flops['done'] / flops['total']:.0%}" if flops["total"] else ""
    return [
        f"{s.study}: {s.state}; {trunks['done']} of {trunks['total']} trunks done{said},"
        f" {answered} of {rows['total']} measurements",
        f"  FLOPs  {flops['done']:.3g} of {flops['total']:.3g} done{share}{notes}",
    ]


def _time_lines(s: StudyStatus) -> list[str]:
    running, waiting = s.trunks["running"], s.trunks["waiting"]
    if s.state != "running":
        if s.train_flops["left"] and s.worker_seconds_left is not None:
            left = clock(s.worker_seconds_left)
            return [f"  time   about {left} of one worker left, each trunk at the pace of the nearest measured"]
        return []
    if not running:
        return ["  time   workers are starting"] if waiting else []
    rate = f"{s.flops_per_second / 1e9:.3g} GFLOP/s by {running} worker{'s' * (running != 1)}"
    if s.seconds_left is None:
        silent = any(worker["stale"] for worker in s.workers)
        return [f"  time   {rate}; no estimate {'while one is silent' if silent else 'before the first measurement'}"]
    made = "running at their own pace, waiting at the nearest measured shape's"
    lines = [f"  time   about {clock(s.seconds_left)} left; {rate}"]
    return lines + [f"         (training steps alone; {made})"] * (waiting > 0)


def _worker_cells(worker: dict) -> list[str]:
    def cell(name: str, form: str, scale: float = 1.0) -> str:
        return "" if worker[name] is None else format(worker[name] * scale, form)

    return [
        *(str(worker[name]) for name in ("trunk_id", "shape", "init_seed", "phase")),
        cell("share", ".0%"),
        cell("loss", ".3f"),
        cell("images_per_second", ",.0f"),
        cell("flops_per_second", ",.1f", 1e-9),
        "" if worker["seconds_left"] is None else clock(worker["seconds_left"]),
        f"silent for {clock(worker['silent_seconds'])}" if worker["stale"] else "",
    ]


def _problem_lines(problems: list[dict]) -> list[str]:
    """One line for the branches of a trunk that ended alike."""
    alike: dict[tuple, list[int]] = {}
    for p in problems:
        said = tuple(p[key] for key in ("status", "trunk_id", "shape", "init_seed", "error"))
        alike.setdefault(said, []).append(p["num_examples"])
    return [
        f"{status}: {trunk} {shape} seed {seed} at {', '.join(f'{n:,}' for n in sorted(examples))} images: {error}"
        for (status, trunk, shape, seed, error), examples in alike.items()
    ]


def watch(name: str, runs_dir: Path, results_dir: Path | None, seconds: float) -> None:
    """Draw the status anew every so many seconds until nothing runs any more, or Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    status = study_status(name, runs_dir, results_dir)
    with contextlib.suppress(KeyboardInterrupt), Live(Text(status_text(status)), auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(seconds)
            status = study_status(name, runs_dir, results_dir)
            live.update(Text(status_text(status)), refresh=True)
