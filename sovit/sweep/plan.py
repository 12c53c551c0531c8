"""The plan of a sweep, before anything is trained: what, how much compute, how long."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from sovit.spec.any_run import encoder_runs
from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun
from sovit.sweep.queue import Sweep
from sovit.tables import clock, text_table

GPUS = {"H100": 989e12, "A100": 312e12}  # FLOP/s: dense bf16 peak, by their data sheets (SXM)
UTILISATION = 0.4  # of that peak: an assumption, about what a well-fed ViT reaches in bf16
MEASURABLE_FLOPS = 2e10  # a training step above this is not tried out, its time is taken from the matrix-product rate
OVERHEAD = 1.15  # data, clipping and checkpoints come on top of a step that was tried


def plan_of(sweep: Sweep, workers: int, device: str) -> dict:
    """Rows and totals. `compute` counts every branch as if trained alone, as SoViT did; `spent` counts trunks once.

    Of a vision-language model the stages are told, and neither FLOPs nor seconds.
    """
    pending = {run.trunk_id: run for run in sweep.pending()}
    untrained = [run for run in pending.values() if not all(sweep.rows(run))]  # the rest is only to be probed
    costs = try_encoders(encoder_runs(untrained), device)
    rows = []
    for trunk, run in sweep.runs.items():
        flops, seconds = costs.get(trunk, (None, None))
        about: dict[str, Any] = {"trunk_id": trunk, "kind": run.kind, "shape": run.label, **run.parts, **run.numbers}
        about |= {"budgets": list(run.budgets), "compute": None, "spent_compute": None}
        rows.append(about | _of_kind(run) | {"done": trunk not in pending, "seconds": seconds})
        rows[-1].setdefault("train_flops", flops)
    train_flops = sum(row["train_flops"] or 0 for row in rows if not row["done"])
    totals = {
        "study": sweep.name,
        "trunks": len(rows),
        "pending": len(pending),
        "measurements": sum(len(run.budgets) for run in sweep.runs.values()),
        "images": sum(sum(run.budgets) for run in sweep.runs.values()),
        "compute": sum(row["compute"] or 0 for row in rows),
        "spent_compute": sum(row["spent_compute"] or 0 for row in rows),
        "seconds": sum(row["seconds"] or 0 for row in rows) / workers,
        "workers": workers,
        "gpu_hours": {gpu: train_flops / (UTILISATION * peak) / 3600 for gpu, peak in GPUS.items()},
    }
    return {"totals": totals, "trunks": rows}


def _of_kind(run: Any) -> dict:
    if isinstance(run, VlmRun):
        return {"stages": [stage.words for stage in run.stages], "steps": run.num_examples // run.batch_size}
    forward = run.shape.forward_flops
    return {
        "steps": run.budgets[-1] // run.recipe.batch_size,
        "num_params": run.shape.num_params,
        "forward_flops": forward,
        "compute": sum(forward * n for n in run.budgets),
        "spent_compute": forward * run.total_examples,
        "train_flops": run.total_flops,
    }


def try_encoders(runs: Sequence[Run], device: str) -> dict[str, tuple]:
    """trunk_id -> (training FLOPs, seconds), each kind of step tried where it is small, else from a matrix product."""
    known: dict[tuple, float] = {}
    found: dict[str, tuple] = {}
    for run in runs:
        key = run.shape, run.recipe.batch_size, run.recipe.patch_sizes, bool(run.base), run.trained
        flops = run.total_flops / run.total_examples * run.recipe.batch_size
        if key not in known:
            known[key] = _try_step(run, device) if flops < MEASURABLE_FLOPS else flops / matmul_rate(device)
        found[run.trunk_id] = run.total_flops, run.total_examples / run.recipe.batch_size * known[key]
    return found


def _try_step(run: Run, device: str) -> float:
    import torch

    from sovit.encoder.model import build, parameter_groups
    from sovit.train.finetune import freeze
    from sovit.train.profile import seconds_of, wall_clock

    model = build(run.shape, 16, run.recipe.parametrisation, 0).to(device)
    freeze(model, run.trained)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), fused=True)
    images = torch.randn(run.recipe.batch_size, 3, run.shape.image_size, run.shape.image_size, device=device)

    def step() -> None:
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = seconds_of(step, wall_clock(device), min_seconds=0.05)
    drawn = run.total_flops / run.total_examples / run.shape.step_flops(0, run.trained) if run.recipe.patch_sizes else 1
    return seconds * drawn * OVERHEAD


@functools.cache
def matmul_rate(device: str) -> float:
    """FLOP/s of a 1024 x 1024 float32 matrix product on one thread: an upper bound of what training reaches."""
    import torch

    from sovit.train.profile import seconds_of, wall_clock

    a = torch.randn(1024, 1024, device=device)
    return 2 * 1024**3 / seconds_of(lambda: a @ a, wall_clock(device), min_seconds=0.1)


def print_plan(sweep: Sweep, workers: int, device: str, data: Sequence[str], as_json: bool) -> None:
    """Print the plan: a table of the trunks, what they cost together, and lines on their data; or JSON."""
    plan = plan_of(sweep, workers, device) | {"data": list(data)}
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    names = [
        "trunk",
        "shape",
        "params",
        "GFLOPs/image",
        "lr",
        "seed",
        "images a branch",
        "steps",
        "train TFLOPs",
        "time",
    ]
    print(text_table(names, map(_cells, plan["trunks"]), left=("trunk", "shape", "images a branch")) + "\n")
    t = plan["totals"]
    print(
        f"{t['study']}: {t['trunks']} trunks ({t['pending']} to do), {t['measurements']} measurements,"
        f" {t['images']:,} images\n"
        f"compute of encoders (forward FLOPs x images): {t['compute'] / 1e9:.6g} GFLOPs if every branch were trained alone,"
        f" {t['spent_compute'] / 1e9:.6g} with shared trunks; training costs 3 x that\n"
        f"estimated time: {clock(t['seconds'])} with {workers} worker{'s' * (workers > 1)} on {device},"
        " without probes and vision-language models"
    )
    if t["gpu_hours"]["H100"] >= 0.1:  # smaller studies are of shapes that keep no GPU busy
        hours = (f"{t['gpu_hours'][gpu]:.3g} on an {gpu} ({peak / 1e12:.0f} TFLOP/s)" for gpu, peak in GPUS.items())
        print(f"GPU-hours, were {UTILISATION:.0%} of the dense bf16 peak reached: " + ", ".join(hours))
    for line in data:
        print(line)


def _cells(row: dict) -> list[str]:
    def cell(name: str, form: str, scale: float = 1) -> str:
        return "" if row.get(name) is None else format(row[name] * scale, form)

    sizes = f" /{row['patch_size']} @{row['image_size']}" if "patch_size" in row else f" {row['projector']}"
    without = "?" if "stages" in row else "probe"
    how = f" {row['trained']}" if "trained" in row else ""
    return [
        row["trunk_id"],
        row["shape"] + sizes + how,
        cell("num_params", ",d"),
        cell("forward_flops", ".4g", 1e-9),
        cell("peak_lr", "g"),
        cell("init_seed", "d"),
        "\n".join(row["stages"]) if "stages" in row else " ".join(f"{n:,}" for n in row["budgets"]),
        cell("steps", ",d"),
        cell("train_flops", ",.4g", 1e-12),
        "done" if row["done"] else without if row["seconds"] is None else clock(row["seconds"]),
    ]
