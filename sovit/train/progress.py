"""What a run in training says of itself: the file that others read, and one line of text."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sovit.files import write_atomic


def write_progress(runs_dir: Path | str, progress: dict) -> None:
    """Write `runs/<trunk_id>/progress.json`; `updated` in it is the unix time of this writing, in seconds."""
    path = Path(runs_dir) / progress["trunk_id"] / "progress.json"
    write_atomic(path, json.dumps({**progress, "updated": time.time()}))


def progress_text(progress: dict) -> str:
    """One line: what, where, how fast, how long."""
    left = progress["seconds_left"]
    return (
        f"{progress['shape']:>11} {progress['phase']:<8} {progress['share']:5.0%}  loss {progress['loss']:.3f}"
        f"  {progress['images_per_second']:6.0f} img/s  {progress['flops_per_second'] / 1e9:5.1f} GFLOP/s"
        f"  {int(left // 60)}:{int(left % 60):02d} left"
    )


def say(line: str) -> None:
    """Print a line on standard error, over the progress that may stand there."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}sovit: {line}", file=sys.stderr, flush=True)
