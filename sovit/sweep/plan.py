"""The plan of a sweep, before anything is trained: what, how much compute, how long."""

from __future__ import annotations

import functools
import json

from sovit import UserError
from sovit.spec.any_run import vlm_runs
from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun
from sovit.tables import clock, text_table

GPUS = {"H100": 989e12, "A100": 312e12}  # FLOP/s: dense bf16 peak, by their data sheets (SXM)
UTILISATION = 0.4  # of that peak: an assumption, about what a well-fed ViT reaches in bf16
MEASURABLE_FLOPS = 2e10  # a training step above this is not tried out, its time is taken from the matrix-product rate
OVERHEAD = 1.15  # data, clipping and checkpoints come on top of a step that was tried


def plan_of(sweep, workers: int, device: str) -> dict:
    """Rows and totals. `compute` counts every branch as if trained alone, as SoViT did; `spent` counts trunks once.

    Of a vision-language model nothing is known that is not tried: its FLOPs and seconds are of a real step of each stage,
    None where its parts are not here, for a reason that stands in `notes`.
    """
    pending = {run.trunk_id for run in sweep.pending()}
    untrained = {trunk for trunk in pending if not all(sweep.rows(sweep.runs[trunk]))}  # the rest is only to be probed
    encoders = [run for run in sweep.runs.values() if isinstance(run, Run)]
    seconds = step_seconds([run for run in encoders if run.trunk_id in untrained], device)
    tried, notes = try_vlm_runs(sweep, vlm_runs([sweep.runs[t] for t in sweep.runs if t in untrained]), device)
    rows = []
    for trunk, run in sweep.runs.items():
        if isinstance(run, VlmRun):
            flops, took = tried.get(trunk, (None, None))
            rows.append(_vlm_row(run, flops, trunk not in pending, took))
        else:
            took = run.total_examples / run.recipe.batch_size * seconds[_key(run)] if trunk in untrained else None
            rows.append(_row(run, trunk not in pending, took))
    left = sum(row["seconds"] or 0 for row in rows)
    train_flops = sum(row["train_flops"] or 0 for row in rows if not row["done"])
    totals = {
        "study": sweep.name,
        "trunks": len(rows),
        "pending": len(pending),
        "measurements": sum(len(run.budgets) for run in sweep.runs.values()),
        "images": sum(sum(run.budgets) for run in sweep.runs.values()),
        "compute": sum(row["compute"] or 0 for row in rows),
        "spent_compute": sum(row["spent_compute"] or 0 for row in rows),
        "seconds": left / workers,
        "workers": workers,
        "gpu_hours": {gpu: train_flops / (UTILISATION * peak) / 3600 for gpu, peak in GPUS.items()},
    }
    return {"totals": totals, "trunks": rows, "notes": notes}


def _row(run: Run, done: bool, seconds: float | None) -> dict:
    forward, batch = run.shape.forward_flops, run.recipe.batch_size
    return {
        "trunk_id": run.trunk_id,
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
        "done": done,
        "seconds": seconds,
    }


def _vlm_row(run: VlmRun, train_flops: float | None, done: bool, seconds: float | None) -> dict:
    return {
        "trunk_id": run.trunk_id,
        "kind": "vlm",
        "encoder": run.encoder,
        "language_model": run.language_model,
        "projector": run.projector,
        "stages": [stage.words for stage in run.stages],
        "init_seed": run.init_seed,
        "budgets": list(run.budgets),
        "steps": run.num_examples // run.batch_size,
        "compute": None,
        "spent_compute": None,
        "train_flops": train_flops,
        "done": done,
        "seconds": seconds,
    }


def try_vlm_runs(sweep, runs: list[VlmRun], device: str) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """trunk_id -> (training FLOPs, seconds), from a tried step of each stage; and why there are none of the others."""
    if not runs:
        return {}, []
    import torch

    from sovit.vlm.step_cost import Trials

    torch.set_num_threads(1)
    trials = Trials(sweep.runs, sweep.runs_dir, device)
    found: dict[str, tuple[float, float]] = {}
    notes: list[str] = []
    for run in sorted(runs, key=lambda run: run.language_model):
        try:
            costs = trials.costs(run)
        except UserError as error:
            notes += [str(error)] * (str(error) not in notes)
            continue
        flops = sum(stage.num_examples * per_image for stage, (per_image, _) in zip(run.stages, costs))
        seconds = sum(stage.num_examples * each for stage, (_, each) in zip(run.stages, costs))
        found[run.trunk_id] = flops, seconds * OVERHEAD
    return found, notes


def print_plan(sweep, workers: int, device: str, as_json: bool) -> None:
    plan = plan_of(sweep, workers, device)
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    encoders = [row for row in plan["trunks"] if row.get("kind") != "vlm"]
    readers = [row for row in plan["trunks"] if row.get("kind") == "vlm"]
    if encoders:
        names = ["trunk", "shape", "params", "GFLOPs/image", "lr", "seed", "images a branch", "steps", "GFLOPs", "time"]
        print(text_table(names, map(_cells, encoders), left=("trunk", "shape", "images a branch")) + "\n")
    if readers:
        names = ["trunk", "encoder", "language model", "projector", "stages", "seed", "steps", "TFLOPs", "time"]
        print(text_table(names, map(_vlm_cells, readers), left=names[:5]) + "\n")
    probed = any(run.probe for run in sweep.runs.values())
    print("\n".join(_total_lines(plan["totals"], encoders, readers, probed, device)))
    for note in plan["notes"]:
        print(f"no estimate: {note}")


def _total_lines(t: dict, encoders: list[dict], readers: list[dict], probed: bool, device: str) -> list[str]:
    lines = [
        f"{t['study']}: {t['trunks']} trunks ({t['pending']} to do), {t['measurements']} measurements,"
        f" {_short(t['images'])} images"
    ]
    if encoders:
        lines.append(
            f"compute (forward FLOPs x images): {t['compute'] / 1e9:.6g} GFLOPs if every branch were trained alone,"
            f" {t['spent_compute'] / 1e9:.6g} with shared trunks; training costs 3 x that"
            + ", of the encoders alone"
            * bool(readers)
        )
    tried = [row["seconds"] is not None for row in readers if not row["done"]]
    apart = ["probes"] * probed
    if any(tried):
        lines.append("vision-language models: FLOPs and time of training, from one step tried of each stage")
        apart.append("answering the validation questions")
    if not all(tried):
        apart.append(f"{tried.count(False)} vision-language models")
    lines.append(
        f"estimated time: {clock(t['seconds'])} with {t['workers']} worker{'s' * (t['workers'] > 1)} on {device}"
        + f", {' and '.join(apart)} apart" * bool(apart)
    )
    if t["gpu_hours"]["H100"] >= 0.1:  # smaller studies are of shapes that keep no GPU busy
        hours = (f"{t['gpu_hours'][gpu]:.3g} on an {gpu} ({peak / 1e12:.0f} TFLOP/s)" for gpu, peak in GPUS.items())
        lines.append(f"GPU-hours, were {UTILISATION:.0%} of the dense bf16 peak reached: " + ", ".join(hours))
    return lines


def _cells(row: dict) -> list[str]:
    return [
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
    ]


def _vlm_cells(row: dict) -> list[str]:
    return [
        row["trunk_id"],
        row["encoder"],
        row["language_model"],
        "" if row["encoder"].startswith("blind:") else row["projector"],
        "\n".join(row["stages"]),
        str(row["init_seed"]),
        f"{row['steps']:,}",
        "" if row["train_flops"] is None else f"{row['train_flops'] / 1e12:.3g}",
        "done" if row["done"] else "?" if row["seconds"] is None else clock(row["seconds"]),
    ]


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
    from torch.utils.benchmark import Timer

    from sovit.encoder.model import build, parameter_groups
    from sovit.train.finetune import freeze

    model = build(run.shape, 16, run.recipe.parametrisation, 0).to(device)
    freeze(model, run.trained)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), fused=True)
    images = torch.randn(run.recipe.batch_size, 3, run.shape.image_size, run.shape.image_size, device=device)

    def step() -> None:
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = Timer("step()", globals={"step": step}, num_threads=1).blocked_autorange(min_run_time=0.05).median
    drawn = run.total_flops / run.total_examples / run.shape.step_flops(0, run.trained) if run.recipe.patch_sizes else 1
    return seconds * drawn * OVERHEAD


@functools.cache
def matmul_rate(device: str) -> float:
    """FLOP/s of a 1024 x 1024 float32 matrix product on one thread: an upper bound of what training reaches."""
    import torch
    from torch.utils.benchmark import Timer

    a = torch.randn(1024, 1024, device=device)
    return 2 * 1024**3 / Timer("a @ a", globals={"a": a}, num_threads=1).timeit(5).median


def _short(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return str(n)
