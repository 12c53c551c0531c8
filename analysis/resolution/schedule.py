"""How to spend a fixed budget: low-resolution pre-training first, fine-tuning at the target after, by a law of transfer.

A budget C of training FLOPs buys n0 images at F0 each and n1 = (C - F0 n0) / F1 at the target, where F1 is what a step of
that mode really computes. `share` is F0 n0 / C. For `effective` the best n0 has a closed form for g < 1,
(k g F1 / F0)^(1 / (1 - g)): pre-train up to a fixed length, whatever the budget, and spend all the rest at the target.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.resolution.curves import SCRATCH, Study
from analysis.resolution.law import Cell, TransferFit
from sovit import UserError
from sovit.law.bootstrap import interval

GRID = 481  # splits tried at a time
TOLERANCE = 1e-6  # of a share: this near to its end it is at the end


def budgets(cell: Cell) -> list[float]:
    """Budgets to split: those run from scratch that a fine-tuning inside the data can cost, and 3/4 of the most of these."""
    ends = [span(cell, mode) for mode in cell.modes]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    every = {float(n) * cell.flops_per_image[SCRATCH] for n in cell.n1[cell.mode < 0]}
    return sorted({*(c for c in every if low <= c <= high), 0.75 * high})


def span(cell: Cell, mode: str) -> tuple[float, float]:
    """Least and largest total FLOPs of the n0 and n1 that were run in a mode."""
    mine = cell.mode == cell.modes.index(mode)
    f0, f1 = cell.flops_per_image["base"], cell.flops_per_image[mode]
    return (
        f0 * cell.n0[mine].min() + f1 * cell.n1[mine].min(),
        f0 * cell.n0[mine].max() + f1 * cell.n1[mine].max(),
    )


def window(cell: Cell, mode: str, train_flops: float) -> tuple[float, float] | None:
    """Shares of the budget whose n0 and n1 both lie within what was run; None where there are none."""
    mine = cell.mode == cell.modes.index(mode)
    f0, f1 = cell.flops_per_image["base"], cell.flops_per_image[mode]
    low = max(f0 * cell.n0[mine].min(), train_flops - f1 * cell.n1[mine].max()) / train_flops
    high = min(f0 * cell.n0[mine].max(), train_flops - f1 * cell.n1[mine].min()) / train_flops
    return (low, high) if low < high else None


def best_split(fit: TransferFit, mode: str, train_flops: float, noise_sd: float | None) -> dict:
    """The best share of pre-training, with its interval, its loss, the flat region and what to be warned of.

    Splits are sought where both n0 and n1 were run; where the budget reaches none of these, everywhere, with a warning.
    flat: shares whose loss lies within one noise s.d. of the best. status: `edge` where the best is the end of what was
    sought, `ok` otherwise; `beyond` is then what the law would have without that end, which no run supports. Ends of
    intervals are None without draws. Raises UserError for a budget that buys no image.
    """
    cell = fit.cell
    if not train_flops > 0 or not math.isfinite(train_flops):
        raise UserError(f"train_flops={train_flops} is no budget; give a number above 0")
    f0, f1 = cell.flops_per_image["base"], cell.flops_per_image[mode]
    if train_flops < 2 * max(f0, f1):
        raise UserError(f"train_flops={train_flops:.3g} does not pay for two images at {cell.image_size} px; give more")
    found, everywhere = window(cell, mode, train_flops), (f0 / train_flops, 1 - f1 / train_flops)
    low, high = found or everywhere

    def loss(share, theta=None):
        return fit.loss(share * train_flops / f0, (1 - share) * train_flops / f1, mode, theta)

    share, least = _least_at(loss, low, high)
    shares = _grid(low, high)
    at_end = min(share - low, high - share) < TOLERANCE * (high - low)
    flat = shares[loss(shares)[0] <= least * math.exp(noise_sd)] if noise_sd else np.array([share])
    out = dict(
        mode=mode,
        train_flops=float(train_flops),
        share=share,
        base_examples=share * train_flops / f0,
        examples=(1 - share) * train_flops / f1,
        loss=least,
        searched=[float(low), float(high)],
        status="edge" if at_end else "ok",
        flat=[float(min(flat.min(initial=share), share)), float(max(flat.max(initial=share), share))],
        beyond=None,
        warnings=_warnings(cell, mode, train_flops, found, share, (low, high) if at_end else None),
    )
    if found and at_end:
        further, lower = _least_at(loss, *everywhere)
        out["beyond"] = dict(
            share=further,
            base_examples=further * train_flops / f0,
            examples=(1 - further) * train_flops / f1,
            loss=lower,
        )
    scratch = train_flops / cell.flops_per_image[SCRATCH]
    known = float(fit.loss(1.0, scratch, SCRATCH)[0])
    out["scratch_loss"] = known
    for name, prefix in (("random_effects", ""), ("seeds", "seeds_")):
        ends: dict = dict.fromkeys(("share", "loss", "against_scratch"), (None, None))
        if name in fit.draws:
            theta, widen = fit.draws[name], fit.widen[name]
            drawn = loss(shares, theta)  # [R, GRID]
            ends["share"] = interval(shares[drawn.argmin(1)], widen, None)
            ends["loss"] = interval(drawn.min(1), widen)
            against = np.log(drawn.min(1) / fit.loss(1.0, scratch, SCRATCH, theta))
            ends["against_scratch"] = interval(against, widen, None)
            ends["share"] = tuple(float(np.clip(x, low, high)) for x in ends["share"])
        for quantity, (lower, upper) in ends.items():
            out |= {f"{quantity}_{prefix}low": lower, f"{quantity}_{prefix}high": upper}
    out["against_scratch"] = math.log(least / known)
    return out


def compare_modes(fit: TransferFit, train_flops: float, noise_sd: float | None) -> dict:
    """The best split of every mode at one budget, and ln(loss of the first mode / loss of the second) with its interval."""
    splits = {mode: best_split(fit, mode, train_flops, noise_sd) for mode in fit.cell.modes}
    out: dict = dict(train_flops=float(train_flops), splits=splits, between=None)
    if len(splits) == 2:
        first, second = splits

        def difference(theta):
            return np.log(_least(fit, splits[first], theta) / _least(fit, splits[second], theta))

        out["between"] = dict(ours=first, theirs=second) | fit.interval(difference)
    return out


def _least(fit: TransferFit, split: dict, theta: np.ndarray) -> np.ndarray:
    """The least loss of each draw over the splits that were sought, [R]."""
    f0, f1 = fit.cell.flops_per_image["base"], fit.cell.flops_per_image[split["mode"]]
    low, high = split["searched"]
    shares, c = _grid(low, high), split["train_flops"]
    return fit.loss(shares * c / f0, (1 - shares) * c / f1, split["mode"], theta).min(1)


def valley(fit: TransferFit, mode: str, train_flops: float, num: int = 60) -> dict:
    """Predicted loss along every split, for a figure: share, loss, low and high [num] (None without draws).

    inside: the shares whose n0 and n1 were both run, None where there are none.
    """
    f0, f1 = fit.cell.flops_per_image["base"], fit.cell.flops_per_image[mode]
    inside = window(fit.cell, mode, train_flops)
    ends = f0 / train_flops, 1 - f1 / train_flops
    shares = np.unique(np.concatenate([_grid(*ends, num), inside or ()]))
    n0, n1 = shares * train_flops / f0, (1 - shares) * train_flops / f1
    out: dict = dict(share=shares.tolist(), loss=fit.loss(n0, n1, mode)[0].tolist(), low=None, high=None)
    out["inside"] = None if inside is None else [float(x) for x in inside]
    if "random_effects" in fit.draws:
        drawn = fit.loss(n0, n1, mode, fit.draws["random_effects"])
        ends_of = [interval(column, fit.widen["random_effects"]) for column in drawn.T]
        out |= dict(low=[e[0] for e in ends_of], high=[e[1] for e in ends_of])
    return out


def measured(study: Study, cell: Cell, train_flops: float, metric: str = "val_loss") -> list[dict]:
    """What was run, at this budget: each mode and length of pre-training whose trunks' branches lie on both sides of it.

    {mode, base_examples, share, loss (geometric mean over seeds, read between two branches), n}.
    """
    out = []
    for arm, curves in study.arms().items():
        here = (arm.network, arm.patch_size, arm.image_size) == (cell.network, cell.patch_size, cell.image_size)
        if not here or arm.mode not in cell.modes:
            continue
        able = [c for c in curves.values() if c.total_flops[0] <= train_flops <= c.total_flops[-1]]
        if able:
            loss = math.exp(float(np.mean([math.log(c.at("total_flops", train_flops, metric)) for c in able])))
            share = able[0].base_flops / train_flops
            out.append(dict(mode=arm.mode, base_examples=arm.base_examples, share=share, loss=loss, n=len(able)))
    return out


def _least_at(loss, low: float, high: float) -> tuple[float, float]:
    """Share of the least loss between low and high, and that loss: a grid, and a finer one around its best."""
    shares = _grid(low, high)
    i = int(loss(shares)[0].argmin())
    finer = np.linspace(shares[max(i - 1, 0)], shares[min(i + 1, GRID - 1)], GRID)
    near = loss(finer)[0]
    return float(finer[near.argmin()]), float(near.min())


def _grid(low: float, high: float, num: int = GRID) -> np.ndarray:
    """Shares from low to high, closer together at both ends, where the number of images changes fastest."""
    return low + (high - low) * np.sin(np.linspace(0, np.pi / 2, num)) ** 2


def _warnings(cell: Cell, mode: str, train_flops: float, found, share: float, ends) -> list[str]:
    out = []
    mine = cell.mode == cell.modes.index(mode)
    f0, f1 = cell.flops_per_image["base"], cell.flops_per_image[mode]
    if found is None:
        low, high = span(cell, mode)
        out.append(
            f"no split of {train_flops:.2g} FLOPs lies within the data ({low:.2g} to {high:.2g} by {mode}); what follows is"
            " the law's word beyond its data"
        )
        for name, value, known in (
            ("pre-training", share * train_flops / f0, cell.n0[mine]),
            ("fine-tuning", (1 - share) * train_flops / f1, cell.n1[mine]),
        ):
            if value < known.min() or value > known.max():
                out.append(f"{value:,.0f} images of {name}, run from {known.min():,.0f} to {known.max():,.0f}")
    elif ends is not None:
        more = "more" if share > sum(ends) / 2 else "less"
        out.append(f"the law would have {more} pre-training than any run within this budget had")
    from_scratch = cell.n1[cell.mode < 0] * cell.flops_per_image[SCRATCH]
    if not from_scratch.min() * 0.97 <= train_flops <= from_scratch.max() * 1.03:
        decades = abs(
            math.log10(train_flops / (from_scratch.max() if train_flops > from_scratch.max() else from_scratch.min()))
        )
        out.append(f"training from scratch is extrapolated by {decades:.1f} decades")
    return out
