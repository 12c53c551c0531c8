"""What shapes cost on the device at hand: seconds and memory of a forward pass and of a training step, shape by shape.

Noise of a shared machine moves all shapes alike only if they take turns: every repeat goes round all shapes, each built
anew, warmed up and timed, so that a slow minute spoils one repeat of each and the median none. With one thread on a CPU
the clock is the process's own CPU time, what a core of its own would take: by the wall, a machine shared with others
slows long calls, which are interrupted, more than short ones, and so favours small shapes. Rows (see `sovit.pareto`) are
written after every turn; a killed profile goes on where it was.

Memory is measured once a (shape, batch), before anything is timed: on a CPU in a forked process of its own (allocators
keep what they once had), as the growth of its resident set; on CUDA by the allocator's peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.law import read_law
from sovit.ledger import OUTPUTS, dump_row, locked, provenance, write_atomic
from sovit.loop import is_out_of_memory
from sovit.model import build, parameter_groups
from sovit.pareto import read_profiles
from sovit.predict import best_shape
from sovit.shape import Shape, named_shape
from sovit.train import check_device

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 2  # calls before those that are timed, in every turn
TURN_SECONDS, MIN_CALLS, MAX_CALLS = 0.03, 3, 100  # a repeat is the median of the calls that fit into so long
MIB = 2**20


def profile(
    shapes: Sequence[Shape],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch_sizes: Sequence[int] = (1, 32),
    num_classes: int = 1000,
    repeats: int = 9,
    out: Path = OUTPUTS / "hardware.jsonl",
    again: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Profile shapes at each batch size, into the ledger `out`; what it holds of them is not measured again.

    Training steps (autocast to `dtype`, AdamW, as `sovit.train` takes them) are measured at the batches above 1, or at
    1 where it is the only one. again: drop what the ledger holds of these shapes first. Returns the rows of these
    shapes. Raises UserError for an impossible device, dtype, batch or number of repeats.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if repeats < 1 or min(batch_sizes, default=0) < 1:
        raise UserError(f"--repeats {repeats} --batch-sizes {' '.join(map(str, batch_sizes))}: each must be at least 1")
    check_device(device)
    fixed = conditions(device, dtype)
    jobs = {}
    for shape in dict.fromkeys(shapes):
        for batch in sorted(set(batch_sizes)):
            train = batch > 1 or max(batch_sizes) == 1
            key = dict(shape.to_dict(), num_classes=num_classes, batch_size=batch, **fixed)
            jobs[hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]] = shape, batch, train
    found = {row["profile_id"]: row for row in read_profiles(out)} if out.exists() and out.stat().st_size else {}
    rows = {name: found[name] for name in jobs if name in found and not again}
    if again:
        save_rows(out, {}, drop=set(jobs))
    facts = provenance(device) | fixed
    for i, (name, (shape, batch, train)) in enumerate(jobs.items(), 1):
        if name in rows:
            continue
        on_progress(f"memory {i}/{len(jobs)}: {shape.label}, batch {batch}")
        rows[name] = _new_row(name, shape, batch, num_classes, facts) | _memory(
            shape, batch, train, num_classes, device, dtype
        )
        save_rows(out, {name: rows[name]})
    started, taken = time.monotonic(), 0
    waiting = sum(max(repeats - row["num_repeats"], 0) for row in rows.values() if row["status"] == "ok")
    for repeat in range(repeats):
        for shape in dict.fromkeys(shape for shape, _, _ in jobs.values()):
            mine = {
                name: job
                for name, job in jobs.items()
                if job[0] == shape and rows[name]["status"] == "ok" and rows[name]["num_repeats"] <= repeat
            }
            if not mine:
                continue
            left = (time.monotonic() - started) / taken * (waiting - taken) if taken else None
            about = f", about {left:.0f} s left" if left is not None else ""
            on_progress(f"repeat {repeat + 1}/{repeats}: {shape.label}{about}")
            model, optimizer = _build(shape, num_classes, device)
            for name, (_, batch, train) in mine.items():
                rows[name] = _turn(rows[name], model, optimizer, batch, train, device, dtype)
                taken += 1
            del model, optimizer
            save_rows(out, {name: rows[name] for name in mine})
    return [rows[name] for name in jobs]


def conditions(device: str, dtype: str) -> dict:
    """What a cost holds under, and part of a row's id: device, type of number, threads, clock and version of torch."""
    return dict(
        device=device.partition(":")[0],
        device_name=device_name(device),
        dtype=dtype,
        threads=torch.get_num_threads(),
        clock="cpu" if device == "cpu" and torch.get_num_threads() == 1 else "wall",
        torch=torch.__version__,
    )


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
        geometry = fit.geometry or {}
        known = {n: geometry.get(n) for n in ("head_dim", "patch_size", "image_size", "pool")}
        known = {n: value if isinstance(value, str) else int(value) for n, value in known.items() if value}
        num_classes = geometry.get("num_classes")
        if train_flops is not None:
            best = best_shape(fit, train_flops)
            shapes += [Shape(**best.shape), Shape(**best.proportional["shape"])]
    elif train_flops is not None:
        raise UserError(f"--train-flops {train_flops:g} is a budget for a law; name one with --law")
    for name in names:
        if re.fullmatch(r"\d+(x\d+){2,3}", name):
            own = dict(zip(("width", "depth", "mlp_dim", "head_dim"), map(int, name.split("x"))))
            shapes.append(Shape(**known | fields | own))
        else:
            shapes.append(named_shape(name, **fields))
    values: dict[str, list[int]] = {}
    for part in grid:
        name, _, numbers = part.partition("=")
        if name not in ("width", "depth", "mlp_dim") or not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise UserError(f"--grid {part} is not NAME=N,N,... with width, depth or mlp_dim; write width=16,32")
        values[name] = [int(number) for number in numbers.split(",")]
    if grid:
        missing = [name for name in ("width", "depth", "mlp_dim") if name not in values]
        if missing:
            raise UserError(f"--grid lacks {missing[0]}; write {missing[0]}=N,N,...")
        for combined in itertools.product(*values.values()):
            shapes.append(Shape(**known | fields | dict(zip(values, combined))))
    if not shapes:
        raise UserError(
            "no shape to profile; name some, such as B/16 or 32x2x256, or give --grid, or --law with --train-flops"
        )
    return list(dict.fromkeys(shapes)), num_classes


def _new_row(name: str, shape: Shape, batch: int, num_classes: int, facts: dict) -> dict:
    unknown: tuple = ("forward_seconds", "forward_seconds_low", "forward_seconds_high", "train_step_seconds")
    unknown += ("train_step_seconds_low", "train_step_seconds_high", "images_per_second")
    unknown += ("forward_flops_per_second", "train_flops_per_second")
    return {
        "schema": SCHEMA,
        "profile_id": name,
        "status": "ok",
        **shape.to_dict(),
        "num_classes": num_classes,
        "num_params": shape.num_params,
        "forward_flops": shape.forward_flops,
        "head_flops": shape.head_flops(num_classes),
        "batch_size": batch,
        **{k: v for k, v in facts.items() if k != "torch"},
        "num_repeats": 0,
        **dict.fromkeys(unknown),
        "forward_samples": [],
        "train_step_samples": [],
        "load_before": round(os.getloadavg()[0], 2),
        "load_after": None,
    }


def _turn(row: dict, model, optimizer, batch: int, train: bool, device: str, dtype: str) -> dict:
    """The row with one repeat more."""
    try:
        forward = row["forward_samples"] + [
            seconds_of(partial(_forward, model, dtype, *random_batch(row, batch, device)), row["clock"], device)
        ]
        step = row["train_step_samples"]
        if train:
            step_once = partial(_step, model, optimizer, dtype, *random_batch(row, batch, device))
            step = step + [seconds_of(step_once, row["clock"], device)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return row | dict(status="out_of_memory", error=str(error).splitlines()[0])
    middle = statistics.median(forward)
    flops = row["forward_flops"] + row["head_flops"]
    more = dict(
        num_repeats=len(forward),
        forward_samples=forward,
        train_step_samples=step,
        **spread("forward_seconds", forward),
        images_per_second=batch / middle,
        forward_flops_per_second=flops * batch / middle,
        load_after=round(os.getloadavg()[0], 2),
    )
    if train:
        more |= spread("train_step_seconds", step)
        more["train_flops_per_second"] = 3 * flops * batch / more["train_step_seconds"]
    return row | more


def spread(name: str, samples: list[float]) -> dict:
    """{name: median, name_low, name_high: quartiles} of samples."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


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
    with torch.inference_mode(), _cast(images, dtype):
        model(images)


def _step(model, optimizer, dtype: str, images, labels) -> None:
    with _cast(images, dtype):
        logits = model(images).flatten(0, -2)  # [B, C] or [B N, C]
    loss = F.cross_entropy(logits.float(), labels) if logits.shape[-1] > 1 else logits.float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _cast(images, dtype: str):
    return torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype != "float32")


def seconds_of(
    call: Callable[[], None],
    clock_name: str,
    device: str,
    *,
    warm_up: int = WARM_UP,
    turn_seconds: float = TURN_SECONDS,
    min_calls: int = MIN_CALLS,
) -> float:
    """Median seconds of a call, warmed up, by the process's CPU time (clock_name="cpu") or by the wall."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    clock = time.process_time if clock_name == "cpu" else time.perf_counter
    for _ in range(warm_up):
        call()
    samples: list[float] = []
    wait()
    while len(samples) < min_calls or (sum(samples) < turn_seconds and len(samples) < MAX_CALLS):
        start = clock()
        call()
        wait()
        samples.append(clock() - start)
    return statistics.median(samples)


# memory --------------------------------------------------------------------------------------------------------------


def _memory(shape: Shape, batch: int, train: bool, num_classes: int, device: str, dtype: str) -> dict:
    """{forward_bytes, train_bytes}, or {status, error} where one of them does not fit."""
    arguments = (num_classes, device, dtype)
    out: dict = dict(forward_bytes=None, train_bytes=None)
    for name, steps in (("forward_bytes", False), ("train_bytes", True)):
        if steps and not train:
            continue
        work = partial(_work, shape, batch, *arguments, steps)
        peak = peak_bytes(work, partial(_work, shape, 1, *arguments, steps), device)
        if isinstance(peak, str):
            return out | dict(status="out_of_memory", error=peak)
        out[name] = peak
    return out


def _work(shape, batch, num_classes, device, dtype, steps: bool) -> None:
    """What a user of the shape does: hold the model, and run it forward, or train it for two steps."""
    model = build(shape, num_classes, "fan_in", seed=0).to(device)
    row = dict(image_size=shape.image_size, patch_size=shape.patch_size, pool=shape.pool)
    if steps:
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)
        for _ in range(2):
            _step(model, optimizer, dtype, *random_batch(row, batch, device))
    else:
        _forward(model, dtype, *random_batch(row, batch, device))


def peak_bytes(work: Callable[[], object], warm_up: Callable[[], object], device: str) -> int | str:
    """Peak memory of `work`, above what was held before it, in bytes; or the words of what ended it.

    On a CPU, where it is the resident set of a forked process that grows, `warm_up` runs there first: the same work,
    smaller, so that what libraries load is not counted.
    """
    return _peak_cuda(work, device) if device.startswith("cuda") else _peak_cpu(work, warm_up)


def _peak_cuda(work, device) -> int | str:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
        torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return str(error).splitlines()[0]
    return torch.cuda.max_memory_allocated(device) - held


def _peak_cpu(work, warm_up) -> int | str:
    _load_once()
    _trim()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, work, warm_up))
    child.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:  # killed by the kernel, who says nothing
        answer = "killed: the machine ran out of memory"
    child.join()
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def _child(pipe, work, warm_up) -> None:
    try:
        warm_up()  # touches the code of the libraries, whose pages are resident from then on
        gc.collect()
        _trim()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        held = _resident()
        work()
        pipe.send(max(_peak_resident() - held, 0))
    except (RuntimeError, MemoryError) as error:
        said = str(error).splitlines()[0] if str(error) else "out of memory"
        pipe.send(said if is_out_of_memory(error) else RuntimeError(said))


def _trim() -> None:
    """Give back what the allocator holds free: it would hide what is needed, or count as peak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_loaded: list[bool] = []


def _load_once() -> None:
    """A tiny training step in this process, so that what libraries load at first use is not taken for a shape's."""
    if not _loaded:
        _work(Shape(8, 1, 8, head_dim=8, patch_size=4, image_size=8), 1, 2, "cpu", "float32", True)
        _loaded.append(True)


# the machine and the ledger ------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save_rows(path: Path, rows: dict[str, dict], drop: Collection[str] = ()) -> None:
    """Put rows into the ledger in place of those with their ids, atomically and under a lock."""
    with locked(path.with_suffix(".lock")):
        old = {row["profile_id"]: row for row in read_profiles(path)} if path.exists() and path.stat().st_size else {}
        kept = {name: row for name, row in old.items() if name not in drop} | rows
        if kept != old:
            write_atomic(path, "".join(dump_row(row) + "\n" for row in kept.values()))


def profile_text(rows: Sequence[dict]) -> str:
    """The rows as a table."""
    head = f"{'shape':<20}{'batch':>6}{'forward':>12}{'images/s':>11}{'GFLOP/s':>9}{'train step':>12}{'GFLOP/s':>9}"
    lines = [head + f"{'MiB fwd':>9}{'MiB train':>10}{'n':>4}"]

    def cell(value, scale: float, form: str, width: int) -> str:
        return ("-" if value is None else format(value * scale, form)).rjust(width)

    for row in rows:
        label = f"{row['width']}x{row['depth']}x{row['mlp_dim']} h{row['head_dim']}"
        start = f"{label:<20}{row['batch_size']:>6}"
        if row["status"] != "ok":
            lines.append(f"{start}  {row['status'].replace('_', ' ')}: {row['error']}")
            continue
        lines.append(
            start
            + cell(row["forward_seconds"], 1e3, ".3f", 9)
            + " ms"
            + cell(row["images_per_second"], 1, ",.0f", 11)
            + cell(row["forward_flops_per_second"], 1e-9, ".2f", 9)
            + (cell(row["train_step_seconds"], 1e3, ".3f", 9) + (" ms" if row["train_step_seconds"] else "   "))
            + cell(row["train_flops_per_second"], 1e-9, ".2f", 9)
            + cell(row["forward_bytes"], 1 / MIB, ".1f", 9)
            + cell(row["train_bytes"], 1 / MIB, ".1f", 10)
            + f"{row['num_repeats']:>4}"
        )
    first = rows[0]
    clock = "CPU time of the process" if first["clock"] == "cpu" else "wall time"
    lines.append(
        f"{first['device_name']}, {first['dtype']}, {first['threads']} thread{'s' * (first['threads'] > 1)}; {clock};"
        " medians of n repeats, shapes taking turns; FLOP/s by our count (training: 3 x forward)"
    )
    return "\n".join(lines)
