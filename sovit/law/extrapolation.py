"""The extrapolation test: laws fitted below a compute cut and scored above it, with baselines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.design_matrix import Prepared, positive, predicted
from sovit.law.exponents import MIN_SPAN
from sovit.law.solver.fitter import Loss, solve


@dataclass(frozen=True, kw_only=True)
class Score:
    """Errors ln(predicted / measured) of rows above the cut; rmse None where nothing could be scored, with a note."""

    rmse: float | None
    bias: float | None
    n: int
    rows: list[int] | None = None
    predicted: list[float] | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """The test: fitted below `cut`, scored above it, baselines beside the form. n = 0 and a note where none was made."""

    cut: float | None = None
    n_fit: int | None = None
    n: int = 0
    forms: dict[str, Score] | None = None
    note: str | None = None

    @property
    def scores(self) -> dict[str, Score]:
        return self.forms or {}

    def rmse(self, form: str) -> float | None:
        """Held-out error of a form or baseline; None where it has none."""
        return self.scores[form].rmse if form in self.scores else None


def compute_cut(compute: np.ndarray) -> float:
    """The cut of the extrapolation test: the middle of the widest gap of ln compute that holds out 10 to 40 % of the rows.

    Where runs stand on budget levels that gap lies below the largest level, which is then what is held out.
    """
    order = np.sort(np.log(compute))
    n = len(order)
    first, last = int(np.ceil(0.6 * n)), max(int(np.floor(0.9 * n)), int(np.ceil(0.6 * n)))
    gaps = [(order[i] - order[i - 1], i) for i in range(max(first, 1), min(last, n - 1) + 1)]
    i = max(gaps)[1]
    return float(np.exp((order[i] + order[i - 1]) / 2))


def extrapolation(ready: Prepared, loss: Loss, cut: float | None = None) -> Extrapolation:
    """Fit below a compute cut, score above it; RMSE and signed bias of ln(predicted / measured), baselines beside it.

    Baselines: `chinchilla` (size N and images, no shape), `compute_only` (E + A t^-a: constant proportions, all that
    matters is compute), `nearest` (the loss of the nearest run below the cut, which is what no law at all would say).
    """
    table, y = ready.table, ready.y
    if "compute" not in table:
        return Extrapolation(note="no compute column")
    compute = positive(table, "compute")
    span = compute.max() / compute.min()
    if compute.max() < MIN_SPAN * compute.min():
        return Extrapolation(note=f"the rows span a factor {span:.3g} in compute, too little for one")
    cut = cut or compute_cut(compute)
    below, above = compute < cut, compute >= cut
    if not (below.any() and above.any()):
        missing = "above" if below.any() else "below"
        return Extrapolation(note=f"no row is {missing} the cut at compute {cut:.3g}")
    tries = {ready.name: ready, "compute_only": ready.named("additive", ("compute",))}
    if {"num_params", "num_examples"} <= set(table):
        tries["chinchilla"] = ready.named("chinchilla") if ready.name != "chinchilla" else ready
    forms = {}
    for label, tried in tries.items():
        try:
            forms[label] = _extrapolate(tried, loss, below, above)
        except (UserError, np.linalg.LinAlgError) as error:
            forms[label] = Score(rmse=None, bias=None, n=0, note=str(error))
    near = (*ready.dims, "num_examples") if ready.dims or "num_examples" in table else ("compute",)
    logs = np.log(np.stack([positive(table, n) for n in near if n in table], 1))
    nearest = np.flatnonzero(below)[_nearest(logs[below], logs[above], logs.std(0))]
    forms["nearest"] = _score(y, np.flatnonzero(above), y[nearest])
    return Extrapolation(cut=cut, n_fit=int(below.sum()), n=int(above.sum()), forms=forms)


def _nearest(run: np.ndarray, asked: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The first of the nearest rows of run [n, D] to each row of asked [m, D], in units of the spread [D]: [m]."""
    places, first = np.unique(run, axis=0, return_index=True)
    first = first[order := np.argsort(first)]
    places, (wanted, back) = places[order], np.unique(asked, axis=0, return_inverse=True)
    out = np.empty(len(wanted), int)
    size = max(1, 10**7 // len(places))
    for i in range(0, len(wanted), size):
        distance = (((wanted[i : i + size, None] - places) / (spread + 1e-12)) ** 2).sum(2)
        out[i : i + size] = first[distance.argmin(1)]
    return out[back.ravel()]


def _extrapolate(ready: Prepared, loss: Loss, below: np.ndarray, above: np.ndarray) -> Score:
    rows, rest = ready.take(below).rows, ready.take(above)
    theta = solve(rows, loss).theta
    found = predicted(rows.form, theta, rows.centre, rest.table, rest.arms)
    known = np.isfinite(found)
    if not known.any():
        return Score(rmse=None, bias=None, n=0, note="no row above the cut that the form describes")
    return _score(ready.y, np.flatnonzero(above)[known], found[known])


def _score(y: np.ndarray, rows: np.ndarray, predicted: np.ndarray) -> Score:
    residual = np.log(predicted / y[rows])
    rmse, bias = float(np.sqrt((residual**2).mean())), float(residual.mean())
    return Score(rmse=rmse, bias=bias, n=len(rows), rows=rows.tolist(), predicted=predicted.tolist())
