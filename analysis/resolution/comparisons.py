"""Arms of a fine-tuning study: their means, the noise between seeds, and their comparison by paired seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from analysis.resolution.curves import METRICS, SCRATCH, Arm, Study
from sovit.predict.validation import paired
from sovit.spec.shape import Shape

STAY = "stay"  # in a comparison: the base network trained on at its own resolution
AXES = {
    "own_flops": "equal fine-tuning FLOPs",
    "examples": "equal fine-tuning images",
    "total_flops": "equal total FLOPs",
}
COMPARED = (  # ours, theirs, equal in what
    *(("attention", other, axis) for other in ("full", "mlp", "head") for axis in ("own_flops", "examples")),
    *((mode, SCRATCH, "total_flops") for mode in ("attention", "full", "mlp", "head")),
    *((mode, STAY, "total_flops") for mode in ("attention", "full", SCRATCH)),
)
SAME_LEVEL = 0.03  # budgets within 3 % of each other are one: whole batches never meet a budget exactly
RULE = (
    "d = ln ours - ln theirs for each paired seed; verdict by the 90 % Student t interval of its mean: better if it lies"
    " below 0, worse if above 0, else not distinguishable"
)


def cells(study: Study) -> list[dict]:
    """Sum up each arm and budget: costs, and mean, s.d. (None for one seed) and n of loss and error over seeds."""
    out = []
    for arm, curves in study.arms().items():
        for examples in sorted({n for curve in curves.values() for n in curve.examples}):
            found = [(c, i) for c in curves.values() for i in np.flatnonzero(c.examples == examples)]
            one, i = found[0]
            cell = arm.named() | {"num_examples": int(examples), "own_flops": float(one.own_flops[i])}
            cell |= {"total_flops": float(one.total_flops[i]), "base_flops": one.base_flops, "n": len(found)}
            for metric in METRICS:
                values = np.array([c.metrics[metric][j] for c, j in found])
                known = values[np.isfinite(values)]
                cell[metric] = float(known.mean()) if len(known) else None
                cell[f"{metric}_sd"] = float(known.std(ddof=1)) if len(known) > 1 else None
            out.append(cell)
    return out


def seed_noise(study: Study, metric: str = "val_loss") -> dict:
    """Pool the s.d. of ln metric between seeds of one arm and budget; n: degrees of freedom, by trunks."""
    arms, squares, dof = study.arms().values(), 0.0, 0
    for curves in arms:
        groups: dict[float, list[float]] = {}
        for curve in curves.values():
            for examples, value in zip(curve.examples, curve.metrics[metric]):
                if value > 0:
                    groups.setdefault(examples, []).append(math.log(value))
        squares += sum(float(np.var(values)) * len(values) for values in groups.values())
        dof += sum(len(values) - 1 for values in groups.values())
    sd = math.sqrt(squares / dof) if dof else None
    return {"sd": sd, "n": sum(len(curves) - 1 for curves in arms), "source": "seeds"}


def storage(study: Study) -> list[dict]:
    """Count the bytes of a file for one more resolution, by what was trained, and their share of full fine-tuning's."""
    found: dict[Shape, dict] = {}
    for curve in study.curves:
        if curve.arm.mode != SCRATCH and np.isfinite(curve.stored_bytes[-1]):
            found.setdefault(curve.arm.shape, {})[curve.arm.mode] = int(curve.stored_bytes[-1])
    return [
        {"shape": shape.label, "patch_size": shape.patch_size, "image_size": shape.image_size, "mode": mode}
        | {"bytes": size, "share": size / modes["full"] if "full" in modes else None}
        for shape, modes in found.items()
        for mode, size in modes.items()
    ]


def compare(ours: dict, theirs: dict, axis: str, metric: str = "val_loss") -> list[dict]:
    """Compare two arms (seed -> Curve) at equal `axis`: both ends of what all their trunks have run, our branches between.

    Returns points {x, seeds, d [S], ours, theirs (geometric means), **paired}, x rising; [] where they do not overlap.
    """
    seeds = sorted(set(ours) & set(theirs))
    both = [side[seed] for side in (ours, theirs) for seed in seeds]
    if not both or not all(np.all(c.metrics[metric] > 0) for c in both):
        return []
    low, high = max(getattr(c, axis)[0] for c in both), min(getattr(c, axis)[-1] for c in both)
    if low > high * (1 + 1e-9):
        return []
    at = [min(low, high), *(x for x in getattr(ours[seeds[0]], axis) if low < x < high), high]
    at = [x for i, x in enumerate(at) if i == len(at) - 1 or math.log(at[i + 1] / x) > SAME_LEVEL]
    out = []
    for x in at:
        values = np.log([[side[seed].at(axis, x, metric) for seed in seeds] for side in (ours, theirs)])  # [2, S]
        d, (mine, other) = values[0] - values[1], np.exp(values.mean(1))
        point = {"x": float(x), "seeds": [s[0] for s in seeds], "d": d.tolist()}
        out.append(point | {"ours": float(mine), "theirs": float(other)} | paired(d))
    return out


def comparisons(study: Study, metric: str = "val_loss") -> list[dict]:
    """Make every comparison of COMPARED that the arms allow: what they share, ours, theirs, axis, points of `compare`."""
    arms, out = study.arms(), []
    bases = {arm.shape: arm.base for arm in arms if arm.base}
    for arm, curves in arms.items():
        for ours, theirs, axis in COMPARED:
            if arm.mode != ours or arm.shape not in bases:
                continue
            if theirs in (SCRATCH, STAY):
                other = Arm(arm.shape if theirs == SCRATCH else bases[arm.shape], SCRATCH)
            else:
                other = dataclasses.replace(arm, mode=theirs)
            if other in arms and other != arm and (points := compare(curves, arms[other], axis, metric)):
                named = {k: v for k, v in arm.named().items() if k != "mode"}
                out.append(named | {"ours": ours, "theirs": theirs, "axis": axis, "metric": metric, "points": points})
    return out


def pool(found: list[dict], by: Sequence[str] = ()) -> list[dict]:
    """Pool comparisons of one kind, at the largest common budget of each: seeds are what is counted.

    d of a seed is its mean over the comparisons (shapes, resolutions, bases), so that n is the number of seeds. Those that
    lack a seed of the others are left out and counted in `without`. by: further names to tell apart, such as image_size.
    """
    groups: dict = {}
    for entry in found:
        key = (entry["ours"], entry["theirs"], entry["axis"], *(entry[name] for name in by))
        groups.setdefault(key, []).append(entry["points"][-1])
    out = []
    for key, points in groups.items():
        seeds = max((point["seeds"] for point in points), key=len)
        whole = [point for point in points if point["seeds"] == seeds]
        verdicts = [point["verdict"] for point in whole]
        out.append(
            dict(zip(("ours", "theirs", "axis", *by), key))
            | {"end": "largest", "num_cells": len(whole), "without": len(points) - len(whole)}
            | {name: verdicts.count(name) for name in ("better", "worse")}
            | paired(np.mean([point["d"] for point in whole], 0))
        )
    return out
