"""`sovit finetune`: one fine-tuning from the command line, its cost said beforehand, what it brought said afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sovit import UserError
from sovit.data import Source, named_data, open_data
from sovit.encoder.base import Base
from sovit.encoder.trained import open_base
from sovit.files import locked
from sovit.ledger.ledger import update_ledger
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import TRAINED
from sovit.train.command import train_here
from sovit.train.device import check_device
from sovit.train.evaluate import validate
from sovit.train.finetune import begin
from sovit.train.trainer import check_readout

# peak rate of a fine-tuning over that of its base, as studies/finetune_rate.py found it; of a timm model the rate itself:
# DeiT-III's at 384 px, the nearest that was published (facebookresearch/deit, README_revenge.md)
RATE = {"full": 1.0, "attention": 2.0, "mlp": 2.0, "head": 2.0}
TIMM_RATE = 1e-5


def fine_tune(
    name: str, runs_dir: Path, ledger: Path, device: str = "cpu", dry_run: bool = False, **options: Any
) -> dict:
    """Fine-tune the base `name` (`tuning` has the options), merge its rows into `ledger`.

    Returns {cost: what `summary` says, before: {val_loss, val_error} of the resized base where its task head goes on,
    rows}; the last two are empty in a dry run. Raises UserError, and what training does.
    """
    check_device(device)
    base = open_base(name, runs_dir)
    run = tuning(base, **options).replace(study=ledger.stem)
    source = open_data(run.data, run.preset, run.shape.image_size, run.shape.patch_size, run.data_seed, device)
    check_readout(run, source.readout)
    cost = summary(run, base, source.num_classes)
    if dry_run:
        return {"cost": cost, "before": {}, "rows": []}
    before = _before(run, base, source, device)
    with locked(ledger.with_suffix(".lock")):
        pass  # a folder that cannot be written is found now, not after the training
    rows = train_here(run, runs_dir, device)
    update_ledger(ledger, [row | {"study": ledger.stem} for row in rows])
    return {"cost": cost, "before": before, "rows": rows}


def _before(run: Run, base: Base, source: Source, device: str) -> dict:
    """Loss and error of the base at the new size, before any training; nothing where it has no task head for the data."""
    if base.run is None or (base.run.data, base.run.preset) != (run.data, run.preset):
        return {}
    metrics = validate(begin(run, base, source.num_classes).to(device), source)
    return {metric: metrics[metric] for metric in ("val_loss", "val_error")}


def tuning(
    base: Base,
    trained: str = "attention",
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    budgets: Sequence[int] = (),
    data: str = "",
    peak_lr: float | None = None,
    **recipe: Any,
) -> Run:
    """The Run that fine-tunes a base; what is not said is as the base was trained.

    data: SOURCE:PRESET. budgets: images, a cooldown branch at each; without them a fifth of the base's. peak_lr: without
    it RATE x the base's own, or TIMM_RATE. Warm-up takes as long as the base's, but at most a tenth of the first budget.
    The images are those that the base saw, from its first on. Raises UserError for what cannot be guessed of a timm model.
    """
    before = base.run
    if before is None and not (data and budgets):
        raise UserError(f"{base.name} does not say what it was trained on; give --data SOURCE:PRESET and --examples N")
    start = Recipe(peak_lr=TIMM_RATE) if before is None else replace(before.recipe, patch_sizes=())
    if peak_lr is None and before is not None:  # of a base that was fine-tuned itself, over what it had been before
        whole = start.peak_lr / (RATE[before.trained] if before.base else 1.0)
        peak_lr = float(f"{RATE.get(trained, 1.0) * whole:.4g}")
    settled = replace(start, peak_lr=start.peak_lr if peak_lr is None else peak_lr, **recipe)
    if data and not data.partition(":")[2]:
        raise UserError(f"--data {data} names no preset; give SOURCE:PRESET, such as stream:cpu (sovit data list)")
    if not budgets:
        batches = max(5, round((base.num_examples or 0) / 5 / settled.batch_size))
        budgets = (batches * settled.batch_size,)
    settled = replace(settled, warmup_examples=min(start.warmup_examples, min(budgets) // 10))
    source, preset, _ = named_data(data or f"{before.data}:{before.preset}" if before else data)
    sizes = {"image_size": image_size, "patch_size": patch_size}
    return Run(
        shape=base.shape.replace(**{name: size for name, size in sizes.items() if size is not None}),
        recipe=settled,
        budgets=tuple(budgets),
        data=source,
        preset=preset,
        init_seed=before.init_seed if before else 0,
        data_seed=before.data_seed if before else 0,
        base=base.name,
        base_sha256="" if before else base.sha256,
        trained=trained,
    )


def summary(run: Run, base: Base, num_classes: int) -> dict:
    """What a fine-tuning costs, before it is made: parameters, FLOPs and bytes (of float32) against training it whole."""
    shape = run.shape
    params = {part: shape.trained_params(num_classes, part) for part in TRAINED}
    flops = {part: shape.step_flops(num_classes, part) for part in TRAINED}
    n = run.budgets[-1]
    return {
        "base": base.name,
        "trained": run.trained,
        "from": {"image_size": base.shape.image_size, "patch_size": base.shape.patch_size},
        "to": {"image_size": shape.image_size, "patch_size": shape.patch_size},
        "shape": shape.label,
        "peak_lr": run.recipe.peak_lr,
        "num_examples": n,
        "trained_params": params[run.trained],
        "share_of_params": params[run.trained] / params["full"],
        "step_flops": flops[run.trained],
        "share_of_step": flops[run.trained] / flops["full"],
        "train_flops": run.train_flops(n, num_classes),
        "base_train_flops": base.train_flops,
    }


def summary_text(said: dict) -> str:
    """One or two lines of `summary`."""
    sizes = [f"{said[at]['image_size']} px by {said[at]['patch_size']}" for at in ("from", "to")]
    of_base = (
        f", {said['train_flops'] / said['base_train_flops']:.0%} of those of its base"
        if said["base_train_flops"]
        else ""
    )
    return (
        f"{said['base']} ({said['shape']}), {sizes[0]} -> {sizes[1]}: {said['trained']},"
        f" {said['trained_params']:,} parameters, {said['share_of_params']:.0%} of all;"
        f" a step computes {said['share_of_step']:.0%} of a full one\n"
        f"{said['num_examples']:,} images at a peak rate of {said['peak_lr']:g}: {said['train_flops']:.2e} FLOPs{of_base}"
    )


def result_text(result: dict) -> str:
    """What `fine_tune` brought, for a person."""
    lines = [summary_text(result["cost"])]
    if result["before"]:
        lines.append("before    loss {val_loss:.4f}, error {val_error:.1%}".format_map(result["before"]))
    for row in result["rows"]:
        found = "loss {val_loss:.4f}, error {val_error:.1%}".format_map(row) if row["status"] == "ok" else row["status"]
        stored = f"; {row['stored_bytes']:,} bytes beside its base" if row.get("stored_bytes") else ""
        lines.append(f"{row['run_id']}    {found} after {row['num_examples']:,} images{stored}")
    if any(row["status"] == "ok" for row in result["rows"]):
        lines.append(f"next: sovit export {result['rows'][-1]['run_id']} --out encoder")
    return "\n".join(lines)
