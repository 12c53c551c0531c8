"""Intervals that hold the truth as often as they say: simulation against its nominal."""

import dataclasses

import numpy as np
import pytest

from analysis.coverage import tables as study
from sovit import UserError
from sovit.law.bootstrap import interval


def test_intervals_cover_in_thirty_sets():
    """Nominal 90; 30 sets of 3 dimensions: a share below 78 % has a chance under 1 in 100 were it truly 88 %."""
    condition = study.Condition(sets=30)
    line = study.run_condition(condition, draws=49)
    assert line["right"] and line["failed"] == 0 and line["num_trunks"] == 18
    for kind in ("random_effects", "pairs"):
        for quantity in ("exponent", "shape_10x"):
            found = line["coverage"][kind][quantity]
            print(kind, quantity, f"{found['mean']:.0%} +- {found['se']:.1%}")
            assert found["mean"] >= 0.78 and 0.01 < found["se"] < 0.07
    assert study.run_condition(dataclasses.replace(condition, sets=2), draws=19) == (
        study.run_condition(dataclasses.replace(condition, sets=2), draws=19)
    )


def test_a_wrong_form_is_seen_as_one():
    """Eq. 3 fitted with `joint`: its intervals hold the truth far too seldom, which is what the study must show."""
    line = study.run_condition(study.Condition(truth="eq3", sets=6), draws=29)
    assert not line["right"] and line["coverage"]["random_effects"]["exponent"]["mean"] < 0.6


def test_a_finished_condition_is_not_run_again(tmp_path, monkeypatch):
    conditions = (study.Condition(sets=2), study.Condition(truth="weak", sets=2))
    path = tmp_path / "c.jsonl"
    first = study.study(path, conditions, draws=9)
    kept = path.read_text()
    path.write_text(kept.splitlines()[0] + "\n" + kept.splitlines()[1][:40])  # killed while it wrote the second
    ran = []
    run = study.run_condition
    monkeypatch.setattr(study, "run_condition", lambda c, draws: ran.append(c.truth) or run(c, draws))
    again = study.study(path, conditions, draws=9)
    assert ran == ["weak"]
    assert again == first
    assert study.study(path, conditions, draws=9) == again and ran == ["weak"]
    path.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="line 1: not a line of this study"):
        study.study(path, conditions, draws=9)


def test_percentiles_do_not_narrow_with_few_draws():
    """Of B draws and one more of the same law, the interval holds the last with probability 90 %, for any B."""
    rng = np.random.default_rng(0)
    for num in (39, 99, 399):
        draws = rng.standard_normal((4000, num))
        hit = [
            low <= x <= high
            for (low, high), x in zip((interval(d, floor=None) for d in draws), rng.standard_normal(4000))
        ]
        assert np.mean(hit) == pytest.approx(0.90, abs=0.015), num


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text("{}\n")
    assert study.main(["--out", str(tmp_path / "c.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "line 1" in said and said.count("\n") == 1


def test_the_table_holds_every_condition(tmp_path):
    lines = study.study(tmp_path / "c.jsonl", (study.Condition(sets=2), study.Condition(truth="eq3", sets=2)), 9)
    text = study.table(lines)
    assert text.count("*(the form is wrong)*") == 1 and text.count("\n") == 3
