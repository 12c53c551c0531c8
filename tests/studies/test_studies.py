"""Every study imports, states its command, cost and expectation, names each trunk once, and plans without training."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sovit.sweep import study_main
from sovit.sweep.plan import plan_of
from sovit.sweep.queue import Sweep

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_study(path):
    study = load(path)
    assert "?" in study.__doc__.splitlines()[0], "opens with its question"
    assert f"python studies/{path.name}" in study.__doc__ and "Cost:" in study.__doc__ and "Expected" in study.__doc__
    runs = study.runs()
    assert len({run.trunk_id for run in runs}) == len(runs) > 0
    said = re.search(r"Cost: (\d+) trunks", study.__doc__)
    assert said is None or path.stem == "validate_prediction" or int(said[1]) == len(runs)


def test_the_paper_star_is_54_runs_at_the_published_compute():
    study = load(next(p for p in STUDIES if p.stem == "sovit_paper"))
    star, grid = study.star_runs(), study.grid_runs()
    assert sum(len(r.budgets) for r in star) == 54 and len(grid) == 64
    assert sum(r.shape.forward_flops * n for r in star for n in r.budgets) == pytest.approx(3.2e21, rel=0.02)
    assert sum(r.shape.forward_flops * n for r in grid for n in r.budgets) == pytest.approx(0.53e21, rel=0.01)
    assert {r.shape.num_heads for r in star + grid} == {16}


def test_dry_run_prints_the_totals_and_trains_nothing(tmp_path, capsys):
    study = load(next(p for p in STUDIES if p.stem == "sovit_paper"))
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert study_main.main(study.__doc__, "paper", study.star_runs, ["--dry-run", "--json", *folders]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["totals"]["measurements"] == 54 and plan["totals"]["pending"] == 18
    assert plan["totals"]["compute"] == sum(row["compute"] for row in plan["trunks"])
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_shared_trunks_cost_less_than_runs_alone(tmp_path):
    study = load(next(p for p in STUDIES if p.stem == "stream_star"))
    totals = plan_of(Sweep("s", study.runs()[:2], tmp_path, tmp_path / "s.jsonl"), 1, "cpu")["totals"]
    assert 0 < totals["spent_compute"] < totals["compute"] and totals["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry"], "unrecognized arguments: --dry"),
        (["--work", "2"], "unrecognized arguments: --work"),
        (["--workers", "-1e3"], "begins with - only as in"),
    ],
)
def test_no_abbreviated_flag_is_taken(arguments, words, capsys):
    """`--dry` once trained: one parser read it as --dry-run, and another did not."""
    with pytest.raises(SystemExit) as stop:
        study_main.main("doc", "study", list, arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_a_dry_run_opens_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "cache"))
    study = load(next(p for p in STUDIES if p.stem == "image_star"))
    arguments = ["--dry-run", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]

    def planned(preset):
        return study_main.main(study.__doc__, "images", lambda: study.runs()[:1], [*arguments, f"preset={preset}"])

    assert planned("/no/such/folder") == 2
    assert "preset='/no/such/folder' is neither a file or folder here nor a hub name" in capsys.readouterr().err
    for name, shade in (("a", 0), ("b", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 40), (shade, 20 * i, 0)).save(tmp_path / "photos" / name / f"{i}.png")
    assert planned(tmp_path / "photos") == 0
    said = capsys.readouterr()
    images = study.runs()[0].budgets[-1]
    assert f"2 classes, 9 training images ({images / 9:.3g} epochs of the longest run), 1 validation images" in said.out
    assert "10 files or rows found = 10 images read + 0 refused" in said.err and "chance loss" in said.out
    assert not (tmp_path / "runs").exists()
    assert planned("owner/name") == 0
    assert "owner/name is on the hub; the launch downloads it" in capsys.readouterr().out
