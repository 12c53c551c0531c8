"""SoViT's own metric: the few-shot error of a linear probe on frozen features (arXiv 2305.13035, section 4).

The mathematics are those of big_vision's `evaluators/fewshot_lsr.py`, with its constants: `shots` labelled examples of
each class are the support set; features are whitened one by one on it; a constant feature of 100 stands for the bias,
so that it is all but free of the penalty; ridge regression with lambda 2^10 on targets of -1 and 1; the answer to a test
image is the class of the largest output. Three support sets, drawn with seeds 0, 1, 2, are the same for every
encoder; fewer shots are the first of the more. A row of a ledger keeps, for every number of shots,

    val_error_10shot/icons:single40          mean over the support sets
    val_error_10shot_sd/icons:single40       standard deviation over them (n - 1)
    val_error_10shot_seeds/icons:single40    the list itself

and `probe_data_key/icons:single40` (which samples) and `probe_zero_line/icons:single40` (the error of a guess).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sovit import UserError
from sovit.kinds import AnyRun

SHOTS = (1, 5, 10, 25)
SUPPORT_SEEDS = (0, 1, 2)
RIDGE = 2.0**10
BIAS = 100.0
SD_FLOOR = 1e-5  # added to the standard deviation of a feature, which may not move at all


def support_sets(labels: np.ndarray, num_classes: int, seed: int, most: int = SHOTS[-1]) -> np.ndarray:
    """Indices [C, most] into `labels` [n]: the first `most` of each class in the order of this seed.

    Raises UserError where a class has fewer.
    """
    random = np.random.default_rng(seed)
    orders = [random.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]
    fewest = min(range(num_classes), key=lambda c: len(orders[c]))
    if len(orders[fewest]) < most:
        raise UserError(
            f"class {fewest} has {len(orders[fewest])} examples among {len(labels)}, fewer than {most} shots need;"
            " give data with more of it"
        )
    return np.stack([order[:most] for order in orders])


def ridge(features: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float = RIDGE):
    """Fit the probe to features [N, D] and labels [N]; returns mean [D], scale [D] and weights [D + 1, C].

    In closed form, by the eigenvectors of the smaller of X'X and XX'; in the precision of `features`.
    """
    mean, scale = features.mean(0), features.std(0) + features.dtype.type(SD_FLOOR)
    x = with_bias((features - mean) / scale)  # [N, D + 1]
    targets = np.where(labels[:, None] == np.arange(num_classes), 1, -1).astype(x.dtype)  # [N, C]
    if x.shape[0] >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ targets)
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ targets
    return mean, scale, (left / (values + x.dtype.type(penalty))) @ right


def with_bias(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.full((len(x), 1), BIAS, x.dtype)], 1)


def answers(features: np.ndarray, probe) -> np.ndarray:
    """The class [n] that a fitted probe gives each row of features [n, D]."""
    mean, scale, weights = probe
    return (with_bias((features - mean) / scale) @ weights).argmax(1)


def few_shot_errors(
    support: np.ndarray,
    support_labels: np.ndarray,
    sets: Sequence[np.ndarray],
    test: np.ndarray,
    test_labels: np.ndarray,
) -> dict[int, list[float]]:
    """Test error by number of shots and support set. support [M, D], test [V, D]; sets: indices [C, shots] into support.

    In double precision, so that machines agree. Single changed no answer of five encoders on icons (weights by 3e-5).
    """
    support, test = support.astype(np.float64), test.astype(np.float64)
    errors: dict[int, list[float]] = {}
    for shots in SHOTS:
        for chosen in sets:
            rows = chosen[:, :shots].ravel()
            probe = ridge(support[rows], support_labels[rows], len(chosen))
            errors.setdefault(shots, []).append(float((answers(test, probe) != test_labels).mean()))
    return errors


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


# columns of a row ----------------------------------------------------------------------------------------------------


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


def columns_of(row: dict, data: str) -> dict:
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


def noise_of(rows: Sequence[dict], metric: str) -> tuple[np.ndarray, dict] | None:
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


def is_probed(row: dict, data: str) -> bool:
    """Whether the row holds every column of a probe on `data`."""
    return all(row.get(column(shots, data, kind)) is not None for shots in SHOTS for kind in ("", "sd", "seeds"))


def lacks_probe(run: AnyRun, row: dict) -> bool:
    """Whether the row of a branch of `run` is to be probed still."""
    return bool(run.probe) and row["status"] == "ok" and not is_probed(row, run.probe)
