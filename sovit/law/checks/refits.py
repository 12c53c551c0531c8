"""The headline law and its refits: what every altered choice is asked, and by what it is fitted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.compute_optimum import Family
from sovit.law.design_matrix import Prepared, positive, prepare_fit
from sovit.law.exponents import amplitudes, growth, optimum_of
from sovit.law.fitted_law import Fit
from sovit.law.form import FALLING, Form
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Loss, solve
from sovit.law.solver.polish import Objective, polish
from sovit.ledger.measurements import Measurements

STARTS = 4  # points of the exponent grid from which a refit starts, beside the headline's own parameters


@dataclass(frozen=True)
class _Solved:
    """A point fit: what `Frame.answers` reads."""

    form: Form
    centre: np.ndarray
    theta: np.ndarray  # [P]
    num_rows: int
    num_trunks: int


@dataclass(frozen=True)
class Counting:
    """A counting of FLOPs, and the range of compute in it. geometry, ends: None = the headline's; head: with the head."""

    geometry: Geometry | None = None
    ends: tuple[float, float] | None = None
    head: bool = False


AS_FITTED = Counting()


class Frame:
    """The headline law and what every alteration is asked: exponents over its range, the optimum at its budget."""

    def __init__(self, data: Measurements, fit: Fit, train_flops: float | None) -> None:
        self.data, self.fit, self.dims = data, fit, list(fit.model.dims)
        self.grid, self.ends = fit.data.grid, fit.data.compute_range or (1.0, 1.0)
        self.geometry = fit.geometry
        self.log_budget = None if train_flops is None else float(np.log(train_flops / 3))
        self.loss = loss_of(fit)
        self.best: dict = {}
        self.best = self.row("headline", "", fit)["optimum"]

    def refit(
        self,
        keep: np.ndarray | None = None,
        data: Measurements | None = None,
        form: str = "",
        zero_line: float | None = None,
        loss: Loss | None = None,
    ) -> _Solved:
        """The law again, on the rows `keep` (all), by another loss; raises as `law.fit` does.

        The polish starts from the STARTS best points of the form's grid and, for the headline's own form, from its theta.
        """
        fit, data, form, loss = self.fit, data or self.data, form or self.fit.form, loss or self.loss
        zero_line = fit.model.zero_line if form == fit.form and zero_line is None else zero_line
        which = slice(None) if keep is None else keep
        sd = data.measurement_sd[which] if loss.whitens and data.measurement_sd is not None else None
        options = LawOptions(dims=self.dims, zero_line=zero_line, measurement_sd=sd, whiten=loss.whitens)
        columns = {name: column[which] for name, column in data.columns.items()}
        made = prepare_fit(form, columns, data.y[which], options).rows
        starts = made.form.starts(made.u, made.y)
        off = ((made.form.evaluate(starts, made.u)[0] - np.log(made.y)) ** 2).sum(1)
        starts = starts[np.argsort(off, kind="stable")[:STARTS]]
        if form == fit.form:  # the headline's theta about the centre of these rows: `raw` shifts by a centre
            starts = np.concatenate([made.form.raw(fit.theta[None], fit.centre - made.centre), starts])
        theta = solve(made, loss, starts).theta
        return _Solved(made.form, made.centre, theta, len(np.unique(made.source)), int(made.trunk.max()) + 1)

    def row(self, what: str, setting: str, fit: Fit | _Solved, note: str = "", counted: Counting = AS_FITTED) -> dict:
        """What `fit` answers."""
        if isinstance(fit, Fit):
            fit = _Solved(fit.shape_form, fit.centre, fit.theta, fit.num_rows, fit.num_clusters)
        (found,) = self.answers(fit.form, fit.centre, fit.theta[None], counted)
        return alteration((what, setting), fit.form.arms, (fit.num_rows, fit.num_trunks), found, note)

    def answers(self, form: Form, centre: np.ndarray, theta: np.ndarray, counted: Counting = AS_FITTED) -> list[dict]:
        """{exponents, optimum, excess_loss} of each theta [R, P]."""
        own = self.geometry
        geometry = counted.geometry or own
        family = Family(form, centre, geometry, self.grid)
        present = amplitudes(form, theta) > 0  # [R, K]
        grown = at = None
        if geometry is not None or form.arms:
            grown = growth(family, theta, counted.ends or self.ends, counted.head)
            if self.log_budget is not None:
                budget = self.log_budget
                if own is not None and geometry is not None and geometry != own and None not in self.best.values():
                    # the budget is what the headline's own optimum costs in that counting: shapes differ, not units
                    budget += float(np.log(_flops(geometry, self.best) / _flops(own, self.best)))
                at = np.exp(optimum_of(family, theta, budget, head=True))
                run = np.array([[min(self.grid[d]), max(self.grid[d])] for d in self.dims]).T
                ends = np.where([d in FALLING for d in self.dims], np.minimum(at, run[1]), np.maximum(at, run[0]))
                at = np.where(present, at, ends)
        out = []
        for r, on in enumerate(present):
            exponents = {
                d: float(grown[r, k]) if on[k] and grown is not None else None for k, d in enumerate(self.dims)
            }
            optimum = {d: float(at[r, k]) if on[k] and at is not None else None for k, d in enumerate(self.dims)}
            excess = None if at is None else self.excess(dict(zip(self.dims, at[r])))
            out.append(dict(exponents=exponents, optimum=optimum, excess_loss=excess))
        return out

    def excess(self, shape: Mapping[str, float]) -> float | None:
        """Relative excess of the headline law's loss at `shape` over its loss at its own optimum, at the budget."""
        if not LAWS[self.fit.form].ranks_shapes or self.geometry is None or not self.best or None in self.best.values():
            return None
        losses = [self._predicted(s) for s in (shape, self.best)]
        return float(losses[0] / losses[1] - 1)

    def _predicted(self, shape: Mapping[str, float]) -> float:
        assert self.geometry is not None and self.log_budget is not None
        table = {d: np.array([x]) for d, x in shape.items()}
        table["num_examples"] = np.exp(self.log_budget) / self.geometry.flops(table, head=True)
        if "num_params" in self.fit.model.terms:
            table["num_params"] = self.geometry.num_params(table)
        return float(self.fit.predict(table)[0])

    def attempt(self, what: str, setting: str, note: str = "", counted: Counting = AS_FITTED, **refit: Any) -> dict:
        """A row of a refit; where it is refused, the reason is the note."""
        try:
            return self.row(what, setting, self.refit(**refit), note, counted)
        except (UserError, np.linalg.LinAlgError) as error:
            keep = refit.get("keep")
            num = len(self.data.y) if keep is None else int(np.sum(keep))
            form = refit.get("form") or self.fit.form
            said = f"not fitted: {error}"
            return alteration((what, setting), LAWS[form].by_arm, (num, None), self._nothing(), said)

    def _nothing(self) -> dict:
        return dict(exponents=dict.fromkeys(self.dims), optimum=dict.fromkeys(self.dims), excess_loss=None)

    def without(self, what: str, settings: Sequence[str], keeps: np.ndarray) -> list[dict]:
        """Rows of refits with whole shapes left out; keeps [A, n] says what is kept in each. One batch.

        Rows left out weigh 0. Huber's delta and the whitening stay those of all rows, as in the pairs bootstrap, and each
        refit starts from the headline and from the best points of the exponent grid.
        """
        ready = prepared(self.data, self.fit)
        rows = ready.rows
        solved = solve(rows, self.loss)
        starts = np.concatenate([solved.theta[None], rows.form.starts(rows.u, rows.y)[:STARTS]])
        weights = keeps[:, rows.source].astype(float)
        many, repeated = np.tile(starts, (len(keeps), 1)), np.repeat(weights, len(starts), 0)
        done = polish(Objective(rows.form, rows.u, np.log(rows.y), solved.groups, solved.delta, repeated), many)
        best = done.objective.reshape(len(keeps), -1).argmin(1)
        theta = done.theta.reshape(len(keeps), len(starts), -1)[np.arange(len(keeps)), best]
        out = []
        for setting, keep, weight, found in zip(settings, keeps, weights, self.answers(rows.form, rows.centre, theta)):
            flat = [d for d in self.dims if len(np.unique(positive(ready.table, d)[keep])) < 2]
            num, note = int((weight > 0).sum()), ""
            if flat or num <= len(rows.form.names):
                found = self._nothing()
                note = f"not fitted: {f'{flat[0]} does not vary' if flat else f'{num} rows'} in what is left"
            counts = int(keep.sum()), len(np.unique(ready.index[keep]))
            out.append(alteration((what, setting), rows.form.arms, counts, found, note))
        return out


def loss_of(fit: Fit) -> Loss:
    """How the law was fitted."""
    model = fit.model
    return Loss(model.loss, None if model.whitened else model.huber_delta, model.whitened)


def prepared(data: Measurements, fit: Fit) -> Prepared:
    """The rows of `fit` as `law.fit` makes them."""
    model = fit.model
    options = LawOptions(
        dims=model.dims or None,
        zero_line=model.zero_line,
        measurement_sd=data.measurement_sd,
        whiten=model.whitened,
    )
    return prepare_fit(fit.form, data.columns, data.y, options)


def alteration(
    asked: tuple[str, str], by_arm: object, counts: tuple[int, int | None], found: Mapping, note: str
) -> dict:
    """A row of the table of alterations: asked = (what, setting), counts = (rows, trunks)."""
    lost = [d for d, s in found["exponents"].items() if s is None]
    if lost and not note.startswith("not fitted"):
        note = "; ".join(filter(None, [note, f"no gain from {', '.join(lost)}"]))
    said = dict(what=asked[0], setting=asked[1], kind="marginal" if by_arm else "joint")
    return said | dict(num_rows=counts[0], num_trunks=counts[1], **found, note=note)


def kind_of(fit: Fit) -> str:
    """Whether exponents are those of one dimension alone, or of all dimensions optimised together."""
    return "marginal" if fit.shape_form.arms else "joint"


def _flops(geometry: Geometry, shape: Mapping[str, float]) -> float:
    return float(geometry.flops({d: np.array([x]) for d, x in shape.items()}, head=True)[0])
