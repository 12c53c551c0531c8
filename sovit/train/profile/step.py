"""One row of a profile: what is measured, under which settings, and the forward pass and training step themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import Batch
from sovit.encoder.model import build, parameter_groups
from sovit.spec.shape import Shape
from sovit.train.device import check_device
from sovit.train.finetune import freeze
from sovit.train.loop import OutOfMemory, Position, Task, fit
from sovit.train.profile.memory import count_saved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Job(NamedTuple):
    """What one row measures. part: what of the shape is trained; "" of a profile of shapes, which trains all of it."""

    shape: Shape
    batch: int
    part: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.shape.label, f"batch {self.batch}", self.part)))


@dataclass(frozen=True)
class Settings:
    """What all rows are measured under. Raises UserError for an impossible device, dtype or number."""

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

    def trains(self, job: Job) -> bool:
        """Whether training steps are measured: of a shape at the batches above 1, or at 1 where it is the only one."""
        return bool(job.part) or job.batch > 1 or max(self.batch_sizes) == 1

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

    def profile_id(self, job: Job) -> str:
        more = {"trained": job.part} if job.part else {}
        key = dict(job.shape.to_dict(), num_classes=self.num_classes, batch_size=job.batch, **more, **self.conditions)
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]


def saved_bytes(job: Job, under: Settings, fused_attention: bool) -> int:
    """Bytes that one forward pass keeps for its backward pass where the part is trained.

    Counted at depths 1 and 2: all blocks are alike, so every further one adds as much as the second.
    fused_attention=False: with the attention weights [B, H, N, N] written out, as they were before fused kernels.
    """

    def at(depth: int) -> int:
        shallow = job._replace(shape=job.shape.replace(depth=depth))
        model, _ = built(shallow, under)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attention
        return count_saved(model, random_batch(shallow, under.device).images, DTYPES[under.dtype])

    one = at(1)
    return one + (job.shape.depth - 1) * (at(2) - one)


def built(job: Job, under: Settings) -> tuple[Any, torch.optim.Optimizer]:
    """The model, and AdamW over what is trained of it."""
    model = build(job.shape, under.num_classes, "fan_in", seed=0).to(under.device)
    freeze(model, job.part or "full")
    return model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.0, fused=True)


def random_batch(job: Job, device: str) -> Batch:
    """Images [B, 3, H, W] and labels [B, 1], or [B, N] where each patch token has one."""
    labels = job.shape.num_patches if job.shape.pool == "none" else 1
    images = torch.randn(job.batch, 3, job.shape.image_size, job.shape.image_size, device=device)
    return Batch(images, torch.zeros(job.batch, labels, dtype=torch.long, device=device), None)


def autocast(under: Settings) -> torch.autocast:
    return torch.autocast(under.device.partition(":")[0], DTYPES[under.dtype], enabled=under.dtype != "float32")


def forward(model: Any, batch: Batch, under: Settings) -> None:
    with torch.inference_mode(), autocast(under):
        model(batch.images)


def train_steps(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, under: Settings, count: int) -> None:
    """Training steps as the trainer takes them, without its schedule. Raises MemoryError rather than split a batch."""

    def loss_fn(b: Batch) -> tuple[torch.Tensor, int]:
        with autocast(under):
            logits = model(b.images).flatten(0, -2)  # [B, C] or [B N, C]
        return F.cross_entropy(logits.float(), b.labels.flatten(), reduction="sum"), b.labels.numel()

    def on_split(micro_batch: int) -> None:
        raise MemoryError(f"out of memory: of {len(batch.images)} images {micro_batch} fit at a time")

    trained = [p for p in model.parameters() if p.requires_grad]
    task = Task(trained, optimizer, lambda step: batch, loss_fn, lambda step: 1e-5, clip_norm=1.0)
    try:
        fit(task, Position(), count, on_split=on_split)
    except OutOfMemory as error:
        raise MemoryError(str(error)) from error


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
