"""How to spend a fixed budget: low-resolution pre-training first, fine-tuning at the target after, by a law of transfer.

A budget C of training FLOPs buys n0 images at F0 each and n1 = (C - F0 n0) / F1 at the target, where F1 is what a step of
that mode really computes. `share` is F0 n0 / C. For `effective` the best n0 has a closed form for g < 1,
(k g F1 / F0)^(1 / (1 - g)): pre-train up to a fixed length, whatever the budget, and spend all the rest at the target.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.resolution.curves import SCRATCH
from analysis.resolution.law import TransferFit
from analysis.resolution.law_rows import Cell
from sovit import UserError

GRID = 481  # splits tried at a time
TOLERANCE = 1e-6  # of a share: this near to its end it is at the end
LEVEL = 0.03  # as far as whole batches miss a budget


def budgets(cell: Cell) -> list[float]:
    """List budgets to split: those run from scratch that a fine-tuning can cost, and 3/4 of the largest that one did."""
    low, high = (end(ends) for end, ends in zip((min, max), zip(*(span(cell, mode) for mode in cell.modes))))
    every = {float(n) * cell.flops_per_image[SCRATCH] for n in cell.n1[cell.mode < 0]}
    return sorted({*(c for c in every if low <= c <= high), 0.75 * high})


def span(cell: Cell, mode: str) -> tuple[float, float]:
    """Return the least and largest total FLOPs of the n0 and n1 that were run in a mode."""
    f0, f1, n0, n1 = cell.of(mode)
    return f0 * n0.min() + f1 * n1.min(), f0 * n0.max() + f1 * n1.max()


def window(cell: Cell, mode: str, train_flops: float) -> tuple[float, float] | None:
    """Return the shares of the budget whose n0 and n1 both lie within what was run; None where there are none."""
    f0, f1, n0, n1 = cell.of(mode)
    low = max(f0 * n0.min(), train_flops - f1 * n1.max()) / train_flops
    high = min(f0 * n0.max(), train_flops - f1 * n1.min()) / train_flops
    return (float(low), float(high)) if low < high else None


def best_split(fit: TransferFit, mode: str, train_flops: float, noise_sd: float | None) -> dict:
    """Find the best share of pre-training, with its interval, its loss, the flat region and what to be warned of.

    flat: shares whose loss lies within one noise s.d. of the best. status: `edge` where the best is the end of what was
    run, `ok` otherwise; `beyond` is then what the law would have without that end, which no run supports. Ends of
    intervals are None without draws. Raises UserError for a budget that no split within the data costs.
    """
    cell = fit.cell
    ends = window(cell, mode, train_flops) if train_flops > 0 else None
    if ends is None:
        least, most = span(cell, mode)
        raise UserError(
            f"train_flops={train_flops:.3g} is none that {mode} was run for; give {least:.3g} to {most:.3g}"
        )
    low, high = ends
    f0, f1, *_ = cell.of(mode)

    def loss(share, theta=None):
        return fit.loss(share * train_flops / f0, (1 - share) * train_flops / f1, mode, theta)

    def spent(share: float, least: float) -> dict:
        images = {"base_examples": share * train_flops / f0, "examples": (1 - share) * train_flops / f1}
        return {"share": share} | images | {"loss": least}

    share, least = _least(loss, low, high)
    shares = _grid(low, high)
    at_end = min(share - low, high - share) < TOLERANCE * (high - low)
    flat = [*shares[loss(shares)[0] <= least * math.exp(noise_sd)], share] if noise_sd else [share]
    scratch = train_flops / cell.flops_per_image[SCRATCH]
    known = float(fit.loss(1.0, scratch, SCRATCH)[0])
    out = {"mode": mode, "train_flops": float(train_flops), **spent(share, least), "searched": [low, high]}
    out |= {"status": "edge" if at_end else "ok", "flat": [float(min(flat)), float(max(flat))], "beyond": None}
    out |= {"warnings": [], "scratch_loss": known, "against_scratch": math.log(least / known)}
    if at_end:
        out["beyond"] = spent(*_least(loss, f0 / train_flops, 1 - f1 / train_flops))
        more = "more" if share > (low + high) / 2 else "less"
        out["warnings"].append(f"the law would have {more} pre-training than any run within this budget had")
    run = cell.n1[cell.mode < 0] * cell.flops_per_image[SCRATCH]
    if not run.min() * (1 - LEVEL) <= train_flops <= run.max() * (1 + LEVEL):
        out["warnings"].append("training from scratch is extrapolated")
    found: dict = dict.fromkeys(("share", "loss", "against_scratch"), (None, None))
    if fit.draws is not None:
        drawn = loss(shares, fit.draws)  # [R, GRID]
        against = np.log(drawn.min(1) / fit.loss(1.0, scratch, SCRATCH, fit.draws))
        found = {"share": np.clip(fit.interval(shares[drawn.argmin(1)]), low, high).tolist()}
        found |= {"loss": fit.interval(drawn.min(1), 1e-300), "against_scratch": fit.interval(against)}
    return out | {f"{name}_{end}": x for name, pair in found.items() for end, x in zip(("low", "high"), pair)}


def splits(fit: TransferFit, train_flops: float, noise_sd: float | None) -> dict:
    """Find the best split of every mode that was run for a budget; UserError where none was."""
    able = [mode for mode in fit.cell.modes if window(fit.cell, mode, train_flops)]
    return {mode: best_split(fit, mode, train_flops, noise_sd) for mode in able or fit.cell.modes[:1]}


def valley(fit: TransferFit, mode: str, train_flops: float, num: int = 60) -> dict:
    """Predict the loss along every split, for a figure: share, loss, low and high [num] (None without draws).

    inside: the shares whose n0 and n1 were both run, None where there are none.
    """
    f0, f1, *_ = fit.cell.of(mode)
    inside = window(fit.cell, mode, train_flops)
    shares = np.unique(np.concatenate([_grid(f0 / train_flops, 1 - f1 / train_flops, num), inside or ()]))
    n0, n1 = shares * train_flops / f0, (1 - shares) * train_flops / f1
    out: dict = {"share": shares.tolist(), "loss": fit.loss(n0, n1, mode)[0].tolist(), "low": None, "high": None}
    if fit.draws is not None:
        out["low"], out["high"] = zip(*(fit.interval(column, 1e-300) for column in fit.loss(n0, n1, mode, fit.draws).T))
    return out | {"inside": None if inside is None else list(inside)}


def _least(loss, low: float, high: float) -> tuple[float, float]:
    """Share of the least loss between low and high, and that loss: a grid, and a finer one around its best."""
    shares = _grid(low, high)
    i = int(loss(shares)[0].argmin())
    finer = np.linspace(shares[max(i - 1, 0)], shares[min(i + 1, GRID - 1)], GRID)
    near = loss(finer)[0]
    return float(finer[near.argmin()]), float(near.min())


def _grid(low: float, high: float, num: int = GRID) -> np.ndarray:
    """Shares from low to high, closer together at both ends, where the number of images changes fastest."""
    return low + (high - low) * np.sin(np.linspace(0, np.pi / 2, num)) ** 2
