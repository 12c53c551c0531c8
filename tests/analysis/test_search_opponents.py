"""The opponents' analysis: what is committed is what its command gives, and counts what it spends."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.next_run import simulated_contest as contest
from sovit.law import simulate as planted

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("search_opponents", ROOT / "analysis" / "next_run" / "opponents.py")
analysis = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = analysis  # so that workers find it
spec.loader.exec_module(analysis)
LINES = [json.loads(line) for line in (ROOT / "results" / "search_opponents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("truth", "search", "seed"), [("joint", "tpe-24", 3), ("eq3", "random-at-target", 0)])
def test_a_committed_episode_is_given_again(truth, search, seed):
    for line in analysis.episode((truth, search, seed)):
        (kept,) = [k for k in LINES if (k["truth"], k["strategy"], k["seed"]) == (truth, line["strategy"], seed)]
        assert len(kept["curve"]) == len(line["curve"])
        for ours, theirs in zip(line["curve"], kept["curve"]):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_totals_are_never_exceeded_and_regrets_are_none_below_zero():
    assert {line["truth"] for line in LINES} == set(contest.TRUTHS)
    for line in LINES:
        for point in line["curve"]:
            assert point["compute"] <= point["level"] * (1 + 1e-9)
            assert min(point["regret_10x"], point["regret_100x"]) >= -1e-9
            at_target = "at-target" in line["strategy"]
            assert point["run_flops"] <= (contest.TARGETS["10x"] if at_target else contest.LARGEST) * (1 + 1e-5)


def test_scaling_keeps_proportions_and_hits_the_flops():
    truth, shape = planted.truth("joint"), np.array([608.0, 10, 928])
    grown = analysis.scaled(truth, shape, 7.5)
    assert truth.flops(grown) == pytest.approx(7.5 * truth.flops(shape))
    assert grown / shape == pytest.approx(np.full(3, grown[0] / 608))


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analysis, "NUM_TRIALS", {"random": (8,)})
    monkeypatch.setattr(analysis, "TOTALS", (0.03, 3.0))
    path = tmp_path / "o.jsonl"
    assert analysis.main(["--seeds", "1", "--gp-seeds", "0", "--out", str(path)]) == 0
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:6]) + '{"truth": "jo')  # a kill in the middle of a line
    assert analysis.main(["--seeds", "1", "--gp-seeds", "0", "--out", str(path)]) == 0
    assert path.read_text() == whole
    assert "joint" in capsys.readouterr().out
    assert analysis.main(["--seeds", "0"]) == 2
