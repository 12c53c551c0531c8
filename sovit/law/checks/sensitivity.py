"""How much a law's answer hangs on choices that another analyst could have made: point refits, one altered choice each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.compute_optimum import Family, loss_along_budget
from sovit.law.design_matrix import positive, prepare_fit
from sovit.law.exponents import amplitudes, growth, optimum_of
from sovit.law.extrapolation import extrapolation
from sovit.law.fit import fit_measurements
from sovit.law.fitted_law import Fit, plain
from sovit.law.form import FALLING
from sovit.law.forms import LAWS
from sovit.law.options import LawOptions
from sovit.ledger.measurements import Measurements, levels

MAX_ROWS = 5_000  # more rows make the refits a matter of many minutes: none are made
MAX_SHAPES = 60  # of more shapes, so many are left out one at a time, taken evenly
MAX_LEVELS = 12  # of more budgets, fifths of the rows are taken for levels
LOSSES: dict[str, dict] = {
    "squared log error": dict(loss="log_squares"),
    "Huber with δ = 1e-3, rows as they are (as in publications)": dict(
        loss="huber_log", huber_delta=1e-3, whiten=False
    ),
    "Huber with δ from the data, not whitened by trunk": dict(loss="huber_log", huber_delta=None, whiten=False),
}


def sensitivity(
    data: Measurements, fit: Fit, train_flops: float | None, *, fits: Mapping[str, Fit] | None = None
) -> dict:
    """Refit the headline law `fit` of `data` under every alteration of one choice.

    train_flops: budget of the recommendation, None for no recommendation. fits: the laws of other forms on the same rows.
    Returns plain data, {train_flops, num_rows, headline, alterations, dimensions}. `headline` and each of `alterations` are
    {what, setting, kind, num_rows, exponents, optimum, excess_loss, note}: `exponents` (of x* ~ compute^s over the
    headline's range of compute) and `optimum` (real values at the budget) by dimension, None where the refit has no
    gain from it; `excess_loss` is what that optimum loses under the headline law. A refused refit has the reason as its
    note. `dimensions` says what moves each exponent how far, and what moves it out of its own interval.
    A law without dimensions and too many rows have none of this: {} with a note.
    """
    if not fit.model.dims or not fit.exponents:
        return dict(note="the law has no shape dimension with a growth exponent, so that there is nothing to alter")
    if len(data.y) > MAX_ROWS:
        return dict(note=f"{len(data.y):,} rows: refits under altered choices are made for at most {MAX_ROWS:,}")
    asked = _Question(fit, None if train_flops is None else float(np.log(train_flops / 3)))
    headline = asked.row("headline", f"`{fit.form}`, all rows", fit)
    altered = []
    for (what, setting), keep in (_shapes(data, fit) | _windows(data)).items():
        columns = {name: column[keep] for name, column in data.columns.items()}
        part = dataclasses.replace(data, y=data.y[keep], columns=columns)
        altered.append(asked.refitted(what, setting, fit.form, part))
    altered += [
        asked.refitted("loss", setting, fit.form, data, **options)
        for setting, options in LOSSES.items()
        if not options.items() <= _as_fitted(fit).items()
    ]
    altered += _forms(asked, data, fits or {})
    moves = {dim: _moves(dim, fit, headline, altered) for dim in fit.model.dims}
    return dict(train_flops=train_flops, num_rows=len(data.y), headline=headline, alterations=altered, dimensions=moves)


@dataclass(frozen=True)
class _Question:
    """The headline law and what every refit is asked: exponents over its range of compute, the optimum at its budget."""

    fit: Fit
    log_budget: float | None  # ln of forward FLOPs x images, head included

    def _optimum(self, family: Family, theta: np.ndarray) -> np.ndarray:
        """ln x [K] at the budget; within the values run of a dimension without an amplitude."""
        assert self.log_budget is not None
        at = optimum_of(family, theta[None], self.log_budget, head=True)[0]
        low, high = np.log([[min(values), max(values)] for values in family.grid.values()]).T
        within = np.where([d in FALLING for d in family.dims], np.minimum(at, high), np.maximum(at, low))
        return np.where(amplitudes(family.form, theta[None])[0] > 0, at, within)

    def row(self, what: str, setting: str, fit: Fit, note: str = "") -> dict:
        """What `fit` answers."""
        own, theta = self.fit.family, fit.theta
        family = dataclasses.replace(own, form=fit.shape_form, centre=fit.centre)
        grown = best = np.full(len(family.dims), np.nan)
        excess = None
        if family.geometry is not None or family.form.arms:
            grown = growth(family, theta[None], self.fit.data.compute_range or (1.0, 1.0))[0]
            if self.log_budget is not None:
                best = self._optimum(family, theta)
                if LAWS[self.fit.form].ranks_shapes:
                    both = np.stack([best, self._optimum(own, self.fit.theta)])
                    loss = loss_along_budget(own, np.log(np.maximum(self.fit.theta, 1e-300)), both, self.log_budget)[0]
                    excess = float(np.expm1(loss[0] - loss[1]))
        present = amplitudes(family.form, theta[None])[0] > 0
        exponents, optimum = (
            {d: float(x) if known and not np.isnan(x) else None for d, x, known in zip(family.dims, values, present)}
            for values in (grown, np.exp(best))
        )
        lost = [d for d, s in exponents.items() if s is None]
        note = "; ".join(filter(None, [note, f"no gain from {', '.join(lost)}" if lost else ""]))
        found = dict(exponents=exponents, optimum=optimum, excess_loss=excess)
        return _alteration(what, setting, fit.form, fit.num_rows, found, note)

    def refitted(self, what: str, setting: str, form: str, data: Measurements, **options: Any) -> dict:
        """What the law answers when it is fitted again, as it was but for options; a refused one has the reason as note."""
        try:
            again = fit_measurements(form, data, extrapolate=False, **_as_fitted(self.fit) | options)
        except (UserError, np.linalg.LinAlgError) as error:
            nothing = dict.fromkeys(self.fit.model.dims)
            found = dict(exponents=nothing, optimum=nothing, excess_loss=None)
            return _alteration(what, setting, form, len(data.y), found, f"not fitted: {error}")
        return self.row(what, setting, again)


def _alteration(what: str, setting: str, form: str, num_rows: int, found: dict, note: str) -> dict:
    kind = "marginal" if LAWS[form].by_arm else "joint"
    return dict(what=what, setting=setting, kind=kind, num_rows=num_rows) | found | dict(note=note)


def _shapes(data: Measurements, fit: Fit) -> dict[tuple[str, str], np.ndarray]:
    """Every shape left out: (what, setting) -> rows kept [n]."""
    values = np.stack([positive(data.columns, d) for d in fit.model.dims], 1)
    shapes, index = np.unique(values, axis=0, return_inverse=True)
    picks = np.unique(np.linspace(0, len(shapes) - 1, min(len(shapes), MAX_SHAPES)).round().astype(int))
    names = ["x".join(f"{x:g}" for x in shape) for shape in shapes]
    return {("shape", f"without {names[i]}"): index.ravel() != i for i in picks} if len(shapes) > 1 else {}


def _windows(data: Measurements) -> dict[tuple[str, str], np.ndarray]:
    """Windows of the budget: (what, setting) -> rows kept [n]."""
    group, centres = _budgets(data)
    said = [f"{c:.3g}".replace("e+", "e") for c in centres]
    last, half = len(said) - 1, (len(said) + 1) // 2
    if last < 1:
        return {}
    windows = {
        f"without the lowest budget ({said[0]})": group > 0,
        f"without the highest budget ({said[-1]})": group < last,
        f"only the lower half of the budgets (to {said[half - 1]})": group < half,
        f"only the upper half of the budgets (from {said[last + 1 - half]})": group > last - half,
    }
    distinct: dict = {}
    for setting, keep in windows.items():
        distinct.setdefault(keep.tobytes(), (("window", setting), keep))
    return dict(distinct.values())


def _budgets(data: Measurements) -> tuple[np.ndarray, np.ndarray]:
    """Budget level of each row [n], rising, and the training FLOPs of each level (compute where the rows say no more)."""
    names = [name for name in ("train_flops", "compute") if name in data.columns]
    if not names:
        return np.zeros(len(data.y), int), np.ones(1)
    spent = np.log(positive(data.columns, names[0]))
    group, centres = levels(np.exp(spent))
    if len(centres) > MAX_LEVELS:
        edges = np.quantile(spent, [0.2, 0.4, 0.6, 0.8])
        group, centres = np.searchsorted(edges, spent), np.exp([*edges, spent.max()])
    return group, centres


def _as_fitted(fit: Fit) -> dict:
    """The fields of `LawOptions` by which a law was fitted."""
    model = fit.model
    delta = None if model.whitened else model.huber_delta
    return dict(dims=model.dims or None, loss=model.loss, huber_delta=delta, whiten=model.whitened)


def _forms(asked: _Question, data: Measurements, fits: Mapping[str, Fit]) -> list[dict]:
    """Every other form of LAWS that reads shape dimensions: as it was fitted already, else fitted for this."""
    fit, out = asked.fit, []
    for name, entry in LAWS.items():
        tokens = "num_patches" not in entry.needs or {"patch_size", "image_size"} & set(fit.model.dims)
        if name == fit.form or not entry.uses_dims or entry.needs_terms or not tokens:
            continue
        if name in fits and fits[name].model.dims == fit.model.dims:
            row = asked.row("form", f"`{name}`", fits[name])
        elif entry.bounded and data.zero_line is None:
            continue
        else:
            row = asked.refitted("form", f"`{name}`", name, data)
        if entry.by_arm != LAWS[fit.form].by_arm:
            how = "each dimension alone, the others at the centre" if entry.by_arm else "all dimensions together"
            row["note"] = "; ".join(filter(None, [f"another question: {how}", row["note"]]))
        out.append(row)
    return out


def _moves(dim: str, fit: Fit, headline: dict, altered: list[dict]) -> dict:
    """What moves one exponent: least and greatest, the largest mover, and all that leave the headline interval.

    A form that answers another question (each dimension alone, or all together) is not held against the interval.
    """
    own, low, high = headline["exponents"][dim], fit.exponents[dim].low, fit.exponents[dim].high
    rows = [r for r in altered if r["kind"] == headline["kind"] and r["exponents"][dim] is not None]
    found = [(r["exponents"][dim], f"{r['what']}: {r['setting']}") for r in rows]
    farthest = sorted(found, key=lambda f: -abs(f[0] - (own or 0.0)))
    known = low is not None and high is not None
    outside = [dict(setting=s, exponent=v) for v, s in farthest if known and not low <= v <= high]
    return dict(
        estimate=own,
        low=low,
        high=high,
        smallest=min(found, default=(None,))[0],
        largest=max(found, default=(None,))[0],
        mover=farthest[0][1] if found else "",
        mover_exponent=farthest[0][0] if found else None,
        outside=outside,
    )


def extrapolation_cuts(data: Measurements, fits: Mapping[str, Fit]) -> list[dict]:
    """The extrapolation test of every form at every budget that can be its cut, rising.

    Returns rows {cut, largest, n_fit, n, forms: {form or baseline: {rmse, bias, n, note}}}: the laws are fitted to the
    rows up to the budget `largest` (training FLOPs, or compute where the rows do not say them), at least two budgets, and
    scored on all rows above. A budget whose rows overlap the next one's in compute is no cut. [] beyond MAX_ROWS rows.
    """
    if "compute" not in data.columns or len(data.y) > MAX_ROWS:
        return []
    compute, (group, centres) = positive(data.columns, "compute"), _budgets(data)
    out = []
    for last in range(1, group.max()):
        below = group <= last
        if compute[below].max() >= compute[~below].min():
            continue
        cut = float(np.sqrt(compute[below].max() * compute[~below].min()))
        forms: dict = {}
        for name, fit in fits.items():
            options = LawOptions(zero_line=fit.model.zero_line, **_as_fitted(fit))
            ready = prepare_fit(name, data.columns, data.y, options)
            for label, score in extrapolation(ready, options.estimator, cut).scores.items():
                if label == name or label not in fits:
                    forms.setdefault(label, plain(dataclasses.replace(score, rows=None, predicted=None)))
        scored = int((~below).sum())
        out.append(dict(cut=cut, largest=float(centres[last]), n_fit=len(compute) - scored, n=scored, forms=forms))
    return out
