"""`sovit finetune`: one fine-tuning from the command line, its cost said beforehand, what it brought said afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sovit import UserError
from sovit.data import named_data, open_data
from sovit.encoder.from_timm import Base
from sovit.encoder.trained import open_base
from sovit.files import locked
from sovit.ledger.ledger import update_ledger
from sovit.spec.run import Recipe, Run
from sovit.train.base import check_device
from sovit.train.command import train_here
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
    found: dict = {"cost": summary(run, base, source.num_classes), "before": {}, "rows": []}
    if dry_run:
        return found
    if base.run and (base.run.data, base.run.preset) == (run.data, run.preset):
        metrics = validate(begin(run, base, source.num_classes).to(device), source)
        found["before"] = {metric: metrics[metric] for metric in ("val_loss", "val_error")}
    with locked(ledger.with_suffix(".lock")):
        pass  # a folder that cannot be written is found now, not after the training
    found["rows"] = train_here(run, runs_dir, device)
    update_ledger(ledger, [row | {"study": ledger.stem} for row in found["rows"]])
    return found


def tuning(
    base: Base, trained: str = "attention", *, data: str = "", budgets: Sequence[int] = (), **changes: Any
) -> Run:
    """The Run that fine-tunes a base; what is not said is as the base was trained.

    data: SOURCE:PRESET. budgets: images, a cooldown branch at each; without them a fifth of the base's. changes:
    image_size, patch_size and fields of Recipe. peak_lr: without it RATE x the base's own, or TIMM_RATE. Warm-up takes as
    long as the base's, but at most a tenth of the first budget. The images are those that the base saw, from its first on.
    Raises UserError for what cannot be guessed of a timm model.
    """
    before = base.run
    if before is None and not (data and budgets):
        raise UserError(f"{base.name} does not say what it was trained on; give --data SOURCE:PRESET and --examples N")
    sizes = {name: changes.pop(name) for name in ("image_size", "patch_size") if name in changes}
    recipe = replace(before.recipe, patch_sizes=()) if before else Recipe(peak_lr=TIMM_RATE)
    if before:  # of a base that was fine-tuned itself, over what the rate had been before
        whole = recipe.peak_lr / (RATE[before.trained] if before.base else 1.0)
        recipe = replace(recipe, peak_lr=float(f"{RATE.get(trained, 1.0) * whole:.4g}"))
    recipe = replace(recipe, **changes)
    if not budgets:
        budgets = (max(5, round((base.num_examples or 0) / 5 / recipe.batch_size)) * recipe.batch_size,)
    if data and ":" not in data:
        raise UserError(f"--data {data} names no preset; give SOURCE:PRESET, such as stream:cpu (sovit data list)")
    source, preset, _ = named_data(data or f"{before.data}:{before.preset}" if before else data)
    return Run(
        shape=base.shape.replace(**sizes),
        recipe=replace(recipe, warmup_examples=min(recipe.warmup_examples, min(budgets) // 10)),
        budgets=tuple(budgets),
        data=source,
        preset=preset,
        init_seed=before.init_seed if before else 0,
        data_seed=before.data_seed if before else 0,
        base=base.name,
        base_sha256="" if before else base.sha256,
        trained=trained,  # type: ignore[arg-type]  # Run checks it
    )


def summary(run: Run, base: Base, num_classes: int) -> dict:
    """What a fine-tuning costs, before it is made: parameters and FLOPs against training all of it."""
    shape, part, n = run.shape, run.trained, run.budgets[-1]
    params, flops = shape.trained_params(num_classes, part), shape.step_flops(num_classes, part)
    return {
        "base": base.name,
        "trained": part,
        "from": {"image_size": base.shape.image_size, "patch_size": base.shape.patch_size},
        "to": {"image_size": shape.image_size, "patch_size": shape.patch_size},
        "shape": shape.label,
        "peak_lr": run.recipe.peak_lr,
        "num_examples": n,
        "trained_params": params,
        "share_of_params": params / shape.trained_params(num_classes, "full"),
        "share_of_step": flops / shape.step_flops(num_classes, "full"),
        "train_flops": run.train_flops(n, num_classes),
        "base_train_flops": base.train_flops,
    }


def result_text(result: dict) -> str:
    """What `fine_tune` costs and brought, for a person."""
    cost, base_flops = result["cost"], result["cost"]["base_train_flops"]
    sizes = " -> ".join("{image_size} px by {patch_size}".format_map(cost[at]) for at in ("from", "to"))
    of_base = f", {cost['train_flops'] / base_flops:.0%} of those of its base" if base_flops else ""
    metrics = "loss {val_loss:.4f}, error {val_error:.1%}"
    lines = [
        f"{cost['base']} ({cost['shape']}), {sizes}: {cost['trained']}, {cost['trained_params']:,} parameters,"
        f" {cost['share_of_params']:.0%} of all; a step computes {cost['share_of_step']:.0%} of a full one",
        f"{cost['num_examples']:,} images at a peak rate of {cost['peak_lr']:g}: {cost['train_flops']:.2e} FLOPs{of_base}",
    ]
    if result["before"]:
        lines.append(f"before    {metrics}".format_map(result["before"]))
    for row in result["rows"]:
        found = metrics.format_map(row) if row["status"] == "ok" else row["status"]
        lines.append(f"{row['run_id']}    {found} after {row['num_examples']:,} images")
    if any(row["status"] == "ok" for row in result["rows"]):
        lines.append(f"next: sovit export {result['rows'][-1]['run_id']} --out encoder")
    return "\n".join(lines)
