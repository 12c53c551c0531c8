"""The plan of a sweep, before anything is trained: what, how much compute, how long."""

from __future__ import annotations

import json
import time

from sovit.run import Run

GPUS = {"H100": 989e12, "A100": 312e12}  # FLOP/s: dense bf16 peak, by their data sheets (SXM)
UTILISATION = 0.4  # of that peak: an assumption, about what a well-fed ViT reaches in bf16
MEASURABLE_FLOPS = 2e10  # a training step above this is not tried out, its time is taken from the matrix-product rate


def plan_of(sweep, workers: int, device: str) -> dict:
    """Rows and totals. `compute` counts every branch as if trained alone, as SoViT did; `spent` counts trunks once."""
    pending = {run.trunk_id for run in sweep.pending()}
    untrained = {trunk for trunk in pending if not all(sweep.rows(sweep.runs[trunk]))}  # the rest is only to be probed
    seconds = step_seconds([sweep.runs[trunk] for trunk in sweep.runs if trunk in untrained], device)
    rows = []
    for trunk, run in sweep.runs.items():
        forward, batch = run.shape.forward_flops, run.recipe.batch_size
        rows.append(
            {
                "trunk_id": trunk,
                "shape": run.shape.label,
                "patch_size": run.shape.patch_size,
                "image_size": run.shape.image_size,
                "trained": run.trained if run.base else None,
                "num_params": run.shape.num_params,
                "forward_flops": forward,
                "peak_lr": run.recipe.peak_lr,
                "init_seed": run.init_seed,
                "budgets": list(run.budgets),
                "steps": run.budgets[-1] // batch,
                "compute": sum(forward * n for n in run.budgets),
                "spent_compute": forward * run.total_examples,
                "train_flops": run.total_flops,
                "done": trunk not in pending,
                "seconds": run.total_examples / batch * seconds[_key(run)] if trunk in untrained else None,
            }
        )
    left = sum(row["seconds"] or 0 for row in rows)
    train_flops = sum(row["train_flops"] for row in rows if not row["done"])
    totals = {
        "study": sweep.name,
        "trunks": len(rows),
        "pending": len(pending),
        "measurements": sum(len(run.budgets) for run in sweep.runs.values()),
        "images": sum(sum(run.budgets) for run in sweep.runs.values()),
        "compute": sum(row["compute"] for row in rows),
        "spent_compute": sum(row["spent_compute"] for row in rows),
        "seconds": left / workers,
        "workers": workers,
        "gpu_hours": {gpu: train_flops / (UTILISATION * peak) / 3600 for gpu, peak in GPUS.items()},
    }
    return {"totals": totals, "trunks": rows}


def print_plan(sweep, workers: int, device: str, as_json: bool) -> None:
    plan = plan_of(sweep, workers, device)
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in (
        "trunk",
        "shape",
        "params",
        "GFLOPs/image",
        "lr",
        "seed",
        "images a branch",
        "steps",
        "GFLOPs",
        "time",
    ):
        table.add_column(
            name, justify="left" if name in ("trunk", "shape", "images a branch") else "right", no_wrap=True
        )
    for row in plan["trunks"]:
        table.add_row(
            row["trunk_id"],
            f"{row['shape']} /{row['patch_size']} @{row['image_size']}" + f" {row['trained']}" * bool(row["trained"]),
            f"{row['num_params']:,}",
            f"{row['forward_flops'] / 1e9:.4g}",
            f"{row['peak_lr']:g}",
            str(row["init_seed"]),
            " ".join(_short(n) for n in row["budgets"]),
            f"{row['steps']:,}",
            f"{row['compute'] / 1e9:.4g}",
            "done" if row["done"] else "probe" if row["seconds"] is None else clock(row["seconds"]),
        )
    Console(width=150 if not Console().is_terminal else None).print(table)
    t = plan["totals"]
    print(
        f"\n{t['study']}: {t['trunks']} trunks ({t['pending']} to do), {t['measurements']} measurements,"
        f" {_short(t['images'])} images"
        f"\ncompute (forward FLOPs x images): {t['compute'] / 1e9:.6g} GFLOPs if every branch were trained alone,"
        f" {t['spent_compute'] / 1e9:.6g} with shared trunks; training costs 3 x that"
        f"\nestimated time: {clock(t['seconds'])} with {t['workers']} worker{'s' * (t['workers'] > 1)} on {device}"
        + ", probes apart"
        * any(run.probe for run in sweep.runs.values())
    )
    if t["gpu_hours"]["H100"] >= 0.1:  # smaller studies are of shapes that keep no GPU busy
        hours = (f"{t['gpu_hours'][gpu]:.3g} on an {gpu} ({peak / 1e12:.0f} TFLOP/s)" for gpu, peak in GPUS.items())
        print(f"GPU-hours, were {UTILISATION:.0%} of the dense bf16 peak reached: " + ", ".join(hours))


def step_seconds(runs: list[Run], device: str) -> dict[tuple, float]:
    """Seconds of one training step, by (shape, batch): tried out where a step is small, else from a matrix product."""
    out = {}
    for run in runs:
        key = _key(run)
        if key in out:
            continue
        flops = run.total_flops / run.total_examples * run.recipe.batch_size
        out[key] = _try_step(run, device) if flops < MEASURABLE_FLOPS else flops / matmul_rate(device)
    return out


def _key(run: Run) -> tuple:
    return run.shape, run.recipe.batch_size, run.recipe.patch_sizes, bool(run.base), run.trained


def _try_step(run: Run, device: str) -> float:
    import torch

    from sovit.finetune import freeze
    from sovit.model import build, parameter_groups

    torch.set_num_threads(1)
    model = build(run.shape, 16, run.recipe.parametrisation, 0).to(device)
    freeze(model, run.trained)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), fused=True)
    images = torch.randn(run.recipe.batch_size, 3, run.shape.image_size, run.shape.image_size, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    drawn = run.total_flops / run.total_examples / run.shape.step_flops(0, run.trained) if run.recipe.patch_sizes else 1
    return sorted(seconds[1:])[2] * drawn * 1.15  # data, clipping and checkpoints come on top


_matmul_rates: dict[str, float] = {}


def matmul_rate(device: str) -> float:
    """FLOP/s of a 1024 x 1024 float32 matrix product on one thread: an upper bound of what training reaches."""
    if device not in _matmul_rates:
        import torch

        torch.set_num_threads(1)
        a = torch.randn(1024, 1024, device=device)
        (a @ a).sum().item()
        start = time.perf_counter()
        for _ in range(5):
            b = a @ a
        b.sum().item()
        _matmul_rates[device] = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    return _matmul_rates[device]


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 3 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


def _short(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return str(n)
