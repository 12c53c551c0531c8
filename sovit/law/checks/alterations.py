"""The choices that another analyst could have made, one function a kind: rows of refits under each alteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import combinations
from math import comb

import numpy as np

from sovit.law.checks.refits import Counting, Frame, kind_of
from sovit.law.design_matrix import positive
from sovit.law.fitted_law import Fit
from sovit.law.forms import LAWS
from sovit.law.solver.fitter import Loss
from sovit.ledger.few_shot_columns import is_spread, noise_of
from sovit.ledger.measurements import levels
from sovit.spec.shape import COUNTINGS

DRAWS = 20  # random sets of shapes left out, for each size of DROPS
DROPS = (2, 3, 5)
MAX_SHAPES = 60  # of more shapes, so many are left out one at a time, taken evenly
MAX_LEVELS = 12  # more budgets than that are cut into quarters
LOSSES = {
    "squared log error": Loss("log_squares"),
    "Huber with δ = 1e-3, rows as they are (as in publications)": Loss(huber_delta=1e-3),
    "Huber with δ from the data, not whitened by trunk": Loss(whiten=False),
}


def _labels(frame: Frame) -> tuple[list[str], np.ndarray]:
    """The distinct shapes of the rows, as `32x2x256` in the order of the law's dimensions, and each row's shape [n]."""
    values = np.stack([positive(frame.data.columns, d) for d in frame.dims], 1)
    shapes, index = np.unique(values, axis=0, return_inverse=True)
    return ["x".join(f"{x:g}" for x in shape) for shape in shapes], index.ravel()


def shapes(frame: Frame) -> list[dict]:
    names, index = _labels(frame)
    picks = np.arange(len(names))
    if len(names) > MAX_SHAPES:
        picks = np.unique(np.linspace(0, len(names) - 1, MAX_SHAPES).round().astype(int))
    if len(names) < 2:
        return []
    return frame.without("shape", [f"without {names[i]}" for i in picks], index != picks[:, None])


def drops(frame: Frame, rng: np.random.Generator) -> list[dict]:
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


def windows(frame: Frame) -> list[dict]:
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


def countings(frame: Frame) -> list[dict]:
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
        counted = Counting(geometry, ends, head)
        if per_arm:
            data = dataclasses.replace(frame.data, columns=frame.data.columns | dict(compute=compute))
            out.append(frame.attempt("counting", about, counted=counted, data=data))
        else:
            out.append(frame.row("counting", about, frame.fit, note, counted))
    return out


def losses(frame: Frame) -> list[dict]:
    model, out = frame.fit.model, []
    for setting, loss in LOSSES.items():
        if loss.whitens and (model.loss, model.whitened) == (loss.kind, True):
            continue  # the headline's own
        note = "" if loss.whitens or frame.data.measurement_sd is None else "the known noise of each row is left out"
        out.append(frame.attempt("loss", setting, note, loss=loss))
    return out


def forms(frame: Frame, fits: Mapping[str, Fit]) -> list[dict]:
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
        if row["kind"] != kind_of(frame.fit):
            alone = row["kind"] == "marginal"
            how = "each dimension alone, the others at the centre" if alone else "all dimensions together"
            row["note"] = "; ".join(filter(None, [f"another question: {how}", row["note"]]))
        out.append(row)
    return out


def metrics(frame: Frame) -> list[dict]:
    """Every other validation metric of the rows. A form that needs a chance loss is fitted without where there is none."""
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
            form, note = "power_mean", "`power_mean`, the same form without a chance loss, which this metric lacks"
        zero_line = data.zero_line if LAWS[form].bounded else None
        out.append(frame.attempt("metric", f"`{name}`", note, data=data, form=form, zero_line=zero_line))
    return out
