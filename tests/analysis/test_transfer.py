"""Arms of a fine-tuning study and their verdicts, against planted truths; the committed study, computed again."""

import json
import math
from pathlib import Path

import numpy as np
import planted_transfer as planted
import pytest
from scipy import stats

from analysis.resolution import figures as resolution_figures
from analysis.resolution import tables
from analysis.resolution.comparisons import cells, compare, comparisons, pool, seed_noise
from analysis.resolution.curves import Arm, Curve, read_study
from analysis.resolution.tables import summarise
from sovit import UserError
from sovit.predict.validation import paired

ROOT = Path(__file__).resolve().parents[2]
SHAPE = planted.SHAPES[0]
EXACT = {
    "full": dict(k=1.5, g=0.85, m=1.0, h=0.0, J=0.0, j=0.0),
    "attention": dict(k=4.0, g=0.7, m=0.6, h=0.0, J=0.0, j=0.0),
}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return planted.write_ledger(tmp_path_factory.mktemp("transfer") / "planted.jsonl", planted.study_rows())


@pytest.fixture(scope="module")
def study(ledger):
    return read_study([ledger])


def curve(examples, losses, flops_per_image=1.0, base_flops=0.0, seed=0, mode="full"):
    examples = np.array(examples, float)
    arm = Arm(SHAPE.replace(image_size=48), mode, 100, SHAPE)
    metrics = {"val_loss": np.array(losses, float)}
    return Curve(arm, (seed, seed), f"t{seed}", base_flops, examples, examples * flops_per_image, examples * 0, metrics)


# arms and comparisons ------------------------------------------------------------------------------------------------------


def test_curves_are_the_ledgers_rows(study, ledger):
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert sum(len(c.examples) for c in study.curves) == len(rows)
    by_id = {(row["trunk_id"], row["num_examples"]): row for row in rows}
    for c in study.curves:
        for i, n in enumerate(c.examples):
            row = by_id[c.trunk_id, n]
            assert c.metrics["val_loss"][i] == row["val_loss"] and c.own_flops[i] == row["train_flops"]
            assert c.total_flops[i] == row["train_flops"] + row.get("base_train_flops", 0)


def test_between_branches_a_power_law_is_exact_and_beyond_them_nothing_is_said():
    c = curve([100, 1000, 10_000], [3 * n**-0.25 for n in (100, 1000, 10_000)], flops_per_image=7)
    for n in (100, 317, 4444, 10_000):
        assert c.at("examples", n, "val_loss") == pytest.approx(3 * n**-0.25, rel=1e-12)
        assert c.at("own_flops", 7 * n, "val_loss") == pytest.approx(3 * n**-0.25, rel=1e-12)
    for n in (99, 10_100):
        with pytest.raises(UserError, match="no branch is extrapolated"):
            c.at("examples", n, "val_loss")


def test_arms_are_compared_at_equal_flops_and_not_beyond_either():
    """Ours costs half a step; at equal FLOPs it sees twice the images, so that d is that of the laws at n and 2 n."""
    n = [100, 1000, 10_000]
    ours = {(s, s): curve(n, [2 * x**-0.3 for x in n], 1.0, seed=s) for s in range(3)}
    theirs = {(s, s): curve(n, [2 * x**-0.3 * 1.1 for x in n], 2.0, seed=s) for s in range(3)}
    points = compare(ours, theirs, "own_flops")
    assert points[0]["x"] == 200 and points[-1]["x"] == 10_000 and [p["x"] for p in points[1:-1]] == [1000]
    for p in points:
        assert p["mean"] == pytest.approx(-0.3 * math.log(2) - math.log(1.1), abs=1e-12)
    (same, *_) = compare(ours, theirs, "examples")
    assert same["mean"] == pytest.approx(-math.log(1.1), abs=1e-12)
    far = {(s, s): curve([20_000, 30_000], [1, 0.9], seed=s) for s in range(3)}
    assert compare(ours, far, "examples") == []


@pytest.mark.parametrize(
    ("d", "verdict"),
    [((-0.1, -0.11, -0.09), "better"), ((0.1, 0.11, 0.09), "worse"), ((-0.1, 0.11, 0.0), "not distinguishable")],
)
def test_the_rule_is_the_paired_t_interval(d, verdict):
    found = paired(d)
    reference = stats.ttest_1samp(d, 0).confidence_interval(0.90)
    assert found["verdict"] == verdict
    assert found["low"] == pytest.approx(reference.low) and found["high"] == pytest.approx(reference.high)


def test_two_seeds_decide_nothing():
    assert paired([-0.1, -0.11])["verdict"] == "not distinguishable" and paired([-0.1, -0.11])["low"] is None


def test_planted_differences_get_their_verdicts(study):
    """By the planted truth attention lies between full and head everywhere, and full is worth its pre-training at 64 px."""
    found = {(e["ours"], e["theirs"], e["axis"]): e for e in pool(comparisons(study))}
    assert found["attention", "full", "examples"]["verdict"] == "worse"
    assert found["attention", "head", "own_flops"]["verdict"] == "better"
    by_size = {(e["ours"], e["theirs"], e["image_size"]): e for e in pool(comparisons(study), by=("image_size",))}
    assert by_size["full", "scratch", 64]["verdict"] == "better"
    assert by_size["head", "scratch", 48]["verdict"] == "worse"
    # the size of the difference, by the truth at that budget
    for entry in comparisons(study):
        if (entry["ours"], entry["theirs"], entry["axis"]) != ("attention", "full", "examples"):
            continue
        shape = next(s for s in planted.SHAPES if s.label == entry["shape"]).replace(image_size=entry["image_size"])
        for p in entry["points"]:
            a, b = (
                planted.tuned_loss(shape, entry["base_examples"], p["x"], planted.TRUTH[m])
                for m in ("attention", "full")
            )
            assert p["mean"] == pytest.approx(math.log(a / b), abs=0.012)


def test_staying_at_the_base_resolution_is_an_arm_too(study):
    """By the planted truth a higher resolution has the lower loss for an image, and the higher cost."""
    found = [e for e in comparisons(study) if e["theirs"] == "stay"]
    assert {e["ours"] for e in found} == {"attention", "full", "scratch"} and {e["image_size"] for e in found} == {
        48,
        64,
    }
    for entry in found:
        if entry["ours"] != "scratch":
            continue
        shape = next(s for s in planted.SHAPES if s.label == entry["shape"])
        big = shape.replace(image_size=entry["image_size"])
        p = entry["points"][-1]
        ours, theirs = (s.train_flops_per_image(planted.NUM_CLASSES) for s in (big, shape))
        expected = planted.scratch_loss(big, p["x"] / ours) / planted.scratch_loss(shape, p["x"] / theirs)
        assert p["mean"] == pytest.approx(math.log(expected), abs=0.015)


def test_equal_arms_are_rarely_told_apart(tmp_path):
    """With one truth for both modes the rule errs in about one comparison of ten, not in most."""
    truth = {"full": EXACT["full"], "attention": EXACT["full"]}
    study = read_study([planted.write_ledger(tmp_path / "a.jsonl", planted.study_rows(truth=truth, seed=5))])
    points = [e["points"][-1] for e in comparisons(study) if e["theirs"] == "full" and e["axis"] == "examples"]
    assert len(points) == 12 and sum(p["verdict"] != "not distinguishable" for p in points) <= 4


def test_a_pooled_verdict_counts_seeds_and_not_cells(study):
    every = [e for e in comparisons(study) if (e["ours"], e["theirs"], e["axis"]) == ("attention", "mlp", "examples")]
    (entry,) = pool(every)
    assert entry["n"] == 3 and entry["num_cells"] == len(every) == 12
    by_hand = np.mean([e["points"][-1]["d"] for e in every], 0)
    assert entry["mean"] == pytest.approx(by_hand.mean()) and entry["sd"] == pytest.approx(by_hand.std(ddof=1))


def test_noise_is_that_between_seeds(study):
    noise = seed_noise(study)
    assert noise["sd"] == pytest.approx(0.004 * math.sqrt(1.25), rel=0.15) and noise["n"] == 2 * len(study.arms())


# bad input -----------------------------------------------------------------------------------------------------------------


def broken(tmp_path, change):
    rows = planted.study_rows(planted.SHAPES[:1], (48,), 1, truth=dict(full=EXACT["full"]))
    change(rows)
    return planted.write_ledger(tmp_path / "bad.jsonl", rows)


def tuned(rows):
    return next(row for row in rows if row.get("base"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: tuned(rows).pop("base_train_flops"), "lacks base_train_flops"),
        (lambda rows: tuned(rows).update(val_loss=-1.0), "val_loss=-1.0"),
        (lambda rows: tuned(rows).update(val_error="low"), "val_error='low'"),
        (lambda rows: tuned(rows).update(stored_bytes="4 kB"), "stored_bytes='4 kB'"),
        (lambda rows: tuned(rows).update(base_image_size="32"), "base_image_size='32'"),
        (lambda rows: rows[0].update(image_size="48"), "image_size='48'"),
        (lambda rows: tuned(rows).update(preset="other"), "mix preset"),
        (lambda rows: rows.append(tuned(rows) | dict(trunk_id="again", run_id="again-1600")), "the same arm"),
        (lambda rows: [row.update(status="diverged") for row in rows], "none of the"),
    ],
)
def test_a_bad_ledger_is_refused_in_one_line(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as error:
        read_study([broken(tmp_path, change)])
    assert "\n" not in str(error.value)


def test_what_is_not_ok_or_excluded_is_left_out_with_its_reason(tmp_path):
    path = broken(tmp_path, lambda rows: tuned(rows).update(status="diverged"))
    other = next(json.loads(line)["run_id"] for line in path.read_text().splitlines() if '"base": ' not in line)
    (tmp_path / "exclusions.csv").write_text(f"run_id,reason\n{other},a test\n")
    assert sorted(reason for _, reason in read_study([path]).left_out) == ["excluded: a test", "status diverged"]


def test_a_ledger_without_fine_tuning_is_refused(tmp_path):
    rows = [row for row in planted.study_rows(planted.SHAPES[:1], (48,), 1) if not row.get("base")]
    with pytest.raises(UserError, match="no fine-tuned row"):
        summarise([planted.write_ledger(tmp_path / "a.jsonl", rows)])


# the analysis --------------------------------------------------------------------------------------------------------------


def test_the_analysis_writes_what_it_says(tmp_path, capsys):
    rows = planted.study_rows(planted.SHAPES[:1], (48,), 3, truth={**EXACT, "head": planted.TRUTH["head"]})
    path = planted.write_ledger(tmp_path / "resolution_finetune.jsonl", rows)
    main = tables.main
    assert main([str(path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "resolution_finetune.json").read_text())
    assert (tmp_path / "resolution_finetune" / "report.md").read_text() == said
    assert "| attention | full | equal fine-tuning FLOPs |" in said
    assert found["num_rows"] == len(rows)
    assert (tmp_path / "resolution_finetune" / "loss_by_total_flops.png").stat().st_size > 10_000
    assert main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("sovit: no ledger at")


def test_figures_show_the_ledgers_own_means(study):
    rows = [
        c
        for c in study.curves
        if c.arm.mode == "attention" and c.arm.shape.image_size == 48 and c.arm.base_examples == 48_000
    ]
    figure = resolution_figures.by_total_flops({"cells": cells(study)})
    (axis,) = [a for a in figure.axes if a.get_title(loc="left") == "32x2x128 at 48 px, patch 4"]
    drawn = np.concatenate([line.get_ydata() for line in axis.lines if len(line.get_ydata()) == 3])
    mine = [c.metrics["val_loss"] for c in rows if c.arm.shape.label == "32x2x128"]
    assert all(np.isclose(drawn, y).any() for y in np.mean(mine, 0))


def same(ours, theirs, where=""):
    """All of ours stands in theirs, numbers to 1e-9."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            same(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs)):
            same(one, other, f"{where}/{i}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("name", ["resolution_finetune", "resolution_icons"])
def test_the_committed_numbers_are_what_the_ledger_gives(name):
    same(summarise([ROOT / "results" / f"{name}.jsonl"]), json.loads((ROOT / "results" / f"{name}.json").read_text()))
