"""Fit a law to measured losses, with intervals that are honest about trunks: `fit` -> `Fit`, JSON both ways.

    data = measurements(["results/stream_star.jsonl"])
    fit = law.fit("joint", data.columns, data.y, bootstrap=1000)
    fit.exponents["width"]      # its estimate, low, high, status of width* ~ compute^s
    fit.predict(columns)        # losses
    Fit.from_json(fit.to_json())

Compute is SoViT's t: forward FLOPs of the encoder x images seen. The algorithm, its tolerances and what failed are in
the module docstrings of `fitter` (estimator), `bootstrap` (intervals) and `allocate` (optimum).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import MIN_CLUSTERS, interval, pairs, pairs_stretch, random_effects, strata_of, stretch
from sovit.law.design_matrix import geometry_of, positive, prepare_fit
from sovit.law.diagnostics import Diagnostics, Draws, describe, seed_noise
from sovit.law.exponents import Growth, Interval, exponents
from sovit.law.extrapolation import Extrapolation, extrapolation
from sovit.law.fitted_law import Data, Fit, Model, read_law
from sovit.law.fitter import solve
from sovit.law.form import FALLING
from sovit.law.forms import LAWS

__all__ = ["LAWS", "Fit", "fit"]


DRAW_DIGITS = 8  # significant digits of a stored bootstrap draw


def fit(
    form,
    columns,
    y,
    *,
    clusters=None,
    loss="huber_log",
    huber_delta=None,
    bootstrap=0,
    seed=0,
    dims=None,
    terms=None,
    zero_line=None,
    whiten=None,
    geometry=None,
    cut=None,
    extrapolate=True,
    measurement_sd=None,
    metric=None,
    coverage=0,
) -> Fit:
    """Fit the law `form` (a key of LAWS) to losses y [n] > 0 measured at columns name -> [n].

    clusters      trunk of each row; None = the column trunk_id, else rows that agree in all but num_examples
    loss          "huber_log" or "log_squares", of ln(predicted / measured)
    huber_delta   None = 1.345 robust s.d., whitened by trunk; a number = as in a paper (1e-3), rows as they are
    bootstrap     draws of each of the two bootstraps; needs 3 trunks (1,000 for results to keep)
    dims          dimensions of the law; None = those of width, depth, mlp_dim, patch_size, image_size that vary
    terms         form "additive": the columns of sum_k A_k x_k^-a_k + eps. ("num_params", "tokens"),
                  ("width", "depth", "tokens") and so on are the Gemstones forms (2502.06857). Form "shifted": the same
                  in place of the dims, the last of them shifted; ("num_examples",) or ("compute",) is a plain curve
    zero_line     form "bounded" only: the loss of knowing nothing
    whiten        None = as said under huber_delta
    geometry      what the columns do not say for counting FLOPs: patch_size, image_size, pool, head_dim, num_classes
    cut           compute that splits fit and score of the extrapolation test; None = `diagnose.compute_cut`
    measurement_sd  [n], in units of y: what is known of the noise of each row by itself, such as that of a few-shot error
                  over its support sets (only what is not shared by all rows: that cancels where rows are compared). A row
                  weighs by 1 / (tau^2 + its own variance) in the log loss, tau^2 being estimated from what is left, and
                  the parametric bootstrap draws both. Needs whitening, so huber_delta=None
    metric        what y is, such as "val_loss": kept in `data` for the words of a prediction
    coverage      data sets drawn from the fitted law and refitted, to see how often its intervals hold it (100 tell it
                  to 2 points); about .5 s each, into diagnostics["coverage"]

    Raises UserError (one line, value and remedy) for bad columns, too few rows or trunks, unknown names.
    """
    if loss not in ("huber_log", "log_squares"):
        raise UserError(f"loss={loss!r} is unknown; choose huber_log or log_squares")
    if huber_delta is not None and not huber_delta > 0:
        raise UserError(f"huber_delta={huber_delta!r} is not positive; give a number such as 1e-3, or None")
    whiten = (huber_delta is None) if whiten is None else whiten
    ready = prepare_fit(
        form,
        columns,
        y,
        clusters=clusters,
        dims=dims,
        terms=terms,
        zero_line=zero_line,
        geometry=geometry,
        measurement_sd=measurement_sd,
        whiten=whiten,
    )
    table, y, dims, arms, rows, own = ready.table, ready.y, ready.dims, ready.arms, ready.rows, ready.own
    index, shaped = ready.index, LAWS[form].uses_dims and terms is None
    num_clusters = int(own.max()) + 1
    if bootstrap and num_clusters < MIN_CLUSTERS:
        raise UserError(
            f"bootstrap={bootstrap} with {num_clusters} trunk(s); an interval by trunk needs at least {MIN_CLUSTERS}"
        )
    solver = dict(loss=loss, huber_delta=huber_delta, whiten=whiten)
    solved = solve(rows.form, rows.u, rows.y, own, known_sd=ready.known_sd, **solver)
    noise = seed_noise(table, y, index, solved)
    diagnostics = describe(rows, solved, noise, table)
    known = geometry_of(table, geometry) if shaped else None
    data = _data(table, dims, ready.centre, metric)
    draws, widen = {}, (1.0, 1.0)
    if bootstrap:
        rng = np.random.default_rng(seed)
        strata = strata_of(arms[rows.source][np.unique(own, return_index=True)[1]].tolist())
        made = dict(
            random_effects=random_effects(rows.form, rows.u, solved, bootstrap, rng, rows.source),
            pairs=pairs(rows.form, rows.u, rows.y, solved, bootstrap, rng, strata),
        )
        draws = {kind: _rounded(done.theta) for kind, done in made.items()}
        widen = stretch(solved.dof), pairs_stretch(strata)
        went = {
            kind: dict(converged=float(done.converged.mean()), iterations=float(done.iterations.mean()))
            for kind, done in made.items()
        }
        diagnostics["draws"] = Draws(num=bootstrap, seed=seed, t_over_z=widen[0], pairs_stretch=widen[1], **went)
    params, intervals = _params(rows, solved.theta, draws, widen)
    growths: dict = {}
    absent: dict = {}
    countable = rows.form.arms or known is not None
    if dims and countable and data.compute_range:
        growths, absent = exponents(
            rows.form,
            rows.centre,
            solved.theta,
            draws.get("random_effects"),
            draws.get("pairs"),
            widen,
            known,
            data.grid,
            data.compute_range,
        )
    elif form == "chinchilla":
        growths = _size_growth(rows, solved.theta, draws, widen, data)
    diagnostics["absent_share"] = absent
    diagnostics["interval_ratio"] = {
        d: float(abs(np.log(e.pairs_high / e.pairs_low)) / max(abs(np.log(e.high / e.low)), 1e-12))
        for d, e in growths.items()
        if e.low is not None
    }
    if coverage:
        diagnostics["coverage"] = _coverage(rows, solved, own, arms, known, data, growths, coverage, seed, solver)
    diagnostics["held_out_rows"] = sorted(set(range(len(y))) - set(rows.source.tolist()))
    extra = Extrapolation()
    if extrapolate:
        options = dict(zero_line=zero_line, terms=terms, solver=solver, known_sd=ready.log_sd)
        extra = extrapolation(form, table, y, dims, index, arms, options, cut)
    model = Model(
        dims=list(dims),
        terms=list(rows.form.terms),
        names=list(rows.form.names),
        theta=solved.theta.tolist(),
        centres=rows.centre.tolist(),
        zero_line=zero_line,
        loss=loss,
        huber_delta=None if np.isinf(solved.delta) else solved.delta,
        whitened=bool(whiten),
    )
    return Fit(
        form,
        params,
        intervals,
        growths,
        noise,
        len(np.unique(rows.source)),
        num_clusters,
        solved.objective,
        extra,
        Diagnostics(**diagnostics),
        model,
        data,
        known,
        draws={kind: theta.tolist() for kind, theta in draws.items()},
    )


def _coverage(rows, solved, own, arms, known, data, growths, num, seed, solver) -> dict:
    from sovit.law import coverage

    if not growths or set(data.grid) & set(FALLING) or not data.compute_range:
        raise UserError(f"coverage={num} needs growth exponents of width, depth or MLP dim; this law has none")
    strata = strata_of([str(arms[rows.source][np.flatnonzero(own == g)[0]]) for g in range(int(own.max()) + 1)])
    setup = coverage.Setup(rows, own, strata, known, data.grid, tuple(data.compute_range), solver, (10.0,))
    return coverage.of_fit(setup, solved, num, seed=seed)


def _rounded(theta: np.ndarray) -> np.ndarray:
    """To DRAW_DIGITS significant digits: what is stored is what the intervals are read from."""
    digits = DRAW_DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(theta), 1e-200)))
    return np.vectorize(lambda value, d: round(float(value), int(d)))(theta, digits)


def _params(rows, theta, draws, widen) -> tuple[dict, dict]:
    raw = rows.form.raw(theta[None], rows.centre)[0]
    params = dict(zip(rows.form.names, (float(p) for p in raw)))
    for amplitude, exponent in rows.form.partners:
        if params[amplitude] <= 0:
            params[exponent] = None
    spread = {kind: rows.form.raw(many, rows.centre) for kind, many in draws.items()}
    intervals = {}
    for i, name in enumerate(rows.form.names if draws else ()):
        # on the plain scale: a parameter on its bound 0 in some draws has no log; none of them can be negative
        low, high = interval(spread["random_effects"][:, i], widen[0], floor=None)
        pairs_low, pairs_high = interval(spread["pairs"][:, i], widen[1], floor=None)
        intervals[name] = Interval(low=max(low, 0.0), high=high, pairs_low=max(pairs_low, 0.0), pairs_high=pairs_high)
    return params, intervals


def _data(table, dims, centre, metric) -> Data:
    ranges: dict = {}
    for name in ("compute", "num_examples", "train_flops"):
        if name in table:
            ranges[f"{name}_range"] = [float(positive(table, name).min()), float(positive(table, name).max())]
    sides = None
    if {"patch_size", "image_size"} & set(dims) and {"patch_size", "image_size"} <= set(table):
        count = positive(table, "image_size") / positive(table, "patch_size")
        sides = np.unique(np.rint(count).astype(int)).tolist()
    grid = {d: np.unique(positive(table, d)).tolist() for d in dims}
    return Data(grid=grid, centre=centre, grid_sides=sides, metric=metric or None, **ranges)


def _size_growth(rows, theta, draws, widen, data) -> dict[str, Growth]:
    """Chinchilla: N* ~ (N D)^s with s = beta / (alpha + beta); its compute is N D, not exact FLOPs."""

    def share(many):
        return many[:, 4] / (many[:, 3] + many[:, 4])

    low = high = pairs_low = pairs_high = None
    if draws:
        low, high = interval(share(draws["random_effects"]), widen[0])
        pairs_low, pairs_high = interval(share(draws["pairs"]), widen[1])
    absent = min(theta[:2]) <= 0
    note = "an amplitude is 0" if absent else "" if draws else "no interval: fitted with bootstrap=0"
    found = Growth(
        estimate=None if absent else float(share(theta[None])[0]),
        low=low,
        high=high,
        kind="joint",
        compute_range=data.compute_range,
        status="unidentified" if absent else "ok",
        pairs_low=pairs_low,
        pairs_high=pairs_high,
        note=note,
    )
    return dict(num_params=found)


def read_siblings(path: Path, forms: Sequence[str]) -> dict[str, Fit]:
    """Read the laws of other `forms` that `sovit fit` kept of the same rows, as far as they stand beside `path`."""
    folder = path.parent if path.parent.name == "forms" else path.parent / "forms"
    return {form: read_law(folder / f"{form}.json") for form in forms if (folder / f"{form}.json").is_file()}
