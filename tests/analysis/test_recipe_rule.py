"""The learning-rate rule: planted powers are found, the committed rule is what its ledger gives."""

import json
from pathlib import Path

import numpy as np
import planted_ledger as planted
import pytest

from analysis import recipe_rule
from sovit import UserError
from sovit.ledger.schema import new_row
from sovit.spec.design import to_runs
from sovit.spec.run import Recipe, learning_rate
from sovit.spec.shape import Shape

RESULTS = Path(__file__).resolve().parents[2] / "results"


def rate_rows(base=0.008, width_power=0.5, depth_power=0.25, rates=(0.002, 0.004, 0.008, 0.016, 0.032)):
    """Losses that are parabolas in ln(rate) about the planted rule."""
    shapes = [
        planted.CENTRE.replace(**change)
        for change in ({}, {"width": 16}, {"width": 64}, {"depth": 1}, {"depth": 6}, {"mlp_dim": 512})
    ]
    rows = []
    for rate in rates:
        for run in to_runs(shapes, (3.2e10, 1e11), 16, lambda s, rate=rate: Recipe(peak_lr=rate), study="rates"):
            own = base * (32 / run.shape.width) ** width_power * (2 / run.shape.depth) ** depth_power
            for n in run.budgets:
                loss = planted.planted_loss(run.shape, n) + 0.02 * np.log(rate / own) ** 2
                rows.append(new_row(run, n, status="ok", num_classes=16, val_loss=float(loss), val_error=0.5))
    return rows


def test_the_rule_recovers_planted_powers(tmp_path, capsys):
    path = planted.write_ledger(tmp_path / "rates.jsonl", rate_rows())
    assert recipe_rule.main([str(path), "--out", str(tmp_path / "out")]) == 0
    rule = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert rule["base"] == pytest.approx(0.008, rel=1e-6)
    assert rule["width_power"] == pytest.approx(0.5, abs=1e-6) and rule["depth_power"] == pytest.approx(0.25, abs=1e-6)
    assert rule["train_flops"] == 1e11 and rule["penalty"]["largest"] < 1e-6  # learning_rate keeps 4 digits
    wide = next(case for case in rule["cases"] if case["width"] == 64)
    assert wide["rule_rate"] == learning_rate(Shape(64, 2, 256), rule["base"], rule["width_power"], rule["depth_power"])
    assert "base 0.008" in capsys.readouterr().out


def test_a_best_rate_at_the_edge_is_flagged_and_left_out(tmp_path):
    rows = [row for row in rate_rows() if not (row["width"] == 16 and row["peak_lr"] > 0.009)]
    rule = recipe_rule.recipe_rule([planted.write_ledger(tmp_path / "rates.jsonl", rows)])
    assert [case["width"] for case in rule["cases"] if case["edge"]] == [16, 16]
    assert rule["n"] == 5 and rule["width_power"] == pytest.approx(0.5, abs=1e-6)
    assert (
        next(case for case in rule["cases"] if case["width"] == 16)["penalty"] is None
    )  # the rule's rate was not run there


def test_standard_errors_cover_the_truth():
    shapes = [dict(width=w, depth=d) for w in (16, 32, 64) for d in (1, 2, 6)]
    hits = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(0, 0.2, len(shapes))
        rates = [0.01 * (32 / s["width"]) ** 0.5 * (2 / s["depth"]) ** 0.2 * np.exp(e) for s, e in zip(shapes, noise)]
        rule = recipe_rule.fit_rule(shapes, rates)
        hits += abs(rule["width_power"] - 0.5) < 2.447 * rule["standard_errors"]["width_power"]  # t of 6 degrees, 95 %
    assert 180 <= hits <= 198


def test_bad_rate_ledgers_are_one_line_and_status_2(tmp_path, capsys):
    ledger = planted.write_ledger(tmp_path / "one.jsonl", rate_rows(rates=(0.008,)))
    assert recipe_rule.main([str(ledger), "--out", str(tmp_path)]) == 2
    assert recipe_rule.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "three learning rates" in err
    with pytest.raises(UserError, match="cannot be told apart"):
        recipe_rule.fit_rule(
            [dict(width=16, depth=1), dict(width=32, depth=2), dict(width=64, depth=4)], [0.01, 0.02, 0.03]
        )


def test_the_committed_rule_is_what_its_ledger_gives():
    found = recipe_rule.recipe_rule([RESULTS / "recipe_search.jsonl"])
    kept = json.loads((RESULTS / "recipe.json").read_text())
    for name in ("base", "width_power", "depth_power", "standard_errors", "penalty"):
        assert found[name] == pytest.approx(kept[name], rel=1e-9), name
