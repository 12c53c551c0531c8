"""How far does each law see? Fitted below a compute cut, scored above it, for every cut, on studies and published sweeps.

    python -m analysis.published.extrapolation LEDGER ... [--public FOLDER] [--out FOLDER]

The committed scores are of results/stream_star.jsonl, icons_star.jsonl and stream_isoflop.jsonl.

The headline at a cut is the form that `sovit fit` would have chosen from the rows below it, by its own test inside them:
no row that is scored has a say. Its baselines are the N-D law (`chinchilla`), constant proportions (`compute_only`) and the
nearest run. Whether it is better is said with a 90 % interval of the ratio of RMSEs, from resampling the trunks that are
scored (what a fit itself would vary by is not in it). Writes extrapolation.json. No row of a published
sweep is written, only scores. FOLDER is described in `analysis.published.sweeps`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.publish import Result, run
from analysis.published.data_sets import LEVEL_GAP, MIN_FITTED, MIN_SCORED, Data, cuts_of, of_ledger, of_public
from sovit import UserError
from sovit.law import fitted_law
from sovit.law.fit import FORMS, FORMS_WITHOUT_LINE, choose_headline
from sovit.law.forms import LAWS
from sovit.predict.validation import LEVEL, verdict_of

BASELINES = ("chinchilla", "compute_only", "nearest")
MIN_TRUNKS, NUM_DRAWS = 3, 2000


def compare(ours: np.ndarray, theirs: np.ndarray, trunks: np.ndarray) -> dict:
    """Ratio of our RMSE to theirs over the rows that both predict, with an interval from resampling whole trunks.

    ours, theirs [n]: residuals; trunks [n]. The verdict is `better` or `worse` where the interval leaves 1 out.
    """
    both = np.isfinite(ours) & np.isfinite(theirs)
    index = np.unique(trunks[both], return_inverse=True)[1]
    sums = np.stack([np.bincount(index, residual[both] ** 2) for residual in (ours, theirs)])  # [2, G]
    num = sums.shape[1]
    ratio = float(np.sqrt(sums[0].sum() / sums[1].sum()))
    if num < MIN_TRUNKS:
        return dict(ratio=ratio, low=None, high=None, num_trunks=num, verdict="too few trunks")
    weights = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), NUM_DRAWS)
    drawn = np.sqrt((weights @ sums[0]) / (weights @ sums[1]))
    low, high = (float(q) for q in np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]))
    return dict(ratio=ratio, low=low, high=high, num_trunks=num, verdict=verdict_of(low - 1, high - 1))


def tried(data: Data) -> tuple[str, ...]:
    """The forms among which `sovit fit` chooses."""
    return FORMS_WITHOUT_LINE if data.zero_line is None else FORMS


def fits_below(data: Data, below: np.ndarray) -> dict[str, fitted_law.Fit]:
    """Every form that the rows below a cut allow, fitted to them and to nothing else."""
    fits = {}
    for form in dict.fromkeys((*tried(data), *data.forms)):
        try:
            fits[form] = data.fit(form, below)
        except (UserError, np.linalg.LinAlgError) as error:
            print(f"{data.name} {data.metric}: no {form}: {error}", file=sys.stderr)
    return fits


def choose(fits: Mapping[str, fitted_law.Fit], forms: Sequence[str]) -> str | None:
    """The one of `forms` that `sovit fit` would choose; None where none of those fitted describes shapes."""
    able = {form: fits[form] for form in forms if form in fits}
    return choose_headline(able, None)[0] if any(LAWS[form].uses_dims for form in able) else None


def predictions(data: Data, fits: Mapping[str, fitted_law.Fit], cut: float) -> dict[str, np.ndarray]:
    """Form -> predicted losses of the rows from the cut up [n], nan where it says nothing; baselines included.

    The baselines are those of `law.fit`'s own extrapolation test; `chinchilla` is one of them.
    """
    above = np.flatnonzero(data.columns["compute"] >= cut)
    columns = {name: column[above] for name, column in data.columns.items()}
    found = {form: fits[form].predict(columns) for form in data.forms if form in fits}
    for name, scored in data.fit("joint", cut=cut).extrapolation.scores.items():
        if name in BASELINES and scored.n:
            found[name] = np.full(len(above), np.nan)
            found[name][np.searchsorted(above, scored.rows)] = scored.predicted
    return found


def score(residual: np.ndarray, decades: np.ndarray) -> dict:
    """RMSE, signed bias and number of residuals ln(predicted / measured), nan left out; in all, and by distance.

    decades [n]: distance of each row beyond the dearest row fitted; a bin is a budget where rows stand on budgets, else
    a half decade, and has the mean distance of its rows.
    """

    def of(rows: np.ndarray) -> dict:
        known = residual[rows & np.isfinite(residual)]
        return dict(rmse=float(np.sqrt((known**2).mean())), bias=float(known.mean()), n=len(known))

    bins = distance_bins(decades)
    near = [
        dict(decades=float(decades[bins == b].mean())) | of(bins == b) for b in np.unique(bins[np.isfinite(residual)])
    ]
    return of(np.full(len(residual), True)) | dict(by_distance=near)


def distance_bins(decades: np.ndarray) -> np.ndarray:
    """Bin of each distance: a budget where rows stand on budgets, else a half decade."""
    order = np.argsort(decades, kind="stable")
    budget = np.empty(len(decades), int)
    budget[order] = np.r_[0, np.cumsum(np.diff(decades[order]) > LEVEL_GAP / np.log(10))]
    spans = [np.ptp(decades[budget == b]) for b in np.unique(budget)]
    return budget if max(spans) < LEVEL_GAP / np.log(10) else np.round(decades * 2).astype(int)


def scored(residuals: Mapping[str, np.ndarray], trunks: np.ndarray, decades: np.ndarray) -> dict:
    """Score every form: {forms: {form: score}, winner (lowest RMSE of those that predict all), against: {headline: ...}}."""
    forms = {form: score(residual, decades) for form, residual in residuals.items()}
    able = {form: s["rmse"] for form, s in forms.items() if s["n"] == len(trunks) and form != "headline"}
    baselines = [b for b in BASELINES if b in residuals and "headline" in residuals]
    against = {b: compare(residuals["headline"], residuals[b], trunks) for b in baselines}
    winner = min(able, key=lambda form: able[form]) if able else None
    return dict(forms=forms, winner=winner, against=dict(headline=against))


def study(data: Data) -> dict:
    """Every cut of one data set, and all of them pooled: a form is pooled where it is scored at every cut."""
    compute = data.columns["compute"]
    out: dict = dict(name=data.name, metric=data.metric, n=len(data.y), num_trunks=len(set(data.clusters.tolist())))
    cuts, every = [], []
    for cut in cuts_of(compute):
        below, above = np.flatnonzero(compute < cut), np.flatnonzero(compute >= cut)
        fits = fits_below(data, below)
        headline = choose(fits, tried(data))
        residuals = {form: np.log(p / data.y[above]) for form, p in predictions(data, fits, cut).items()}
        if headline in residuals:
            residuals = {"headline": residuals[headline]} | residuals
        part = residuals, data.clusters[above], np.log10(compute[above] / compute[below].max())
        counts = dict(n_fit=len(below), n=len(above), decades=float(part[2].max()))
        cuts.append(dict(cut=cut, headline=headline) | counts | scored(*part))
        every.append(part)
        print(f"{data.name} {data.metric}: cut at {cut:.2e}, {counts}", file=sys.stderr, flush=True)
    out["cuts"] = cuts
    usable = [part for part in every if "headline" in part[0]] or every
    if not usable:
        return out | dict(note=f"no compute cut leaves {MIN_FITTED} rows below and {MIN_SCORED} above")
    common = [form for form in usable[0][0] if all(form in residuals for residuals, _, _ in usable)]
    pooled = {form: np.concatenate([residuals[form] for residuals, _, _ in usable]) for form in common}
    trunks, decades = (np.concatenate([part[i] for part in usable]) for i in (1, 2))
    return out | dict(pooled=dict(num_cuts=len(usable)) | scored(pooled, trunks, decades))


def analyse(options: argparse.Namespace) -> Result:
    sets = [data for path in options.ledgers for data in of_ledger(path)]
    sets += of_public(options.public) if options.public else []
    found = [study(data) for data in sets]
    lines = []
    for data in (data for data in found if "pooled" in data):
        forms = data["pooled"]["forms"].items()
        cells = "  ".join(f"{form} {100 * s['rmse']:.2f} ({100 * s['bias']:+.2f})" for form, s in forms)
        lines.append(f"{data['name']}, {data['metric']}, {data['pooled']['num_cuts']} cuts pooled: {cells}")
    return Result(found, "\n".join(lines), "extrapolation.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER")
    parser.add_argument("--public", type=Path, metavar="FOLDER", help="published sweeps, see analysis.published.sweeps")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
