"""Strategies against each other: the same pilot and noise for all, a summary by hand, and a sweep that goes on."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from analysis.next_run import simulated_contest as contest
from analysis.next_run import summary
from analysis.next_run.simulated_contest import World
from sovit.law.checks import simulate as planted
from sovit.predict.candidates import Candidate

ROOT = Path(__file__).resolve().parents[2]


def test_the_star_costs_what_it_costs_and_the_pilot_a_hundredth():
    star = planted.sovit_star()
    trunk = 3 * star.geometry.flops(star.columns, head=True)[::3]
    assert pytest.approx((256e6 + 0.2 * (64e6 + 128e6)) * trunk.sum()) == contest.STAR_COST
    assert pytest.approx(star.columns["train_flops"].max()) == contest.LARGEST
    assert 0.005 < World("joint", 0).spent / contest.STAR_COST < 0.0095


def test_a_run_measures_the_same_loss_whoever_makes_it():
    worlds = [World("joint", 3), World("joint", 3), World("joint", 4)]
    run = Candidate(contest.BASE.replace(depth=16), (64_000_000, 128_000_000), "trunk", 1e18)
    one, other, third = (w.measure(run) for w in worlds)
    assert one == other != third
    table = worlds[0].columns
    exact = worlds[0].truth.loss(np.stack([table[d] for d in planted.DIMS], 1), table["num_examples"])
    assert 0.001 < np.log(worlds[0].y / exact).std() < 0.01
    assert worlds[0].regret(worlds[0].truth.optimum(contest.TARGETS["10x"] / 3), "10x") == pytest.approx(0, abs=1e-9)


def test_episodes_spend_up_to_each_checkpoint_and_no_further(monkeypatch):
    monkeypatch.setattr(contest, "CHECKPOINTS", (0.0095, 0.012))
    for strategy in ("next_run", "cost_random", "star"):
        done = contest.episode("joint", strategy, 0)
        assert json.loads(json.dumps(done)) == done
        assert all(p["compute"] <= p["level"] for p in done["curve"]) and len(done["curve"]) == 2
        assert all(p[f"{k}regret_{m}"] >= -1e-9 for p in done["curve"] for k in ("", "joint_") for m in ("10x", "100x"))
    assert done["curve"][1]["num_trunks"] == 7  # no trunk of the star is that cheap


def test_compute_to_a_regret():
    levels = np.array([1.0, 2.0, 4.0, 8.0])
    assert summary.compute_to(levels, np.array([4.0, 2.0, 1.0, 0.5]), 1.0) == pytest.approx(4)
    assert summary.compute_to(levels, np.array([4.0, 0.5, 2.0, 0.5]), 1.0) == pytest.approx(4 * 2**0.5)  # to stay there
    assert summary.compute_to(levels, np.array([4.0, 2.0, 1.0, 0.5]), 0.1) == np.inf
    assert summary.compute_to(levels, np.array([0.1, 0.1, 0.1, 0.1]), 1.0) == 1.0


def lines():
    """Ours has at half the compute what the other has: a ratio of one half."""
    out = []
    for seed in range(4):
        for strategy, factor in (("next_run", 2.0), ("cost_random", 1.0)):
            curve = [dict(level=c, compute=c, regret_10x=0.001 / (factor * c)) for c in contest.CHECKPOINTS[:9]]
            out.append(dict(truth="joint", strategy=strategy, seed=seed, curve=curve))
    return out


def test_summary_finds_a_planted_ratio():
    found = summary.summary(lines())["truths"]["joint"]
    assert [one["ratio"] for one in found["same_regret"]] == pytest.approx([0.5, 0.5, 0.5])
    assert [one["low"] for one in found["same_regret"]] == pytest.approx([0.5, 0.5, 0.5])
    assert all(one["ratio"] == pytest.approx(0.5) and one["share_better"] == 1 for one in found["same_compute"])
    assert "next_run takes 0.50 [0.50, 0.50]" in summary.table(summary.summary(lines()))


def sweep():
    spec = importlib.util.spec_from_file_location("active_sweep", ROOT / "analysis" / "next_run" / "active_sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_sweep_repeats_nothing_and_reads_other_strategies(tmp_path, monkeypatch, capsys):
    module, out, asked = sweep(), tmp_path / "s.jsonl", []
    saved: list = []
    known = {(e["truth"], e["strategy"], e["seed"]): e for e in lines()}

    def episode(truth, strategy, seed):
        asked.append((truth, strategy, seed))
        return known[truth, strategy, seed]

    monkeypatch.setattr(module, "episodes", lambda quick: list(known))
    monkeypatch.setattr(module.contest, "episode", episode)
    first = list(known.values())[:3]
    out.write_text("".join(json.dumps(e) + "\n" for e in first) + '{"truth": "joint", "str')
    other = tmp_path / "tpe.jsonl"
    other.write_text("".join(json.dumps({**e, "strategy": "tpe"}) + "\n" for e in first))
    monkeypatch.setattr("sovit.report.figures.save", lambda figure, path: saved.append(path))  # drawn, not written
    assert module.main(["--out", str(out)]) == 0
    assert module.main(["--out", str(out), "--also", str(other)]) == 0
    assert asked == list(known)[3:] and saved == [tmp_path / "s" / "regret"] * 2
    assert len(out.read_text().splitlines()) == len(known)
    assert "tpe" in json.loads((tmp_path / "s.json").read_text())["truths"]["joint"]["strategies"]
    capsys.readouterr()
    assert module.main(["--out", str(out), "--also", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_curve_that_rises_again_first_has_what_it_does_not_keep():
    levels, regret = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.4, 0.1, 0.2, 0.05])
    assert summary.compute_to(levels, regret, 0.1, first=True) == pytest.approx(2)
    assert summary.compute_to(levels, regret, 0.1) == pytest.approx(np.sqrt(32))
    assert summary.compute_to(levels, regret, 0.5, first=True) == summary.compute_to(levels, regret, 0.5) == 1
    assert summary.compute_to(levels, regret, 0.01, first=True) == summary.compute_to(levels, regret, 0.01) == np.inf
