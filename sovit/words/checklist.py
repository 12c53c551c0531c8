"""The field's reporting checklist, answered from the rows and the fit: what is not known is said to be so.

The four stages are those of (Mis)Fitting (arXiv 2502.18969): form, training set-up, data extraction, fitting.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from sovit import __version__
from sovit.fitter import START_ROWS
from sovit.words.data import order, rates, seeds
from sovit.words.extrapolation import extrapolation_table, own_rmse
from sovit.words.law import equation
from sovit.words.phrases import cell, listed, number, percent, sentence

UNKNOWN = "not recorded in the rows"


def checklist(data, fits, headline, why, refused) -> list[dict]:
    """The answers as rows {stage, question, answer}."""
    fit = fits[headline]
    stages = {
        "form": _form(fits, headline, why, refused),
        "training set-up": _training(data),
        "data extraction": _extraction(data, fit),
        "fitting": _fitting(data, fits, headline),
    }
    return [dict(stage=s, question=q, answer=cell(a)) for s, answers in stages.items() for q, a in answers.items()]


def checklist_section(rows: list[dict]) -> str:
    unknown = sum(UNKNOWN in row["answer"] for row in rows)
    text = (
        "What somebody needs who would do this again, by the four stages of (Mis)Fitting (arXiv 2502.18969). Every answer is"
        f" read from the rows or the fit; {unknown} of {len(rows)} are, at least in part, {UNKNOWN}."
    )
    body = "\n".join(f"| {row['stage']} | {row['question']} | {row['answer']} |" for row in rows)
    return f"{text}\n\n| stage | question | answer |\n|---|---|---|\n{body}"


def _form(fits, headline, why, refused) -> dict:
    fit = fits[headline]
    others = [name for name in fits if name != headline]
    tried = f"{listed([f'`{n}`' for n in others])}, in `forms/`" if others else "none"
    return {
        "exact form": f"`{'; '.join(equation(fit).splitlines())}`",
        "parameters": f"{len(fit.params)}, at full precision in `law.json` and under The law",
        "why this form": sentence(why) + " A form chosen by held-out rows makes their score a little optimistic.",
        "other forms fitted": tried + (f"; not fitted: {listed([f'`{n}`' for n in refused])}" if refused else ""),
    }


def _training(data) -> dict:
    rows, shapes = data.rows, data.shapes()
    fixed = {n: _values(rows, n) for n in ("patch_size", "image_size", "head_dim", "pool")}
    shares = sorted({round(r["cooldown_examples"] / r["num_examples"], 2) for r in rows if r.get("cooldown_examples")})
    branches = Counter(Counter(str(r.get("trunk_id")) for r in rows).values())
    schedule = UNKNOWN
    if shares:
        ends = f"{100 * shares[0]:.0f} %" + (f" to {100 * shares[-1]:.0f} %" if shares[0] != shares[-1] else "")
        schedule = f"each row ends a cooldown over the last {ends} of its images; "
        counts = sorted(branches.items())
        schedule += listed([f"{n} trunk{'s' * (n > 1)} with {b} branch{'es' * (b > 1)}" for b, n in counts])
        schedule += "; warm-up and the shapes of trunk and cooldown: " + UNKNOWN
    return {
        "data": f"{_values(rows, 'data')}, preset {_values(rows, 'preset')}, {_values(rows, 'num_classes')} classes",
        "objective": _values(rows, "objective"),
        "architecture": "; ".join(f"{n.replace('_', ' ')} {v}" for n, v in fixed.items()),
        "optimiser": f"batch size {_values(rows, 'batch_size')}, weight decay {_values(rows, 'weight_decay')}; its name and"
        f" its other constants: {UNKNOWN}",
        "learning rate, fair to every shape?": rates(data),
        "schedule": schedule,
        "seeds": seeds(data, shapes).replace("**", ""),
        "order of the data": order(data, shapes),
        "device": _values(rows, "device"),
        "code": f"commit {_values(rows, 'commit')}{_dirty(rows)}; {_versions(rows)}",
    }


def _extraction(data, fit) -> dict:
    geometry = fit.geometry or {}
    counting = (
        "forward FLOPs of the encoder by matrix products, a multiply-add is 2; attention's n² products, patch embedding and"
        " pooling head included, the task head not; compute t = that × images; training FLOPs = 3 × (encoder + task head)"
        " × images"
    )
    if abs(geometry.get("flops_scale", 1.0) - 1) > 1e-9:
        counting += (
            f"; the rows' own FLOPs are {geometry['flops_scale']:.4g} × ours (geometric mean); ours scaled by that"
        )
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(data.statuses.items()))
    reasons = Counter(reason for _, reason in data.left_out)
    most = [f"{n} × {reason}" for reason, n in sorted(reasons.most_common(9))] + ["..."] * (len(reasons) > 9)
    left_out = "; ".join(most)
    zero = "none" if data.zero_line is None else repr(data.zero_line)
    return {
        "metric": f"`{data.metric}`; loss of knowing nothing: {zero}",
        "counting of FLOPs": counting,
        "counting of parameters": "the encoder's, embeddings included, the task head apart",
        "rows and clusters": f"{fit.num_rows} rows of {fit.num_clusters} trunks; branches of one trunk are never treated as"
        " independent",
        "rows read": f"{sum(data.statuses.values())} ({statuses})",
        "left out, and why": f"{len(data.left_out)}: {left_out}" if data.left_out else "none",
        "rows before the end of a schedule": "none: each row ends its cooldown"
        if all(r.get("cooldown_examples") for r in data.rows)
        else UNKNOWN,
    }


def _fitting(data, fits, headline) -> dict:
    fit, d = fits[headline], fits[headline].diagnostics
    model, draws = fit.model, d.get("draws", {})
    loss = {"huber_log": "Huber loss", "log_squares": "squares"}[model["loss"]] + " of ln(predicted / measured), summed"
    loss += f", δ = {model['huber_delta']!r}" if model["huber_delta"] else ""
    weights = (
        "rows of one trunk whitened by the estimated trunk and row s.d." if model["whitened"] else "all rows alike"
    )
    if data.measurement_sd is not None and model["whitened"]:
        weights += "; each row's own measurement noise weighs it besides"
    active = [f"`{n}` ({side})" for n, side in d["active_bounds"].items()]
    intervals = "none (bootstrap=0)"
    if draws:
        reached = [percent(draws[kind]["converged"]) for kind in ("random_effects", "pairs")]
        intervals = (
            f"{100 * fit.level:.0f} %, by trunk: parametric (trunk and row s.d., stretched by t/z ="
            f" {draws['t_over_z']:.3f}) and pairs (whole trunks by arm), {draws['num']} draws each, seed {draws['seed']};"
            f" converged {listed(reached)}; all draws in `law.json`"
        )
    own, extra = own_rmse(fit, headline), fit.extrapolation
    score = extrapolation_table(fits).get(headline, {})
    held = extra.get("note", "not tested")
    if own is not None:
        held = f"RMSE {percent(own)}, bias {percent(score['bias'], True)} on {score['n']} rows above t = {extra['cut']:.4g}"
    return {
        "loss": loss,
        "weights": weights,
        "optimiser": "projected Levenberg-Marquardt in all parameters, exact Jacobian;"
        f" {'converged' if d['converged'] else 'NOT converged'} after {d['iterations']} steps, objective {fit.objective!r}",
        "starts": f"the {d['num_starts']} best of a fixed grid of exponents (amplitudes by non-negative least squares"
        + (f", polished first on whole trunks of about {START_ROWS:,} rows);" if len(data.y) > START_ROWS else ");")
        + f" {percent(d['starts_agreeing'])} of them reach the same objective to 1e-6",
        "bounds": _bounds(fit),
        "active bounds": listed(active) if active else "none",
        "noise": f"{percent(fit.noise['sd'])}, from {fit.noise['source']}, {fit.noise['n']} degrees of freedom between"
        " trunks",
        "intervals": intervals,
        "held-out extrapolation": held,
        "sensitivity": "under What it depends on, and in `sensitivity.json`",
        "code": f"sovit {__version__}",
    }


def _values(rows, name: str) -> str:
    """The values that the rows hold of a column, or that they do not say it."""
    found = {row.get(name) for row in rows} - {None}
    if not found:
        return UNKNOWN
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found):
        values = [number(v) if float(v).is_integer() else f"{v:g}" for v in sorted(found)]
    else:
        values = sorted(map(str, found))
    text = listed(values) if len(values) <= 6 else f"{len(values)} values from {values[0]} to {values[-1]}"
    missing = sum(row.get(name) is None for row in rows)
    return text + (f" ({missing} rows do not say)" if missing else "")


def _dirty(rows) -> str:
    dirty = sum(bool(row.get("commit_dirty")) for row in rows)
    return f" ({dirty} rows with uncommitted changes)" if dirty else ""


def _versions(rows) -> str:
    found: dict[str, set] = {}
    for row in rows:
        for name, version in (row["versions"] if isinstance(row.get("versions"), dict) else {}).items():
            found.setdefault(str(name), set()).add(str(version))
    return ", ".join(f"{n} {listed(sorted(v))}" for n, v in found.items()) or f"versions {UNKNOWN}"


def _bounds(fit) -> str:
    low, high = fit.shape_form.bounds
    names: dict[tuple, list] = {}
    for name, lo, hi in zip(fit.shape_form.names, low, high):
        names.setdefault((float(lo), float(hi)), []).append(f"`{name}`")
    return "; ".join(
        f"{listed(n)} {f'at least {lo:g}' if np.isinf(hi) else f'{lo:g} to {hi:g}'}" for (lo, hi), n in names.items()
    )
