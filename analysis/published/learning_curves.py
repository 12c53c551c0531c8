"""The vision learning curves as one data set of the extrapolation test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.published import sweeps as public
from analysis.published.compare import BASELINES, compare
from analysis.published.data_sets import cuts_of
from sovit.law import fit as law

CURVE_FORMS = ("shifted", "bounded")  # of a learning curve, beside the power law in its images, `compute_only`


def curves(folder: Path, say=lambda line: None) -> dict:
    """The vision learning curves, one fit a curve and cut, as one data set: every curve, cut and half decade counts once.

    A curve is one run of one model, whose compute is in proportion to the images. Forms are compared with the power law
    by resampling models, six of them.
    """
    cells = []
    found = public.vision(folder)
    for (model, task), sweep in found.items():
        images = sweep.columns["num_examples"]
        for cut in cuts_of(images):
            above = np.flatnonzero(images >= cut)
            predicted = {}
            for form in CURVE_FORMS:
                options = dict(terms=("num_examples",), cut=cut, loss="log_squares", whiten=False)
                if form == "bounded":
                    options["zero_line"] = sweep.zero_line
                fitted = law.fit(
                    form, sweep.columns | dict(compute=images), sweep.y, clusters=sweep.clusters, **options
                )
                scored = fitted.extrapolation.scores
                predicted |= {name: np.array(s.predicted) for name, s in scored.items()}
            decades = np.log10(images[above] / images[images < cut].max())
            bins = np.round(decades * 2).astype(int)
            for b in np.unique(bins):
                cell = {form: np.log(p / sweep.y[above])[bins == b] for form, p in predicted.items()}
                cells.append(
                    (model, decades[bins == b].mean(), {form: (r @ r / len(r), r.mean()) for form, r in cell.items()})
                )
        say(f"curve of {model} on {task}")
    models, decades = np.array([c[0] for c in cells]), np.array([c[1] for c in cells])
    mean = {form: np.array([c[2][form] for c in cells]) for form in cells[0][2]}  # [cells, (square, residual)]
    bins = np.round(decades * 2).astype(int)

    def pooled(rows):
        return {
            form: dict(rmse=float(np.sqrt(m[rows, 0].mean())), bias=float(m[rows, 1].mean()), n=int(rows.sum()))
            for form, m in mean.items()
        }

    forms = pooled(np.ones(len(bins), bool))
    for b in np.unique(bins):
        for form, scored in pooled(bins == b).items():
            forms[form].setdefault("by_distance", []).append(dict(decades=float(decades[bins == b].mean())) | scored)
    root = {form: np.sqrt(m[:, 0]) for form, m in mean.items()}
    comparisons = {form: {b: compare(root[form], root[b], models) for b in BASELINES[1:]} for form in CURVE_FORMS}
    best = min(forms, key=lambda form: forms[form]["rmse"])
    return dict(
        name="vision curves",
        metric="few-shot error",
        n=len(cells),
        num_trunks=len(found),
        cuts=[],
        pooled=dict(num_cuts=None, forms=forms, winner=best, against=comparisons),
    )
