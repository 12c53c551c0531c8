"""How much a law's answer hangs on choices that another analyst could have made: point refits, one altered choice each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.compute_optimum import loss_along_budget
from sovit.law.design_matrix import Prepared, positive, prepare_fit
from sovit.law.exponents import amplitudes, growth, optimum_of
from sovit.law.extrapolation import extrapolation
from sovit.law.fit import fit_measurements
from sovit.law.fitted_law import Fit, plain
from sovit.law.form import FALLING, Form
from sovit.law.forms import LAWS
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Loss, solve
from sovit.law.solver.polish import Objective, polish
from sovit.ledger.measurements import Measurements, levels

MAX_ROWS = 20_000  # more rows make the refits a matter of many minutes: none are made
MAX_SHAPES = 60  # of more shapes, so many are left out one at a time, taken evenly
MAX_LEVELS = 12  # of more budgets, fifths of the rows are taken for levels
STARTS = 4  # points of the exponent grid from which a refit starts, beside the headline's own parameters
LOSSES: dict[str, dict] = {
    "squared log error": dict(loss="log_squares"),
    "Huber with δ = 1e-3, rows as they are (as in publications)": dict(huber_delta=1e-3),
    "Huber with δ from the data, not whitened by trunk": dict(whiten=False),
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
    altered = [*_without(asked, data, _shapes(data, fit) | _windows(data)), *_losses(asked, data)]
    altered += _forms(asked, data, fits or {})
    moves = {dim: _moves(dim, fit, headline, altered) for dim in fit.model.dims}
    return dict(train_flops=train_flops, num_rows=len(data.y), headline=headline, alterations=altered, dimensions=moves)


@dataclass(frozen=True)
class _Question:
    """The headline law and what every refit is asked: exponents over its range of compute, the optimum at its budget."""

    fit: Fit
    log_budget: float | None  # ln of forward FLOPs x images, head included

    @cached_property
    def best(self) -> np.ndarray:
        """ln x [K] of the headline's own optimum."""
        return self._optima(self.fit.shape_form, self.fit.centre, self.fit.theta[None])[0]

    def _optima(self, form: Form, centre: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """ln x [R, K] at the budget; within the values run of a dimension without an amplitude."""
        family = dataclasses.replace(self.fit.family, form=form, centre=centre)
        assert self.log_budget is not None
        at = optimum_of(family, theta, self.log_budget, head=True)
        low, high = np.log([[min(values), max(values)] for values in family.grid.values()]).T
        within = np.where([d in FALLING for d in family.dims], np.minimum(at, high), np.maximum(at, low))
        return np.where(amplitudes(form, theta) > 0, at, within)

    def answers(self, form: Form, centre: np.ndarray, theta: np.ndarray) -> list[dict]:
        """{exponents, optimum, excess_loss} of each theta [R, P]."""
        family, own = dataclasses.replace(self.fit.family, form=form, centre=centre), self.fit.family
        present = amplitudes(form, theta) > 0  # [R, K]
        grown = at = np.full(present.shape, np.nan)
        excess = np.full(len(theta), np.nan)
        if family.geometry is not None or form.arms:
            grown = growth(family, theta, self.fit.data.compute_range or (1.0, 1.0))
            if self.log_budget is not None:
                at = self._optima(form, centre, theta)
                if LAWS[self.fit.form].ranks_shapes:
                    phi = np.log(np.maximum(self.fit.theta, 1e-300))
                    loss = loss_along_budget(own, phi, np.concatenate([self.best[None], at]), self.log_budget)[0]
                    excess = np.expm1(loss[1:] - loss[0])
        known = np.where(present, grown, np.nan), np.where(present, np.exp(at), np.nan)
        tables = [[dict(zip(family.dims, map(_number, row))) for row in part.tolist()] for part in known]
        return [
            dict(exponents=exponents, optimum=best, excess_loss=_number(lost))
            for exponents, best, lost in zip(*tables, excess.tolist())
        ]

    def row(self, what: str, setting: str, fit: Fit, note: str = "") -> dict:
        """What `fit` answers."""
        (found,) = self.answers(fit.shape_form, fit.centre, fit.theta[None])
        return _alteration(what, setting, fit.form, fit.num_rows, found, note)

    def refitted(self, what: str, setting: str, form: str, data: Measurements, note: str = "", **options: Any) -> dict:
        """What the law answers when it is fitted again; a refused one has the reason as its note."""
        try:
            again = fit_measurements(form, data, dims=self.fit.model.dims, extrapolate=False, **options)
            return self.row(what, setting, again, note)
        except (UserError, np.linalg.LinAlgError) as error:
            return self.refused(what, setting, form, len(data.y), str(error))

    def refused(self, what: str, setting: str, form: str, num_rows: int, reason: str) -> dict:
        nothing = dict.fromkeys(self.fit.model.dims)
        found = dict(exponents=nothing, optimum=nothing, excess_loss=None)
        return _alteration(what, setting, form, num_rows, found, f"not fitted: {reason}")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _alteration(what: str, setting: str, form: str, num_rows: int, found: dict, note: str) -> dict:
    lost = [d for d, s in found["exponents"].items() if s is None]
    if lost and not note.startswith("not fitted"):
        note = "; ".join(filter(None, [note, f"no gain from {', '.join(lost)}"]))
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


def _without(asked: _Question, data: Measurements, keeps: Mapping[tuple[str, str], np.ndarray]) -> list[dict]:
    """Refits on the rows kept, as one batch.

    Rows left out weigh 0. Huber's delta and the whitening stay those of all rows, as in the cluster bootstrap, and each
    refit starts from the headline and from the best points of the exponent grid.
    """
    if not keeps:
        return []
    fit, (ready, loss) = asked.fit, _prepared(data, asked.fit)
    rows = ready.rows
    solved = solve(rows, loss)
    starts = np.concatenate([solved.theta[None], rows.form.starts(rows.u, rows.y)[:STARTS]])
    weights = np.stack(list(keeps.values()))[:, rows.source].astype(float)
    many, repeated = np.tile(starts, (len(keeps), 1)), np.repeat(weights, len(starts), 0)
    done = polish(Objective(rows.form, rows.u, np.log(rows.y), solved.groups, solved.delta, repeated), many)
    best = done.objective.reshape(len(keeps), -1).argmin(1)
    theta = done.theta.reshape(len(keeps), len(starts), -1)[np.arange(len(keeps)), best]
    out = []
    for (key, keep), found in zip(keeps.items(), asked.answers(rows.form, rows.centre, theta)):
        flat = [d for d in fit.model.dims if len(np.unique(positive(ready.table, d)[keep])) < 2]
        num = int(keep.sum())
        if flat or keep[rows.source].sum() <= len(rows.form.names):
            reason = f"{f'{flat[0]} does not vary' if flat else f'{num} rows'} in what is left"
            out.append(asked.refused(*key, fit.form, num, reason))
        else:
            out.append(_alteration(*key, fit.form, num, found, ""))
    return out


def _prepared(data: Measurements, fit: Fit) -> tuple[Prepared, Loss]:
    """The rows of `fit` and its loss as `law.fit` takes them."""
    model = fit.model
    delta = None if model.whitened else model.huber_delta
    options = LawOptions(
        dims=model.dims or None,
        zero_line=model.zero_line,
        loss=model.loss,
        huber_delta=delta,
        whiten=model.whitened,
    )
    return prepare_fit(fit.form, data.columns, data.y, options), options.estimator


def _losses(asked: _Question, data: Measurements) -> list[dict]:
    own, form = asked.fit.model.loss, asked.fit.form
    others = {setting: options for setting, options in LOSSES.items() if options.get("loss") != own}
    return [asked.refitted("loss", setting, form, data, **options) for setting, options in others.items()]


def _forms(asked: _Question, data: Measurements, fits: Mapping[str, Fit]) -> list[dict]:
    """Every other form of LAWS that reads shape dimensions: as it was fitted already, else fitted for this."""
    fit, out = asked.fit, []
    for name, entry in LAWS.items():
        tokens = not entry.needs_tokens or {"patch_size", "image_size"} & set(fit.model.dims)
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
            for label, score in extrapolation(*_prepared(data, fit), cut).scores.items():
                if label == name or label not in fits:
                    forms.setdefault(label, plain(dataclasses.replace(score, rows=None, predicted=None)))
        scored = int((~below).sum())
        out.append(dict(cut=cut, largest=float(centres[last]), n_fit=len(compute) - scored, n=scored, forms=forms))
    return out
