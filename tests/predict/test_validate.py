"""The decision rule, against hand-computed intervals and planted differences."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sovit import UserError
from sovit.law.fitted_law import read_law
from sovit.predict.recommend import best_shape
from sovit.predict.validation import RULE, runs_of, verdict, verdict_text, write_prediction
from sovit.spec.run import Recipe, learning_rate
from sovit.spec.shape import Shape

A = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
B = Shape(64, 1, 256, head_dim=8, patch_size=4, image_size=16, pool="none")


def prediction(seeds=(10, 11, 12)):
    arms = {"recommended": {"shape": A.to_dict(), "predicted": 1.0}, "usual": {"shape": B.to_dict(), "predicted": 1.1}}
    return {
        "train_flops": 1e10,
        "seeds": list(seeds),
        "rule": RULE,
        "arms": arms,
        "num_classes": 16,
        "trained_on": dict(data="icons", preset="mosaic", data_keys=["a"], recipe={"batch_size": 32}, base_lr=0.004),
        "predicted_difference": {"estimate": math.log(1 / 1.1), "low": None, "high": None},
    }


def rows_with(losses_a, losses_b):
    rows = []
    for shape, losses in ((A, losses_a), (B, losses_b)):
        for seed, loss in zip((10, 11, 12), losses):
            rows.append(shape.to_dict() | {"init_seed": seed, "status": "ok", "val_loss": loss})
    return rows


def test_difference_and_interval_equal_a_paired_t_interval():
    a, b = np.array([1.00, 1.02, 0.99]), np.array([1.05, 1.06, 1.05])
    result = verdict(prediction(), rows_with(a, b))
    reference = stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(0.90)
    assert result["difference"]["low"] == pytest.approx(reference.low, rel=1e-12)
    assert result["difference"]["high"] == pytest.approx(reference.high, rel=1e-12)
    assert result["difference"]["n"] == 3


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1.00, 1.01, 0.99), (1.10, 1.11, 1.09), "better"),
        ((1.10, 1.11, 1.09), (1.00, 1.01, 0.99), "worse"),
        ((1.00, 1.10, 0.95), (1.02, 1.00, 1.05), "not distinguishable"),
    ],
)
def test_verdict(a, b, expected):
    assert verdict(prediction(), rows_with(a, b))["verdict"] == expected


def test_a_missing_or_diverged_seed_gives_no_verdict():
    rows = rows_with((1.0, 1.0, 1.0), (1.1, 1.1, 1.1))
    with pytest.raises(UserError, match="seed 12"):
        verdict(prediction(), [r for r in rows if not (r["width"] == 64 and r["init_seed"] == 12)])
    rows[0]["status"] = "diverged"
    with pytest.raises(UserError, match="seed 10"):
        verdict(prediction(), rows)


def test_both_arms_get_equal_flops_and_paired_seeds():
    runs = runs_of(prediction())
    assert len(runs) == 6
    for run in runs:
        assert run.budgets[0] * run.shape.train_flops_per_image(16) == pytest.approx(1e10, rel=0.01)
        assert run.init_seed == run.data_seed
        assert (run.data, run.preset) == ("icons", "mosaic")
        assert run.recipe == Recipe(peak_lr=learning_rate(run.shape, 0.004), batch_size=32)
    assert sorted((r.shape.width, r.init_seed) for r in runs) == [(w, s) for w in (32, 64) for s in (10, 11, 12)]


def test_two_seeds_cannot_decide(tmp_path):
    with pytest.raises(UserError, match="at least 3"):
        write_prediction(tmp_path / "law.json", 1e12, [1, 2], tmp_path / "p.json")


def test_a_written_prediction_is_not_changed(tmp_path):
    path = tmp_path / "prediction.json"
    path.write_text(json.dumps(prediction() | {"law_sha256": "another"}))
    before = path.read_text()
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(UserError, match="holds a prediction from another law"):
        write_prediction(tmp_path / "law.json", 1e10, [10, 11, 12], path)
    assert path.read_text() == before


def test_equal_arms_are_trained_once_and_said_to_be_equal():
    same = prediction()
    same["arms"]["usual"]["shape"] = A.to_dict()
    assert len(runs_of(same)) == 3
    result = verdict(same, rows_with((1.0, 1.1, 1.2), ())[:3])
    assert result["verdict"] == "not distinguishable" and "nothing to compare" in verdict_text(result)


def test_a_prediction_that_missed_is_called_that():
    result = verdict(prediction(), rows_with((1.00, 1.01, 0.99), (1.02, 1.03, 1.01)))
    assert result["verdict"] == "better" and "the law missed" in verdict_text(result)
    near = prediction() | {"predicted_difference": {"estimate": -0.05, "low": -0.1, "high": 0.0}}
    result = verdict(near, rows_with((1.00, 1.01, 0.99), (1.02, 1.03, 1.01)))
    assert "which meets the measured interval" in verdict_text(result)


def test_a_prediction_is_of_the_recommended_and_the_usual_shape(tmp_path):
    law, path = Path(__file__).parents[2] / "results" / "stream_star_law" / "law.json", tmp_path / "p.json"
    made = write_prediction(law, 1e12, [1, 2, 3], path)
    best = best_shape(read_law(law), 1e12)
    assert [arm["shape"] for arm in made["arms"].values()] == [best.shape.to_dict(), best.proportional.shape.to_dict()]
    ours, usual = made["arms"].values()
    assert usual["predicted_low"] < usual["predicted"] < usual["predicted_high"]
    difference = math.log(ours["predicted"] / usual["predicted"])
    assert made["predicted_difference"]["estimate"] == pytest.approx(difference)
    assert write_prediction(law, 1e12, [1, 2, 3], path) == made
    with pytest.raises(UserError, match="holds a prediction from another law"):
        write_prediction(law, 1e12, [1, 2, 4], path)
