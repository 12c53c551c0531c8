"""What a step of fine-tuning costs where only a part is trained: the saving that arXiv 2203.09795 claims, measured.

The step is that of the trainer: `sovit.loop.fit` with AdamW and gradient clipping, on random images. Time and peak memory
are taken as `sovit.hardware` takes them, parts in the place of shapes: every repeat goes round all parts of a shape, there
and back in turn, so that neither a slow minute nor a drift of the machine favours one. Beside the peak stand the
three things that it is made of:

    weights             the same for every part
    gradients, state    of what is trained alone: 4 + 8 bytes a parameter, as the optimiser really holds them
    activations         what autograd keeps for the backward pass, each storage once, parameters and images left out. A
                        frozen Linear keeps no input. Counted by saved-tensor hooks

Rows are described in `sovit.savings`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sovit import UserError
from sovit.data import Batch
from sovit.finetune import freeze
from sovit.hardware import DTYPES, conditions, peak_bytes, random_batch, save_rows, seconds_of, spread
from sovit.ledger import OUTPUTS, provenance
from sovit.loop import OutOfMemory, fit, is_out_of_memory
from sovit.model import build, parameter_groups
from sovit.pareto import read_profiles
from sovit.savings import stored_params
from sovit.shape import TRAINED, Shape
from sovit.train import check_device

SCHEMA = 1
M_MMAP_THRESHOLD = -3  # malloc.h: blocks from this size on are mapped one by one
TURN_SECONDS = 1.0  # calls of a turn, after one that makes the optimiser's state; at least one


def finetune_cost(
    shapes: Sequence[Shape],
    *,
    trained: Sequence[str] = TRAINED,
    device: str = "cpu",
    dtype: str = "float32",
    batch_sizes: Sequence[int] = (2,),
    num_classes: int = 1000,
    repeats: int = 5,
    out: Path = OUTPUTS / "finetune_cost.jsonl",
    again: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Measure a step of each part of `trained`, for each shape and batch size, into the ledger `out`.

    What the ledger holds is not measured again (again: it is dropped first); rows are written after every turn. Returns
    the rows that were asked for. Raises UserError for an unknown part, dtype or device, and for numbers below 1.
    """
    unknown = [name for name in trained if name not in TRAINED]
    if unknown or not trained:
        named = f"{unknown[0]!r} is unknown" if unknown else "is empty"
        raise UserError(f"--trained {named}; choose of {', '.join(TRAINED)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if min(repeats, num_classes, *batch_sizes) < 1 or not batch_sizes:
        numbers = f"--repeats {repeats} --num-classes {num_classes} --batch-sizes {' '.join(map(str, batch_sizes))}"
        raise UserError(f"{numbers}: each must be at least 1")
    check_device(device)
    fixed = conditions(device, dtype)
    groups: dict[tuple[Shape, int], dict[str, str]] = {}  # (shape, batch) -> part -> id of its row
    for shape in dict.fromkeys(shapes):
        for batch in sorted(set(batch_sizes)):
            for part in dict.fromkeys(trained):
                key = dict(shape.to_dict(), num_classes=num_classes, batch_size=batch, trained=part, **fixed)
                name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
                groups.setdefault((shape, batch), {})[part] = name
    names = [name for group in groups.values() for name in group.values()]
    if again:
        save_rows(out, {}, drop=names)
    found = {row["profile_id"]: row for row in read_profiles(out)} if out.exists() and out.stat().st_size else {}
    rows = {name: found[name] for name in names if name in found}
    facts = {k: v for k, v in (provenance(device) | fixed).items() if k != "torch"}
    for (shape, batch), group in groups.items():
        for part, name in group.items():
            if name not in rows:
                on_progress(f"memory {len(rows) + 1}/{len(names)}: {shape.label}, batch {batch}, {part}")
                row = _new_row(name, shape, part, batch, num_classes, device, facts)
                rows[name] = row | _memory(shape, part, batch, num_classes, device, dtype)
                save_rows(out, {name: rows[name]})
    for (shape, batch), group in groups.items():
        _take_turns(shape, batch, group, rows, device, repeats, out, on_progress)
    return [rows[name] for name in names]


def _new_row(name: str, shape: Shape, part: str, batch: int, num_classes: int, device: str, facts: dict) -> dict:
    unknown: tuple = ("gradient_bytes", "optimizer_bytes", "peak_bytes")
    unknown += ("train_step_seconds", "train_step_seconds_low", "train_step_seconds_high")
    saved = partial(saved_bytes, shape, part, batch, num_classes, device, facts["dtype"])
    return {
        "schema": SCHEMA,
        "profile_id": name,
        "status": "ok",
        **shape.to_dict(),
        "num_classes": num_classes,
        "batch_size": batch,
        "trained": part,
        "num_params": shape.num_params,
        "head_params": shape.head_params(num_classes),
        "trained_params": shape.trained_params(num_classes, part),
        "stored_bytes": 4 * stored_params(shape, num_classes, part),
        "step_flops": shape.step_flops(num_classes, part),
        "saved_bytes": saved(fused_attention=True),
        "saved_bytes_materialised": saved(fused_attention=False),
        **facts,
        "num_repeats": 0,
        **dict.fromkeys(unknown),
        "train_step_samples": [],
        "load_before": round(os.getloadavg()[0], 2),
        "load_after": None,
    }


# activations ---------------------------------------------------------------------------------------------------------


def saved_bytes(
    shape: Shape, trained: str, batch: int, num_classes: int, device: str, dtype: str, fused_attention: bool
) -> int:
    """Bytes that one forward pass keeps for its backward pass where `trained` is trained.

    Counted at depths 1 and 2: all blocks are alike, so every further one adds as much as the second.
    fused_attention=False: with the attention weights [B, H, N, N] written out, as they were before fused kernels.
    """
    one, two = (
        _saved_at(shape.replace(depth=depth), trained, batch, num_classes, device, dtype, fused_attention)
        for depth in (1, 2)
    )
    return one + (shape.depth - 1) * (two - one)


def _saved_at(shape, trained, batch, num_classes, device, dtype, fused_attention) -> int:
    model = build(shape, num_classes, seed=0).to(device)
    freeze(model, trained)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention  # type: ignore[assignment]
    return count_saved(model, random_batch(shape.to_dict(), batch, device)[0], dtype)


def count_saved(model: nn.Module, images, dtype: str) -> int:
    """Bytes of the storages, each once, that model(images) keeps for its backward pass, parameters and images apart."""
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), images)}
    kept = {}  # the tensors are kept, too: a storage that was freed could give its place to the next one

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32"),
    ):
        model(images)
    return sum(size for size, _ in kept.values())


# peak ----------------------------------------------------------------------------------------------------------------


def _memory(shape: Shape, part: str, batch: int, num_classes: int, device: str, dtype: str) -> dict:
    """{peak_bytes}, or {status, error} where it does not fit."""
    work = partial(_train, shape, part, batch, num_classes, device, dtype)
    warm_up = partial(_warm_up, shape.replace(depth=1), part, 1, num_classes, device, dtype)
    peak = peak_bytes(work, warm_up, device)
    return dict(status="out_of_memory", error=peak) if isinstance(peak, str) else dict(peak_bytes=peak)


def _warm_up(*arguments) -> None:
    """In the forked process whose resident set is read: from now on what is freed goes back to the system at once.

    Else the peak is also that of the holes which tensors of changing sizes leave behind, a tenth of it and by chance;
    so it is that of the tensors alone, as CUDA's allocator counts it.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    _train(*arguments)


def _train(shape: Shape, part: str, batch: int, num_classes: int, device: str, dtype: str) -> None:
    """Two steps: the second has the optimiser's state from its beginning."""
    model = build(shape, num_classes, "fan_in", seed=0).to(device)
    _steps(model, _optimizer(model, part), _batch(shape, batch, device), dtype, 2)


# time ----------------------------------------------------------------------------------------------------------------


def _take_turns(shape: Shape, batch: int, group: dict[str, str], rows: dict, device, repeats, out, on_progress) -> None:
    """Repeats of all parts of one shape until each has `repeats`; rows are replaced, and written after every turn."""

    def waiting(repeat: int) -> list[str]:
        order = list(group) if repeat % 2 == 0 else list(group)[::-1]
        mine = [(part, rows[group[part]]) for part in order]
        return [part for part, row in mine if row["status"] == "ok" and row["num_repeats"] <= repeat]

    todo = sum(len(waiting(repeat)) for repeat in range(repeats))
    if not todo:
        return
    num_classes = rows[next(iter(group.values()))]["num_classes"]
    model = build(shape, num_classes, "fan_in", seed=0).to(device)
    images = _batch(shape, batch, device)
    started, taken = time.monotonic(), 0
    for repeat in range(repeats):
        for part in waiting(repeat):
            about = f", about {(time.monotonic() - started) / taken * (todo - taken):.0f} s left" if taken else ""
            on_progress(f"repeat {repeat + 1}/{repeats}: {shape.label}, batch {batch}, {part}{about}")
            rows[group[part]] = _turn(rows[group[part]], model, images, device)
            save_rows(out, {group[part]: rows[group[part]]})
            taken += 1


def _turn(row: dict, model: nn.Module, images: Batch, device: str) -> dict:
    """The row with one repeat more."""
    try:
        optimizer = _optimizer(model, row["trained"])
        step = partial(_steps, model, optimizer, images, row["dtype"], 1)
        sample = seconds_of(step, row["clock"], device, warm_up=1, turn_seconds=TURN_SECONDS, min_calls=1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return row | dict(status="out_of_memory", error=str(error).splitlines()[0])
    samples = [*row["train_step_samples"], sample]
    return row | dict(
        num_repeats=len(samples),
        train_step_samples=samples,
        **spread("train_step_seconds", samples),
        gradient_bytes=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        optimizer_bytes=sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        load_after=round(os.getloadavg()[0], 2),
    )


def _optimizer(model: nn.Module, part: str) -> torch.optim.Optimizer:
    """AdamW over what `part` trains; all else holds no gradient from then on."""
    freeze(model, part)
    for parameter in model.parameters():
        parameter.grad = None
    return torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.0, fused=True)


def _batch(shape: Shape, batch: int, device: str) -> Batch:
    images, labels = random_batch(shape.to_dict(), batch, device)
    return Batch(images, labels.view(batch, -1), None)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, dtype: str, count: int) -> None:
    """Training steps as the trainer takes them, without its schedule. Raises MemoryError rather than split a batch."""

    def loss_fn(b: Batch):
        with torch.autocast(b.images.device.type, DTYPES[dtype], enabled=dtype != "float32"):
            logits = model(b.images).flatten(0, -2)  # [B, C] or [B N, C]
        return F.cross_entropy(logits.float(), b.labels.flatten(), reduction="sum"), b.labels.numel()

    def on_split(micro_batch: int) -> None:
        raise MemoryError(f"out of memory: of {len(batch.images)} images {micro_batch} fit at a time")

    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        fit(
            trainable, optimizer, lambda step: batch, loss_fn, lambda step: 1e-5, range(count), clip_norm=1.0,
            on_split=on_split,
        )  # fmt: skip
    except OutOfMemory as error:
        raise MemoryError(str(error)) from error
