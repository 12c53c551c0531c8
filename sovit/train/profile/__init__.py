"""What shapes cost on the device at hand: seconds and memory, forward and in a step of training all or a part of them.

Noise of a shared machine moves all alike only if they take turns: every repeat goes round all shapes, batches and parts,
there and back in turn, each built anew, warmed up and timed. A slow minute spoils one repeat of each and the median none.
On one CPU thread we time with process CPU time: wall time on a shared machine penalises long calls, and so large shapes. A
training step is the trainer's (`sovit.train.loop.fit`, AdamW, clipping), on random images. Memory is measured once, before
anything is timed. Rows are written after every turn; a killed profile goes on where it was.

Rows are described in `sovit.ledger.profiles`. Beside the peak of a part stand the things that it is made of: gradients and
the optimiser's state, of what is trained alone, and the activations that autograd keeps for the backward pass (a frozen
Linear keeps no input).
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sovit import OUTPUTS, UserError
from sovit.ledger.ledger import rewrite_rows
from sovit.ledger.profiles import read_profiles
from sovit.ledger.provenance import provenance
from sovit.spec.named_shapes import stored_params
from sovit.spec.shape import TRAINED, Shape
from sovit.train.profile.memory import peak_bytes, unless_out_of_memory
from sovit.train.profile.step import Job, Settings, built, forward, random_batch, saved_bytes, train_steps

SCHEMA = 1
TURN_SECONDS = 0.03  # a repeat is the median of the calls that fit into so long
PART_SECONDS = 1.0  # of a part, which differ little


def profile(
    shapes: Sequence[Shape],
    *,
    trained: Sequence[str] = (),
    out: Path | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> list[dict]:
    """Measure shapes, or training `trained` parts of them, at each batch size into the ledger `out`.

    What the ledger holds is not measured again. settings: fields of `Settings`, of parts with batches of 2 and 5 repeats
    unless said otherwise. Returns the rows that were asked for. Raises UserError for an unknown part, and as `Settings`.
    """
    if unknown := [part for part in trained if part not in TRAINED]:
        raise UserError(f"trained={unknown[0]!r} is unknown; choose of {', '.join(TRAINED)}")
    defaults: dict[str, Any] = {"batch_sizes": (2,), "repeats": 5} if trained else {}
    under = Settings(**defaults | settings)
    out = out or OUTPUTS / ("finetune_cost.jsonl" if trained else "hardware.jsonl")
    batches = sorted(set(under.batch_sizes))
    asked = dict.fromkeys(Job(s, b, part) for s in shapes for b in batches for part in trained or [""])
    jobs = {under.profile_id(job): job for job in asked}
    rows = _known_rows(out, jobs)
    for i, (name, job) in enumerate(jobs.items(), 1):
        if name not in rows:
            on_progress(f"memory {i}/{len(jobs)}: {job}")
            rows[name] = _new_row(name, job, under) | unless_out_of_memory(partial(_memory, job, under))
            _save_row(out, rows[name])
    turns = [
        (repeat, name)
        for repeat in range(under.repeats)
        for name in (list(jobs)[::-1] if repeat % 2 else jobs)
        if rows[name]["status"] == "ok" and rows[name]["num_repeats"] <= repeat
    ]
    for (repeat, name), about in zip(turns, _times_left(len(turns))):
        on_progress(f"repeat {repeat + 1}/{under.repeats}: {jobs[name]}{about}")
        if rows[name]["status"] == "ok":
            rows[name] |= unless_out_of_memory(partial(_turn, rows[name], jobs[name], under))
            _save_row(out, rows[name])
    return [rows[name] for name in jobs]


def _new_row(name: str, job: Job, under: Settings) -> dict:
    shape, batch, part = job
    classes = under.num_classes
    seconds = ("train_step_seconds", "train_step_seconds_low", "train_step_seconds_high")
    if part:
        more: dict = {
            "trained": part,
            "head_params": shape.head_params(classes),
            "trained_params": shape.trained_params(classes, part),
            "stored_bytes": 4 * stored_params(shape, classes, part),
            "step_flops": shape.step_flops(classes, part),
            "saved_bytes": saved_bytes(job, under, fused_attention=True),
            "saved_bytes_materialised": saved_bytes(job, under, fused_attention=False),
        }
        unknown: tuple = ("gradient_bytes", "optimizer_bytes", "peak_bytes", *seconds)
    else:
        more = {"forward_flops": shape.forward_flops, "head_flops": shape.head_flops(classes), "forward_samples": []}
        unknown = ("forward_seconds", "forward_seconds_low", "forward_seconds_high", *seconds, "images_per_second")
        unknown += ("forward_flops_per_second", "train_flops_per_second", "forward_bytes", "train_bytes")
    conditions = provenance(under.device) | under.conditions
    return {
        "schema": SCHEMA,
        "profile_id": name,
        "status": "ok",
        **shape.to_dict(),
        "num_classes": classes,
        "num_params": shape.num_params,
        "batch_size": batch,
        **more,
        **{k: v for k, v in conditions.items() if k != "torch"},
        "num_repeats": 0,
        **dict.fromkeys(unknown),
        "train_step_samples": [],
        "load_before": round(os.getloadavg()[0], 2),
        "load_after": None,
    }


# one turn ------------------------------------------------------------------------------------------------------------


def _turn(row: dict, job: Job, under: Settings) -> dict:
    """What one repeat more changes in a row."""
    more = {"num_repeats": row["num_repeats"] + 1, "load_after": round(os.getloadavg()[0], 2)}
    model, optimizer = built(job, under)
    batch = random_batch(job, under.device)
    flops = job.batch * (job.shape.forward_flops + job.shape.head_flops(under.num_classes))
    if not job.part:
        samples = [*row["forward_samples"], seconds_of(partial(forward, model, batch, under), row["clock"])]
        more |= _spread("forward", samples)
        more["images_per_second"] = job.batch / more["forward_seconds"]
        more["forward_flops_per_second"] = flops / more["forward_seconds"]
    if under.trains(job):
        step = partial(train_steps, model, optimizer, batch, under, 1)
        seconds = seconds_of(step, row["clock"], PART_SECONDS if job.part else TURN_SECONDS)
        more |= _spread("train_step", [*row["train_step_samples"], seconds])
    if job.part:
        more["gradient_bytes"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        more["optimizer_bytes"] = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    elif under.trains(job):
        more["train_flops_per_second"] = 3 * flops / more["train_step_seconds"]
    return more


def _spread(name: str, samples: list[float]) -> dict:
    """The samples, their median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    seconds = {f"{name}_seconds": middle, f"{name}_seconds_low": low, f"{name}_seconds_high": high}
    return {f"{name}_samples": samples, **seconds}


def seconds_of(call: Callable[[], object], clock: str, min_seconds: float = TURN_SECONDS) -> float:
    """Median seconds of a call, warmed up, by the process's CPU time (clock="cpu") or by the wall."""
    # its import tells, through this logger, that CUDA was installed and no GPU is there
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import benchmark

    call()
    timer = time.process_time if clock == "cpu" else benchmark.timer
    threads = torch.get_num_threads()
    timed = benchmark.Timer("call()", globals={"call": call}, timer=timer, num_threads=threads)
    return timed.blocked_autorange(min_run_time=min_seconds).median


def _memory(job: Job, under: Settings) -> dict:
    """The peaks of a forward pass and of two training steps: the second has the optimiser's state from its beginning."""

    def look() -> None:
        forward(built(job, under)[0], random_batch(job, under.device), under)

    def train() -> None:
        train_steps(*built(job, under), random_batch(job, under.device), under, 2)

    if job.part:
        return {"peak_bytes": peak_bytes(train, under.device)}
    found = {"forward_bytes": peak_bytes(look, under.device)}
    if under.trains(job):
        found |= unless_out_of_memory(lambda: {"train_bytes": peak_bytes(train, under.device)})
    return found


# the ledger ----------------------------------------------------------------------------------------------------------


def _times_left(count: int) -> Iterator[str]:
    """For each of `count` turns, as it begins: how long they take from now on, in words."""
    started = time.monotonic()
    for taken in range(count):
        left = (time.monotonic() - started) / max(taken, 1) * (count - taken)
        yield f", about {left:.0f} s left" if taken else ""


def _known_rows(out: Path, names: Collection[str]) -> dict[str, dict]:
    """The rows of a profile ledger under these ids."""
    found = read_profiles(out) if out.exists() and out.stat().st_size else []
    return {row["profile_id"]: row for row in found if row["profile_id"] in names}


def _save_row(out: Path, row: dict) -> None:
    """Put a row into a profile ledger in place of the one with its id."""
    rewrite_rows(
        out, read_profiles, lambda old: [*({r["profile_id"]: r for r in old} | {row["profile_id"]: row}).values()]
    )
