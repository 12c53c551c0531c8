"""Which form of the law of transfer is used: the one that predicts rows best that it was not fitted to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from analysis.resolution.law import KINDS, fit_cell
from analysis.resolution.law_rows import Cell
from sovit import UserError

AS_GOOD = 1.05  # a simpler form whose RMSE is within 5 % of the best one's is as good


def held_out(cell: Cell) -> list[tuple[str, np.ndarray]]:
    """Hold out, as (what, rows), the longest fine-tuning of each trunk; the longest pre-training; the longest of both.

    Where some leave three pairs of n0 and n1, what all but the richest forms need, those that leave fewer are not judged by.
    """
    tuned, out = cell.mode >= 0, []
    lengths = sorted({float(n) for n in cell.n0[tuned]}), sorted({float(n) for n in cell.n1[tuned]})
    if len(lengths[1]) > 1:
        last = np.zeros(len(cell.y), bool)
        for trunk in np.unique(cell.trunk[tuned]):
            mine = np.flatnonzero(cell.trunk == trunk)
            last[mine[cell.n1[mine].argmax()]] = len(mine) > 1
        out.append(("longest fine-tuning", last))
        longest = tuned & (cell.n0 == lengths[0][-1])  # its own longest fine-tuning: other bases may have a longer one
        out.append(("longest of both", longest & (cell.n1 == cell.n1[longest].max())))
    if len(lengths[0]) > 2:
        out.append(("longest pre-training", tuned & (cell.n0 == lengths[0][-1])))
    left = [len(set(zip(cell.n0[tuned & ~rows], cell.n1[tuned & ~rows]))) for _, rows in out]
    return [split for split, pairs in zip(out, left) if pairs >= min(3, max(left))]


def score(cells: Sequence[Cell], mode: str, kinds: Sequence[str] = tuple(KINDS)) -> dict:
    """Score each kind in one mode on held-out rows, and the nearest run; choose the best, or a simpler one as good.

    Returns {kinds: {name: {rmse, bias, n, splits: {name: rmse}}}, chosen}. A kind that some part of the rows cannot
    determine is not judged. Raises UserError where none can be.
    """
    misses: dict = {name: [] for name in (*kinds, "nearest run")}
    cases = 0
    for cell in (cell.only(mode) for cell in cells if mode in cell.modes):
        for split, rows in held_out(cell):
            kept = cell.take(~rows)
            able = {}
            for kind in kinds:
                with contextlib.suppress(UserError):
                    fit = fit_cell(kept, kind)
                    u = kept.u(cell.n0, cell.n1, cell.mode)[:, rows]
                    able[kind] = fit.form.value(fit.solved.theta[None], u)[0]
            if able:
                cases += 1
                for name, predicted in (*able.items(), ("nearest run", _nearest(cell, rows))):
                    misses[name].append((split, predicted - np.log(cell.y[rows])))
    found = {name: _errors(parts) for name, parts in misses.items() if cases and len(parts) == cases}
    ours = [name for name in kinds if name in found]
    if not ours:
        raise UserError(f"{mode}: no form can be judged by held-out rows; run more budgets or lengths of pre-training")
    best = min(found[name]["rmse"] for name in ours)
    as_good = [name for name in ours if found[name]["rmse"] <= AS_GOOD * best]
    return {"kinds": found, "chosen": min(as_good, key=lambda name: len(KINDS[name].names))}


def _errors(parts: list[tuple[str, np.ndarray]]) -> dict:
    """RMSE and bias of errors of ln loss, over all splits and by split."""
    every = np.concatenate([errors for _, errors in parts])
    by_split = {split: np.concatenate([e for other, e in parts if other == split]) for split, _ in parts}
    splits = {split: float(np.sqrt((errors**2).mean())) for split, errors in by_split.items()}
    return {"rmse": float(np.sqrt((every**2).mean())), "bias": float(every.mean()), "n": len(every), "splits": splits}


def _nearest(cell: Cell, rows: np.ndarray) -> np.ndarray:
    """ln loss of the nearest row that was kept, of the same mode and seed, by the distance in ln n0 and ln n1."""
    out = []
    kept = np.flatnonzero(~rows)
    for i in np.flatnonzero(rows):
        same = kept[(cell.mode[kept] == cell.mode[i]) & (cell.seed[kept] == cell.seed[i])]
        same = same if len(same) else kept
        far = np.hypot(np.log(cell.n0[same] / cell.n0[i]), np.log(cell.n1[same] / cell.n1[i]))
        out.append(math.log(cell.y[same[far.argmin()]]))
    return np.array(out)
