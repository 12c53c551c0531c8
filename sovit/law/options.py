"""The options of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sovit.law.solver.fitter import Loss


@dataclass(frozen=True)
class LawOptions:
    """How a law is fitted. Raises UserError for a loss that is none."""

    loss: str = "huber_log"
    """huber_log or log_squares, of ln(predicted / measured)."""
    huber_delta: float | None = None
    """None = 1.345 robust s.d., whitened by trunk; a number = as in a paper (1e-3), rows as they are."""
    whiten: bool | None = None
    """None = as said under huber_delta."""
    clusters: Any = None
    """Trunk of each row; None = the column trunk_id, else rows that agree in all but num_examples."""
    dims: Sequence[str] | None = None
    """Dimensions of the law; None = those of width, depth, mlp_dim, patch_size, image_size that vary."""
    terms: Sequence[str] | None = None
    """Form "additive": the columns of sum_k A_k x_k^-a_k + eps. ("num_params", "tokens") and so on are the Gemstones
    forms (2502.06857)."""
    zero_line: float | None = None
    """Forms that are bounded: the chance loss."""
    geometry: Mapping | None = None
    """What the columns do not say for counting FLOPs: patch_size, image_size, pool, head_dim, num_classes."""
    cut: float | None = None
    """Compute that splits fit and score of the extrapolation test; None = `extrapolation.compute_cut`."""
    extrapolate: bool = True
    bootstrap: int = 0
    """Draws of each of the two bootstraps; needs 3 trunks (1,000 for results to keep)."""
    seed: int = 0
    metric: str | None = None
    """What y is, such as "val_loss"."""

    @property
    def estimator(self) -> Loss:
        return Loss(self.loss, self.huber_delta, self.whiten)
