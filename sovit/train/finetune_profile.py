"""What a step of fine-tuning costs where only a part is trained: the saving that arXiv 2203.09795 claims, measured.

The step is that of the trainer: `sovit.train.loop.fit` with AdamW and gradient clipping, on random images. Time and peak memory
are taken as `sovit.train.step_profile` takes them, parts in the place of shapes: every repeat goes round all parts of a shape, there
and back in turn, so that neither a slow minute nor a drift of the machine favours one. Beside the peak stand the
three things that it is made of:

    weights             the same for every part
    gradients, state    of what is trained alone: 4 + 8 bytes a parameter, as the optimiser really holds them
    activations         what autograd keeps for the backward pass, each storage once, parameters and images left out. A
                        frozen Linear keeps no input. Counted by saved-tensor hooks

Rows are described in `sovit.report.finetune_savings`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sovit import OUTPUTS, UserError
from sovit.data import Batch
from sovit.encoder.model import build, parameter_groups
from sovit.spec.named_shapes import stored_params
from sovit.spec.shape import TRAINED, Shape
from sovit.train.finetune import freeze
from sovit.train.loop import OutOfMemory, Position, Task, fit
from sovit.train.step_profile import (
    Settings,
    cast,
    facts,
    known_rows,
    peak_bytes,
    random_batch,
    save_rows,
    seconds_of,
    spread,
    times_left,
    unless_out_of_memory,
    waits,
)

SCHEMA = 1
TURN_SECONDS = 1.0  # calls of a turn, after one that makes the optimiser's state; at least one


def finetune_cost(
    shapes: Sequence[Shape],
    *,
    trained: Sequence[str] = TRAINED,
    out: Path = OUTPUTS / "finetune_cost.jsonl",
    again: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
    **settings,
) -> list[dict]:
    """Measure a step of each part of `trained`, for each shape and batch size, into the ledger `out`.

    settings: fields of `sovit.train.step_profile.Settings`, here with batches of 2 and 5 repeats. What the ledger holds is not
    measured again (again: it is dropped first); rows are written after every turn. Returns the rows that were asked for.
    Raises UserError for an unknown part, and as `Settings` does.
    """
    unknown = [name for name in trained if name not in TRAINED]
    if unknown or not trained:
        named = f"{unknown[0]!r} is unknown" if unknown else "is empty"
        raise UserError(f"trained={named}; choose of {', '.join(TRAINED)}")
    chosen: dict = dict(batch_sizes=(2,), repeats=5) | settings
    under = Settings(**chosen)
    groups = {  # (shape, batch) -> part -> id of its row
        (shape, batch): {part: under.profile_id(shape, batch, trained=part) for part in dict.fromkeys(trained)}
        for shape in dict.fromkeys(shapes)
        for batch in sorted(set(under.batch_sizes))
    }
    names = [name for group in groups.values() for name in group.values()]
    rows = known_rows(out, names, again)
    for (shape, batch), group in groups.items():
        for part, name in group.items():
            if name not in rows:
                on_progress(f"memory {len(rows) + 1}/{len(names)}: {shape.label}, batch {batch}, {part}")
                rows[name] = _new_row(name, shape, part, batch, under)
                rows[name] |= _memory(shape, part, batch, under)
                save_rows(out, {name: rows[name]})
    for (shape, batch), group in groups.items():
        turns = [(r, part) for r in range(under.repeats) for part in _order(group, r) if waits(rows[group[part]], r)]
        if not turns:
            continue
        model, images = (
            build(shape, under.num_classes, "fan_in", seed=0).to(under.device),
            _batch(shape, batch, under.device),
        )
        for (repeat, part), about in zip(turns, times_left(len(turns))):
            on_progress(f"repeat {repeat + 1}/{under.repeats}: {shape.label}, batch {batch}, {part}{about}")
            row = rows[group[part]]
            if row["status"] == "ok":
                row |= unless_out_of_memory(partial(_turn, row, model, images))
            save_rows(out, {group[part]: row})
    return [rows[name] for name in names]


def _order(group: dict[str, str], repeat: int) -> list[str]:
    return list(group) if repeat % 2 == 0 else list(group)[::-1]


def _new_row(name: str, shape: Shape, part: str, batch: int, under: Settings) -> dict:
    unknown: tuple = ("gradient_bytes", "optimizer_bytes", "peak_bytes")
    unknown += ("train_step_seconds", "train_step_seconds_low", "train_step_seconds_high")
    saved = partial(saved_bytes, shape, part, batch, under)
    return {
        "schema": SCHEMA,
        "profile_id": name,
        "status": "ok",
        **shape.to_dict(),
        "num_classes": under.num_classes,
        "batch_size": batch,
        "trained": part,
        "num_params": shape.num_params,
        "head_params": shape.head_params(under.num_classes),
        "trained_params": shape.trained_params(under.num_classes, part),
        "stored_bytes": 4 * stored_params(shape, under.num_classes, part),
        "step_flops": shape.step_flops(under.num_classes, part),
        "saved_bytes": saved(fused_attention=True),
        "saved_bytes_materialised": saved(fused_attention=False),
        **facts(under),
        "num_repeats": 0,
        **dict.fromkeys(unknown),
        "train_step_samples": [],
        "load_before": round(os.getloadavg()[0], 2),
        "load_after": None,
    }


# activations ---------------------------------------------------------------------------------------------------------


def saved_bytes(shape: Shape, trained: str, batch: int, under: Settings, fused_attention: bool) -> int:
    """Bytes that one forward pass keeps for its backward pass where `trained` is trained.

    Counted at depths 1 and 2: all blocks are alike, so every further one adds as much as the second.
    fused_attention=False: with the attention weights [B, H, N, N] written out, as they were before fused kernels.
    """
    one, two = (_saved_at(shape.replace(depth=d), trained, batch, under, fused_attention) for d in (1, 2))
    return one + (shape.depth - 1) * (two - one)


def _saved_at(shape: Shape, trained: str, batch: int, under: Settings, fused_attention: bool) -> int:
    model = build(shape, under.num_classes, seed=0).to(under.device)
    freeze(model, trained)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention  # type: ignore[assignment]
    return count_saved(model, random_batch(shape.to_dict(), batch, under.device)[0], under.dtype)


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
        cast(images, dtype),
    ):
        model(images)
    return sum(size for size, _ in kept.values())


# peak and time -------------------------------------------------------------------------------------------------------


def _memory(shape: Shape, part: str, batch: int, under: Settings) -> dict:
    """{peak_bytes}, or {status, error} where it does not fit."""

    def train() -> None:
        """Two steps: the second has the optimiser's state from its beginning."""
        model = build(shape, under.num_classes, "fan_in", seed=0).to(under.device)
        _steps(model, _optimizer(model, part), _batch(shape, batch, under.device), under.dtype, 2)

    return unless_out_of_memory(lambda: dict(peak_bytes=peak_bytes(train, under.device)))


def _turn(row: dict, model: nn.Module, images: Batch) -> dict:
    """What one repeat more changes in a row."""
    optimizer = _optimizer(model, row["trained"])
    step = partial(_steps, model, optimizer, images, row["dtype"], 1)
    samples = [*row["train_step_samples"], seconds_of(step, row["clock"], TURN_SECONDS)]
    return dict(
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
        with cast(b.images, dtype):
            logits = model(b.images).flatten(0, -2)  # [B, C] or [B N, C]
        return F.cross_entropy(logits.float(), b.labels.flatten(), reduction="sum"), b.labels.numel()

    def on_split(micro_batch: int) -> None:
        raise MemoryError(f"out of memory: of {len(batch.images)} images {micro_batch} fit at a time")

    trainable = [p for p in model.parameters() if p.requires_grad]
    task = Task(trainable, optimizer, lambda step: batch, loss_fn, lambda step: 1e-5, clip_norm=1.0)
    try:
        fit(task, Position(), count, on_split=on_split)
    except OutOfMemory as error:
        raise MemoryError(str(error)) from error
