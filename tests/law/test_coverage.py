"""Intervals that hold the truth as often as they say: simulation against its nominal."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.coverage import study
from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.checks import coverage

ROOT = Path(__file__).resolve().parents[2]


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
    assert study.run_condition(dataclasses.replace(condition, sets=2), draws=19) | dict(seconds=0) == (
        study.run_condition(dataclasses.replace(condition, sets=2), draws=19) | dict(seconds=0)
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
    assert [line | dict(seconds=0) for line in again] == [line | dict(seconds=0) for line in first]
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


def test_the_script_draws_and_tells_bad_input(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "analysis" / "coverage" / "tables.py", "--out", tmp_path / "c.jsonl", "--workers", "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (tmp_path / "c.jsonl").write_text("{}\n")
    done = subprocess.run(
        [sys.executable, ROOT / "analysis" / "coverage" / "tables.py", "--out", tmp_path / "c.jsonl"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "line 1" in done.stderr and "Traceback" not in done.stderr


def test_table_and_figure_hold_every_condition(tmp_path):
    from analysis.coverage import figures as coverage_figures

    lines = study.study(tmp_path / "c.jsonl", (study.Condition(sets=2), study.Condition(truth="eq3", sets=2)), 9)
    text = coverage.table(lines)
    assert "*the form is wrong:*" in text and text.count("\n") == 4
    names = [t.get_text() for t in coverage_figures.coverage(lines).axes[0].get_yticklabels()]
    assert len(names) == 2 and names[1].startswith("eq3, fitted joint")
