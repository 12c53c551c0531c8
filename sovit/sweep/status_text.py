"""The status of a study as text for a terminal."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from sovit.sweep.status import StudyStatus, study_status
from sovit.tables import clock, text_table

MAX_LISTED = 8  # budgets and problems that are named; all are in the plain data


def status_text(s: StudyStatus) -> str:
    """The status in lines of at most 100 columns, but for commands, reasons and what vision-language models are made of."""
    lines = _head_lines(s)
    if s.workers:
        names = ["trunk", "shape", "seed", "phase", "share", "loss", "images/s", "GFLOP/s", "left", ""]
        lines += ["", text_table(names, map(_worker_cells, s.workers), left=("trunk", "shape", "phase", ""))]
    if s.best:
        cells = [
            (f"{row['train_flops']:.3g}", row["shape"], f"{row[s.metric]:.4f}", f"{row['num_shapes']}", row["run_id"])
            for row in s.best[:MAX_LISTED]
        ]
        names = ["train FLOPs", "best so far", s.metric, "of shapes", "run"]
        lines += ["", text_table(names, cells, left=("best so far", "run"))]
    if s.problems:
        problems = _problem_lines(s.problems)
        more = [f"and {len(problems) - MAX_LISTED} more"] * (len(problems) > MAX_LISTED)
        lines += ["", *problems[:MAX_LISTED], *more]
    if s.resume:
        lines += ["", f"go on with: {s.resume}"]
    elif s.state == "running" and not s.launches:
        lines += ["", "no launch of it is alive: what trains now ends its trunk, and nothing follows"]
    return "\n".join(lines)


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
    share = (
        f", {flops['done'] / flops['total']:.0%}" if flops["total"] else ""
    )  # of what diverged, nobody kept the bill
    lines = [
        f"{s.study}: {s.state}; {trunks['done']} of {trunks['total']} trunks done{said},"
        f" {answered} of {rows['total']} measurements",
        f"  FLOPs  {flops['done']:.3g} of {flops['total']:.3g} done{share}",
    ]
    if not s.workers:
        return lines + ["  time   workers are starting"] * (s.state == "running" and trunks["waiting"] > 0)
    rate = f"{s.flops_per_second / 1e9:.3g} GFLOP/s by {len(s.workers)} worker{'s' * (len(s.workers) != 1)}"
    if s.seconds_left is not None:
        return [*lines, f"  time   about {clock(s.seconds_left)} left of training steps; {rate}"]
    silent = any(worker["stale"] for worker in s.workers)
    return [
        *lines,
        f"  time   {rate}; no estimate {'while one is silent' if silent else 'before the first measurement'}",
    ]


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
