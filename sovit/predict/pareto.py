"""Profiles of shapes on a device, and a law's losses against what was measured there: which shapes are worth their cost.

A profile row is one flat JSON object a (shape, device, dtype, batch, threads), written by `sovit.train.profile`:

    schema profile_id status (ok | out_of_memory), the shape, num_classes num_params forward_flops head_flops
    device device_name dtype threads clock batch_size versions commit commit_dirty date num_repeats
    forward_seconds, forward_seconds_low, _high    one forward pass of a batch: median and quartiles of the repeats
    train_step_seconds, _low, _high                forward, backward and AdamW of a batch
    forward_samples, train_step_samples            the repeats themselves
    forward_bytes, train_bytes                     peak memory of both, weights included
    images_per_second forward_flops_per_second train_flops_per_second
    load_before load_after                         load average of the machine, one minute

Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.fitted_law import Fit
from sovit.law.geometry import Geometry
from sovit.ledger.profiles import shape_of
from sovit.predict.recommend import predicted_loss
from sovit.spec.shape import Shape

NUM_BUDGETS = 61  # points of the curves of loss against a budget


DECADES = 1.5  # the curves run from this far below the budget asked for, to the same


COSTS = ("train_flops", "train_seconds", "latency", "memory")  # one front each


def front(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices, by rising cost, of the points that no other point matches or beats in both and beats in one."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))[:-1]
    keep = order[loss[order] < best]
    equal = (cost[:, None] == cost[keep]) & (loss[:, None] == loss[keep])  # twins do not beat each other
    return np.flatnonzero(equal.any(1))[np.lexsort((loss[equal.any(1)], cost[equal.any(1)]))]


@dataclass(frozen=True)
class Costs:
    """What was measured of S shapes at one batch size; NaN where it was not."""

    shapes: list[Shape]
    batch_size: int
    step: np.ndarray  # [S] seconds of a training step, an image
    latency: np.ndarray  # [S] seconds of one image's forward pass
    memory: np.ndarray  # [S] peak bytes of a training step
    flops: np.ndarray  # [S] training FLOPs of an image
    left_out: list[str]


def pareto(fit: Fit, rows: Sequence[dict], train_flops: float | None = None) -> dict:
    """The law's losses of the profiled shapes against four costs, as plain data.

    train_flops: the budget; None = the largest that was run. Costs: training FLOPs, training seconds (the images that
    fit into them at the measured step time, at the largest batch that every shape was measured at), seconds of one
    image's forward pass, and peak bytes of a training step; the loss of the last two is that of the budget in FLOPs.
    Losses are the law's predictions; nothing is trained. Raises UserError where rows and law do not fit together.
    """
    if not fit.data.train_flops_range or fit.geometry is None:
        raise UserError("the law does not know the training FLOPs of its rows; fit it to rows with a whole shape")
    budget = float(train_flops or fit.data.train_flops_range[1])
    rows, device = _one_device(rows)
    costs = _costs(fit, rows)
    shapes, flops, step = costs.shapes, costs.flops, costs.step
    loss = predicted_loss(fit, shapes, budget)
    flop_best = int(loss.argmin())
    seconds = float(budget / flops[flop_best] * step[flop_best])  # what the best shape per FLOP takes
    timed = loss_of_images(fit, shapes, seconds / step)
    time_best = int(timed.argmin())
    along = np.logspace(-DECADES, 0, NUM_BUDGETS)
    budgets = dict(train_flops=budget * along, train_seconds=seconds * along)
    losses = {  # [B, S]
        name: np.array([loss_of_images(fit, shapes, b / each) for b in budgets[name]])
        for name, each in dict(train_flops=flops, train_seconds=step).items()
    }
    on = _fronts(costs, losses, loss)
    table = _table(fit, costs, loss, timed, on)
    labels, rate = [row["label"] for row in table], flops / step
    return dict(
        form=fit.form,
        train_flops=budget,
        train_seconds=seconds,
        batch_size=costs.batch_size,
        device=device,
        shapes=table,
        fronts={name: [labels[i] for i in found] for name, found in on.items()},
        on_every_front=[row["label"] for row in table if len(row["fronts"]) == len(COSTS)],
        flop_optimal=dict(
            label=labels[flop_best],
            loss_at_flops=float(loss[flop_best]),
            excess_at_seconds=float(timed[flop_best] / timed[time_best] - 1),
        ),
        time_optimal=dict(
            label=labels[time_best],
            loss_at_seconds=float(timed[time_best]),
            excess_at_flops=float(loss[time_best] / loss[flop_best] - 1),
        ),
        rate_range=[float(rate.min()), float(rate.max())],
        curves={name: dict(budget=budgets[name].tolist(), loss=losses[name].T.tolist()) for name in budgets},
        noise_sd=fit.noise.sd,
        left_out=costs.left_out,
    )


def _costs(fit: Fit, rows: Sequence[dict]) -> Costs:
    rows, strangers = _of_law(fit, rows)
    by_shape: dict[Shape, dict[int, dict]] = {}
    for row in rows:
        by_shape.setdefault(shape_of(row), {})[row["batch_size"]] = row
    batches = [b for b in {b for found in by_shape.values() for b in found} if b > 1]
    trained = [b for b in batches if all(found.get(b, {}).get("train_step_seconds") for found in by_shape.values())]
    batch = max(trained or [max(batches, default=1)])  # where no batch has all shapes: the largest, of what fits there
    shapes = [s for s, found in by_shape.items() if found.get(batch, {}).get("train_step_seconds")]
    if len(shapes) < 2:
        raise UserError(
            f"{len(shapes)} shape of the law's kind has a training step at batch {batch}; profile at least two"
        )
    at = [by_shape[s][batch] for s in shapes]
    single = [by_shape[s].get(1, {}).get("forward_seconds") for s in shapes]
    return Costs(
        shapes=shapes,
        batch_size=batch,
        step=np.array([row["train_step_seconds"] / batch for row in at]),
        latency=np.array(single, float),  # None becomes NaN
        memory=np.array([row["train_bytes"] for row in at], float),
        flops=3 * (fit.geometry or Geometry()).flops(_columns(shapes), head=True),
        left_out=[*strangers, *(f"{s.label}: no training step at batch {batch}" for s in by_shape if s not in shapes)],
    )


def _fronts(costs: Costs, losses: dict[str, np.ndarray], loss: np.ndarray) -> dict[str, list[int]]:
    """Cost -> indices of the shapes on its front. losses: along each budget [B, S]; loss: at the budget [S]."""
    on: dict[str, list[int]] = {name: sorted(set(many.argmin(1).tolist())) for name, many in losses.items()}
    for name, cost in (("latency", costs.latency), ("memory", costs.memory)):
        known = np.flatnonzero(np.isfinite(cost))
        on[name] = known[front(cost[known], loss[known])].tolist() if len(known) else []
    return on


def _table(fit: Fit, costs: Costs, loss: np.ndarray, timed: np.ndarray, on: dict[str, list[int]]) -> list[dict]:
    return [
        dict(
            shape=shape.to_dict(),
            label=shape_label(shape, fit),
            loss_at_flops=float(loss[i]),
            loss_at_seconds=float(timed[i]),
            step_seconds_per_image=float(costs.step[i]),
            train_flops_per_second=float(costs.flops[i] / costs.step[i]),
            latency=None if np.isnan(costs.latency[i]) else float(costs.latency[i]),
            train_bytes=None if np.isnan(costs.memory[i]) else float(costs.memory[i]),
            fronts=[name for name in COSTS if i in on[name]],
        )
        for i, shape in enumerate(costs.shapes)
    ]


def loss_of_images(fit: Fit, shapes: Sequence[Shape], images: np.ndarray) -> np.ndarray:
    """Predicted loss [S] of shapes trained on so many images [S] each."""
    return fit.predict(_columns(shapes) | dict(num_examples=np.maximum(images, 1.0)))


def shape_label(shape: Shape, fit: Fit) -> str:
    """width x depth x MLP dim, and the head dim where it is not the law's."""
    usual = fit.geometry and fit.geometry.head_dim
    return shape.label + (f" (head {shape.head_dim})" if shape.head_dim != usual else "")


def _columns(shapes: Sequence[Shape]) -> dict[str, np.ndarray]:
    names = ("width", "depth", "mlp_dim", "patch_size", "image_size")
    return {n: np.array([getattr(s, n) for s in shapes], float) for n in names}


def _one_device(rows: Sequence[dict]) -> tuple[list[dict], dict]:
    names = ("device", "device_name", "dtype", "threads", "clock")
    kinds = {tuple(row.get(n) for n in names) for row in rows}
    if len(kinds) > 1:
        found = "; ".join(sorted(", ".join(f"{v}" for v in kind) for kind in kinds))
        raise UserError(f"the profiles are of several machines or settings ({found}); give those of one")
    return list(rows), dict(zip(names, next(iter(kinds))))


def _of_law(fit: Fit, rows: Sequence[dict]) -> tuple[list[dict], list[str]]:
    """The rows of shapes that the law speaks of, and why the others are none."""
    geometry, dims = fit.geometry or Geometry(), fit.model.dims
    kept, strangers = [], []
    for row in rows:
        fixed = {n: getattr(geometry, n) for n in ("patch_size", "image_size", "pool") if n not in dims}
        off = next((n for n, value in fixed.items() if row[n] != value), None)
        if row["status"] != "ok":
            strangers.append(f"{shape_of(row).label} at batch {row['batch_size']}: {row['status'].replace('_', ' ')}")
        elif off:
            strangers.append(f"{shape_of(row).label}: {off}={row[off]}, where the law is of {fixed[off]}")
        else:
            kept.append(row)
    if not kept:
        raise UserError(f"no profiled shape is of the law's kind ({'; '.join(strangers[:3])}); profile with --law")
    return kept, list(dict.fromkeys(strangers))
