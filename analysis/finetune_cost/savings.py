"""What is saved where fine-tuning trains a part alone: the costs of each part beside those of all, from measured rows.

A row is one flat JSON object a (shape, device, dtype, batch, threads, part), written by `sovit.train.finetune_profile`:

    schema profile_id status (ok | out_of_memory), the shape, num_classes batch_size
    trained                                        attention | mlp | head | full
    num_params head_params trained_params
    stored_bytes                                   float32 tensors that one more resolution has to store
    step_flops                                     of one image, forward and backward, of what is really computed
    train_step_seconds, _low, _high                forward, backward, clipping and AdamW: median and quartiles of the repeats
    train_step_samples                             the repeats; the i-th ones of the parts of a shape are of one round
    peak_bytes                                     peak memory above what the process held before
    saved_bytes                                    activations kept for the backward pass, counted
    saved_bytes_materialised                       the same with attention's weights [B, H, N, N] written out
    gradient_bytes optimizer_bytes                 as held after a step
    device device_name dtype threads clock versions commit commit_dirty date num_repeats load_before load_after

Numpy and scipy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import LEVEL
from sovit.ledger.profiles import shape_of
from sovit.ledger.schema import is_number
from sovit.spec.named_shapes import VARIANTS, stored_params
from sovit.spec.shape import TRAINED, Shape

PAPER = {
    "train_step_seconds": 0.10,
    "peak_bytes": 0.10,
    "stored_bytes": 0.66,
}  # saved by attention; 2203.09795, section 4


COSTS = {  # what is compared -> its name in tables
    "train_step_seconds": "step time",
    "peak_bytes": "peak memory",
    "saved_bytes": "activations",
    "saved_bytes_materialised": "same, attention written out",
    "held_bytes": "gradients + state",
    "stored_bytes": "stored",
    "step_flops": "step FLOPs",
}


MEASURED = (*(cost for cost in COSTS if cost != "held_bytes"), "gradient_bytes", "optimizer_bytes")


FACTS = ("num_params", "head_params", "num_repeats", "device", "device_name", "dtype", "threads", "clock")


NEEDED = ("trained", "status", "num_classes", "batch_size", "train_step_samples", *FACTS, *MEASURED)


UNITS = {  # heading -> cost, scale, format
    "step, s": ("train_step_seconds", 1.0, ".3f"),
    "peak, MiB": ("peak_bytes", 2**-20, ",.1f"),
    "activations, MiB": ("saved_bytes", 2**-20, ",.1f"),
    "grads + state, MiB": ("held_bytes", 2**-20, ",.1f"),
    "stored, MiB": ("stored_bytes", 2**-20, ",.1f"),
    "GFLOPs an image": ("step_flops", 1e-9, ",.3f"),
}


def closed_forms(patch_size: int = 16, image_size: int = 384, num_classes: int = 1000) -> list[dict]:
    """What attention alone takes of the cost of "full", for each named shape, in closed form.

    share_of_blocks: of the blocks' matrices, 4 w² of 4 w² + 2 w m. stored_bytes: of all tensors, positions and task head
    included. step_flops: of a step. saved_bytes: of a block's activations with fused attention, 7 w + m floats a token
    of 8 w + 2 m: the frozen MLP keeps neither of its inputs.
    """
    shapes = {"x⁽⁰⁾": Shape(608, 10, 928, 76, patch_size, image_size, "map")}  # where SoViT's growth begins
    for name, (width, depth, mlp_dim, num_heads, pool) in VARIANTS.items():
        shapes[name] = Shape(width, depth, mlp_dim, width // num_heads, patch_size, image_size, pool)
    out = []
    for name, shape in shapes.items():
        w, m = shape.width, shape.mlp_dim
        stored = [stored_params(shape, num_classes, part) for part in ("attention", "full")]
        flops = [shape.step_flops(num_classes, part) for part in ("attention", "full")]
        out.append(
            dict(
                name=name,
                mlp_ratio=m / w,
                share_of_blocks=2 * w / (2 * w + m),
                stored_bytes=stored[0] / stored[1],
                step_flops=flops[0] / flops[1],
                saved_bytes=(7 * w + m) / (8 * w + 2 * m),
            )
        )
    return out


def savings(rows: Sequence[dict]) -> list[dict]:
    """For each shape and batch: the costs of each part, and their ratios to those of "full".

    `ratio` of the step time is the geometric mean over rounds of the paired ratios, with `low` and `high` its 90 %
    interval (Student's t of their logarithms; None for one round) and `num_rounds`; all others are exact or measured once.
    `expected_peak_bytes` is the sum of weights, state and activations. Raises UserError where a shape lacks "full", and
    for a row that is not one of these.
    """
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        _check(row)
        key = (
            shape_of(row),
            row["num_classes"],
            row["batch_size"],
            *(row[n] for n in ("device_name", "dtype", "threads")),
        )
        groups.setdefault(key, {})[row["trained"]] = row
    out = []
    for (shape, num_classes, batch, *_), group in groups.items():
        label = f"{shape.label}, patch {shape.patch_size}, {shape.image_size} px"
        if "full" not in group:
            raise UserError(f"{label} was not measured with trained=full, against which parts are compared; measure it")
        first = group["full"]
        facts = {n: first[n] for n in ("device", "device_name", "dtype", "threads", "clock")}
        parts = {part: _costs(group[part]) for part in TRAINED if part in group}
        for part, costs in parts.items():
            costs["ratio"] = {
                cost: costs[cost] / parts["full"][cost]
                for cost in COSTS
                if costs[cost] is not None and parts["full"][cost]  # a tiny shape's peak can be 0 pages
            }
            costs["ratio"] |= _time_ratio(group[part], first)
        out.append(
            dict(shape=shape.to_dict(), label=label, num_classes=num_classes, batch_size=batch, **facts, parts=parts)
        )
    return out


def _check(row: dict) -> None:
    name = f"row {row.get('profile_id')}"
    missing = [n for n in NEEDED if n not in row]
    if missing:
        raise UserError(f"{name} lacks {missing[0]}; give rows that sovit profile --trained wrote")
    if row["trained"] not in TRAINED:
        raise UserError(f"{name} has trained={row['trained']!r}; it is one of {', '.join(TRAINED)}")
    samples = row["train_step_samples"]
    if not isinstance(samples, list) or not all(is_number(x) and x > 0 for x in samples):
        raise UserError(f"{name} has train_step_samples={samples!r}; give a list of seconds above 0")
    for cost in (*MEASURED, "num_params", "head_params"):
        if row[cost] is not None and not is_number(row[cost]):
            raise UserError(f"{name} has {cost}={row[cost]!r}; give a number, or null for none")


def _costs(row: dict) -> dict:
    costs = {cost: row.get(cost) for cost in COSTS}
    held, weights = None, 4 * (row["num_params"] + row["head_params"])
    if row["optimizer_bytes"] is not None:
        held = row["gradient_bytes"] + row["optimizer_bytes"]
        costs["expected_peak_bytes"] = weights + row["optimizer_bytes"] + row["saved_bytes"]
    return costs | dict(held_bytes=held, status=row["status"], num_repeats=row["num_repeats"])


def _time_ratio(row: dict, full: dict) -> dict:
    from scipy.stats import t

    pairs = list(zip(row["train_step_samples"], full["train_step_samples"]))
    if not pairs:
        return {}
    logs = np.log([a / b for a, b in pairs])
    mean, n = logs.mean(), len(logs)
    half = t.ppf((1 + LEVEL) / 2, n - 1) * logs.std(ddof=1) / math.sqrt(n) if n > 1 else None
    low, high = (None, None) if half is None else (math.exp(mean - half), math.exp(mean + half))
    return dict(train_step_seconds=math.exp(mean), low=low, high=high, num_rounds=n)


def savings_text(found: Sequence[dict]) -> str:
    """The costs of each part and, in parentheses, their ratios to those of "full"."""
    lines = []
    for group in found:
        lines.append(f"{group['label']}, batch {group['batch_size']}, {group['num_classes']} classes")
        lines.append("trained".ljust(10) + "".join(f"{name:>24}" for name in UNITS))
        for part, costs in group["parts"].items():
            lines.append(part.ljust(10) + "".join(f"{_cell(costs, cost):>24}" for cost, *_ in UNITS.values()))
    first = found[0]
    lines += [
        f"in parentheses the ratio to full; the time's is the mean over n rounds in turns, with its {LEVEL:.0%} interval",
        f"arXiv 2203.09795 claims for attention: time {1 - PAPER['train_step_seconds']:.2f}, peak"
        f" {1 - PAPER['peak_bytes']:.2f}, stored {1 - PAPER['stored_bytes']:.2f}",
        f"{first['device_name']}, {first['dtype']}, {first['threads']} thread{'s' * (first['threads'] > 1)};"
        f" {'CPU time of the process' if first['clock'] == 'cpu' else 'wall time'}; activations with fused attention",
    ]
    return "\n".join(lines)


def _cell(costs: dict, cost: str) -> str:
    scale, form = next((scale, form) for name, scale, form in UNITS.values() if name == cost)
    if costs[cost] is None:
        return costs["status"].replace("_", " ")
    ratio = costs["ratio"]
    of_full = f"{ratio[cost]:.3f}" if cost in ratio else "-"
    if cost == "train_step_seconds" and ratio.get("low") not in (None, 1.0):
        of_full = f"{ratio[cost]:.2f}; {ratio['low']:.2f}-{ratio['high']:.2f}"
    return f"{costs[cost] * scale:{form}} ({of_full})"
