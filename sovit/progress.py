"""One line of text for a run in training."""

from __future__ import annotations


def progress_text(progress: dict) -> str:
    """One line: what, where, how fast, how long."""
    left = progress["seconds_left"]
    return (
        f"{progress['shape']:>11} {progress['phase']:<8} {progress['share']:5.0%}  loss {progress['loss']:.3f}"
        f"  {progress['images_per_second']:6.0f} img/s  {progress['flops_per_second'] / 1e9:5.1f} GFLOP/s"
        f"  {int(left // 60)}:{int(left % 60):02d} left"
    )
