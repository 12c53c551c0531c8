"""What shapes cost on the device at hand: seconds and memory of a forward pass and of a training step, shape by shape.

Noise of a shared machine moves all shapes alike only if they take turns: every repeat goes round all shapes, each built
anew, warmed up and timed, so that a slow minute spoils one repeat of each and the median none. On one CPU thread we time
with process CPU time: wall time on a shared machine penalises long calls, and so large shapes. Rows (see `sovit.predict.pareto`)
are written after every turn; a killed profile goes on where it was.

Memory is measured once a (shape, batch), before anything is timed: the peak of what torch's allocator holds, weights
included. On CUDA the allocator's own statistics say it, on a CPU the allocations that torch's profiler records. What a
kernel allocates without torch is not in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch.utils import benchmark

from sovit import OUTPUTS, UserError
from sovit.encoder.model import build, parameter_groups
from sovit.law.fitted_law import read_law
from sovit.law.geometry import Geometry
from sovit.ledger.ledger import rewrite_rows
from sovit.ledger.profiles import read_profiles
from sovit.ledger.provenance import provenance
from sovit.predict.recommend import best_shape
from sovit.spec.named_shapes import named_shape
from sovit.spec.shape import Shape
from sovit.tables import text_table
from sovit.train.device import check_device
from sovit.train.loop import is_out_of_memory

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TURN_SECONDS = 0.03  # a repeat is the median of the calls that fit into so long
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """What all shapes are measured under. Raises UserError for an impossible device, dtype or number."""

    device: str = "cpu"
    dtype: str = "float32"
    batch_sizes: Sequence[int] = (1, 32)
    num_classes: int = 1000
    repeats: int = 9

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if min(self.repeats, self.num_classes, *self.batch_sizes, len(self.batch_sizes)) < 1:
            raise UserError(
                f"repeats={self.repeats}, num_classes={self.num_classes}, batch_sizes={[*self.batch_sizes]}:"
                " each must be at least 1"
            )
        check_device(self.device)

    def trains(self, batch: int) -> bool:
        """Whether training steps are measured: at the batches above 1, or at 1 where it is the only one."""
        return batch > 1 or max(self.batch_sizes) == 1

    @property
    def conditions(self) -> dict:
        """What a cost holds under, and part of a row's id."""
        one_thread = torch.get_num_threads() == 1
        return dict(
            device=self.device.partition(":")[0],
            device_name=device_name(self.device),
            dtype=self.dtype,
            threads=torch.get_num_threads(),
            clock="cpu" if self.device == "cpu" and one_thread else "wall",
            torch=torch.__version__,
        )

    def profile_id(self, shape: Shape, batch: int, **more) -> str:
        key = dict(shape.to_dict(), num_classes=self.num_classes, batch_size=batch, **more, **self.conditions)
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]


def profile(
    shapes: Sequence[Shape],
    *,
    out: Path = OUTPUTS / "hardware.jsonl",
    again: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
    **settings,
) -> list[dict]:
    """Profile shapes at each batch size, into the ledger `out`; what it holds of them is not measured again.

    Training steps (autocast to dtype, AdamW) are as `sovit.train` takes them. settings: fields of `Settings`. again: drop
    what the ledger holds of these shapes first. Returns the rows of these shapes. Raises UserError as `Settings` does.
    """
    under = Settings(**settings)
    shapes = list(dict.fromkeys(shapes))
    jobs = {under.profile_id(s, b): (s, b) for s in shapes for b in sorted(set(under.batch_sizes))}
    rows = known_rows(out, jobs, again)
    for i, (name, (shape, batch)) in enumerate(jobs.items(), 1):
        if name not in rows:
            on_progress(f"memory {i}/{len(jobs)}: {shape.label}, batch {batch}")
            rows[name] = _new_row(name, shape, batch, under) | _memory(shape, batch, under)
            save_rows(out, {name: rows[name]})
    turns = [
        (repeat, shape, mine)
        for repeat in range(under.repeats)
        for shape in shapes
        if (mine := [n for n in jobs if jobs[n][0] == shape and waits(rows[n], repeat)])
    ]
    for (repeat, shape, mine), about in zip(turns, times_left(len(turns))):
        on_progress(f"repeat {repeat + 1}/{under.repeats}: {shape.label}{about}")
        model, optimizer = _build(shape, under.num_classes, under.device)
        for name in mine:
            if rows[name]["status"] == "ok":
                rows[name] |= unless_out_of_memory(partial(_turn, rows[name], model, optimizer, under))
        del model, optimizer
        save_rows(out, {name: rows[name] for name in mine})
    return [rows[name] for name in jobs]


def _new_row(name: str, shape: Shape, batch: int, under: Settings) -> dict:
    unknown: tuple = ("forward_seconds", "forward_seconds_low", "forward_seconds_high", "train_step_seconds")
    unknown += ("train_step_seconds_low", "train_step_seconds_high", "images_per_second")
    unknown += ("forward_flops_per_second", "train_flops_per_second", "forward_bytes", "train_bytes")
    return {
        "schema": SCHEMA,
        "profile_id": name,
        "status": "ok",
        **shape.to_dict(),
        "num_classes": under.num_classes,
        "num_params": shape.num_params,
        "forward_flops": shape.forward_flops,
        "head_flops": shape.head_flops(under.num_classes),
        "batch_size": batch,
        **facts(under),
        "num_repeats": 0,
        **dict.fromkeys(unknown),
        "forward_samples": [],
        "train_step_samples": [],
        "load_before": round(os.getloadavg()[0], 2),
        "load_after": None,
    }


def facts(under: Settings) -> dict:
    """Where and under what a row is measured."""
    return {k: v for k, v in (provenance(under.device) | under.conditions).items() if k != "torch"}


def _turn(row: dict, model, optimizer, under: Settings) -> dict:
    """What one repeat more changes in a row."""
    batch, flops = row["batch_size"], row["forward_flops"] + row["head_flops"]
    images = random_batch(row, batch, under.device)
    forward = [*row["forward_samples"], seconds_of(partial(_forward, model, under.dtype, *images), row["clock"])]
    middle = statistics.median(forward)
    more = dict(
        num_repeats=len(forward),
        forward_samples=forward,
        **spread("forward_seconds", forward),
        images_per_second=batch / middle,
        forward_flops_per_second=flops * batch / middle,
        load_after=round(os.getloadavg()[0], 2),
    )
    if under.trains(batch):
        step_once = partial(_step, model, optimizer, under.dtype, *images)
        more["train_step_samples"] = [*row["train_step_samples"], seconds_of(step_once, row["clock"])]
        more |= spread("train_step_seconds", more["train_step_samples"])
        more["train_flops_per_second"] = 3 * flops * batch / more["train_step_seconds"]
    return more


# turns, shared with sovit.train.finetune_profile ------------------------------------------------------------------------------


def waits(row: dict, repeat: int) -> bool:
    """Whether a row still has to be timed in this repeat."""
    return row["status"] == "ok" and row["num_repeats"] <= repeat


def times_left(count: int) -> Iterator[str]:
    """For each of `count` turns, as it begins: how long they take from now on, in words."""
    started = time.monotonic()
    for taken in range(count):
        left = (time.monotonic() - started) / max(taken, 1) * (count - taken)
        yield f", about {left:.0f} s left" if taken else ""


def unless_out_of_memory(measure: Callable[[], dict]) -> dict:
    """Return measure(), or {status, error} where it does not fit into memory."""
    try:
        return measure()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return dict(status="out_of_memory", error=(str(error) or "out of memory").splitlines()[0])


def spread(name: str, samples: list[float]) -> dict:
    """{name: median, name_low, name_high: quartiles} of samples."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def seconds_of(call: Callable[[], object], clock: str, min_seconds: float = TURN_SECONDS) -> float:
    """Median seconds of a call, warmed up, by the process's CPU time (clock="cpu") or by the wall."""
    call()
    timer = time.process_time if clock == "cpu" else benchmark.timer
    threads = torch.get_num_threads()
    timed = benchmark.Timer("call()", globals={"call": call}, timer=timer, num_threads=threads)
    return timed.blocked_autorange(min_run_time=min_seconds).median


def known_rows(out: Path, names: Iterable[str], again: bool) -> dict[str, dict]:
    """The rows of a profile ledger under these ids; again: none, and the ledger loses them."""
    names = set(names)
    if again:
        save_rows(out, {}, drop=names)
    found = read_profiles(out) if out.exists() and out.stat().st_size else []
    return {row["profile_id"]: row for row in found if row["profile_id"] in names}


def save_rows(out: Path, rows: dict[str, dict], drop: Collection[str] = ()) -> None:
    """Put rows into a profile ledger in place of those with their ids."""

    def change(old: list[dict]) -> list[dict]:
        kept = {row["profile_id"]: row for row in old if row["profile_id"] not in drop}
        return list((kept | rows).values())

    rewrite_rows(out, read_profiles, change)


# one call ------------------------------------------------------------------------------------------------------------


def _build(shape: Shape, num_classes: int, device: str):
    model = build(shape, num_classes, "fan_in", seed=0).to(device)
    return model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)


def random_batch(row: dict, batch: int, device: str):
    """Images [B, 3, H, W] and labels [B], or [B x N] where each patch token has one."""
    labels = batch * (row["image_size"] // row["patch_size"]) ** 2 if row["pool"] == "none" else batch
    size = row["image_size"]
    return torch.randn(batch, 3, size, size, device=device), torch.zeros(labels, dtype=torch.long, device=device)


def _forward(model, dtype: str, images, labels) -> None:
    with torch.inference_mode(), cast(images, dtype):
        model(images)


def _step(model, optimizer, dtype: str, images, labels) -> None:
    with cast(images, dtype):
        logits = model(images).flatten(0, -2)  # [B, C] or [B N, C]
    loss = F.cross_entropy(logits.float(), labels) if logits.shape[-1] > 1 else logits.float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def cast(images, dtype: str):
    return torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32")


# memory --------------------------------------------------------------------------------------------------------------


def _memory(shape: Shape, batch: int, under: Settings) -> dict:
    """{forward_bytes, train_bytes}, or with {status, error} where one of them does not fit."""

    def forward() -> None:
        model, _ = _build(shape, under.num_classes, under.device)
        _forward(model, under.dtype, *random_batch(shape.to_dict(), batch, under.device))

    def train() -> None:
        """Two steps: the second has the optimiser's state from its beginning."""
        model, optimizer = _build(shape, under.num_classes, under.device)
        for _ in range(2):
            _step(model, optimizer, under.dtype, *random_batch(shape.to_dict(), batch, under.device))

    out = unless_out_of_memory(lambda: dict(forward_bytes=peak_bytes(forward, under.device)))
    if under.trains(batch) and "status" not in out:
        out |= unless_out_of_memory(lambda: dict(train_bytes=peak_bytes(train, under.device)))
    return out


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Peak of what torch's allocator holds during `work`, above what it held before, in bytes.

    Raises what `work` raises; on a CPU, MemoryError or RuntimeError for what the machine has no memory left for.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - held
    with _quiet(), _bounded_memory(), torch.autograd.profiler.profile(profile_memory=True) as recorded:
        work()
    events = recorded.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)


@contextlib.contextmanager
def _bounded_memory():
    """Let an allocation beyond the machine's free memory fail, where the kernel would kill the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    free = psutil.Process().memory_info().vms + psutil.virtual_memory().available
    limits = [limit for limit in (free, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _quiet():
    """Keep what torch's profiler writes to standard error, at its start and end, from there."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# what is asked for, and what came out --------------------------------------------------------------------------------


def shapes_for(
    names: Sequence[str] = (),
    grid: Sequence[str] = (),
    law: Path | None = None,
    train_flops: float | None = None,
    **fields,
) -> tuple[list[Shape], int | None]:
    """The shapes that a command line asks for, and the classes of the law's task head (None without a law).

    names: `B/16`, a timm name, or WxDxM[xHEAD_DIM], whose other fields are those of the law or of `fields` (head_dim,
    patch_size, image_size, pool). grid: `width=16,32 depth=1,2 mlp_dim=64`, all combinations. train_flops: with a law, its
    best shape for that budget and ViT-B's proportions at it, too. Raises UserError.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    known: dict = {}
    num_classes = None
    shapes = []
    if law is not None:
        fit = read_law(law)
        geometry = fit.geometry or Geometry()
        known = {n: getattr(geometry, n) for n in ("head_dim", "patch_size", "image_size", "pool")}
        known = {n: value if isinstance(value, str) else int(value) for n, value in known.items() if value}
        num_classes = geometry.num_classes
        if train_flops is not None:
            best = best_shape(fit, train_flops)
            shapes += [best.shape, best.proportional.shape]
    elif train_flops is not None:
        raise UserError(f"train_flops={train_flops:g} is a budget for a law; name one")
    for name in names:
        if re.fullmatch(r"\d+(x\d+){2,3}", name):
            own = dict(zip(("width", "depth", "mlp_dim", "head_dim"), map(int, name.split("x"))))
            shapes.append(Shape(**known | fields | own))
        else:
            shapes.append(named_shape(name, **fields))
    shapes += [Shape(**known | fields | point) for point in _grid(grid)]
    if not shapes:
        raise UserError("no shape to profile; name some, such as B/16 or 32x2x256, a grid, or a law with a budget")
    return list(dict.fromkeys(shapes)), num_classes


def _grid(parts: Sequence[str]) -> list[dict[str, int]]:
    """All combinations of `width=16,32 depth=1 mlp_dim=64`."""
    values: dict[str, list[int]] = {}
    for part in parts:
        name, _, numbers = part.partition("=")
        if name not in ("width", "depth", "mlp_dim") or not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise UserError(f"grid {part} is not NAME=N,N,... with width, depth or mlp_dim; write width=16,32")
        values[name] = [int(number) for number in numbers.split(",")]
    missing = [name for name in ("width", "depth", "mlp_dim") if name not in values]
    if parts and missing:
        raise UserError(f"grid lacks {missing[0]}; write {missing[0]}=N,N,...")
    return [dict(zip(values, point)) for point in itertools.product(*values.values())] if parts else []


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
        "n": ("num_repeats", 1, "d"),
    }

    def cells(row: dict) -> list[str]:
        values = ((row[column], scale, form) for column, scale, form in columns.values())
        numbers = ["-" if value is None else format(value * scale, form) for value, scale, form in values]
        label = f"{row['width']}x{row['depth']}x{row['mlp_dim']} h{row['head_dim']}"
        why = "" if row["status"] == "ok" else f"{row['status'].replace('_', ' ')}: {row['error']}"
        return [label, str(row["batch_size"]), *numbers, why]

    first = rows[0]
    clock = "CPU time of the process" if first["clock"] == "cpu" else "wall time"
    table = text_table(["shape", "batch", *columns, ""], map(cells, rows), left=("shape", ""))
    return (
        f"{table}\n{first['device_name']}, {first['dtype']}, {first['threads']} thread{'s' * (first['threads'] > 1)};"
        f" {clock}; medians of n repeats, shapes taking turns; FLOP/s by our count (training: 3 x forward)"
    )
