"""The trunks of a ledger as curves: branches by images seen, of an arm and a seed.

Fine-tuned trunks have a base (low-resolution pre-training), the others are trained from scratch. Between two branches of a
trunk a metric is read off the straight line in logarithms, exact for a power law, and never beyond its branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.ledger.ledger import merge, read_exclusions, read_rows
from sovit.ledger.schema import is_number, is_vlm
from sovit.spec.shape import Shape

METRICS = ("val_loss", "val_error")
SHAPE = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")
NEEDED = (*SHAPE, "init_seed", "data_seed", "num_examples", "train_flops", "val_loss")
OF_TUNED = ("trained", "base_examples", "base_train_flops")  # needed besides of a fine-tuning
OPTIONAL = ("val_error", "stored_bytes", "base_patch_size", "base_image_size")
SCRATCH, FLEXI = "scratch", "flexi"  # arms that no base stands before; FLEXI draws its patch size by batch


@dataclass(frozen=True)
class Arm:
    """What a trunk is but for its seed. base: the shape of pre-training, base_examples its images; 0 from scratch."""

    shape: Shape
    mode: str  # SCRATCH, FLEXI or what is trained
    base_examples: int = 0
    base: Shape | None = None

    @property
    def order(self) -> tuple:
        """Sort arms by network, patch and image size, scratch first, then by mode and pre-training."""
        s, base = self.shape, self.base.image_size if self.base else 0
        network = s.width, s.depth, s.mlp_dim, s.head_dim, s.pool, s.patch_size, s.image_size
        return *network, self.mode != SCRATCH, self.mode, self.base_examples, base

    def named(self) -> dict:
        """The arm as entries of a JSON object."""
        shape, base = self.shape, self.base.image_size if self.base else 0
        size = {"shape": shape.label, "patch_size": shape.patch_size, "image_size": shape.image_size}
        return size | {"mode": self.mode, "base_examples": self.base_examples, "base_image_size": base}


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

    @property
    def total_flops(self) -> np.ndarray:
        return self.own_flops + self.base_flops

    @property
    def flops_per_image(self) -> float:
        """Of a training step, as really computed."""
        return float(self.own_flops[-1] / self.examples[-1])

    def at(self, axis: str, x: float, metric: str) -> float:
        """Read the metric at x off the line in logarithms between the two branches around it; UserError outside of them."""
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


def read_study(paths: Sequence[Path | str]) -> Study:
    """Read the trunks of the ledgers. Rows that are excluded or not ok are left out with their reason.

    Raises UserError for a malformed ledger or row, two trunks of one arm and seed, rows of different data, no row left.
    """
    files = [Path(p) for p in paths]
    where = ", ".join(map(str, files))
    rows = merge([row for path in files for row in read_rows(path)], where)
    excluded = {}
    for folder in {path.parent for path in files}:
        excluded |= read_exclusions(folder / "exclusions.csv")
    left_out: list[tuple[str, str]] = []
    trunks: dict[str, list[dict]] = {}
    for row in rows:
        if row["run_id"] in excluded:
            left_out.append((row["run_id"], f"excluded: {excluded[row['run_id']]}"))
        elif row["status"] != "ok":
            left_out.append((row["run_id"], f"status {row['status']}"))
        elif is_vlm(row):
            left_out.append((row["run_id"], "a vision-language model"))
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
    curves.sort(key=lambda c: (c.arm.order, c.seed))
    for one, other in zip(curves, curves[1:]):
        if one.arm == other.arm and one.seed == other.seed:
            raise UserError(
                f"trunks {one.trunk_id} and {other.trunk_id} are the same arm ({one.arm.shape.label}, {one.arm.mode})"
                f" and seed {one.seed[0]}; name one of them in exclusions.csv"
            )
    return Study(curves, left_out, [path.name for path in files])


def _curve(rows: list[dict]) -> Curve:
    first = rows[0]
    for row in rows:
        _check(row)
    shape, mode = Shape(**{name: first[name] for name in SHAPE}), FLEXI if first.get("patch_sizes") else SCRATCH
    arm, base_flops = Arm(shape, mode), 0.0
    if first.get("base"):
        sizes = {name: first.get(f"base_{name}") or first[name] for name in ("patch_size", "image_size")}
        arm = Arm(shape, first["trained"], first["base_examples"], shape.replace(**sizes))
        base_flops = float(first["base_train_flops"])

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row.get(name) is None else row[name] for row in rows], float)

    names = [*METRICS, *(f"{name}@p{size}" for size in first.get("patch_sizes") or () for name in METRICS)]
    seed = first["init_seed"], first["data_seed"]
    costs = column("num_examples"), column("train_flops"), column("stored_bytes")
    return Curve(arm, seed, first["trunk_id"], base_flops, *costs, {name: column(name) for name in names})


def _check(row: dict) -> None:
    """Raise UserError for a row that lacks what a curve needs, or whose numbers are none."""
    several = row.get("patch_sizes") or []
    if not isinstance(several, list) or not all(type(size) is int and size > 0 for size in several):
        raise UserError(f"row {row['run_id']} has patch_sizes={several!r}; give a list of whole numbers above 0")
    needed = (*NEEDED, *(OF_TUNED if row.get("base") else ()))
    for name in (*needed, *OPTIONAL, *(f"{metric}@p{size}" for size in several for metric in METRICS)):
        value = row.get(name)
        if value is None and name in needed:
            raise UserError(f"row {row['run_id']} lacks {name}; mend it, or name it in exclusions.csv")
        if value is None or name in ("pool", "trained"):
            continue
        may_be_zero = name.startswith("val_error") or name.endswith("_seed")
        if not is_number(value) or value < 0 or (value == 0 and not may_be_zero):
            raise UserError(
                f"row {row['run_id']} has {name}={value!r}; give a number{'' if may_be_zero else ' above 0'}"
            )
