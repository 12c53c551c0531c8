"""How much a law's answer hangs on choices that another analyst could have made.

`sensitivity` refits the law under every alteration of one choice at a time: shapes left out, the window of compute, the
counting of FLOPs, the loss, the form, the metric. Point fits only, so that a hundred take seconds; what they move is held
against the interval of the headline fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from sovit import UserError
from sovit.law.design_matrix import Prepared, positive, prepare_fit
from sovit.law.exponents import amplitudes, growth, optimum_of
from sovit.law.extrapolation import extrapolation
from sovit.law.fitted_law import Fit, plain
from sovit.law.fitter import polish, solve
from sovit.law.form import FALLING, Form
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.ledger.few_shot_columns import is_spread, noise_of
from sovit.ledger.measurements import Measurements, levels
from sovit.spec.shape import COUNTINGS

DRAWS = 20  # random sets of shapes left out, for each size of DROPS
DROPS = (2, 3, 5)
STARTS = 4  # points of the exponent grid from which a refit starts, beside the headline's own parameters
MAX_SHAPES = 60  # of more shapes, so many are left out one at a time, taken evenly
MAX_LEVELS = 12  # more budgets than that are cut into quarters
MAX_ROWS = 20_000  # more rows make a hundred refits a matter of many minutes: none are made
LOSSES: dict[str, dict] = {
    "squared log error": dict(loss="log_squares", huber_delta=None),
    "Huber with δ = 1e-3, rows as they are (as in publications)": dict(loss="huber_log", huber_delta=1e-3),
    "Huber with δ from the data, not whitened by trunk": dict(loss="huber_log", huber_delta=None, whiten=False),
}


def sensitivity(
    data: Measurements, fit: Fit, train_flops: float | None, *, fits: Mapping[str, Fit] | None = None, seed=0
) -> dict:
    """What the headline law `fit` of `data` says under every alteration of one choice. Plain data throughout.

    train_flops: budget of the recommendation, None for no recommendation. fits: the laws of other forms on the same rows.
    Returns {train_flops, num_rows, headline, alterations, drops, dimensions}: `headline` and each of `alterations` are
    {what, setting, kind, num_rows, num_trunks, exponents, optimum, excess_loss, note}, where `exponents` (of x* ~ compute^s
    over the headline's range of compute) and `optimum` (real values at the budget) are by dimension, None where the
    refit has no gain from it, and `excess_loss` is what that optimum loses under the headline law, None where no law can
    say. A choice that cannot be altered has the reason as its note. `drops` sums up the random sets of shapes left
    out, and `dimensions` says by dimension what moves the exponent how far, and what moves it out of its own interval.
    A law without dimensions (a law of size) has none of this: {} with a note.
    """
    if not fit.model.dims or not fit.exponents:
        return dict(note="the law has no shape dimension with a growth exponent, so that there is nothing to alter")
    if len(data.y) > MAX_ROWS:
        return dict(note=f"{len(data.y):,} rows: refits under altered choices are made for at most {MAX_ROWS:,}")
    frame = _Frame(data, fit, train_flops)
    headline = frame.row("headline", f"`{fit.form}`, all rows", fit)
    single = [
        *_shapes(frame),
        *_windows(frame),
        *_countings(frame),
        *_losses(frame),
        *_forms(frame, fits or {}),
        *_metrics(frame),
    ]
    drops = _drops(frame, np.random.default_rng(seed))
    return dict(
        train_flops=train_flops,
        num_rows=len(data.y),
        seed=seed,
        headline=headline,
        alterations=single,
        drops=drops,
        dimensions={dim: _moves(dim, fit, headline, single, drops) for dim in fit.model.dims},
    )


@dataclass(frozen=True)
class _Solved:
    """A point fit: what `_Frame.answers` reads."""

    form: Form
    centre: np.ndarray
    theta: np.ndarray  # [P]
    num_rows: int
    num_trunks: int


class _Frame:
    """The headline law and what every alteration is asked: exponents over its range, the optimum at its budget."""

    def __init__(self, data: Measurements, fit: Fit, train_flops: float | None) -> None:
        self.data, self.fit, self.dims = data, fit, list(fit.model.dims)
        self.grid, self.ends = fit.data.grid, fit.data.compute_range or (1.0, 1.0)
        self.geometry = fit.geometry
        self.log_budget = None if train_flops is None else float(np.log(train_flops / 3))
        self.choice = _choice(fit)
        self.best: dict = {}
        self.best = self.row("headline", "", fit)["optimum"]

    def refit(self, keep=None, data: Measurements | None = None, form: str = "", zero_line=None, **options) -> _Solved:
        """The law again, on the rows `keep` (all), with options of `fitter.solve` altered; raises as `law.fit` does.

        The polish starts from the STARTS best points of the form's grid and, for the headline's own form, from its theta.
        """
        fit, data, form = self.fit, data or self.data, form or self.fit.form
        zero_line = fit.model.zero_line if form == fit.form and zero_line is None else zero_line
        choice = self.choice | options
        rows = np.ones(len(data.y), bool) if keep is None else keep
        known = data.measurement_sd if choice["whiten"] else None
        columns = {name: column[rows] for name, column in data.columns.items()}
        known = None if known is None else known[rows]
        ready = prepare_fit(form, columns, data.y[rows], dims=self.dims, zero_line=zero_line, measurement_sd=known)
        made, own = ready.rows, ready.own
        starts = made.form.starts(made.u, made.y)
        off = ((made.form.evaluate(starts, made.u)[0] - np.log(made.y)) ** 2).sum(1)
        starts = starts[np.argsort(off, kind="stable")[:STARTS]]
        if form == fit.form:  # the headline's theta about the centre of these rows: `raw` shifts by a centre
            shift = made.centre - fit.centre
            starts = np.concatenate([made.form.raw(fit.theta[None], -shift), starts])
        solved = solve(
            made.form,
            made.u,
            made.y,
            own,
            starts=starts,
            known_sd=ready.known_sd,
            **choice,
        )
        return _Solved(made.form, made.centre, solved.theta, len(np.unique(made.source)), int(own.max()) + 1)

    def row(self, what: str, setting: str, fit: Fit | _Solved, *, note="", **counted) -> dict:
        """What `fit` answers; counted: geometry, ends and head, as `answers` takes them."""
        if isinstance(fit, Fit):
            centre = fit.centre
            fit = _Solved(fit.shape_form, centre, fit.theta, fit.num_rows, fit.num_clusters)
        (found,) = self.answers(fit.form, fit.centre, fit.theta[None], **counted)
        kind = "marginal" if fit.form.arms else "joint"
        return _row(what, setting, kind, fit.num_rows, fit.num_trunks, found, note)

    def answers(self, form, centre, theta, *, geometry=None, ends=None, head=False) -> list[dict]:
        """{exponents, optimum, excess_loss} of each theta [R, P].

        geometry, ends: another counting of FLOPs, and the range of compute in it; head: compute counts the task head.
        """
        own = self.geometry
        geometry = geometry or own
        present = amplitudes(form, theta) > 0  # [R, K]
        grown = at = None
        if geometry is not None or form.arms:
            grown = growth(form, centre, theta, geometry, self.grid, ends or self.ends, head)
            if self.log_budget is not None:
                budget = self.log_budget
                if own is not None and geometry != own and None not in self.best.values():
                    # the budget is what the headline's own optimum costs in that counting: shapes differ, not units
                    budget += float(np.log(_flops(geometry, self.best) / _flops(own, self.best)))
                at = np.exp(optimum_of(form, centre, theta, geometry, self.grid, budget, head=True))
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
        losses = [self._loss(s) for s in (shape, self.best)]
        return float(losses[0] / losses[1] - 1)

    def _loss(self, shape: Mapping[str, float]) -> float:
        assert self.geometry is not None and self.log_budget is not None
        table = {d: np.array([x]) for d, x in shape.items()}
        table["num_examples"] = np.exp(self.log_budget) / self.geometry.flops(table, head=True)
        if "num_params" in self.fit.model.terms:
            table["num_params"] = self.geometry.num_params(table)
        return float(self.fit.predict(table)[0])

    def attempt(self, what: str, setting: str, note: str = "", answered: Mapping | None = None, **refit) -> dict:
        """A row of a refit; where it is refused, the reason is the note."""
        try:
            return self.row(what, setting, self.refit(**refit), note=note, **(answered or {}))
        except (UserError, np.linalg.LinAlgError) as error:
            keep = refit.get("keep")
            num = len(self.data.y) if keep is None else int(np.sum(keep))
            form = refit.get("form") or self.fit.form
            kind = "marginal" if LAWS[form].by_arm else "joint"
            return _row(what, setting, kind, num, None, self._nothing(), f"not fitted: {error}")

    def _nothing(self) -> dict:
        return dict(exponents=dict.fromkeys(self.dims), optimum=dict.fromkeys(self.dims), excess_loss=None)

    def without(self, what: str, settings: Sequence[str], keeps: np.ndarray) -> list[dict]:
        """Rows of refits with whole shapes left out; keeps [A, n] says what is kept in each. One batch.

        Rows left out weigh 0. Huber's delta and the whitening stay those of all rows, as in the pairs bootstrap, and each
        refit starts from the headline and from the best points of the exponent grid.
        """
        fit, ready = self.fit, _ready(self.data, self.fit)
        table, rows, index = ready.table, ready.rows, ready.index
        solved = solve(rows.form, rows.u, rows.y, ready.own, known_sd=ready.known_sd, **self.choice)
        starts = np.concatenate([solved.theta[None], rows.form.starts(rows.u, rows.y)[:STARTS]])
        weights = keeps[:, rows.source].astype(float)
        many = np.tile(starts, (len(keeps), 1))
        alike: dict = dict(weights=np.repeat(weights, len(starts), 0), groups=solved.groups, delta=solved.delta)
        done = polish(rows.form, rows.u, many, np.log(rows.y), **alike)
        best = done.objective.reshape(len(keeps), -1).argmin(1)
        theta = done.theta.reshape(len(keeps), len(starts), -1)[np.arange(len(keeps)), best]
        out = []
        for setting, keep, weight, found in zip(settings, keeps, weights, self.answers(rows.form, rows.centre, theta)):
            flat = [d for d in self.dims if len(np.unique(positive(table, d)[keep])) < 2]
            num, note = int((weight > 0).sum()), ""
            if flat or num <= len(rows.form.names):
                found = self._nothing()
                note = f"not fitted: {f'{flat[0]} does not vary' if flat else f'{num} rows'} in what is left"
            out.append(_row(what, setting, _kind(fit), int(keep.sum()), len(np.unique(index[keep])), found, note))
        return out


def _choice(fit: Fit) -> dict:
    """How the law was fitted, as options of `fitter.solve`."""
    model = fit.model
    delta = None if model.whitened else model.huber_delta
    return dict(loss=model.loss, huber_delta=delta, whiten=model.whitened)


def _ready(data: Measurements, fit: Fit) -> Prepared:
    """The rows of `fit` as `law.fit` makes them."""
    model = fit.model
    return prepare_fit(
        fit.form,
        data.columns,
        data.y,
        dims=model.dims or None,
        zero_line=model.zero_line,
        measurement_sd=data.measurement_sd,
        whiten=model.whitened,
    )


def _row(what: str, setting: str, kind: str, num_rows: int, num_trunks: int | None, found: Mapping, note: str) -> dict:
    lost = [d for d, s in found["exponents"].items() if s is None]
    if lost and not note.startswith("not fitted"):
        note = "; ".join(filter(None, [note, f"no gain from {', '.join(lost)}"]))
    return dict(what=what, setting=setting, kind=kind, num_rows=num_rows, num_trunks=num_trunks, **found, note=note)


def _kind(fit: Fit) -> str:
    """Whether exponents are those of one dimension alone, or of all dimensions optimised together."""
    return "marginal" if fit.shape_form.arms else "joint"


def _flops(geometry: Geometry, shape: Mapping[str, float]) -> float:
    return float(geometry.flops({d: np.array([x]) for d, x in shape.items()}, head=True)[0])


def _labels(frame: _Frame) -> tuple[list[str], np.ndarray]:
    """The distinct shapes of the rows, as `32x2x256` in the order of the law's dimensions, and each row's shape [n]."""
    values = np.stack([positive(frame.data.columns, d) for d in frame.dims], 1)
    shapes, index = np.unique(values, axis=0, return_inverse=True)
    return ["x".join(f"{x:g}" for x in shape) for shape in shapes], index.ravel()


def _shapes(frame: _Frame) -> list[dict]:
    names, index = _labels(frame)
    picks = np.arange(len(names))
    if len(names) > MAX_SHAPES:
        picks = np.unique(np.linspace(0, len(names) - 1, MAX_SHAPES).round().astype(int))
    if len(names) < 2:
        return []
    return frame.without("shape", [f"without {names[i]}" for i in picks], index != picks[:, None])


def _drops(frame: _Frame, rng) -> list[dict]:
    """Random sets of k shapes left out: median, 5 and 95 % of each exponent, the worst draw by dimension named."""
    names, index = _labels(frame)
    own = frame.row("headline", "", frame.fit)["exponents"]
    out = []
    for k in DROPS:
        if k >= len(names):
            continue
        if comb(len(names), k) <= DRAWS:
            sets = list(combinations(range(len(names)), k))
        else:
            sets = [tuple(np.sort(rng.choice(len(names), k, replace=False)).tolist()) for _ in range(DRAWS)]
        settings = ["without " + ", ".join(names[i] for i in dropped) for dropped in sets]
        rows = frame.without(f"{k} shapes", settings, np.stack([~np.isin(index, dropped) for dropped in sets]))
        by_dim = {}
        for d in frame.dims:
            found = [(r["exponents"][d], r["setting"]) for r in rows if r["exponents"][d] is not None]
            values = [s for s, _ in found]
            worst = max(found, key=lambda f: abs(f[0] - (own[d] or 0.0)), default=(None, ""))
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95]).tolist() if values else (None,) * 3
            by_dim[d] = dict(
                median=middle, low=low, high=high, lost=len(rows) - len(values), worst=worst[0], worst_setting=worst[1]
            )
        excess = [r["excess_loss"] for r in rows if r["excess_loss"] is not None]
        out.append(
            dict(
                num_shapes=k,
                draws=len(rows),
                refused=sum(r["note"].startswith("not fitted") for r in rows),
                exponents=by_dim,
                excess_loss=dict(median=float(np.median(excess)), high=max(excess)) if excess else None,
            )
        )
    return out


def _windows(frame: _Frame) -> list[dict]:
    name = "train_flops" if "train_flops" in frame.data.columns else "compute"
    if name not in frame.data.columns:
        return []
    group, centres = levels(frame.data.columns[name])
    said = [f"{c:.3g}".replace("e+", "e") for c in centres]
    if len(centres) > MAX_LEVELS:
        logs = np.log(positive(frame.data.columns, name))
        group = np.searchsorted(np.quantile(logs, [0.25, 0.5, 0.75]), logs)
        said = ["the lowest quarter", "the second quarter", "the third quarter", "the highest quarter"]
    last = len(said) - 1
    if not last:
        return []
    half = (last + 1) // 2
    windows = {
        f"without the lowest budget ({said[0]})": group > 0,
        f"without the highest budget ({said[-1]})": group < last,
        f"only the lower half of the budgets (to {said[half - 1]})": group < half,
        f"only the upper half of the budgets (from {said[last + 1 - half]})": group > last - half,
    }
    out, seen = [], set()
    for setting, keep in windows.items():
        if keep.tobytes() not in seen:
            seen.add(keep.tobytes())
            out.append(frame.attempt("window", setting, keep=keep))
    return out


def _countings(frame: _Frame) -> list[dict]:
    """Other countings of the FLOPs: of the rows' compute where the form reads it, of the conversion where it does not."""
    if frame.geometry is None or "num_examples" not in frame.data.columns:
        return []
    per_arm = bool(frame.fit.shape_form.arms)
    note = "" if per_arm else "the fit reads images, not FLOPs: only the conversion changes"
    images = positive(frame.data.columns, "num_examples")
    dims = {d: positive(frame.data.columns, d) for d in frame.dims}
    out = []
    for counting, about in [*((k, v) for k, v in COUNTINGS.items() if k != "exact"), ("head", "task head included")]:
        head = counting == "head"
        geometry = frame.geometry if head else dataclasses.replace(frame.geometry, counting=counting)
        compute = geometry.flops(dims, head) * images
        ends = (float(compute.min()), float(compute.max()))
        answered = dict(geometry=geometry, ends=ends, head=head)
        if per_arm:
            data = dataclasses.replace(frame.data, columns=frame.data.columns | dict(compute=compute))
            out.append(frame.attempt("counting", about, data=data, answered=answered))
        else:
            out.append(frame.row("counting", about, frame.fit, note=note, **answered))
    return out


def _losses(frame: _Frame) -> list[dict]:
    model = frame.fit.model
    out = []
    for setting, options in LOSSES.items():
        whitened = options.get("whiten", options["huber_delta"] is None)
        if (model.loss, model.whitened) == (options["loss"], whitened) and whitened:
            continue  # the headline's own
        note = "" if whitened or frame.data.measurement_sd is None else "the known noise of each row is left out"
        out.append(frame.attempt("loss", setting, note, **(dict(whiten=whitened) | options)))
    return out


def _forms(frame: _Frame, fits: Mapping[str, Fit]) -> list[dict]:
    """Every other form of LAWS that reads shape dimensions: as it was fitted already, else fitted for this."""
    out = []
    for name, entry in LAWS.items():
        if name == frame.fit.form or not entry.uses_dims or entry.needs_terms:
            continue
        if entry.needs_tokens and not {"patch_size", "image_size"} & set(frame.dims):
            continue
        if name in fits and list(fits[name].model.dims) == frame.dims:
            row = frame.row("form", f"`{name}`", fits[name])
        elif entry.bounded and frame.data.zero_line is None:
            continue
        else:
            zero_line = frame.data.zero_line if entry.bounded else None
            row = frame.attempt("form", f"`{name}`", form=name, zero_line=zero_line)
        if row["kind"] != _kind(frame.fit):
            alone = row["kind"] == "marginal"
            how = "each dimension alone, the others at the centre" if alone else "all dimensions together"
            row["note"] = "; ".join(filter(None, [f"another question: {how}", row["note"]]))
        out.append(row)
    return out


def _metrics(frame: _Frame) -> list[dict]:
    """Every other validation metric of the rows. A form that needs a zero line is fitted without where there is none."""
    rows = frame.data.rows
    names = sorted({k for row in rows for k in row if k.startswith("val_") and not is_spread(k)})
    out = []
    for name in names:
        values = [row.get(name) for row in rows]
        usable = all(isinstance(v, (int, float)) and np.isfinite(v) and v > 0 for v in values)
        if name == frame.data.metric or not usable or len(set(values)) == 1:
            continue
        y = np.array(values, float)
        noise, support = noise_of(rows, name) or (None, None)
        known = noise * y if noise is not None and noise.any() and frame.fit.model.whitened else None
        data = dataclasses.replace(frame.data, metric=name, y=y, measurement_sd=known, support=support)
        form, note = frame.fit.form, ""
        if LAWS[form].bounded and data.zero_line is None:
            form, note = "power_mean", "`power_mean`, the same form without a zero line, which this metric lacks"
        zero_line = data.zero_line if LAWS[form].bounded else None
        out.append(frame.attempt("metric", f"`{name}`", note, data=data, form=form, zero_line=zero_line))
    return out


def _moves(dim: str, fit: Fit, headline: dict, single: Sequence[dict], drops: Sequence[dict]) -> dict:
    """What moves one exponent: least and greatest, the largest mover, and all that leave the headline interval.

    A form that answers another question (each dimension alone, or all together) is not held against the interval.
    """
    own, known = headline["exponents"][dim], fit.exponents[dim]
    out: dict = dict(estimate=own, low=known.low, high=known.high, status=known.status)
    for key, rows in (
        ("choices", [r for r in single if r["what"] != "metric" and r["kind"] == headline["kind"]]),
        ("metrics", [r for r in single if r["what"] == "metric"]),
    ):
        found = [(r["exponents"][dim], f"{r['what']}: {r['setting']}") for r in rows if r["exponents"][dim] is not None]
        mover = max(found, key=lambda f: abs(f[0] - (own or 0.0)), default=(None, ""))
        low, high = known.low, known.high
        outside = [dict(setting=s, exponent=v) for v, s in found if low is not None and not low <= v <= high]
        out[key] = dict(
            num=len(rows),
            lost=[f"{r['what']}: {r['setting']}" for r in rows if r["exponents"][dim] is None],
            smallest=min(found, default=(None, ""))[0],
            largest=max(found, default=(None, ""))[0],
            mover=mover[1],
            mover_exponent=mover[0],
            outside=sorted(outside, key=lambda o: -abs(o["exponent"] - (own or 0.0))),
        )
    return out


# extrapolation from every budget ---------------------------------------------------------------------------------------


def extrapolation_cuts(data: Measurements, fits: Mapping[str, Fit]) -> list[dict]:
    """The extrapolation test of every form at every budget that can be its cut, rising.

    Returns rows {cut, largest, n_fit, n, forms: {form or baseline: {rmse, bias, n, note}}}: the laws are fitted to the
    rows up to the budget `largest` (training FLOPs, or compute where the rows do not say them), at least two budgets, and
    scored on all rows above. A budget whose rows overlap the next one's in compute is no cut. [] beyond MAX_ROWS rows.
    """
    if "compute" not in data.columns or len(data.y) > MAX_ROWS:
        return []
    compute = positive(data.columns, "compute")
    budget = positive(data.columns, "train_flops" if "train_flops" in data.columns else "compute")
    group, centres = levels(budget)
    if len(centres) > MAX_LEVELS:
        edges = np.quantile(np.log(budget), [0.2, 0.4, 0.6, 0.8])
        group = np.searchsorted(edges, np.log(budget))
        centres = np.exp(edges)
    out = []
    for last in range(1, group.max()):
        below = group <= last
        if compute[below].max() >= compute[~below].min():
            continue
        cut = float(np.sqrt(compute[below].max() * compute[~below].min()))
        forms: dict = {}
        for name, fit in fits.items():
            made = _ready(data, fit)
            options = dict(zero_line=fit.model.zero_line, terms=None, solver=_choice(fit), known_sd=made.log_sd)
            found = extrapolation(name, made.table, made.y, made.dims, made.index, made.arms, options, cut)
            for label, score in found.scores.items():
                if label == name or label not in fits:
                    forms.setdefault(label, plain(dataclasses.replace(score, rows=None, predicted=None)))
        scored = int((~below).sum())
        out.append(dict(cut=cut, largest=float(centres[last]), n_fit=len(compute) - scored, n=scored, forms=forms))
    return out
