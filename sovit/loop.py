"""The only optimisation loop: parameters, batches, a loss and a schedule, whatever is being trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WINDOW = 50  # steps between two looks at the loss: looking costs a synchronisation on a GPU


class Diverged(RuntimeError):
    """The loss or the gradient stopped being finite. `.step` is the first such step, counted from 0."""

    def __init__(self, step: int):
        super().__init__(f"not finite at step {step}")
        self.step = step


def fit(
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Any],
    loss_fn: Callable[[Any], Tensor],
    learning_rate_at: Callable[[int], float],
    steps: range,
    *,
    clip_norm: float,
    on_window: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
) -> None:
    """Take one optimiser step for each number in `steps`.

    `batch_at(step)` and `learning_rate_at(step)` are pure functions of the step, so that a run resumed from a
    checkpoint repeats exactly what the uninterrupted one did. `on_window(next_step, mean_loss, seconds)` is called at
    least every WINDOW steps, at multiples of WINDOW and at the end, after the losses were found finite.

    Raises Diverged at the end of the window that holds the first non-finite loss or gradient norm.
    """
    parameters = list(parameters)
    window, started = [], time.perf_counter()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        loss = loss_fn(batch_at(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
        optimizer.step()
        window.append(torch.stack((loss.detach(), norm.detach())))
        if (step + 1) % WINDOW == 0 or step + 1 == steps.stop:
            values = torch.stack(window)  # [window, 2]
            bad = (~values.isfinite()).any(1).nonzero()
            if len(bad):
                raise Diverged(step + 1 - len(window) + int(bad[0]))
            now = time.perf_counter()
            on_window(step + 1, values[:, 0].mean().item(), now - started)
            window, started = [], now


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
