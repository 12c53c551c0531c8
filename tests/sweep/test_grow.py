"""A study that grows: it finds a planted optimum, and a kill at any moment changes no pick and repeats no measurement."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import fake_grow
import numpy as np
import pytest
from fake_grow import TRUTH, main

from sovit.law import fit as law
from sovit.law.checks import simulate as planted
from sovit.ledger.ledger import read_ledger
from sovit.ledger.measurements import measurements
from sovit.predict.belief import BeliefOptions, learn
from sovit.predict.next_run import whole_shape
from sovit.spec.design import to_runs
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import adaptive as grow

SMALL = ("--max-flops", "1.2e12", "--workers", "2")  # the pilot and a few rounds
TARGET = 1e13 / 3


def rounds_of(folder):
    return json.loads((folder / "results" / "active_stream_rounds.json").read_text())


def values_of(shape):
    return [shape["width"], shape["depth"], shape["mlp_dim"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    assert main(folder, *SMALL) == 0
    return folder


def test_a_planted_optimum_is_found_for_a_third_of_the_star(tmp_path, capsys):
    assert main(tmp_path, "--workers", "2") == 0
    found = rounds_of(tmp_path)
    end = found["end"]
    assert (
        TRUTH.regret(values_of(end["recommendation"]), TARGET)
        < 0.005
        < TRUTH.regret(values_of(found["rounds"][0]["recommendation"]), TARGET)
    )
    assert end["stop"].startswith("stop: expected regret") and end["expected_regret"] < end["noise_sd"]
    checks = [pick for one in found["rounds"] for pick in one["picks"] if pick["is_check"]]
    picks = [pick for one in found["rounds"] for pick in one["picks"]]
    assert checks == picks[4::5] or len(checks) == len(picks) // 5  # with two workers a check may stand one pick early
    rows = read_ledger(tmp_path / "results" / "active_stream.jsonl")
    module = fake_grow.study()
    runs = grow.asked(module.question(), found["rounds"])
    assert {row["run_id"] for row in rows} == {run_id for run in runs for run_id in run.run_ids}
    # a branch below one that was trained starts anew: at least what the merged runs cost
    assert module.question().spent(runs) <= end["spent_flops"] < 8e12
    assert sum(c["cost"] for c in (pick["candidate"] for pick in picks)) + 7.45e11 == pytest.approx(
        end["spent_flops"], rel=1e-3
    )
    said = capsys.readouterr().out
    assert said.count("round ") == len(found["rounds"]) + 1 and "next: sovit fit" in said


def test_predictions_are_written_before_their_runs(tmp_path):
    """At every training after the pilot's, the rounds file already holds the runs and what they should give."""
    seen = []

    def train(found, workers, device):
        path = found.ledger.with_name("active_stream_rounds.json")
        predicted = json.loads(path.read_text())["rounds"] if path.exists() else []
        seen.append(({run.trunk_id for run in found.pending()}, predicted))
        return fake_grow.here(found, workers, device)

    assert main(tmp_path, *SMALL, run=train) == 0
    assert len(seen) > 2 and seen[0][1] == []
    for pending, rounds in seen[1:]:
        last = [pick["candidate"] for pick in rounds[-1]["picks"]]
        question = fake_grow.study().question()
        assert pending == {grow._run_of(question, candidate).trunk_id for candidate in last}
        assert all(len(pick["predicted"]) == len(pick["candidate"]["budgets"]) for pick in rounds[-1]["picks"])


@pytest.mark.slow
def test_killed_anywhere_it_makes_the_same_picks_and_repeats_nothing(tmp_path, small):
    """The whole process group is killed at random moments, then launched again, till it ends by itself."""
    rng, kills = np.random.default_rng(0), 0
    command = [sys.executable, fake_grow.__file__, "grow", str(tmp_path), *SMALL]
    while True:
        process = subprocess.Popen(
            command, start_new_session=True, env=os.environ | {"SOVIT_TEST_PAUSE": "0.2"}, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert process.wait(rng.uniform(2, 4) if kills < 3 else 240) == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.05)
    assert kills >= 2  # a quick machine ends before the third
    assert rounds_of(tmp_path) == rounds_of(small)
    ours, theirs = ({r["run_id"]: r["val_loss"] for r in read_ledger(f / "results" / "active_stream.jsonl")}
                    for f in (tmp_path, small))  # fmt: skip
    assert ours == theirs
    # what was killed between its record and its line may be missing there, but nothing was trained twice
    assert set(Counter((tmp_path / "executions").read_text().split()).values()) == {1}


def test_rounds_are_worked_out_again_from_the_ledger(tmp_path, small):
    shutil.copytree(small / "results", tmp_path / "results")
    (tmp_path / "results" / "active_stream_rounds.json").unlink()

    def nobody(found, workers, device):
        raise AssertionError("nothing is to be trained")

    assert main(tmp_path, *SMALL, run=nobody) == 0
    assert rounds_of(tmp_path) == rounds_of(small)


def test_dry_run_says_what_comes_next_and_writes_nothing(tmp_path, small, capsys):
    shutil.copytree(small / "results", tmp_path / "results")
    before = {p: p.read_bytes() for p in (tmp_path / "results").iterdir()}
    assert main(tmp_path, "--dry-run", "--json", "--max-flops", "3e12", run=None) == 0
    said = json.loads(capsys.readouterr().out)
    (pick,) = said["picks"]
    assert (
        pick["candidate"]["cost"] > 0
        and pick["regret_after"] < pick["regret_before"]
        and "expected regret" in pick["why"]
    )
    assert main(tmp_path, "--dry-run", "--max-flops", "3e12", "--workers", "3") == 0
    assert capsys.readouterr().out.count("predicted") == 3
    assert {p: p.read_bytes() for p in (tmp_path / "results").iterdir()} == before
    assert not (tmp_path / "runs").exists()


def test_more_money_goes_on_from_where_it_stopped(tmp_path, small):
    for name in ("results", "runs"):
        shutil.copytree(small / name, tmp_path / name)
    assert main(tmp_path, "--max-flops", "1.4e12", "--workers", "2") == 0
    before, after = rounds_of(small)["rounds"], rounds_of(tmp_path)["rounds"]
    assert after[: len(before)] == before and len(after) > len(before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-flops", "1e10"), "does not pay for the pilot"),
        (("--target-flops", "-1"), "target_flops=-1.0 is not a positive number"),
        (("--workers", "0"), "--workers 0"),
    ],
)
def test_bad_options_are_one_line_and_status_2(tmp_path, capsys, options, words):
    assert main(tmp_path, *options) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_damaged_rounds_file_and_a_second_grower_are_refused(tmp_path, small, capsys):
    shutil.copytree(small / "results", tmp_path / "results")
    path = tmp_path / "results" / "active_stream_rounds.json"
    path.write_text(path.read_text()[:500])
    assert main(tmp_path, *SMALL) == 2
    assert "delete it" in capsys.readouterr().err
    with grow.locked(tmp_path / "runs" / "active_stream.grow"):
        assert main(tmp_path, *SMALL) == 2
    assert "another process" in capsys.readouterr().err


def test_noise_between_seeds_and_the_whole_shape(small):
    data = measurements([small / "results" / "active_stream.jsonl"])
    groups = {}
    for row, y in zip(data.rows, data.y):
        groups.setdefault((row["width"], row["depth"], row["mlp_dim"], row["num_examples"]), []).append(np.log(y))
    variances = [np.var(g, ddof=1) for g in groups.values() if len(g) == 3]
    assert len(variances) == 2
    assert grow.seed_sd(data.columns, data.y) == pytest.approx(np.sqrt(np.mean(variances)))
    belief = learn(data.columns, data.y, 1e13, BeliefOptions("bounded", zero_line=data.zero_line))
    base = fake_grow.study().CENTRE
    best = whole_shape(belief, base)
    flops = belief.geometry
    near = [
        base.replace(width=best.width + 8 * i, depth=max(1, best.depth + j), mlp_dim=best.mlp_dim + 8 * k)
        for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)
    ]  # fmt: skip
    images = [1e13 / s.train_flops_per_image(16) for s in near]
    losses = np.exp(belief.evaluate(belief.logs_of(near, np.array(images)))[0])
    assert losses.min() > (1 - 1e-3) * losses[13] and flops.num_classes == 16  # depth is coarse, width and MLP are not
    assert isinstance(Run.from_dict(fake_grow.study().runs()[0].to_dict()), Run)


def test_a_belief_in_a_power_mean_finds_the_optimum_of_the_star():
    """Without noise the whole star fixes all of theta: what prior and form discrepancy leave is small beside their s.d."""
    star = planted.stream_star()
    y = star.losses(TRUTH)
    geometry = dict(patch_size=4, image_size=16, pool="none", head_dim=8, num_classes=16)
    options = dict(geometry=geometry, zero_line=TRUTH.zero_line)
    columns = star.columns | dict(trunk_id=star.trunk)
    belief = learn(columns, y, 1e13, BeliefOptions("bounded", **options))
    off = np.log(list(belief.shape.values())) - np.log(TRUTH.optimum(TARGET))
    moved = np.linalg.solve(belief.hessian, belief.mixed)
    sd = np.sqrt(np.einsum("kp,pq,kq->k", moved, belief.covariance, moved))
    assert np.abs(off / sd).max() < 1 and TRUTH.regret(list(belief.shape.values()), TARGET) < 2e-3
    fitted = law.fit("bounded", columns, y, extrapolate=False, **options)
    assert dict(zip(belief.form.names, np.exp(belief.phi)))["s"] == pytest.approx(fitted.params["s"], rel=0.2)
    plain = learn(columns, y, 1e13, BeliefOptions("joint_n", **options))
    assert TRUTH.regret(list(plain.shape.values()), TARGET) > 5 * TRUTH.regret(list(belief.shape.values()), TARGET)


@pytest.mark.slow
def test_a_round_of_real_training(tmp_path):
    """The smallest shapes, in this process: the rows are those of the real trainer and the pick is made from them."""
    from sovit.train.trainer import train

    def really(found, workers, device):
        for run in found.pending():
            train(run, found.runs_dir, device, on_progress=lambda *_: None, should_stop=lambda: False)
        return found.collect()

    def recipe(shape):
        return Recipe(peak_lr=0.01, warmup_examples=32)

    def question(target_flops=1e10, max_flops=1.2e9):
        centre = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
        corners = ((8, 1, 16), (8, 2, 64), (24, 1, 64), (24, 2, 16))
        shapes = [centre, *(centre.replace(width=w, depth=d, mlp_dim=m) for w, d, m in corners)]
        pilot = to_runs(shapes, (1e8, 2e8), 16, recipe, min_steps=5)
        values = {"width": (8, 16, 24), "depth": (1, 2), "mlp_dim": (16, 32, 64)}
        limits = dict(target_flops=target_flops, max_flops=max_flops, min_steps=5)
        return grow.Question("tiny", pilot, values, (1e8, 2e8), recipe, 16, form="bounded", **limits)

    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert grow.main("", question, "tiny", places, really) == 0
    rounds = json.loads((tmp_path / "results" / "tiny_rounds.json").read_text())["rounds"]
    rows = read_ledger(tmp_path / "results" / "tiny.jsonl")
    assert len(rounds) >= 1 and len(rows) == 9 + sum(len(p["predicted"]) for one in rounds for p in one["picks"])
    assert all(row["status"] == "ok" and 2 < row["val_loss"] < 3 for row in rows)
