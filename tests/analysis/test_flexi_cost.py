"""One trunk of several patch sizes against trunks of one: planted differences, what is equal in each way, bad input."""

import json
from pathlib import Path

import planted_transfer as planted
import pytest

from analysis.flexivit import tables
from analysis.flexivit.tables import WAYS, sizes_table, summarise_sizes
from sovit import UserError


def found_in(tmp_path, **more):
    return summarise_sizes([planted.write_ledger(tmp_path / "flexi.jsonl", planted.flexi_rows(**more))])


def points(found, way, size, metric="val_loss"):
    (entry,) = found["shapes"]
    (one,) = [c for c in entry["comparisons"] if (c["way"], c["patch_size"], c["metric"]) == (way, size, metric)]
    return one["points"]


def test_at_equal_images_the_planted_cost_is_found(tmp_path):
    found = found_in(tmp_path)
    for size in (2, 4, 8):
        for p in points(found, "images", size):
            assert p["mean"] == pytest.approx(0.05, abs=0.012)
        assert points(found, "images", size)[-1]["verdict"] == "worse"
    same = found_in(tmp_path, worse=0.0, seed=3)
    assert [points(same, "images", size)[-1]["verdict"] for size in (2, 4, 8)].count("not distinguishable") >= 2


def test_what_is_equal_in_each_way(tmp_path):
    """Without noise: the single trunk's loss at the images that the way's FLOPs pay for."""
    found = found_in(tmp_path, noise=0.0, worse=0.0)
    cost = found["shapes"][0]["flops_per_image"]
    for size in (2, 4, 8):
        for way, images in (
            ("images", lambda x: x / cost["flexi"]),
            ("one", lambda x, size=size: x / cost[str(size)]),
            ("all", lambda x: x / (cost["2"] + cost["4"] + cost["8"])),
        ):
            for p in points(found, way, size):
                assert p["images"] == pytest.approx(images(p["x"]))
                assert 3200 * (1 - 1e-9) <= p["images"] <= 96_000 * (1 + 1e-9)
    # three trunks for the FLOPs of one that sees each size in a third of its steps: a third of the images
    p = points(found, "all", 4)[-1]
    assert p["images"] == pytest.approx(p["x"] / cost["flexi"] / 3, rel=1e-6)
    assert p["mean"] < -0.1  # so that the planted Flexi trunk, as good at equal images, is far ahead


def test_the_table_names_every_way_and_size(tmp_path):
    text = sizes_table(found_in(tmp_path))
    assert all(way in text for way in WAYS.values()) and text.count("| 32x2x128, 16 |") == 3


def test_a_ledger_without_pairs_is_refused_in_one_line(tmp_path):
    rows = [row for row in planted.flexi_rows() if not row.get("patch_sizes")]
    with pytest.raises(UserError, match="no trunk of several patch sizes") as error:
        summarise_sizes([planted.write_ledger(tmp_path / "a.jsonl", rows)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more", [dict(patch_sizes="2,4"), {"val_loss@p4": "low"}], ids=["no list of sizes", "a loss in words"]
)
def test_a_malformed_row_is_refused_in_one_line(tmp_path, more):
    rows = [row | (more if row.get("patch_sizes") else {}) for row in planted.flexi_rows()]
    with pytest.raises(UserError, match=next(iter(more))) as error:
        summarise_sizes([planted.write_ledger(tmp_path / "a.jsonl", rows)])
    assert "\n" not in str(error.value)


def test_trunks_that_miss_each_other_by_a_little_are_not_compared(tmp_path):
    """Single trunks end 1 % below the first budget of the Flexi trunk: nothing is extrapolated, and nothing is refused."""
    rows = [row for row in planted.flexi_rows(budgets=(3168, 9600)) if not row.get("patch_sizes")]
    short = [row for row in rows if row["num_examples"] == 3168 or row["patch_size"] == 8]
    flexi = [row for row in planted.flexi_rows() if row.get("patch_sizes")]
    found = summarise_sizes([planted.write_ledger(tmp_path / "a.jsonl", [*short, *flexi])])
    (entry,) = found["shapes"]
    at_equal_images = {c["patch_size"] for c in entry["comparisons"] if c["way"] == "images"}
    assert at_equal_images == {8}


def test_the_analysis_writes_what_it_says(tmp_path, capsys):
    path = planted.write_ledger(tmp_path / "a.jsonl", planted.flexi_rows())
    assert tables.main([str(path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "flexivit" / "report.md").read_text() == capsys.readouterr().out
    assert json.loads((tmp_path / "flexivit.json").read_text())["shapes"][0]["patch_sizes"] == [2, 4, 8]
    assert tables.main([str(path), "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "flexivit.json").read_text())
    assert tables.main([str(tmp_path / "no.jsonl")]) == 2


def test_the_committed_numbers_are_what_the_ledger_gives():
    results = Path(__file__).resolve().parents[2] / "results"
    kept = json.loads((results / "flexivit.json").read_text())
    found = summarise_sizes([results / "flexivit.jsonl"])
    assert found["noise"]["sd"] == pytest.approx(kept["noise"]["sd"], rel=1e-9)
    for ours, theirs in zip(found["shapes"][0]["comparisons"], kept["shapes"][0]["comparisons"], strict=True):
        for one, other in zip(ours["points"], theirs["points"], strict=True):
            assert one["verdict"] == other["verdict"]
            for name in ("x", "images", "flexi", "single", "mean", "low", "high"):
                assert one[name] == pytest.approx(other[name], rel=1e-9, abs=1e-12), name
