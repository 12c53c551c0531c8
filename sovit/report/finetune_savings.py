"""What is saved where fine-tuning trains a part alone: the costs of each part beside those of all, from measured rows.

A row is one flat JSON object a (shape, device, dtype, batch, threads, part), written by `sovit.train.profile`:

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
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sovit import UserError
from sovit.ledger.profiles import shape_of
from sovit.ledger.schema import is_number
from sovit.predict.paired_test import LEVEL, student_t
from sovit.spec.shape import TRAINED
from sovit.tables import text_table

PAPER = {"train_step_seconds": 0.10, "peak_bytes": 0.10, "stored_bytes": 0.66}  # saved; 2203.09795, section 4
MEASURED = ("train_step_seconds", "peak_bytes", "saved_bytes", "saved_bytes_materialised", "stored_bytes", "step_flops")
HELD = ("gradient_bytes", "optimizer_bytes")  # their sum is compared as held_bytes
FACTS = ("device", "device_name", "dtype", "threads", "clock")
NEEDED = (
    "trained",
    "status",
    "num_classes",
    "batch_size",
    "num_repeats",
    "train_step_samples",
    *FACTS,
    *MEASURED,
    *HELD,
)
UNITS = {  # heading -> cost, scale, format
    "step, s": ("train_step_seconds", 1.0, ".3f"),
    "peak, MiB": ("peak_bytes", 2**-20, ",.1f"),
    "activations, MiB": ("saved_bytes", 2**-20, ",.1f"),
    "grads + state, MiB": ("held_bytes", 2**-20, ",.1f"),
    "stored, MiB": ("stored_bytes", 2**-20, ",.1f"),
    "GFLOPs an image": ("step_flops", 1e-9, ",.3f"),
}


def savings(rows: Sequence[dict]) -> list[dict]:
    """Compare the costs of each part with those of "full", for each shape and batch.

    Args:
        rows: of `sovit profile --trained`

    Returns:
        A group for each shape and batch: its costs by part, and their `ratio` to those of "full". That of the step time
        is the geometric mean over rounds of the paired ratios, with `low` and `high` its 90 % interval (Student's t of
        their logarithms; None for one round) and `num_rounds`; all others are exact or measured once.

    Raises:
        UserError: a shape lacks "full", or a row is not one of these.
    """
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        _check(row)
        under = (row[name] for name in ("num_classes", "batch_size", "device_name", "dtype", "threads"))
        groups.setdefault((shape_of(row), *under), {})[row["trained"]] = row
    out = []
    for (shape, num_classes, batch_size, *_), group in groups.items():
        label = f"{shape.label}, patch {shape.patch_size}, {shape.image_size} px"
        if "full" not in group:
            raise UserError(f"{label} was not measured with trained=full, against which parts are compared; measure it")
        full = group["full"]
        parts = {part: _costs(group[part], full) for part in TRAINED if part in group}
        about = {"num_classes": num_classes, "batch_size": batch_size} | {name: full[name] for name in FACTS}
        out.append({"shape": shape.to_dict(), "label": label} | about | {"parts": parts})
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
    for cost in (*MEASURED, *HELD):
        if row[cost] is not None and not is_number(row[cost]):
            raise UserError(f"{name} has {cost}={row[cost]!r}; give a number, or null for none")


def _costs(row: dict, full: dict) -> dict:
    """The costs of a row, and their ratios to those of the row `full`."""
    ours, theirs = (
        {cost: r[cost] for cost in MEASURED}
        | {"held_bytes": None if r["optimizer_bytes"] is None else r["gradient_bytes"] + r["optimizer_bytes"]}
        for r in (row, full)
    )
    ratio = {cost: value / theirs[cost] for cost, value in ours.items() if value is not None and theirs[cost]}
    logs = np.log([a / b for a, b in zip(row["train_step_samples"], full["train_step_samples"])])
    n = len(logs)
    if n:
        half = student_t(n - 1) * logs.std(ddof=1) / math.sqrt(n) if n > 1 else None
        low, high = (None, None) if half is None else (math.exp(logs.mean() + sign * half) for sign in (-1, 1))
        ratio |= {"train_step_seconds": math.exp(logs.mean()), "low": low, "high": high, "num_rounds": n}
    return ours | {"status": row["status"], "num_repeats": row["num_repeats"], "ratio": ratio}


def savings_text(found: Sequence[dict]) -> str:
    """Write the costs of each part and, in parentheses, their ratios to those of "full"."""
    lines = []
    for group in found:
        rows = [[part, *(_cell(costs, *unit) for unit in UNITS.values())] for part, costs in group["parts"].items()]
        lines.append(f"{group['label']}, batch {group['batch_size']}, {group['num_classes']} classes")
        lines.append(text_table(["trained", *UNITS], rows, left=("trained",)))
    first, claimed = found[0], {cost: 1 - saved for cost, saved in PAPER.items()}
    lines += [
        f"in parentheses the ratio to full; the time's is the mean over n rounds in turns, with its {LEVEL:.0%} interval",
        f"arXiv 2203.09795 claims for attention: time {claimed['train_step_seconds']:.2f}, peak"
        f" {claimed['peak_bytes']:.2f}, stored {claimed['stored_bytes']:.2f}",
        f"{first['device_name']}, {first['dtype']}, {first['threads']} thread{'s' * (first['threads'] > 1)};"
        f" {'CPU time of the process' if first['clock'] == 'cpu' else 'wall time'}; activations with fused attention",
    ]
    return "\n".join(lines)


def _cell(costs: dict, cost: str, scale: float, form: str) -> str:
    if costs[cost] is None:
        return costs["status"].replace("_", " ")
    ratio = costs["ratio"]
    of_full = f"{ratio[cost]:.3f}" if cost in ratio else "-"
    if cost == "train_step_seconds" and ratio.get("low") not in (None, 1.0):
        of_full = f"{ratio[cost]:.2f}; {ratio['low']:.2f}-{ratio['high']:.2f}"
    return f"{costs[cost] * scale:{form}} ({of_full})"
