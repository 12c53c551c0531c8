"""The only optimisation loop: parameters, batches, a loss and a schedule, whatever is being trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sovit import UserError

WINDOW = 50  # steps between two looks at the loss: looking costs a synchronisation on a GPU

T = TypeVar("T")


class Diverged(RuntimeError):
    """The loss or the gradient stopped being finite. `.step` is the first such step, counted from 0."""

    def __init__(self, step: int):
        super().__init__(f"not finite at step {step}")
        self.step = step


class Interrupted(KeyboardInterrupt):
    """A stop was asked for. No failure, so what catches errors lets it pass."""


@dataclass(frozen=True)
class Task:
    """What is descended, and how.

    `batch_at(step)` and `learning_rate_at(step)` are pure functions of the step, so that a resumed run repeats exactly
    what the uninterrupted one did. The rate is one for all, or a list with one for each group of the optimiser. A batch is
    a (named) tuple of tensors [B, ...], or None. `loss_fn(batch)`, which must not depend on chance, returns the sum of its
    losses and the number of their terms; a step descends their mean. A loss that compares the rows of a batch with each
    other (pairwise=True) cannot be taken in parts: `loss_fn(batch, rows)` then gets the whole batch, and itself holds what
    is computed of no more than `rows` of them at a time.
    """

    parameters: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    batch_at: Callable[[int], Any]
    loss_fn: Callable[..., tuple[Tensor, int]]
    learning_rate_at: Callable[[int], float | list[float]]
    clip_norm: float
    pairwise: bool = False


@dataclass
class Position:
    """Where training stands: `fit` moves it, a checkpoint holds it.

    seconds: that all steps took; spent: those since the last record. window: loss and gradient norm [k, 2] of the k steps
    since `on_window`. micro_batch: where a batch did not fit into memory, the rows that did.
    """

    step: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    window: Tensor | None = None
    micro_batch: int | None = None

    def move(self, step: int, seconds: float, window: Tensor | None = None) -> None:
        self.step, self.window = step, window
        self.seconds, self.spent = self.seconds + seconds, self.spent + seconds


def fit(
    task: Task,
    at: Position,
    stop: int,
    *,
    on_window: Callable[[float, int, float], None] = lambda loss, steps, seconds: None,
    on_split: Callable[[int], None] = lambda micro_batch: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take one optimiser step for each number from `at.step` to `stop`, and move `at` along.

    `on_window(mean_loss, steps, seconds)` is called at least every WINDOW steps, at multiples of WINDOW and at the end,
    after the losses were found finite. Where a batch does not fit into memory its step is taken again in two, four ...
    parts of at most `at.micro_batch` rows, with the same gradient but for rounding, and so are all later steps;
    `on_split(micro_batch)` is told.

    Raises Diverged at the end of the window that holds the first non-finite loss or gradient norm; Interrupted between
    two steps, as soon as `should_stop()`, with `at` where it can go on; OutOfMemory where one row does not fit.
    """
    seen: list[Tensor] = [] if at.window is None else list(at.window)  # of [2]: loss, gradient norm
    steps, started = range(at.step, stop), time.perf_counter()
    for step in steps:
        if should_stop():
            at.move(step, time.perf_counter() - started, torch.stack(seen) if seen else None)
            raise Interrupted(f"stopped after {step} steps")
        rates = task.learning_rate_at(step)
        for i, group in enumerate(task.optimizer.param_groups):
            group["lr"] = rates[i] if isinstance(rates, list) else rates
        batch = task.batch_at(step)
        rows = min(at.micro_batch or len(batch[0]), len(batch[0]))
        loss, fitting = within_memory(partial(_backward, task, batch), rows)
        if fitting < rows:
            at.micro_batch = fitting
            on_split(fitting)
        norm = torch.nn.utils.clip_grad_norm_(task.parameters, task.clip_norm, foreach=True)
        task.optimizer.step()
        seen.append(torch.stack((loss, norm.detach())))
        if (step + 1) % WINDOW == 0 or step + 1 == stop:
            values = torch.stack(seen)  # [window, 2]
            bad = (~values.isfinite()).any(1).nonzero()
            if len(bad):
                raise Diverged(step + 1 - len(seen) + int(bad[0]))
            taken, now = step + 1 - at.step, time.perf_counter()
            at.move(step + 1, now - started)
            on_window(values[:, 0].mean().item(), taken, now - started)
            seen, started = [], now
    if steps and should_stop():  # before whatever the caller does next, which may take long
        raise Interrupted(f"stopped after {stop} steps")


def _backward(task: Task, batch: Any, rows: int) -> Tensor:
    """Leave the gradient of the batch's mean loss in the parameters, computed `rows` at a time; return that loss."""
    for p in task.parameters:
        p.grad = None
    if task.pairwise or rows >= len(batch[0]):
        total, count = task.loss_fn(batch, rows) if task.pairwise else task.loss_fn(batch)
        loss = total / (count or 1)  # a batch of which nothing is asked has no loss, and no gradient
        loss.backward()
        return loss.detach()
    sums, counts = [], []
    for part in parts_of(batch, rows):
        total, count = task.loss_fn(part)
        total.backward()
        sums.append(total.detach())
        counts.append(count)
    count = sum(counts) or 1
    for p in task.parameters:
        if p.grad is not None:
            p.grad /= count  # parts may differ in their number of terms: only the whole batch's makes a mean
    return torch.stack(sums).sum() / count


def parts_of(batch, rows: int) -> Iterator[Any]:
    """A batch in parts of at most `rows` rows."""
    for start in range(0, len(batch[0]), rows):
        columns = [None if t is None else t[start : start + rows] for t in batch]
        yield batch._make(columns) if hasattr(batch, "_make") else tuple(columns)


# memory --------------------------------------------------------------------------------------------------------------


class OutOfMemory(UserError):
    """Not even the least of work fits."""

    def __init__(self, what: str, error: BaseException):
        reason = str(error).partition("\n")[0]
        super().__init__(f"out of memory {what} ({reason}); take a smaller shape, or a device with more memory")


def within_memory(attempt: Callable[[int], T], rows: int) -> tuple[T, int]:
    """`attempt(rows)`, with half as many rows each time that memory runs out: its result, and the rows that fitted.

    Raises OutOfMemory where one row does not fit.
    """
    while True:
        try:
            return attempt(rows), rows
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                raise OutOfMemory("with one sample at a time", error) from error
        # here, and not above: as long as the error lives, so does what was computed before it
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        rows = -(-rows // 2)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device's, an allocator's or Python's way to say so; oneDNN's says no more than it does here."""
    said = (
        "DefaultCPUAllocator: can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "could not create a primitive",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


# schedule ------------------------------------------------------------------------------------------------------------


def schedule(step: int, *, warmup: int, timescale: int | None, cooldown: range | None) -> float:
    """Multiplier of the peak learning rate at `step` (0-based).

    Linear warm-up over `warmup` steps; a constant trunk, or with `timescale` 1/sqrt(1 + (step - warmup)/timescale)
    (Zhai et al., arXiv 2106.04560); over the steps of `cooldown` also x (1 - sqrt(share done)), arXiv 2405.18392.
    """
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if timescale:
        factor /= (1 + max(0, step - warmup) / timescale) ** 0.5
    if cooldown and step >= cooldown.start:
        factor *= 1 - ((step - cooldown.start) / len(cooldown)) ** 0.5
    return factor
