"""SoViT's own metric: the few-shot error of a linear probe on frozen features (arXiv 2305.13035, section 4).

The mathematics are those of big_vision's `evaluators/fewshot_lsr.py`, with its constants: `shots` labelled examples of
each class are the support set; features are whitened one by one on it; a constant feature of 100 stands for the bias,
so that it is all but free of the penalty; ridge regression with lambda 2^10 on targets of -1 and 1; the answer to a test
image is the class of the largest output. Three support sets, drawn with seeds 0, 1, 2, are the same for every
encoder; fewer shots are the first of the more. `sovit.ledger.few_shot_columns` names the columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sovit.ledger.few_shot_columns import SD_FLOOR, SHOTS, is_probed
from sovit.spec.any_run import AnyRun

RIDGE, BIAS = 2.0**10, 100.0


def support_sets(labels: np.ndarray, num_classes: int, seed: int, most: int = SHOTS[-1]) -> np.ndarray:
    """Indices [C, most] into `labels` [n]: the first `most` of each class in the order of this seed; none may have fewer."""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(np.flatnonzero(labels == c))[:most] for c in range(num_classes)])


def ridge(features: np.ndarray, labels: np.ndarray, num_classes: int):
    """Fit the probe to features [N, D] and labels [N]; returns mean [D], scale [D] and weights [D + 1, C].

    In closed form, in the smaller of the spaces of X'X and XX'.
    """
    mean, scale = features.mean(0), features.std(0) + SD_FLOOR
    x = with_bias(features, mean, scale)  # [N, D + 1]
    targets = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)  # [N, C]
    n, dim = x.shape
    if n >= dim:
        return mean, scale, np.linalg.solve(x.T @ x + RIDGE * np.eye(dim), x.T @ targets)
    return mean, scale, x.T @ np.linalg.solve(x @ x.T + RIDGE * np.eye(n), targets)


def with_bias(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.pad((features - mean) / scale, ((0, 0), (0, 1)), constant_values=BIAS)


def answers(features: np.ndarray, probe) -> np.ndarray:
    """The class [n] that a fitted probe gives each row of features [n, D]."""
    mean, scale, weights = probe
    return (with_bias(features, mean, scale) @ weights).argmax(1)


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


def lacks_probe(run: AnyRun, row: dict) -> bool:
    """Whether the row of a branch of `run` is to be probed still."""
    return bool(run.probe) and row["status"] == "ok" and not is_probed(row, run.probe)
