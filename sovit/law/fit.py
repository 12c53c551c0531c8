"""Fit a law to measured losses, with intervals that are honest about trunks: `fit_law` and `fit` -> `Fit`.

    law = fit_law(read_ledger("results/stream_star.jsonl"))             # the form chosen by held-out error
    law = fit("joint", data.columns, data.y, bootstrap=1000)            # one form, of columns
    law.exponents["width"]      # its estimate, low, high, status of width* ~ compute^s
    law.predict(columns)        # losses

Compute is SoViT's t: forward FLOPs of the encoder x images seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import MIN_CLUSTERS, interval, pairs, pairs_stretch, random_effects, stretch
from sovit.law.compute_optimum import Family
from sovit.law.design_matrix import Prepared, geometry_of, positive, prepare_fit
from sovit.law.diagnostics import Draws, describe, far_rows, seed_noise
from sovit.law.exponents import Growth, Interval, exponents, size_growth
from sovit.law.extrapolation import Extrapolation, extrapolation
from sovit.law.fitted_law import Data, Fit, Model
from sovit.law.forms import LAWS, WHOLE_SHAPE
from sovit.law.geometry import Geometry
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Rows, Solved, solve
from sovit.ledger.measurements import Measurements, measurements_of
from sovit.ledger.schema import row_label

__all__ = ["LAWS", "Fit", "fit", "fit_law"]

FORMS = ("joint", "bounded", "sovit", "chinchilla")  # tried by default, in the order in which ties are settled
FORMS_TOKENS = ("joint_tokens", "bounded_tokens")  # besides, where patch or image size was varied
FORMS_WITHOUT_LINE = ("joint", "power_mean", "sovit", "chinchilla")  # where the chance loss is not known
DRAW_DIGITS = 8  # significant digits of a stored bootstrap draw


def fit_law(rows: Sequence[dict], metric: str = "val_loss", form: str | None = None, bootstrap: int = 1000) -> Fit:
    """Fit every form that the rows allow and return the one that extrapolates best.

    rows: of a ledger; those that are not ok are left out. form: this one instead. bootstrap: draws of each interval.
    Raises UserError for bad rows and where no form can be fitted.

    >>> law = sovit.fit_law(sovit.read_ledger("results/stream_star.jsonl"), bootstrap=0)
    >>> law.form, law.best_shape(3e12).shape.label
    ('bounded', '40x3x704')
    """
    data = measurements_of(rows, metric)
    fits, _ = fit_forms(data, form, bootstrap=bootstrap)
    return fits[choose_headline(fits, form)[0]]


def fit_forms(data: Measurements, form: str | None = None, **options: Any) -> tuple[dict[str, Fit], dict[str, str]]:
    """Fit every form that the rows allow; returns the fits, and the reasons of the others, by form.

    form: one to fit besides. options: fields of `LawOptions`, such as bootstrap and seed. Raises UserError where none
    fits, or not the one asked for.
    """
    tried: tuple[str, ...] = FORMS_WITHOUT_LINE if data.zero_line is None else FORMS
    if any(len(np.unique(data.columns[n])) > 1 for n in ("patch_size", "image_size") if n in data.columns):
        tried += tuple(name for name in FORMS_TOKENS if data.zero_line is not None or not LAWS[name].bounded)
    fits: dict[str, Fit] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys((*tried, *([form] if form else []))):
        try:
            fits[name] = fit_measurements(name, data, **options)
        except np.linalg.LinAlgError as error:
            refused[name] = f"form={name!r} cannot be fitted to these rows: {error}"
        except UserError as error:
            refused[name] = str(error)
    if form in refused:
        raise UserError(refused[form])
    if not fits or (not form and "width" in data.columns and not any(LAWS[name].uses_dims for name in fits)):
        raise UserError(next(iter(refused.values())))  # a law blind to shape is no answer where shapes were run
    return fits, refused


def fit_measurements(name: str, data: Measurements, **options: Any) -> Fit:
    """Fit one form to measurements, with what they know of the chance loss."""
    if LAWS[name].bounded:
        if data.zero_line is None:
            raise UserError(f"form={name!r} needs the chance loss: rows with zero_line, or val_loss with num_classes")
        options["zero_line"] = data.zero_line
    found = fit(name, data.columns, data.y, metric=data.metric, **options)
    left_out = [dict(run_id=run_id, reason=reason) for run_id, reason in data.left_out]
    outliers = [data.rows[int(i)]["run_id"] for i in found.noise.outliers or ()]
    kept = dataclasses.replace(
        found.data,
        left_out=left_out,
        notes=data.notes,
        warnings=_warnings(data, outliers) or None,
        trained_on=data.trained_on,
        best_run=_best_run(data),
    )
    return dataclasses.replace(found, data=kept, noise=dataclasses.replace(found.noise, outliers=outliers or None))


def _warnings(data: Measurements, outliers: Sequence[str]) -> list[str]:
    """What to know before anything else: rows that the law misses by far, and losses that rise with training."""
    out = []
    if outliers:
        which = ", ".join(outliers[:5]) + (f" and {len(outliers) - 5} more" if len(outliers) > 5 else "")
        lies, them = ("lies", "it") if len(outliers) == 1 else ("lie", "them")
        out.append(f"{which} {lies} far from the law; the noise leaves {them} out: look at {them}, or exclude {them}")
    first: dict[str, tuple] = {}  # trunk -> images, loss
    last: dict[str, tuple] = {}
    for row in data.rows:
        point = row["num_examples"], row[data.metric]
        first[row["trunk_id"]] = min(first.get(row["trunk_id"], point), point)
        last[row["trunk_id"]] = max(last.get(row["trunk_id"], point), point)
    several = [trunk for trunk in first if first[trunk][0] < last[trunk][0]]
    rising = sum(last[trunk][1] > first[trunk][1] for trunk in several)
    if rising > len(several) / 2:
        out.append(
            f"{data.metric} rises with training in {rising} of {len(several)} trunks, which no law of these forms can"
            " follow; check the column, and the learning rate"
        )
    return out


def _best_run(data: Measurements) -> str:
    """The row of least loss, in words."""
    row = data.rows[int(data.y.argmin())]
    return (
        f"{row_label(row)} ({data.metric} {row[data.metric]:.4g} after {row['num_examples']:,} images, {row['run_id']})"
    )


def choose_headline(fits: Mapping[str, Fit], form: str | None) -> tuple[str, str]:
    """The headline form and the reason: the one asked for, else the least extrapolation error of those that can rank
    whole shapes (the others describe part of the rows, or no shape, so that their scores choose nothing)."""
    if form is not None:
        return form, "it was asked for"
    able = [name for name in fits if name in WHOLE_SHAPE]
    if not able:
        return next(iter(fits)), "no form that ranks whole shapes could be fitted"
    errors = {name: error for name in able if (error := fits[name].extrapolation.rmse(name)) is not None}
    if len(able) == 1:
        return able[0], "it is the only form fitted that ranks whole shapes"
    if not errors:
        return able[0], "no form could be scored by extrapolation; the first of the table is kept"
    best = min(errors, key=lambda n: errors[n])
    others = [f"{n} {100 * errors[n]:.2f} %" if n in errors else f"{n} not scored" for n in able if n != best]
    return best, (
        f"among the forms that rank whole shapes it predicts the held-out, most expensive rows best"
        f" (RMSE {100 * errors[best]:.2f} %; {', '.join(others)})"
    )


def fit(form: str, columns: Mapping, y: Any, **options: Any) -> Fit:
    """Fit the law `form` (a key of LAWS) to losses y [n] > 0 measured at columns name -> [n].

    options: the fields of `LawOptions`. Raises UserError (one line, value and remedy) for bad columns, too few rows or
    trunks, unknown names.
    """
    chosen = LawOptions(**options)
    ready = prepare_fit(form, columns, y, chosen)
    rows = ready.rows
    num_clusters = int(rows.trunk.max()) + 1
    if chosen.bootstrap and num_clusters < MIN_CLUSTERS:
        raise UserError(
            f"bootstrap={chosen.bootstrap} with {num_clusters} trunk(s); an interval by trunk needs at least {MIN_CLUSTERS}"
        )
    solved = solve(rows, chosen.estimator)
    noise = seed_noise(ready.table, ready.y, ready.index, solved, far_rows(rows, solved))
    shaped = LAWS[form].uses_dims and chosen.terms is None
    geometry = geometry_of(ready.table, chosen.geometry) if shaped else None
    data = _data(ready, chosen.metric)
    draws, went = _bootstrap(ready, solved, chosen)
    params, intervals = _params(rows, solved.theta, draws, went)
    return Fit(
        form,
        params,
        intervals,
        _growths(ready, solved, geometry, data, draws, went),
        noise,
        len(np.unique(rows.source)),
        num_clusters,
        solved.objective,
        extrapolation(ready, chosen.estimator, chosen.cut) if chosen.extrapolate else Extrapolation(),
        describe(rows, solved, noise, went),
        _model(ready, solved, chosen),
        data,
        geometry,
        draws={kind: theta.tolist() for kind, theta in draws.items()},
    )


def _bootstrap(ready: Prepared, solved: Solved, options: LawOptions) -> tuple[dict[str, np.ndarray], Draws | None]:
    """Draws of both kinds [R, P], as they are stored, and what was drawn; nothing without a bootstrap."""
    if not options.bootstrap:
        return {}, None
    rng = np.random.default_rng(options.seed)
    made = dict(
        random_effects=random_effects(ready.rows, solved, options.bootstrap, rng),
        pairs=pairs(ready.rows, solved, options.bootstrap, rng, ready.strata),
    )
    draws = Draws(
        num=options.bootstrap,
        seed=options.seed,
        t_over_z=stretch(solved.dof),
        pairs_stretch=pairs_stretch(ready.strata),
    )
    return {kind: _rounded(done.theta) for kind, done in made.items()}, draws


def _growths(
    ready: Prepared, solved: Solved, geometry: Geometry | None, data: Data, draws: dict, went: Draws | None
) -> dict[str, Growth]:
    """Growth exponents by dimension; of no dimension where none can be counted."""
    rows, widen = ready.rows, (went.t_over_z, went.pairs_stretch) if went else (1.0, 1.0)
    if ready.dims and (rows.form.arms or geometry is not None) and data.compute_range:
        family = Family(rows.form, rows.centre, geometry, data.grid)
        return exponents(family, solved.theta, draws, widen, data.compute_range)
    if ready.name == "chinchilla":
        return dict(num_params=size_growth(solved.theta, draws, widen, data.compute_range))
    return {}


def _rounded(theta: np.ndarray) -> np.ndarray:
    """To DRAW_DIGITS significant digits: what is stored is what the intervals are read from."""
    digits = DRAW_DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(theta), 1e-200)))
    return np.vectorize(lambda value, d: round(float(value), int(d)))(theta, digits)


def _params(
    rows: Rows, theta: np.ndarray, draws: dict, went: Draws | None
) -> tuple[dict[str, float | None], dict[str, Interval]]:
    raw = rows.form.raw(theta[None], rows.centre)[0]
    params: dict = dict(zip(rows.form.names, (float(p) for p in raw)))
    for amplitude, exponent in rows.form.partners:
        if params[amplitude] <= 0:
            params[exponent] = None
    if went is None:
        return params, {}
    spread = {kind: rows.form.raw(many, rows.centre) for kind, many in draws.items()}
    intervals = {}
    for i, name in enumerate(rows.form.names):
        # on the plain scale: a parameter on its bound 0 in some draws has no log; none of them can be negative
        low, high = interval(spread["random_effects"][:, i], went.t_over_z, floor=None)
        pairs_low, pairs_high = interval(spread["pairs"][:, i], went.pairs_stretch, floor=None)
        intervals[name] = Interval(low=max(low, 0.0), high=high, pairs_low=max(pairs_low, 0.0), pairs_high=pairs_high)
    return params, intervals


def _model(ready: Prepared, solved: Solved, options: LawOptions) -> Model:
    rows = ready.rows
    return Model(
        dims=list(ready.dims),
        terms=list(rows.form.terms),
        names=list(rows.form.names),
        theta=solved.theta.tolist(),
        centres=rows.centre.tolist(),
        zero_line=options.zero_line,
        loss=options.loss,
        huber_delta=None if np.isinf(solved.delta) else solved.delta,
        whitened=options.estimator.whitens,
    )


def _data(ready: Prepared, metric: str | None) -> Data:
    table, dims = ready.table, ready.dims
    ranges: dict = {}
    for name in ("compute", "num_examples", "train_flops"):
        if name in table:
            ranges[f"{name}_range"] = [float(positive(table, name).min()), float(positive(table, name).max())]
    sides = None
    if {"patch_size", "image_size"} & set(dims) and {"patch_size", "image_size"} <= set(table):
        count = positive(table, "image_size") / positive(table, "patch_size")
        sides = np.unique(np.rint(count).astype(int)).tolist()
    grid = {d: np.unique(positive(table, d)).tolist() for d in dims}
    return Data(grid=grid, centre=ready.centre, grid_sides=sides, metric=metric or None, **ranges)
