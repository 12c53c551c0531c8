"""The ImageNet study: its cost is what its docstring says, and its runs train on a folder of photographs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from photographs import write_folder

from sovit.spec.config import override
from sovit.sweep.plan import plan_of
from sovit.sweep.queue import Sweep
from sovit.train.trainer import train

pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("imagenet_star", ROOT / "studies" / "imagenet_star.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cost_said_is_the_cost_planned(study, tmp_path):
    runs = study.runs()
    totals = plan_of(Sweep("s", runs, tmp_path, tmp_path / "s.jsonl"), 1, "cpu")["totals"]
    said = re.search(r"([\d.e]+) FLOPs, (\d+) hours of one H100 or (\d+) of one A100", study.__doc__)
    train_flops = 3 * totals["spent_compute"]
    assert float(said[1]) == pytest.approx(train_flops, rel=0.03)
    assert totals["gpu_hours"]["H100"] == pytest.approx(train_flops / (0.4 * 989e12 * 3600))
    assert totals["gpu_hours"] == pytest.approx({"H100": int(said[2]), "A100": int(said[3])}, rel=0.03)
    gigabytes = int(re.search(r"(\d+) GB under", study.__doc__)[1])
    assert gigabytes == round((1_281_167 + 50_000) * 256 * 256 * 3 / 1e9)


def test_runs_on_a_folder_of_photographs(study, tmp_path, monkeypatch):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "cache"))
    write_folder(tmp_path / "photos" / "train", 60, 125, 94)  # neither square nor of the study's size
    write_folder(tmp_path / "photos" / "val", 18, 94, 125)
    two = [run for run in study.runs() if run.shape == study.CENTRE and run.init_seed < 2]
    overrides = [
        f"preset={tmp_path / 'photos'}?cache_size=37&crop=0.05",
        "shape.width=48", "shape.depth=2", "shape.mlp_dim=96", "shape.head_dim=16", "shape.image_size=32",
        "shape.patch_size=8", "recipe.batch_size=16", "recipe.warmup_examples=160", "recipe.rsqrt_examples=1600",
        "recipe.peak_lr=0.004", "budgets=[480, 1440]",
    ]  # fmt: skip
    rows = [row for run in two for row in train(override(run, overrides), tmp_path / "runs")]
    assert len(rows) == 4 and {row["status"] for row in rows} == {"ok"} and {row["num_classes"] for row in rows} == {3}
    assert len({row["data_key"] for row in rows}) == 1
    longest = [row for row in rows if row["num_examples"] == 1440]
    assert all(row["val_loss"] < 0.5 * row["zero_line"] for row in longest)  # three photographs are soon told apart
    info = json.loads(next((tmp_path / "cache" / "hub").glob("*/info.json")).read_text())
    assert (info["num_train"], info["num_val"], info["size"]) == (60, 18, 37)
