"""Encoders against the models around them: planted arms come out as planted."""

import json
import math
from pathlib import Path

import pytest

from analysis.vlm_encoders import figures as vlm_encoders_figures
from analysis.vlm_encoders import tables
from analysis.vlm_encoders.tables import TEXT_ONLY, report_text, summarise
from sovit import UserError

SETTING = dict(
    language_model="l", projector="p", stages="s", layout="rows", template="short", data="stream", preset="cpu"
)


def encoder(run_id, width, seed, loss):
    shape = dict(width=width, depth=2, mlp_dim=64, head_dim=8, patch_size=4, image_size=16, pool="none")
    row = dict(schema=1, run_id=run_id, trunk_id=run_id.split("-")[0], status="ok", num_examples=1, init_seed=seed)
    return row | shape | dict(objective="classification", val_loss=loss, val_error=loss / 3)


def answer(eye, control, seed, loss, **more):
    run_id = f"{control}{eye}{seed}".replace("-", "").replace(":", "") + "-9"
    row = dict(schema=1, run_id=run_id, trunk_id=run_id[:-2], status="ok", num_examples=9, init_seed=seed)
    row |= SETTING | dict(
        kind="vlm", objective="vlm", control=control, encoder=eye, families=["marks"], num_image_tokens=16
    )
    metrics = {
        "val_loss": loss + 0.1,
        "val_error": 0.5,
        "shuffled_loss": 3.0,
        "shuffled_error": 0.8,
        "val_unparsed": 0.0,
    }
    metrics |= {"val_loss/marks": loss, "val_error/marks": 0.4, "shuffled_loss/marks": 3.1, "val_loss/more": 0.7}
    return row | metrics | {"val_error/more": 0.5, "shuffled_loss/more": 0.7} | more


def ledger(tmp_path, good=(1.5, 1.51, 1.52), poor=(1.8, 1.79, 1.83), **more) -> Path:
    rows = []
    for seed in range(3):
        rows += [encoder(f"a{seed}-1", 32, seed, 1.2 + 0.01 * seed), encoder(f"b{seed}-1", 96, seed, 1.3)]
        rows += [answer(f"a{seed}-1", "none", seed, good[seed], **more), answer(f"b{seed}-1", "none", seed, poor[seed])]
        rows += [answer(f"random:a{seed}-1", "random", seed, 2.5), answer("blind:16", "blind", seed, 2.7)]
    path = tmp_path / "encoders.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_planted_order_is_found(tmp_path):
    found = summarise([ledger(tmp_path)])
    assert list(found["arms"]) == ["32x2x64", "96x2x64", "32x2x64 untrained", TEXT_ONLY] and found["seeds"] == [0, 1, 2]
    assert found["verdict"]["decisive"] == {
        "best_classifier": "32x2x64",
        "against": {"96x2x64": "better"},
        "answer": "yes",
    }
    pair = found["pairs"]["decisive"]["32x2x64 / 96x2x64"]
    assert pair["n"] == 3 and pair["low"] < pair["mean"] < pair["high"] < 0
    on_all = found["pairs"]["all"]["32x2x64 / 96x2x64"]  # each loss 0.1 above that on marks
    logs = [math.log((a + 0.1) / (b + 0.1)) for a, b in zip((1.5, 1.51, 1.52), (1.8, 1.79, 1.83))]
    assert on_all["mean"] == pytest.approx(sum(logs) / 3) and on_all["verdict"] == "better"
    assert found["arms"]["32x2x64"]["val_loss/marks"]["mean"] == pytest.approx(1.51)
    assert found["arms"]["96x2x64"]["encoder_loss"] == pytest.approx(1.3)
    assert found["families"] == {"marks": True, "more": False}


def test_a_better_classifier_that_is_the_worse_encoder_is_told_so(tmp_path):
    assert summarise([ledger(tmp_path, good=(2.0, 2.1, 2.05))])["verdict"]["decisive"]["answer"] == "no"
    noisy = summarise([ledger(tmp_path, good=(1.5, 1.9, 1.8))])["verdict"]["decisive"]
    assert noisy["answer"] == "not distinguishable"


def test_a_loss_of_another_objective_is_no_classifiers(tmp_path):
    """A sigmoid loss of 0.2 nats is below any classifier's, and says nothing beside it."""
    path = ledger(tmp_path)
    rows = list(map(json.loads, path.read_text().splitlines()))
    for seed in range(3):
        rows.append(encoder(f"c{seed}-1", 32, seed, 0.2) | {"objective": "siglip"})
        rows.append(answer(f"c{seed}-1", "none", seed, 1.0 + 0.01 * seed))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = summarise([path])
    assert (
        found["verdict"]["decisive"]["best_classifier"] == "32x2x64" and found["verdict"]["decisive"]["answer"] == "no"
    )
    assert found["verdict"]["decisive"]["against"] == {"96x2x64": "better", "32x2x64 siglip": "worse"}
    assert "| 32x2x64 siglip |  |" in report_text(found)
    left = vlm_encoders_figures.vlm_vs_encoder(found).axes[0]
    assert len(left.collections) == 2 and len(left.lines) == 3


def test_no_family_named_is_all_of_them_trained(tmp_path):
    path = ledger(tmp_path)
    path.write_text(path.read_text().replace('"families": ["marks"]', '"families": []'))
    found = summarise([path])
    assert found["families"] == {"marks": True, "more": True} and found["verdict"]["decisive"]["answer"] == "yes"
    assert "2 of 2 families" in report_text(found)
    assert not vlm_encoders_figures.vlm_vs_encoder(found).axes[1].texts, "nothing was never trained"


def test_a_row_in_two_ledgers_is_one_measurement(tmp_path):
    """Counted twice it would make three seeds six, and the interval narrower than it is."""
    path = ledger(tmp_path)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(path.read_text())
    assert summarise([path, copy]) == summarise([path])


def test_a_seed_that_an_arm_lacks_is_left_out_of_its_pairs_alone(tmp_path):
    path = ledger(tmp_path)
    rows = map(json.loads, path.read_text().splitlines())
    kept = [r for r in rows if not (r.get("control") == "blind" and r["init_seed"] == 1)]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    (tmp_path / "whole").mkdir()
    found, whole = summarise([path]), summarise([ledger(tmp_path / "whole")])
    assert found["seeds"] == [0, 1, 2] and found["arms"][TEXT_ONLY]["n"] == 2 and found["arms"]["32x2x64"]["n"] == 3
    same, fewer = "32x2x64 / 96x2x64", f"32x2x64 / {TEXT_ONLY}"
    assert found["pairs"]["decisive"][same] == whole["pairs"]["decisive"][same]
    logs = [math.log(1.5 / 2.7), math.log(1.52 / 2.7)]
    pair = found["pairs"]["decisive"][fewer]
    assert pair["n"] == 2 and pair["low"] is None and pair["mean"] == pytest.approx(sum(logs) / 2)
    assert f"| {TEXT_ONLY} (n = 2) |" in report_text(found)
    lines = vlm_encoders_figures.vlm_vs_encoder(found).axes[1].lines
    assert any(list(line.get_ydata()) == pytest.approx([1.5 / 2.7, 1.52 / 2.7]) for line in lines)


def test_the_text_and_the_figure_hold_the_numbers(tmp_path):
    found = summarise([ledger(tmp_path)])
    text = report_text(found)
    assert "| 32x2x64 | 1.210 | 1.510 (0.010) |" in text and "the best encoder, by marks? **yes** (-16" in text
    figure = vlm_encoders_figures.vlm_vs_encoder(found)
    left = figure.axes[0]
    assert [list(points.get_offsets()[:, 1]) for points in left.collections] == [[1.5, 1.51, 1.52], [1.8, 1.79, 1.83]]
    assert sorted(line.get_ydata()[0] for line in left.lines) == pytest.approx([2.5, 2.7])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[:6], "no finished row of a vision"),
        (lambda rows: [r for r in rows if r["run_id"] != "a1-1"], "there is no row; name its ledger"),
        (
            lambda rows: [r | ({"init_seed": r["init_seed"] + 9} if r.get("control") == "blind" else {}) for r in rows],
            "no seed in common",
        ),
        (
            lambda rows: [r | ({"projector": "q"} if r.get("control") == "blind" else {}) for r in rows],
            "differ in projector",
        ),
        (
            lambda rows: [r | ({"schedule": "cosine"} if r.get("control") == "blind" else {}) for r in rows],
            "differ in schedule",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, change, words):
    path = ledger(tmp_path)
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: r.get("kind") == "vlm")
    path.write_text("".join(json.dumps(r) + "\n" for r in change(rows)))
    with pytest.raises(UserError, match=words):
        summarise([path])
    with pytest.raises(UserError, match="'more' was not trained"):
        summarise([ledger(tmp_path)], "more")


def test_the_script_writes_its_files_twice_the_same(tmp_path, capsys):
    path = ledger(tmp_path)
    for out in ("one", "two"):
        assert tables.main([str(path), "--out", str(tmp_path / out)]) == 0
    assert capsys.readouterr().out.startswith("# Is the better classifier the better encoder")
    for name in ("encoders.json", "encoders/report.md", "encoders/vlm_vs_encoder.png", "encoders/vlm_vs_encoder.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
