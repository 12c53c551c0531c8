"""The status of a study as text for a terminal."""

from __future__ import annotations

import contextlib
import textwrap
import time
from pathlib import Path

from sovit.sweep.plan import clock
from sovit.sweep.status import MAX_LISTED, Problem, StudyStatus, Worker, study_status
from sovit.tables import text_table


def status_text(s: StudyStatus) -> str:
    """The status in lines of at most 100 columns, but for commands, reasons and what vision-language models are made of."""
    lines = [*_head_lines(s), *_time_lines(s)]
    if s.workers:
        names = ["trunk", "shape", "seed", "phase", "share", "loss", "images/s", "GFLOP/s", "left", ""]
        lines += ["", text_table(names, map(_worker_cells, s.workers), left=("trunk", "shape", "phase", ""))]
    if s.waiting:
        more = len(s.waiting) - MAX_LISTED
        shown = [f"{trunk.shape} seed {trunk.init_seed}" for trunk in s.waiting[:MAX_LISTED]]
        listed = ", ".join([*shown, *[f"and {more} more"] * (more > 0)])
        lines += ["", "waiting", textwrap.fill(listed, 98, initial_indent="  ", subsequent_indent="  ")]
    if s.best:
        cells = [
            (f"{row.train_flops:.3g}", row.shape, f"{row.value:.4f}", f"{row.num_shapes}", row.run_id)
            for row in s.best[:MAX_LISTED]
        ]
        names = ["train FLOPs", "best so far", s.metric, "of shapes", "run"]
        lines += ["", text_table(names, cells, left=("best so far", "run"))]
    if s.problems:
        lines += ["", *_problem_lines(s.problems)]
    if s.resume:
        lines += ["", f"go on with: {s.resume}"]
    elif s.state == "running" and not s.launches:
        lines += ["", "no launch of it is alive: what trains now ends its trunk, and nothing follows"]
    return "\n".join(lines)


def _head_lines(s: StudyStatus) -> list[str]:
    trunks, rows, flops = s.trunks, s.measurements, s.train_flops
    counts = {"running": trunks.running, "waiting": trunks.waiting, "failed": trunks.failed}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    said = f" ({said})" if said else ""
    answered = rows.ok + rows.diverged
    if not s.design_known:
        return [
            f"{s.study}: {'running' if trunks.running else 'nothing runs'}; {trunks.done} trunks done{said},"
            f" {answered} measurements",
            f"  FLOPs  {flops.done:.3g} done; what else is asked for is not known without"
            f" {Path(s.runs) / s.study}.design.json",
        ]
    notes = ""
    if flops.left and not flops.head_counted:
        notes = " (task head not counted before the first measurement)"
    if flops.uncounted:
        notes += f" ({flops.uncounted} vision-language models not counted before the first is measured)"
    share = f", {flops.done / flops.total:.0%}" if flops.total else ""  # of what diverged, nobody kept the bill
    return [
        f"{s.study}: {s.state}; {trunks.done} of {trunks.total} trunks done{said}, {answered} of {rows.total} measurements",
        f"  FLOPs  {flops.done:.3g} of {flops.total:.3g} done{share}{notes}",
    ]


def _time_lines(s: StudyStatus) -> list[str]:
    running, waiting = s.trunks.running, s.trunks.waiting
    if s.state != "running":
        if s.train_flops.left and s.worker_seconds_left is not None:
            left = clock(s.worker_seconds_left)
            return [f"  time   about {left} of one worker left, each trunk at the pace of the nearest measured"]
        return []
    if not running:
        return ["  time   workers are starting"] if waiting else []
    rate = f"{s.flops_per_second / 1e9:.3g} GFLOP/s by {running} worker{'s' * (running != 1)}"
    if s.seconds_left is None:
        silent = any(worker.stale for worker in s.workers)
        return [f"  time   {rate}; no estimate {'while one is silent' if silent else 'before the first measurement'}"]
    made = "running at their own pace, waiting at the nearest measured shape's"
    lines = [f"  time   about {clock(s.seconds_left)} left; {rate}"]
    return lines + [f"         (training steps alone; {made})"] * (waiting > 0)


def _worker_cells(worker: Worker) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rate = worker.flops_per_second
    return [
        worker.trunk_id,
        worker.shape,
        str(worker.init_seed),
        worker.phase,
        cell(worker.share, ".0%"),
        cell(worker.loss, ".3f"),
        cell(worker.images_per_second, ",.0f"),
        cell(None if rate is None else rate / 1e9, ",.1f"),
        "" if worker.seconds_left is None else clock(worker.seconds_left),
        f"silent for {clock(worker.silent_seconds)}" if worker.stale else "",
    ]


def _problem_lines(problems: list[Problem]) -> list[str]:
    """One line for the branches of a trunk that ended alike."""
    alike: dict[tuple, list[int]] = {}
    for p in problems:
        alike.setdefault((p.status, p.trunk_id, p.shape, p.init_seed, p.error), []).append(p.num_examples)
    lines = [
        f"{status}: {trunk} {shape} seed {seed} at {', '.join(f'{n:,}' for n in sorted(examples))} images: {error}"
        for (status, trunk, shape, seed, error), examples in alike.items()
    ]
    return lines[:MAX_LISTED] + [f"and {len(lines) - MAX_LISTED} more"] * (len(lines) > MAX_LISTED)


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
