"""A fit says first what is wrong with its rows: one far from the law, losses that rise, nothing that can be known."""

import numpy as np
import planted_ledger as planted
import pytest

from sovit import UserError
from sovit.law.fit import fit_measurements
from sovit.ledger.measurements import measurements_of
from sovit.predict.recommend import best_shape
from sovit.report.build import fit_ledgers


def fitted(rows, bootstrap=0):
    return fit_measurements("joint", measurements_of(rows), bootstrap=bootstrap)


def test_one_wrong_loss_at_a_repeated_seed_is_named_and_leaves_the_noise_alone():
    rows = planted.planted_rows()
    right = fitted(rows)
    wrong = next(row for row in rows if row.get("init_seed"))
    found = fitted([row | {"val_loss": 100 * row["val_loss"]} if row is wrong else row for row in rows])
    assert found.noise.outliers == [wrong["run_id"]] and right.noise.outliers is None
    assert (
        found.noise.sd < 1.5 * right.noise.sd and found.diagnostics.residual_rms < 1.5 * right.diagnostics.residual_rms
    )
    assert wrong["run_id"] in found.data.warnings[0] and right.data.warnings is None


def test_the_first_lines_say_so(tmp_path):
    rows = planted.planted_rows()
    rows[5] = rows[5] | {"val_loss": 100 * rows[5]["val_loss"]}
    path = planted.write_ledger(tmp_path / "a.jsonl", rows)
    summary = fit_ledgers([path], out=tmp_path / "law", bootstrap=0, figures=False, refits=False)
    assert rows[5]["run_id"] in summary["text"].splitlines()[1]
    assert rows[5]["run_id"] in "".join((tmp_path / "law" / "report.md").read_text().splitlines()[:10])


def test_losses_that_rise_with_training_are_said():
    rows = planted.planted_rows()
    upside_down = [row | {"val_loss": 9 - row["val_loss"]} for row in rows]
    assert "val_loss rises with training in" in fitted(upside_down).data.warnings[-1]


def test_where_nothing_is_identified_no_shape_is_recommended_and_the_best_run_is_named():
    rng = np.random.default_rng(1)
    rows = [row | {"val_loss": float(1 + np.exp(0.4 * rng.normal()))} for row in planted.planted_rows()]
    law = fitted(rows, bootstrap=100)
    assert {growth.status for growth in law.exponents.values()} == {"unidentified"}
    best = min(rows, key=lambda row: row["val_loss"])
    with pytest.raises(UserError, match=f"none is recommended; the best that was run is .*{best['run_id']}"):
        best_shape(law, 3e12)
