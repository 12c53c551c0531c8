"""How much a law's answer hangs on choices that another analyst could have made.

`sensitivity` refits the law under every alteration of one choice at a time: shapes left out, the window of compute, the
counting of FLOPs, the loss, the form, the metric. Point fits only, so that a hundred take seconds; what they move is held
against the interval of the headline fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sovit.law.checks import alterations
from sovit.law.checks.refits import Frame, loss_of, prepared
from sovit.law.design_matrix import positive
from sovit.law.extrapolation import extrapolation
from sovit.law.fitted_law import Fit, plain
from sovit.ledger.measurements import Measurements, levels

MAX_ROWS = 20_000  # more rows make a hundred refits a matter of many minutes: none are made


def sensitivity(
    data: Measurements, fit: Fit, train_flops: float | None, *, fits: Mapping[str, Fit] | None = None, seed: int = 0
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
    frame = Frame(data, fit, train_flops)
    headline = frame.row("headline", f"`{fit.form}`, all rows", fit)
    single = [
        *alterations.shapes(frame),
        *alterations.windows(frame),
        *alterations.countings(frame),
        *alterations.losses(frame),
        *alterations.forms(frame, fits or {}),
        *alterations.metrics(frame),
    ]
    drops = alterations.drops(frame, np.random.default_rng(seed))
    return dict(
        train_flops=train_flops,
        num_rows=len(data.y),
        seed=seed,
        headline=headline,
        alterations=single,
        drops=drops,
        dimensions={dim: _moves(dim, fit, headline, single, drops) for dim in fit.model.dims},
    )


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
    if len(centres) > alterations.MAX_LEVELS:
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
            found = extrapolation(prepared(data, fit), loss_of(fit), cut)
            for label, score in found.scores.items():
                if label == name or label not in fits:
                    forms.setdefault(label, plain(dataclasses.replace(score, rows=None, predicted=None)))
        scored = int((~below).sum())
        out.append(dict(cut=cut, largest=float(centres[last]), n_fit=len(compute) - scored, n=scored, forms=forms))
    return out
