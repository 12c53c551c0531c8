"""The few-shot metric: the closed form against independent solutions, the support sets, the columns."""

import numpy as np
import pytest

from sovit.encoder.few_shot import answers, few_shot_errors, ridge, support_sets
from sovit.ledger.few_shot_columns import SHOTS, SUPPORT_SEEDS, columns, columns_of, is_probed, is_spread, probe_of

CLASSES, DIM = 5, 24


def clusters(num: int, spread: float, seed: int = 0):
    """Features [n, DIM] around a mean for each class, one of them constant, and labels [n] in a mixed order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), num // CLASSES))
    means = np.random.default_rng(99).standard_normal((CLASSES, DIM))
    x = means[labels] * rng.uniform(0.1, 5, DIM) + spread * rng.standard_normal((len(labels), DIM)) + 3
    x[:, 7] = 1.25
    return x, labels


def whitened(x):
    """Population standard deviation + 1e-5, then the constant feature: written out, as big_vision has it."""
    centred = x - np.mean(x, axis=0)
    z = centred / (np.sqrt(np.mean(centred**2, axis=0)) + 1e-5)
    return np.column_stack([z, np.full(len(x), 100.0)])


@pytest.mark.parametrize("num", [5, 20, 25, 30, 200])  # dual, dual, primal at N = D + 1, primal
def test_weights_are_those_of_the_augmented_least_squares(num):
    x, labels = clusters(num, 1.0)
    z, targets = whitened(x), 2.0 * np.eye(CLASSES)[labels] - 1.0
    # min |z w - y|^2 + 1024 |w|^2, as one ordinary least-squares problem
    augmented = np.vstack([z, np.sqrt(1024.0) * np.eye(DIM + 1)])
    expected = np.linalg.lstsq(augmented, np.vstack([targets, np.zeros((DIM + 1, CLASSES))]), rcond=None)[0]
    probe = ridge(x, labels, CLASSES)
    np.testing.assert_allclose(probe[2], expected, rtol=1e-10, atol=1e-12)
    test, _ = clusters(500, 1.0, seed=1)
    centred = (test - x.mean(0)) / (x.std(0) + 1e-5)
    assert (answers(test, probe) == (np.column_stack([centred, np.full(500, 100.0)]) @ expected).argmax(1)).all()


@pytest.mark.parametrize("num", [20, 25, 200])
def test_primal_and_dual_agree(num):
    x, labels = clusters(num, 1.0)
    z, targets = whitened(x), 2.0 * np.eye(CLASSES)[labels] - 1.0
    primal = np.linalg.solve(z.T @ z + 1024 * np.eye(DIM + 1), z.T @ targets)
    dual = z.T @ np.linalg.solve(z @ z.T + 1024 * np.eye(num), targets)
    for solution in (primal, dual):
        np.testing.assert_allclose(ridge(x, labels, CLASSES)[2], solution, rtol=1e-9, atol=1e-12)


# support sets --------------------------------------------------------------------------------------------------------


def test_support_sets_are_drawn_as_big_vision_draws_them_and_nest():
    labels = np.random.default_rng(5).integers(0, CLASSES, 400)
    for seed in SUPPORT_SEEDS:
        rng = np.random.default_rng(seed)
        expected = [rng.permutation(np.where(labels == c)[0]) for c in range(CLASSES)]
        most = support_sets(labels, CLASSES, seed)
        assert most.shape == (CLASSES, 25)
        for shots in SHOTS:
            fewer = support_sets(labels, CLASSES, seed, shots)
            assert [list(row) for row in fewer] == [list(order[:shots]) for order in expected]
            assert (fewer == most[:, :shots]).all()
            assert (labels[fewer] == np.arange(CLASSES)[:, None]).all()
    assert (support_sets(labels, CLASSES, 0) != support_sets(labels, CLASSES, 1)).any()


# errors --------------------------------------------------------------------------------------------------------------


def errors_of(x, labels, test, test_labels):
    sets = [support_sets(labels, CLASSES, seed) for seed in SUPPORT_SEEDS]
    return few_shot_errors(x, labels, sets, test, test_labels)


def test_clusters_are_learned_and_more_shots_help():
    errors = errors_of(*clusters(500, 2.0), *clusters(1000, 2.0, seed=1))
    assert list(errors) == list(SHOTS) and all(len(e) == 3 for e in errors.values())
    means = [np.mean(errors[shots]) for shots in SHOTS]
    assert means == sorted(means, reverse=True) and means[-1] < 0.05 < means[0] < 0.8


def test_random_labels_are_answered_at_chance():
    rng = np.random.default_rng(0)
    (x, _), (test, _) = clusters(500, 2.0), clusters(4000, 2.0, seed=1)
    errors = errors_of(x, rng.permutation(np.arange(500) % CLASSES), test, rng.integers(0, CLASSES, 4000))
    for found in errors.values():
        assert abs(np.mean(found) - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 4000)


def test_one_support_set_is_one_fit():
    x, labels = clusters(500, 2.0)
    test, test_labels = clusters(300, 2.0, seed=1)
    rows = support_sets(labels, CLASSES, 2, 10).ravel()
    expected = (answers(test, ridge(x[rows], labels[rows], CLASSES)) != test_labels).mean()
    assert errors_of(x, labels, test, test_labels)[10][2] == expected


# columns -------------------------------------------------------------------------------------------------------------


def test_columns_of_a_row():
    found = {shots: [0.9 / shots, 0.8 / shots, 0.7 / shots] for shots in SHOTS}
    row = {"run_id": "a", "val_error": 0.3} | columns("icons:single40", found)
    assert row["val_error_10shot/icons:single40"] == pytest.approx(0.08)
    assert row["val_error_10shot_sd/icons:single40"] == pytest.approx(0.01)  # n - 1
    assert row["val_error_10shot_seeds/icons:single40"] == found[10]
    assert is_probed(row, "icons:single40") and not is_probed(row, "icons:single200")
    assert not is_probed(row | {"val_error_25shot_sd/icons:single40": None}, "icons:single40")
    row |= {"probe_data_key/icons:single40": "k", "probe_data_key/hub:x": "l", "val_error_5shot/hub:x": 0.1}
    assert columns_of(row, "icons:single40") == columns("icons:single40", found) | {
        "probe_data_key/icons:single40": "k"
    }
    assert columns_of(row, "hub:x") == {"probe_data_key/hub:x": "l", "val_error_5shot/hub:x": 0.1}


def test_a_path_may_look_like_a_column_of_spread():
    data = "hub:/data/5shot_sd/x"
    row = columns(data, {shots: [0.3, 0.2, 0.1] for shots in SHOTS})
    assert columns_of(row, data) == row and is_probed(row, data)
    assert [is_spread(name) for name in list(row)[:3]] == [False, True, True]


@pytest.mark.parametrize(
    ("metric", "data"),
    [
        ("val_error_10shot/icons:single40", "icons:single40"),
        ("val_error_5shot/hub:/data/birds?label=x", "hub:/data/birds?label=x"),
        ("val_error_10shot_sd/icons:single40", ""),
        ("val_loss", ""),
        ("val_error/attr", ""),
    ],
)
def test_the_data_of_a_metric(metric, data):
    assert probe_of(metric) == data
