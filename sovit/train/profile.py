"""What shapes cost on the device at hand: seconds and memory of a forward pass and of a training step.

A training step is the trainer's (`sovit.train.loop.fit`, AdamW, clipping), on random images. On one CPU thread we time with
process CPU time: wall time on a shared machine penalises long calls, and so large shapes. Each row is written as soon as it
is measured; `sovit.ledger.profiles` describes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sovit import OUTPUTS
from sovit.data import Batch
from sovit.encoder.model import build, parameter_groups
from sovit.ledger.ledger import rewrite_rows
from sovit.ledger.profiles import read_profiles
from sovit.ledger.provenance import provenance
from sovit.spec.config import Count, check
from sovit.spec.run import Precision
from sovit.spec.shape import Shape
from sovit.tables import text_table
from sovit.train.base import check_device
from sovit.train.loop import OutOfMemory, Position, Task, fit, is_out_of_memory

SCHEMA = 1
REPEAT_SECONDS = 0.03  # a repeat is the median of the calls that fit into so long
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What all rows are measured under. Raises UserError for an impossible device, dtype or number."""

    device: str = "cpu"
    dtype: Precision = "float32"
    batch_sizes: tuple[Count, ...] = (1, 32)
    num_classes: Count = 1000
    repeats: Count = 9

    def __post_init__(self) -> None:
        check(self)
        check_device(self.device)

    def conditions(self, shape: Shape, batch_size: int) -> dict:
        """What a cost holds under: with torch's version, what a row's id is made of."""
        threads = torch.get_num_threads()
        return {
            **shape.to_dict(),
            "num_classes": self.num_classes,
            "batch_size": batch_size,
            "device": self.device.partition(":")[0],
            "device_name": _device_name(self.device),
            "dtype": self.dtype,
            "threads": threads,
            "clock": "cpu" if self.device == "cpu" and threads == 1 else "wall",
        }


def profile(
    shapes: Sequence[Shape],
    *,
    out: Path = OUTPUTS / "hardware.jsonl",
    on_progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> list[dict]:
    """Measure shapes at each batch size into the file `out`, and return their rows.

    What the file holds is not measured again. settings: fields of `Settings`. Raises UserError as `Settings` and
    `read_profiles`.
    """
    under = Settings(**settings)
    asked = [(shape, batch) for shape in dict.fromkeys(shapes) for batch in sorted(set(under.batch_sizes))]
    known = {row["profile_id"]: row for row in (read_profiles(out) if out.exists() and out.stat().st_size else [])}
    rows = []
    for i, (shape, batch) in enumerate(asked, 1):
        conditions = under.conditions(shape, batch)
        key = conditions | {"torch": torch.__version__}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        if name not in known or known[name]["num_repeats"] < under.repeats:
            on_progress(f"{i}/{len(asked)}: {shape.label}, batch {batch}")
            row = {"schema": SCHEMA, "profile_id": name, **provenance(under.device), **conditions}
            known[name] = row | _costs(shape, batch, under, row["clock"])
            rewrite_rows(out, read_profiles, lambda old, name=name: _replaced(old, known[name]))  # type: ignore[misc]
        rows.append(known[name])
    return rows


def _replaced(rows: list[dict], row: dict) -> list[dict]:
    """The rows with this one, in the place of one measured by fewer repeats."""
    return [*(other for other in rows if other["profile_id"] != row["profile_id"]), row]


def _costs(shape: Shape, batch: int, under: Settings, clock: str) -> dict:
    """What is measured of a row, and the counts that it is compared with."""
    classes, device, repeats = under.num_classes, under.device, under.repeats
    flops = batch * (shape.forward_flops + shape.head_flops(classes))
    found: dict = {
        "status": "ok",
        "num_params": shape.num_params,
        "forward_flops": shape.forward_flops,
        "head_flops": shape.head_flops(classes),
        "num_repeats": repeats,
    }
    try:
        found["forward_bytes"] = peak_bytes(lambda: _Step(shape, batch, under).forward(), device)
        # of two steps: the second has the optimiser's state from its beginning
        found["train_bytes"] = peak_bytes(lambda: _Step(shape, batch, under).train(2), device)
        step = _Step(shape, batch, under)
        timer = time.process_time if clock == "cpu" else wall_clock(device)
        found |= _spread("forward", step.forward, repeats, timer) | _spread("train_step", step.train, repeats, timer)
        found["images_per_second"] = batch / found["forward_seconds"]
        found["forward_flops_per_second"] = flops / found["forward_seconds"]
        found["train_flops_per_second"] = 3 * flops / found["train_step_seconds"]
    except (RuntimeError, MemoryError, OutOfMemory) as error:
        if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
            raise
        found |= {"status": "out_of_memory", "error": (str(error) or "out of memory").splitlines()[0]}
    return found


class _Step:
    """A model with its optimiser and random images; labels [B, 1], or [B, N] where each patch token has one."""

    def __init__(self, shape: Shape, batch: int, under: Settings):
        self.under = under
        self.model: Any = build(shape, under.num_classes, "fan_in", seed=0).to(under.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=0.0, fused=True)
        labels = shape.num_patches if shape.pool == "none" else 1
        images = torch.randn(batch, 3, shape.image_size, shape.image_size, device=under.device)
        self.batch = Batch(images, torch.zeros(batch, labels, dtype=torch.long, device=under.device), None)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        kind, dtype = self.under.device.partition(":")[0], DTYPES[self.under.dtype]
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return self.model(images).flatten(0, -2)  # [B, C] or [B N, C]

    def forward(self) -> None:
        with torch.inference_mode():
            self.logits(self.batch.images)

    def train(self, count: int = 1) -> None:
        """Steps as the trainer takes them, without its schedule. Raises MemoryError rather than split a batch."""

        def loss(b: Batch) -> tuple[torch.Tensor, int]:
            summed = F.cross_entropy(self.logits(b.images).float(), b.labels.flatten(), reduction="sum")
            return summed, b.labels.numel()

        def on_split(rows: int) -> None:
            raise MemoryError(f"out of memory: of {len(self.batch.images)} images {rows} fit at a time")

        parameters = list(self.model.parameters())
        task = Task(parameters, self.optimizer, lambda step: self.batch, loss, lambda step: 1e-5, clip_norm=1.0)
        fit(task, Position(), count, on_split=on_split)


def _spread(name: str, call: Callable[[], object], repeats: int, timer: Callable[[], float]) -> dict:
    """Median and quartiles of the repeats, and the repeats."""
    samples = [seconds_of(call, timer) for _ in range(repeats)]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if repeats > 1 else samples * 3
    seconds = {f"{name}_seconds": middle, f"{name}_seconds_low": low, f"{name}_seconds_high": high}
    return {f"{name}_samples": samples, **seconds}


def seconds_of(call: Callable[[], object], timer: Callable[[], float], min_seconds: float = REPEAT_SECONDS) -> float:
    """Median seconds of a call, warmed up. timer: `time.process_time`, or what `wall_clock` returns."""
    # its import tells, through this logger, that CUDA was installed and no GPU is there
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import benchmark

    call()
    threads = torch.get_num_threads()
    timed = benchmark.Timer("call()", globals={"call": call}, timer=timer, num_threads=threads)
    return timed.blocked_autorange(min_run_time=min_seconds).median


def wall_clock(device: str) -> Callable[[], float]:
    """A clock that waits for this device; torch's own waits for the current one alone."""

    def seconds() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return seconds


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Peak of what torch's allocator holds during `work`, above what it held before, in bytes.

    What a kernel allocates without torch is not in it.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to standard error
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        work()
    events = recorded.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def profile_text(rows: Sequence[dict]) -> str:
    """The rows as a table."""
    columns = {  # heading -> column, scale, format
        "forward ms": ("forward_seconds", 1e3, ".3f"),
        "images/s": ("images_per_second", 1, ",.0f"),
        "GFLOP/s": ("forward_flops_per_second", 1e-9, ".2f"),
        "train step ms": ("train_step_seconds", 1e3, ".3f"),
        "train GFLOP/s": ("train_flops_per_second", 1e-9, ".2f"),
        "forward MiB": ("forward_bytes", 1 / MIB, ".1f"),
        "train MiB": ("train_bytes", 1 / MIB, ".1f"),
    }

    def cells(row: dict) -> list[str]:
        values = ((row.get(column), scale, form) for column, scale, form in columns.values())
        numbers = ["-" if value is None else format(value * scale, form) for value, scale, form in values]
        label = f"{row['width']}x{row['depth']}x{row['mlp_dim']} h{row['head_dim']}"
        why = "" if row["status"] == "ok" else f"{row['status'].replace('_', ' ')}: {row['error']}"
        return [label, str(row["batch_size"]), *numbers, why]

    first = rows[0]
    clock = "CPU time of the process" if first["clock"] == "cpu" else "wall time"
    table = text_table(["shape", "batch", *columns, ""], map(cells, rows), left=("shape", ""))
    return (
        f"{table}\n{first['device_name']}, {first['dtype']}, {first['threads']} thread{'s' * (first['threads'] > 1)};"
        f" {clock}; medians of {first['num_repeats']} repeats; FLOP/s by our count (training: 3 x forward)"
    )
