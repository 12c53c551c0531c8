"""What fine-tuning to another resolution costs and gives: the arms of a ledger, and their comparison by paired seeds.

A trunk is a curve: its branches by images seen. Fine-tuned trunks have a base (low-resolution pre-training), the others
are trained from scratch. Two arms are compared at equal FLOPs, or at equal images, seed by seed: between two branches of a
trunk the metric is read off the straight line in logarithms, exact for a power law, and never beyond its branches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.ledger.ledger import read_exclusions, read_rows
from sovit.ledger.merge import merge
from sovit.ledger.schema import is_number, is_vlm
from sovit.predict.paired_test import paired

NETWORK = ("width", "depth", "mlp_dim", "head_dim", "pool")  # what a fine-tuning keeps
SIZES = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size")
OPTIONAL = ("val_error", "zero_line", "stored_bytes", "base_patch_size", "base_image_size")  # numbers, if said
SCRATCH, FLEXI = "scratch", "flexi"  # arms that no base stands before
STAY = "stay"  # in a comparison: the base network trained on at its own resolution
AXES = {
    "own_flops": "equal fine-tuning FLOPs",
    "examples": "equal fine-tuning images",
    "total_flops": "equal total FLOPs",
}
# ours, theirs, equal in what
COMPARED = (
    *(("attention", other, axis) for other in ("full", "mlp", "head") for axis in ("own_flops", "examples")),
    *((mode, SCRATCH, "total_flops") for mode in ("attention", "full", "mlp", "head")),
    *((mode, STAY, "total_flops") for mode in ("attention", "full", SCRATCH)),
)
METRICS = ("val_loss", "val_error")
SAME_LEVEL = 0.03  # budgets within 3 % of each other are one: whole batches never meet a budget exactly
RULE = (
    "d = ln ours - ln theirs for each paired seed; verdict by the 90 % Student t interval of its mean: better if it lies"
    " below 0, worse if above 0, else not distinguishable"
)


@dataclass(frozen=True)
class Arm:
    """What a trunk is but for its seed. base_examples: images of pre-training, 0 from scratch."""

    network: tuple
    patch_size: int
    image_size: int
    mode: str  # scratch, or what is trained
    base_examples: int = 0
    base_patch_size: int = 0
    base_image_size: int = 0

    @property
    def label(self) -> str:
        return "x".join(map(str, self.network[:3]))


@dataclass(frozen=True)
class Curve:
    """One trunk, branches rising: examples, own_flops, stored_bytes (nan: not said) [k]; metrics name -> [k], nan: none."""

    arm: Arm
    seed: tuple[int, int]  # init_seed, data_seed
    trunk_id: str
    base_flops: float
    examples: np.ndarray
    own_flops: np.ndarray
    stored_bytes: np.ndarray
    metrics: dict
    zero_line: float | None

    @property
    def total_flops(self) -> np.ndarray:
        return self.own_flops + self.base_flops

    @property
    def flops_per_image(self) -> float:
        """Of a training step, as really computed."""
        return float(self.own_flops[-1] / self.examples[-1])

    def at(self, axis: str, x: float, metric: str) -> float:
        """The metric at x, by the line in logarithms between the two branches around it; UserError outside of them."""
        known = getattr(self, axis)
        if not known[0] * (1 - 1e-9) <= x <= known[-1] * (1 + 1e-9):
            raise UserError(
                f"{axis}={x:.4g} is outside of trunk {self.trunk_id}, run from {known[0]:.4g} to {known[-1]:.4g};"
                " no branch is extrapolated"
            )
        return float(np.exp(np.interp(math.log(x), np.log(known), np.log(self.metrics[metric]))))


@dataclass(frozen=True)
class Study:
    curves: list[Curve]
    left_out: list[tuple[str, str]]  # run_id, reason
    paths: list[str]

    def arms(self) -> dict[Arm, dict[tuple, Curve]]:
        """Arm -> seed -> curve, in a fixed order."""
        out: dict = {}
        for curve in self.curves:
            out.setdefault(curve.arm, {})[curve.seed] = curve
        return out

    def targets(self) -> list[tuple]:
        """(network, patch_size, image_size) that something was fine-tuned to."""
        return sorted({_target(c.arm) for c in self.curves if c.arm.base_examples})


def read_study(paths: Sequence[Path | str], several_sizes: bool = False) -> Study:
    """The trunks of the ledgers. Rows that are excluded or not ok are left out with their reason.

    several_sizes: keep the trunks whose patch size is drawn by batch, as arms of the mode FLEXI. Raises UserError for
    a malformed ledger or row, two trunks of one arm and seed, rows of different data, no row left.
    """
    files = [Path(p) for p in paths]
    where = ", ".join(map(str, files))
    rows = merge([row for path in files for row in read_rows(path)], where)
    reasons: dict[str, str] = {}
    for folder in dict.fromkeys(path.parent for path in files):
        reasons |= read_exclusions(folder / "exclusions.csv")
    left_out: list[tuple[str, str]] = []
    trunks: dict[str, list[dict]] = {}
    for row in rows:
        if row["run_id"] in reasons:
            left_out.append((row["run_id"], f"excluded: {reasons[row['run_id']]}"))
        elif row["status"] != "ok":
            left_out.append((row["run_id"], f"status {row['status']}"))
        elif is_vlm(row):
            left_out.append((row["run_id"], "a vision-language model"))
        elif row.get("patch_sizes") and not several_sizes:
            left_out.append((row["run_id"], "its patch size is drawn by batch"))
        else:
            trunks.setdefault(row["trunk_id"], []).append(row)
    kept = [row for rows in trunks.values() for row in rows]
    if not kept:
        raise UserError(f"{where}: none of the {len(rows)} rows is usable; run the study first")
    for name in ("data", "preset", "num_classes"):
        values = sorted({str(row.get(name)) for row in kept})
        if len(values) > 1:
            raise UserError(f"the rows mix {name}={values[0]} and {values[1]}, whose losses cannot be compared")
    curves = [_curve(sorted(rows, key=lambda row: row["num_examples"])) for rows in trunks.values()]
    curves.sort(key=lambda c: (_order(c.arm), c.seed))
    for one, other in zip(curves, curves[1:]):
        if one.arm == other.arm and one.seed == other.seed:
            raise UserError(
                f"trunks {one.trunk_id} and {other.trunk_id} are the same arm ({_say(one.arm)}) and seed"
                f" {one.seed[0]}; name one of them in exclusions.csv"
            )
    return Study(curves, left_out, [path.name for path in files])


def _curve(rows: list[dict]) -> Curve:
    first = rows[0]
    tuned = bool(first.get("base"))
    needed = (*NETWORK, "patch_size", "image_size", "init_seed", "data_seed", "num_examples", "train_flops", "val_loss")
    for row in rows:
        more = ("trained", "base_examples", "base_train_flops") if tuned else ()
        missing = [name for name in (*needed, *more) if row.get(name) is None]
        if missing:
            raise UserError(f"row {row['run_id']} lacks {missing[0]}; mend it, or name it in exclusions.csv")
        several = row.get("patch_sizes") or []
        if not isinstance(several, list) or not all(type(size) is int and size > 0 for size in several):
            raise UserError(f"row {row['run_id']} has patch_sizes={several!r}; give a list of whole numbers above 0")
        for name in (*SIZES, *more[1:], "num_examples", "train_flops", "val_loss"):
            if not is_number(row[name]) or row[name] <= 0:
                raise UserError(f"row {row['run_id']} has {name}={row[name]!r}; give a number above 0")
        for name in (*OPTIONAL, *(f"{metric}@p{size}" for size in several for metric in METRICS)):
            if row.get(name) is not None and (not is_number(row[name]) or row[name] < 0):
                raise UserError(f"row {row['run_id']} has {name}={row[name]!r}; give a number, or null for none")
    arm = Arm(
        tuple(first[name] for name in NETWORK),
        first["patch_size"],
        first["image_size"],
        first["trained"] if tuned else FLEXI if first.get("patch_sizes") else SCRATCH,
        first["base_examples"] if tuned else 0,
        (first.get("base_patch_size") or first["patch_size"]) if tuned else 0,
        (first.get("base_image_size") or 0) if tuned else 0,
    )

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)

    names = [*METRICS, *(f"{name}@p{size}" for size in first.get("patch_sizes") or () for name in METRICS)]
    return Curve(
        arm,
        (first["init_seed"], first["data_seed"]),
        first["trunk_id"],
        float(first["base_train_flops"]) if tuned else 0.0,
        column("num_examples"),
        column("train_flops"),
        column("stored_bytes"),
        {name: column(name) for name in names},
        first.get("zero_line"),
    )


def _order(arm: Arm) -> tuple:
    return (
        arm.network,
        arm.patch_size,
        arm.image_size,
        arm.mode != SCRATCH,
        arm.mode,
        arm.base_examples,
        arm.base_image_size,
    )


def _say(arm: Arm) -> str:
    base = f" from {arm.base_examples:,} images at {arm.base_image_size} px" if arm.base_examples else ""
    return f"{arm.label} at {arm.image_size} px, patch {arm.patch_size}, {arm.mode}{base}"


# what was measured ---------------------------------------------------------------------------------------------------------


def cells(study: Study) -> list[dict]:
    """Each arm and budget: costs, and mean, s.d. (None for one seed) and n of loss and error over seeds."""
    out = []
    for arm, curves in study.arms().items():
        for examples in sorted({n for curve in curves.values() for n in curve.examples}):
            found = [
                (c, int(np.flatnonzero(c.examples == examples)[0])) for c in curves.values() if examples in c.examples
            ]
            one, i = found[0]
            cell = {
                **_named(arm),
                "num_examples": int(examples),
                "own_flops": float(one.own_flops[i]),
                "total_flops": float(one.total_flops[i]),
                "base_flops": one.base_flops,
                "stored_bytes": None if np.isnan(one.stored_bytes[i]) else int(one.stored_bytes[i]),
                "n": len(found),
            }
            for metric in METRICS:
                values = np.array([c.metrics[metric][j] for c, j in found])
                known = values[np.isfinite(values)]
                cell[metric] = float(known.mean()) if len(known) else None
                cell[f"{metric}_sd"] = float(known.std(ddof=1)) if len(known) > 1 else None
            out.append(cell)
    return out


def _named(arm: Arm) -> dict:
    return {
        "shape": arm.label,
        "patch_size": arm.patch_size,
        "image_size": arm.image_size,
        "mode": arm.mode,
        "base_examples": arm.base_examples,
        "base_image_size": arm.base_image_size,
    }


def seed_noise(study: Study, metric: str = "val_loss") -> dict:
    """S.d. of ln metric between seeds of one arm and budget, pooled; n: degrees of freedom, by trunks."""
    squares, dof, trunks = 0.0, 0, 0
    for curves in study.arms().values():
        if len(curves) < 2:
            continue
        trunks += len(curves) - 1
        for examples in sorted({n for c in curves.values() for n in c.examples}):
            values = np.log(
                [c.metrics[metric][c.examples == examples][0] for c in curves.values() if examples in c.examples]
            )
            values = values[np.isfinite(values)]
            if len(values) > 1:
                squares, dof = squares + float(((values - values.mean()) ** 2).sum()), dof + len(values) - 1
    return {"sd": math.sqrt(squares / dof) if dof else None, "n": trunks, "source": "seeds"}


def storage(study: Study) -> list[dict]:
    """Bytes of the file that one more resolution costs, by what was trained, and its share of full fine-tuning's."""
    found: dict = {}
    for curve in study.curves:
        arm = curve.arm
        if arm.mode != SCRATCH and np.isfinite(curve.stored_bytes[-1]):
            key = (arm.network, arm.patch_size, arm.image_size)
            found.setdefault(key, {})[arm.mode] = (arm.label, int(curve.stored_bytes[-1]))
    out = []
    for (_, patch_size, image_size), modes in found.items():
        whole = modes.get("full", (None, None))[1]
        for mode, (label, size) in modes.items():
            share = size / whole if whole else None
            out.append(
                dict(shape=label, patch_size=patch_size, image_size=image_size, mode=mode, bytes=size, share=share)
            )
    return out


# comparisons -----------------------------------------------------------------------------------------------------------


def compare(ours: dict, theirs: dict, axis: str, metric: str = "val_loss") -> list[dict]:
    """Two arms (seed -> Curve) at equal `axis`: {x, seeds, d [S], ours, theirs (geometric means), **paired}, x rising.

    At both ends of what all trunks of both arms have run, and at our branches between. [] where they do not overlap.
    """
    seeds = sorted(set(ours) & set(theirs))
    both = [side[seed] for side in (ours, theirs) for seed in seeds]
    if not both or not all(np.all(c.metrics[metric] > 0) for c in both):
        return []
    low, high = max(getattr(c, axis)[0] for c in both), min(getattr(c, axis)[-1] for c in both)
    if low > high:
        return []
    at = [low, *(x for x in getattr(ours[seeds[0]], axis) if low < x < high), high]
    at = [x for i, x in enumerate(at) if i == len(at) - 1 or math.log(at[i + 1] / x) > SAME_LEVEL]
    out = []
    for x in at:
        values = np.log([[side[seed].at(axis, x, metric) for seed in seeds] for side in (ours, theirs)])  # [2, S]
        d = values[0] - values[1]
        means = [float(v) for v in np.exp(values.mean(1))]
        out.append(
            dict(x=float(x), seeds=[s[0] for s in seeds], d=d.tolist(), ours=means[0], theirs=means[1]) | paired(d)
        )
    return out


def comparisons(study: Study, metric: str = "val_loss") -> list[dict]:
    """Every comparison of COMPARED that the arms allow: what the arms share, ours, theirs, axis, points of `compare`."""
    arms, out = study.arms(), []
    base = {_target(arm): (arm.base_patch_size, arm.base_image_size) for arm in arms if arm.base_examples}
    for arm, curves in arms.items():
        for ours, theirs, axis in COMPARED:
            if arm.mode != ours or _target(arm) not in base:
                continue
            if theirs == SCRATCH:
                other = Arm(arm.network, arm.patch_size, arm.image_size, SCRATCH)
            elif theirs == STAY:
                other = Arm(arm.network, *base[_target(arm)], SCRATCH)
            else:
                other = dataclasses.replace(arm, mode=theirs)
            if other in arms and other != arm and (points := compare(curves, arms[other], axis, metric)):
                named = {k: v for k, v in _named(arm).items() if k != "mode"}
                out.append({**named, "ours": ours, "theirs": theirs, "axis": axis, "metric": metric, "points": points})
    return out


def _target(arm: Arm) -> tuple:
    return arm.network, arm.patch_size, arm.image_size


def pool(found: list[dict], end: str = "largest", by: Sequence[str] = ()) -> list[dict]:
    """Comparisons of one kind together, at the largest or smallest common budget of each: seeds are what is counted.

    d of a seed is its mean over the comparisons (shapes, resolutions, bases), so that n is the number of seeds. Those that
    lack a seed of the others are left out and counted in `without`. by: further names to tell apart, such as image_size.
    """
    groups: dict = {}
    for entry in found:
        key = (entry["ours"], entry["theirs"], entry["axis"], *(entry[name] for name in by))
        groups.setdefault(key, []).append((entry, entry["points"][-1 if end == "largest" else 0]))
    out = []
    for key, members in groups.items():
        most = max(len(point["seeds"]) for _, point in members)
        seeds = next(point["seeds"] for _, point in members if len(point["seeds"]) == most)
        whole = [point for _, point in members if point["seeds"] == seeds]
        verdicts = [point["verdict"] for point in whole]
        out.append(
            dict(zip(("ours", "theirs", "axis", *by), key))
            | dict(end=end, num_cells=len(whole), without=len(members) - len(whole))
            | {name: verdicts.count(name) for name in ("better", "worse")}
            | paired(np.mean([point["d"] for point in whole], 0))
        )
    return out
