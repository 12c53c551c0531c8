"""How far does each law see? Fitted below a compute cut, scored above it, for every cut, on studies and published sweeps.

    python -m analysis.published.extrapolation LEDGER ... [--public FOLDER] [--out FILE.json]

The committed scores are of results/stream_star.jsonl, icons_star.jsonl and stream_isoflop.jsonl.

The headline at a cut is the form that `sovit fit` would have chosen from the rows below it, by its own test inside them:
no row that is scored has a say. Its baselines are the N-D law (`chinchilla`), constant proportions (`compute_only`) and the
nearest run. Whether it is better is said with a 90 % interval of the ratio of RMSEs, from resampling the trunks that are
scored (what a fit itself would vary by is not in it). Figures stand in the folder named like OUT. No row of a published
sweep is written, only scores. FOLDER is described in `analysis.published.sweeps`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from analysis.published.compare import BASELINES, compare
from analysis.published.data_sets import LEVEL_GAP, MIN_FITTED, MIN_SCORED, Data, cuts_of, of_ledger, of_public
from analysis.published.learning_curves import curves
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law import fitted_law
from sovit.law.fit import FORMS, FORMS_WITHOUT_LINE, choose_headline
from sovit.law.forms import LAWS

CHOSEN = ("headline", "of_all")  # no forms but choices: among those `sovit fit` tries, among all of TRIED


def tried(data: Data) -> tuple[str, ...]:
    """The forms among which `sovit fit` chooses."""
    return FORMS_WITHOUT_LINE if data.zero_line is None else FORMS


def fits_below(data: Data, below: np.ndarray) -> tuple[dict[str, fitted_law.Fit], dict[str, str]]:
    """Every form that the rows below a cut allow, fitted to them and to nothing else; why each other one is not."""
    fits, refused = {}, {}
    for form in dict.fromkeys((*tried(data), *data.forms)):
        try:
            fits[form] = data.fit(form, below)
        except (UserError, np.linalg.LinAlgError) as error:
            refused[form] = str(error)
    return fits, refused


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


def score(residual: np.ndarray) -> dict:
    """RMSE, signed bias and number of residuals ln(predicted / measured), nan left out."""
    known = residual[np.isfinite(residual)]
    return dict(rmse=float(np.sqrt((known**2).mean())), bias=float(known.mean()), n=len(known))


def distance_bins(decades: np.ndarray) -> np.ndarray:
    """Bin of each distance: a budget where rows stand on budgets, else a half decade."""
    order = np.argsort(decades, kind="stable")
    budget = np.empty(len(decades), int)
    budget[order] = np.r_[0, np.cumsum(np.diff(decades[order]) > LEVEL_GAP / np.log(10))]
    spans = [np.ptp(decades[budget == b]) for b in np.unique(budget)]
    return budget if max(spans) < LEVEL_GAP / np.log(10) else np.round(decades * 2).astype(int)


def by_distance(residual: np.ndarray, decades: np.ndarray) -> list[dict]:
    """Scores of the rows within each bin beyond the dearest row fitted; `decades` their mean distance."""
    bins = distance_bins(decades)
    return [
        dict(decades=float(decades[bins == b].mean())) | score(residual[bins == b])
        for b in np.unique(bins[np.isfinite(residual)])
    ]


def study(data: Data, say=lambda line: None) -> dict:
    """Every cut of one data set, and all of them pooled: a form is pooled where it is scored at every cut."""
    compute = data.columns["compute"]
    out: dict = dict(name=data.name, metric=data.metric, n=len(data.y), num_trunks=len(set(data.clusters.tolist())))
    cuts, every = [], []
    for cut in cuts_of(compute):
        below, above = np.flatnonzero(compute < cut), np.flatnonzero(compute >= cut)
        fits, refused = fits_below(data, below)
        headline, wide = choose(fits, tried(data)), choose(fits, data.forms)
        residuals = {form: np.log(p / data.y[above]) for form, p in predictions(data, fits, cut).items()}
        chosen = {"headline": headline, "of_all": wide}
        residuals = {name: residuals[form] for name, form in chosen.items() if form in residuals} | residuals
        decades = np.log10(compute[above] / compute[below].max())
        row = dict(
            cut=cut, n_fit=len(below), n=len(above), decades=float(decades.max()), headline=headline, of_all=wide
        )
        row["forms"] = {f: score(r) | dict(by_distance=by_distance(r, decades)) for f, r in residuals.items()}
        row["refused"] = refused
        row["against"] = against(residuals, data.clusters[above])
        row["winner"] = winner(row["forms"], len(above))
        cuts.append(row)
        every.append((residuals, data.clusters[above], decades))
        say(f"{data.name} {data.metric}: cut at {cut:.2e}, {len(below)} rows fitted, {len(above)} scored")
    out["cuts"] = cuts
    usable = [part for part in every if "headline" in part[0]] or every
    if not usable:
        return out | dict(note=f"no compute cut leaves {MIN_FITTED} rows below and {MIN_SCORED} above")
    common = [form for form in usable[0][0] if all(form in residuals for residuals, _, _ in usable)]
    pooled = {form: np.concatenate([residuals[form] for residuals, _, _ in usable]) for form in common}
    trunks, decades = (np.concatenate([part[i] for part in usable]) for i in (1, 2))
    forms = {form: score(r) | dict(by_distance=by_distance(r, decades)) for form, r in pooled.items()}
    comparisons = against(pooled, trunks)
    return out | dict(
        pooled=dict(
            num_cuts=len(usable),
            forms=forms,
            winner=winner(forms, len(trunks)),
            against=comparisons,
            beats_all_baselines={
                choice: all(c["verdict"] == "better" for c in found.values()) for choice, found in comparisons.items()
            },
        )
    )


def against(residuals: Mapping, trunks: np.ndarray) -> dict:
    """Each choice -> each baseline -> how they compare."""
    return {
        choice: {b: compare(residuals[choice], residuals[b], trunks) for b in BASELINES if b in residuals}
        for choice in CHOSEN
        if choice in residuals
    }


def winner(forms: Mapping, num_rows: int) -> str | None:
    """The form with the lowest RMSE among those that predict every row."""
    able = {form: s["rmse"] for form, s in forms.items() if s["n"] == num_rows and form not in CHOSEN}
    return min(able, key=lambda form: able[form]) if able else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER")
    parser.add_argument("--public", type=Path, metavar="FOLDER", help="published sweeps, see analysis.published.sweeps")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "extrapolation.json")
    options = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        sets = [data for path in options.ledgers for data in of_ledger(path)]
        sets += of_public(options.public) if options.public else []
        found = [study(data, say) for data in sets]
        found += [curves(options.public, say)] if options.public else []
        written = json.dumps(found, indent=1, allow_nan=False)
        written = re.sub(r"\{[^{}\[\]]*\}", lambda flat: " ".join(flat[0].split()), written) + "\n"  # a score a line
        write_atomic(options.out, written)
        from analysis.published.figures import extrapolation_distance
        from sovit.report.figures import save

        save(extrapolation_distance(found), options.out.with_suffix("") / "by_distance")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    for data in found:
        if "pooled" in data:
            forms = data["pooled"]["forms"]
            shown = [f"{form} {100 * forms[form]['rmse']:.2f} %" for form in ("headline", *BASELINES) if form in forms]
            print(f"{data['name']} {data['metric']}, RMSE over all cuts: {', '.join(shown)}")
        else:
            print(f"{data['name']} {data['metric']}: {data['note']}")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
