"""Names and noise of the few-shot columns of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sovit import UserError

SHOTS = (1, 5, 10, 25)
SUPPORT_SEEDS = (0, 1, 2)
SD_FLOOR = 1e-5  # added to the standard deviation of a feature, which may not move at all


def support_noise(errors: np.ndarray) -> tuple[np.ndarray, dict]:
    """Noise of each row's mean error that comes from the choice of its support sets: relative s.d. [n], and a summary.

    errors [n, sets]. All rows are probed with the same support sets, so an error is that of the row, times what the set
    does to every row, times what is left: rows by sets without repeats. What all rows share cancels where they are
    compared; what is left is the noise of a row. Its variance is read from `sets` numbers a row, which is next to
    nothing (chi-squared with sets - 1 degrees of freedom), so that weights made from it would be noise themselves: each
    row's is drawn towards the mean of all by linear Bayes, wholly where they scatter no more than chi-squared does.

    The summary: sets; sd, of one row's mean, over all rows (root mean square); shared_sd, of the level of all rows (s.d.
    of the mean); kept, the share of a row's own variance that was kept (0: all rows alike).
    """
    n, sets = errors.shape
    relative = errors / errors.mean(1, keepdims=True) - 1
    shared = relative.mean(0) if n > 2 else np.zeros(sets)
    factor = n / (n - 1) if n > 2 else 1.0
    variance = (
        ((relative - shared) ** 2).sum(1) / (sets - 1) * factor
    )  # [n]; unbiased in the mean, each where all are equal
    pooled = variance.mean()
    of_shared = max(shared.var(ddof=1) - pooled / n, 0.0)
    sd, kept = _shrunken(variance, sets - 1)
    summary = dict(sets=sets, sd=_rms(sd) / sets**0.5, shared_sd=float((of_shared / sets) ** 0.5), kept=kept)
    return sd / sets**0.5, summary


def _shrunken(variance: np.ndarray, dof: int) -> tuple[np.ndarray, float]:
    """S.d. [n] of linear Bayes from variances [n] of `dof` degrees of freedom each, and the weight of a row's own."""
    pooled, observed = variance.mean(), variance.var()
    true = max((variance**2).mean() / (1 + 2 / dof) - pooled**2, 0.0)  # variance of the true variances
    kept = float(true / observed) if true > 0 else 0.0
    return np.sqrt(pooled + kept * (variance - pooled)), kept


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


def column(shots: int, data: str, kind: str = "") -> str:
    """Name of a column; kind: "" the mean over the support sets, "sd", or "seeds"."""
    return f"val_error_{shots}shot{'_' + kind if kind else ''}/{data}"


def probe_of(metric: str) -> str:
    """The data that a metric is a few-shot error on; "" for another metric."""
    found = re.fullmatch(r"val_error_\d+shot/(.+)", metric)
    return found[1] if found else ""


def columns(data: str, errors: dict[int, list[float]]) -> dict:
    """The columns of a row, from what `few_shot_errors` gives."""
    out: dict = {}
    for shots, found in errors.items():
        out[column(shots, data)] = float(np.mean(found))
        out[column(shots, data, "sd")] = float(np.std(found, ddof=1))
        out[column(shots, data, "seeds")] = found
    return out


def columns_of(row: Mapping[str, Any], data: str) -> dict:
    """The columns of a row that a probe on `data` gave it."""
    return {
        k: v
        for k, v in row.items()
        if probe_of(re.sub(r"^(val_error_\d+shot)_(sd|seeds)/", r"\1/", k)) == data or k in about(data)
    }


def about(data: str) -> tuple[str, str]:
    """Names of the columns that say what was probed on: the key of the samples, and the error of a guess."""
    return f"probe_data_key/{data}", f"probe_zero_line/{data}"


def is_spread(name: str) -> bool:
    """Whether a column tells of the spread of a few-shot error, and is no metric."""
    return bool(re.match(r"val_error_\d+shot_(sd|seeds)/", name))


def noise_of(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, dict] | None:
    """`support_noise` of the rows of a few-shot metric: from the error with each set where all rows have it, else from
    the s.d. over the sets, what they share included (shared_sd None). None where rows say neither.

    Raises UserError for a column that does not hold what its name says.
    """
    data = probe_of(metric)
    if not data:
        return None
    of_sets, of_sd = metric.replace("shot/", "shot_seeds/", 1), metric.replace("shot/", "shot_sd/", 1)
    if all(row.get(of_sets) is not None for row in rows):
        try:
            errors = np.array([row[of_sets] for row in rows], float)
        except (TypeError, ValueError):
            errors = np.empty(0)
        if errors.ndim != 2 or errors.shape[1] < 2 or not (np.isfinite(errors).all() and (errors.mean(1) > 0).all()):
            raise UserError(f"{of_sets} must hold a list of errors, as many in each row; remove that column")
        return support_noise(errors)
    if all(row.get(of_sd) is not None for row in rows):
        try:
            sd = np.array([row[of_sd] / row[metric] for row in rows], float)
        except TypeError:
            raise UserError(f"{of_sd} must hold numbers; remove that column") from None
        sets = len(SUPPORT_SEEDS)
        sd, kept = _shrunken(sd**2, sets - 1)
        return sd / sets**0.5, dict(sets=sets, sd=_rms(sd) / sets**0.5, shared_sd=None, kept=kept)
    return None


def is_probed(row: Mapping[str, Any], data: str) -> bool:
    """Whether the row holds every column of a probe on `data`."""
    return all(row.get(column(shots, data, kind)) is not None for shots in SHOTS for kind in ("", "sd", "seeds"))
