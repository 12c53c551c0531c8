"""Known noise of a few-shot error: what a support set does to all rows, and what is a row's own."""

import json

import numpy as np
import pytest

from sovit import UserError
from sovit.ledger.few_shot_columns import column, columns, noise_of, support_noise
from sovit.ledger.measurements import measurements
from sovit.report.build import fit_ledgers
from sovit.spec.shape import Shape

# support sets --------------------------------------------------------------------------------------------------------


def planted_errors(n, sd, shared, seed):
    """Errors [n, 3] of rows with their own level, times what a support set does to all, times what is a row's own."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.3, 0.8, n)[:, None]
    return level * np.exp(
        shared * rng.standard_normal(3) + np.broadcast_to(sd, n)[:, None] * rng.standard_normal((n, 3))
    )


def test_what_all_rows_share_is_told_from_what_is_a_rows_own():
    sd, summary = support_noise(planted_errors(400, 0.01, 0.03, 0))
    assert summary["sets"] == 3
    assert summary["sd"] == pytest.approx(0.01 / np.sqrt(3), rel=0.08)
    np.testing.assert_allclose(sd, summary["sd"], rtol=0.25)  # as good as equal: three numbers a row tell little
    shared = [support_noise(planted_errors(60, 0.01, 0.03, seed))[1]["shared_sd"] for seed in range(200)]
    assert np.sqrt(np.mean(np.square(shared))) == pytest.approx(0.03 / np.sqrt(3), rel=0.15)
    alone = [support_noise(planted_errors(60, 0.01, 0.0, seed))[1]["shared_sd"] for seed in range(50)]
    assert np.median(alone) < 0.002


def test_rows_that_differ_are_told_apart_as_far_as_three_numbers_can():
    true = np.where(np.arange(400) % 2, 0.03, 0.003)
    sd, summary = support_noise(planted_errors(400, true, 0.02, 1))
    assert 0.1 < summary["kept"] <= 0.5
    assert sd[true == 0.03].mean() > 1.3 * sd[true == 0.003].mean()
    assert summary["sd"] == pytest.approx(np.sqrt(np.mean(true**2) / 3), rel=0.15)
    raw = planted_errors(400, true, 0.02, 1).std(1, ddof=1) / np.sqrt(3)
    truth = true / np.sqrt(3)
    assert ((sd**2 - truth**2) ** 2).mean() < 0.5 * ((raw**2 - truth**2) ** 2).mean()


def test_rows_without_errors_by_set_have_their_sd_with_what_is_shared():
    errors = planted_errors(200, 0.01, 0.03, 2)
    rows = [columns("d", {10: list(e)}) for e in errors]
    metric = column(10, "d")
    by_set, summary = noise_of(rows, metric)
    assert summary["shared_sd"] > 0.005
    stripped = [{k: v for k, v in row.items() if "seeds" not in k} for row in rows]
    whole, without = noise_of(stripped, metric)
    assert without["shared_sd"] is None and whole.mean() > 1.5 * by_set.mean()
    assert noise_of([{metric: 0.5}, *rows], metric) is None and noise_of(rows, "val_loss") is None
    for bad in ([0.1], [0.1, "x", 0.2], 0.5, [0.1, 0.2]):
        with pytest.raises(UserError, match="val_error_10shot_seeds/d must hold a list of errors"):
            noise_of([*rows, rows[0] | {column(10, "d", "seeds"): bad}], metric)


# a ledger ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """A star of few-shot errors: a planted law in width, depth and MLP dim, seeds at two shapes, support noise of 1 %."""
    path = tmp_path_factory.mktemp("probed") / "probed.jsonl"
    centre = Shape(64, 4, 256, head_dim=16, patch_size=4, image_size=32, pool="avg")
    shapes = [centre] * 3 + [centre.replace(width=32)] * 3
    shapes += [centre.replace(**{d: v}) for d, some in _ARMS.items() for v in some]
    rng = np.random.default_rng(0)
    rows, true = [], []
    for i, shape in enumerate(shapes):
        for n in (2000, 8000, 32000):
            base = 2.2 * shape.width**-0.9 + 0.15 * shape.depth**-0.8 + 2.5 * shape.mlp_dim**-0.7 + 9 * n**-0.5 + 0.2
            true.append(base * np.exp(0.002 * rng.standard_normal()))
            rows.append(
                {"run_id": f"t{i}-{n}", "trunk_id": f"t{i}", "status": "ok", "num_examples": n, "num_classes": 10}
            )
            rows[-1] |= shape.to_dict() | {"data": "hub", "init_seed": i, "val_loss": 1.0, "probe_zero_line/d": 0.975}
    errors = np.array(true)[:, None] * np.exp(
        0.02 * rng.standard_normal(3) + 0.01 * rng.standard_normal((len(true), 3))
    )
    rows = [row | columns("d", {10: list(e)}) for row, e in zip(rows, errors)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


_ARMS = {"width": (16, 128), "depth": (1, 2, 8, 12), "mlp_dim": (64, 128, 512, 1024)}


def test_a_few_shot_metric_brings_its_noise(ledger):
    data = measurements([ledger], column(10, "d"))
    assert data.zero_line == 0.975
    assert data.support["sd"] == pytest.approx(0.01 / np.sqrt(3), rel=0.4)
    loss = measurements([ledger], "val_loss")
    assert loss.support is None and loss.zero_line == np.log(10)
    with pytest.raises(UserError, match="the rows have val_error_10shot/d, val_loss$"):  # what tells of spread is none
        measurements([ledger], "nothing")


def test_the_report_says_where_the_noise_comes_from(ledger, tmp_path):
    options = dict(bootstrap=100, figures=False, refits=False)
    summary = fit_ledgers([ledger], metric=column(10, "d"), out=tmp_path, **options)
    assert "bounded" in summary["forms"]  # the error of a guess is the zero line
    assert json.loads((tmp_path / "law.json").read_text())["noise"]["source"] == "seeds"
    text = (tmp_path / "report.md").read_text()
    assert "each row's mean over 3 support sets is known to 0." in text and "cancels between shapes" in text
    assert "between seeds of one shape" in text
