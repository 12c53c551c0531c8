"""A law's losses against costs that were measured on a device: which shapes are worth their cost. Numpy only.

Rows are those of `sovit profile`; `sovit.ledger.profiles` names their fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sovit import UserError
from sovit.law.fitted_law import Fit
from sovit.ledger.profiles import shape_of
from sovit.predict.law_at_budget import columns, predicted_loss
from sovit.spec.shape import Shape

NUM_BUDGETS = 61  # points of the curves of loss against a budget
DECADES = 1.5  # the curves run from this far below the budget asked for, to the same
MACHINE = ("device", "device_name", "dtype", "threads", "clock")


def front(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices, by rising cost, of the points that no other point matches or beats in both and beats in one."""
    less = (cost < cost[:, None]) | (loss < loss[:, None])
    beaten = (less & (cost <= cost[:, None]) & (loss <= loss[:, None])).any(1)
    keep = np.flatnonzero(~beaten & np.isfinite(cost))
    return keep[np.lexsort((loss[keep], cost[keep]))]


def pareto(fit: Fit, rows: Sequence[dict], train_flops: float | None = None) -> dict:
    """The law's losses of the profiled shapes against four costs, as plain data.

    train_flops: the budget; None = the largest that was run. Costs: training FLOPs, training seconds (the images that
    fit into them at the measured step time, at the largest batch that every shape was measured at), seconds of one
    image's forward pass, and peak bytes of a training step; the loss of the last two is that of the budget in FLOPs.
    Losses are the law's predictions; nothing is trained. Raises UserError where rows and law do not fit together.
    """
    if not fit.data.train_flops_range or fit.geometry is None:
        raise UserError("the law does not know the training FLOPs of its rows; fit it to rows with a whole shape")
    machines = {tuple(row.get(n) for n in MACHINE) for row in rows}
    if len(machines) > 1:
        found = "; ".join(sorted(", ".join(map(str, machine)) for machine in machines))
        raise UserError(f"the profiles are of several machines or settings ({found}); give those of one")
    budget = float(train_flops or fit.data.train_flops_range[1])
    table, batch, left_out = _measured(fit, rows)
    shapes, step = list(table), np.array([row["step_seconds_per_image"] for row in table.values()])
    flops = 3 * fit.geometry.flops(columns(shapes), head=True)
    loss = predicted_loss(fit, shapes, budget)
    best = int(loss.argmin())
    seconds = float(budget / flops[best] * step[best])  # what the best shape per FLOP takes
    timed = loss_of_images(fit, shapes, seconds / step)
    fastest = int(timed.argmin())
    along = np.logspace(-DECADES, 0, NUM_BUDGETS)
    curves, on = {}, {}
    for name, total, each in (("train_flops", budget, flops), ("train_seconds", seconds, step)):
        losses = np.array([loss_of_images(fit, shapes, b / each) for b in total * along])  # [B, S]
        curves[name] = dict(budget=(total * along).tolist(), loss=losses.T.tolist())
        on[name] = sorted(set(losses.argmin(1).tolist()))
    for name, key in (("latency", "latency"), ("memory", "train_bytes")):
        cost = np.array([row[key] for row in table.values()], float)  # None becomes NaN
        on[name] = front(cost, loss).tolist()
    labels = [shape_label(shape, fit) for shape in shapes]
    every = [
        dict(shape=shape.to_dict(), label=labels[i], loss_at_flops=float(loss[i]), loss_at_seconds=float(timed[i]))
        | table[shape]
        | dict(train_flops_per_second=float(flops[i] / step[i]), fronts=[name for name in on if i in on[name]])
        for i, shape in enumerate(shapes)
    ]
    in_flops = dict(loss_at_flops=float(loss[best]), excess_at_seconds=float(timed[best] / timed[fastest] - 1))
    in_time = dict(loss_at_seconds=float(timed[fastest]), excess_at_flops=float(loss[fastest] / loss[best] - 1))
    return dict(
        form=fit.form,
        train_flops=budget,
        train_seconds=seconds,
        batch_size=batch,
        device=dict(zip(MACHINE, machines.pop())),
        shapes=every,
        fronts={name: [labels[i] for i in found] for name, found in on.items()},
        on_every_front=[row["label"] for row in every if len(row["fronts"]) == len(on)],
        flop_optimal=dict(label=labels[best]) | in_flops,
        time_optimal=dict(label=labels[fastest]) | in_time,
        rate_range=[float((flops / step).min()), float((flops / step).max())],
        curves=curves,
        noise_sd=fit.noise.sd,
        left_out=left_out,
    )


def _measured(fit: Fit, rows: Sequence[dict]) -> tuple[dict[Shape, dict], int, list[str]]:
    """What was measured of each shape of the law's kind, at one batch size, and why others are left out."""
    by_shape: dict[Shape, dict[int, dict]] = {}
    left_out: list[str] = []
    fixed = {n: getattr(fit.geometry, n) for n in ("patch_size", "image_size", "pool") if n not in fit.model.dims}
    for row in rows:
        off = next((n for n, value in fixed.items() if row[n] != value), None)
        if row["status"] != "ok":
            left_out.append(f"{shape_of(row).label} at batch {row['batch_size']}: {row['status'].replace('_', ' ')}")
        elif off:
            left_out.append(f"{shape_of(row).label}: {off}={row[off]}, where the law is of {fixed[off]}")
        else:
            by_shape.setdefault(shape_of(row), {})[row["batch_size"]] = row
    if not by_shape:
        raise UserError(f"no profiled shape is of the law's kind ({'; '.join(left_out[:3])}); profile with --law")
    trained = [{b for b, row in found.items() if row.get("train_step_seconds")} for found in by_shape.values()]
    shared = set.intersection(*trained) - {1}
    batch = max(shared or {*(b for found in by_shape.values() for b in found)})  # else the largest, of what fits there
    table = {
        shape: dict(
            step_seconds_per_image=found[batch]["train_step_seconds"] / batch,
            latency=found[1].get("forward_seconds") if 1 in found else None,
            train_bytes=found[batch].get("train_bytes"),
        )
        for (shape, found), batches in zip(by_shape.items(), trained)
        if batch in batches
    }
    if len(table) < 2:
        raise UserError(f"{len(table)} shape of the law's kind has a training step at batch {batch}; profile two")
    left_out += [f"{shape.label}: no training step at batch {batch}" for shape in by_shape if shape not in table]
    return table, batch, list(dict.fromkeys(left_out))


def loss_of_images(fit: Fit, shapes: Sequence[Shape], images: np.ndarray) -> np.ndarray:
    """Predicted loss [S] of shapes trained on so many images [S] each."""
    return fit.predict(columns(shapes) | dict(num_examples=np.maximum(images, 1.0)))


def shape_label(shape: Shape, fit: Fit) -> str:
    """width x depth x MLP dim, and the head dim where it is not the law's."""
    usual = fit.geometry and fit.geometry.head_dim
    return shape.label + (f" (head {shape.head_dim})" if shape.head_dim != usual else "")
