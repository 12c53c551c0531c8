"""The rows that a law of transfer is fitted to: one network at one target resolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.resolution.curves import SCRATCH, Curve, Study
from sovit import UserError
from sovit.spec.shape import Shape

MODES = ("attention", "full")  # the modes that a law is fitted to


@dataclass(frozen=True)
class Cell:
    """Rows of one network at one target: [n] each. mode: -1 from scratch, else place in `modes`."""

    shape: Shape
    base_image_size: int
    modes: tuple[str, ...]
    mode: np.ndarray
    n0: np.ndarray
    n1: np.ndarray
    y: np.ndarray
    trunk: np.ndarray
    seed: np.ndarray
    zero_line: float | None
    flops_per_image: dict  # "base", scratch and each mode: of one training step

    @property
    def centre(self) -> tuple[float, float]:
        """(ln n1, ln n0) at the middle of the fine-tunings."""
        tuned = self.mode >= 0
        return float(np.log(self.n1[tuned]).mean()), float(np.log(self.n0[tuned]).mean())

    def u(self, n0, n1, mode) -> np.ndarray:
        """Return what the form reads of rows: ln n1 and ln n0 centred, and the mode, [3, n]."""
        x1, v0 = self.centre
        n0 = np.where(np.asarray(mode) < 0, math.exp(v0), np.asarray(n0, float))
        return np.stack(np.broadcast_arrays(np.log(n1) - x1, np.log(n0) - v0, np.asarray(mode, float)))

    def take(self, keep: np.ndarray) -> Cell:
        names = ("mode", "n0", "n1", "y", "seed")
        trunk = np.unique(self.trunk[keep], return_inverse=True)[1]
        return dataclasses.replace(self, trunk=trunk, **{name: getattr(self, name)[keep] for name in names})

    def only(self, mode: str) -> Cell:
        """Keep the rows from scratch and those of one mode."""
        kept = self.take((self.mode < 0) | (self.mode == self.modes.index(mode)))
        return dataclasses.replace(kept, modes=(mode,), mode=np.where(kept.mode < 0, -1, 0))

    def of(self, mode: str) -> tuple[float, float, np.ndarray, np.ndarray]:
        """Return the FLOPs an image of the base and of this mode, and the n0 and n1 that were run in it."""
        mine = self.mode == self.modes.index(mode)
        return self.flops_per_image["base"], self.flops_per_image[mode], self.n0[mine], self.n1[mine]


def cells_of(study: Study, metric: str = "val_loss") -> tuple[list[Cell], list[str]]:
    """Gather what a law can be fitted to, and a line for each target that it cannot."""
    out, notes = [], []
    for target in study.targets():
        scratch = [c for c in study.curves if c.arm.shape == target and c.arm.mode == SCRATCH]
        tuned = [c for c in study.curves if c.arm.shape == target and c.arm.mode in MODES]
        bases = list(dict.fromkeys(c.arm.base for c in tuned))
        base = [c for c in study.curves if c.arm.shape in bases and c.arm.mode == SCRATCH]
        budgets, lengths = {n for c in scratch for n in c.examples}, {c.arm.base_examples for c in tuned}
        if len(bases) == 1 and base and len(budgets) > 1 and len(lengths) > 1:
            out.append(_cell(scratch, tuned, base[0], metric))
        else:
            where = f"{target.label} at {target.image_size} px, patch {target.patch_size}"
            notes.append(
                f"{where}: a law needs 2 budgets from scratch ({len(budgets)} run), 2 lengths of pre-training"
                f" ({len(lengths)}) and 1 base resolution ({len(bases)}) with a trunk from scratch ({len(base)})"
            )
    return out, notes


def _cell(scratch: Sequence[Curve], tuned: Sequence[Curve], base: Curve, metric: str) -> Cell:
    shape, curves = tuned[0].arm.shape, [*scratch, *tuned]
    present = tuple(mode for mode in MODES if any(c.arm.mode == mode for c in tuned))
    seeds = sorted({c.seed for c in curves})
    rows = [
        ((SCRATCH, *present).index(c.arm.mode) - 1, c.arm.base_examples, n, y, g, seeds.index(c.seed))
        for g, c in enumerate(curves)
        for n, y in zip(c.examples, c.metrics[metric])
    ]
    mode, n0, n1, y, trunk, seed = map(np.array, zip(*rows))
    if not (y > 0).all():
        raise UserError(
            f"{shape.label} at {shape.image_size} px has a row without {metric} above 0; a power law needs it"
        )
    per_image = {c.arm.mode: c.flops_per_image for c in reversed(curves)} | {"base": base.flops_per_image}
    lines = {c.zero_line for c in curves}
    zero_line = lines.pop() if len(lines) == 1 and metric == "val_loss" else None
    image_size = base.arm.shape.image_size
    return Cell(shape, image_size, present, mode, n0.astype(float), n1, y, trunk, seed, zero_line, per_image)
