"""Profiles of shapes: numbers that agree with the counts, resume, memory that runs out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sovit import UserError
from sovit.cli.main import main
from sovit.cli.train import shapes_for
from sovit.ledger.profiles import read_profiles
from sovit.spec.shape import Shape
from sovit.train.profile import peak_bytes, profile

ROOT = Path(__file__).resolve().parents[2]
LAW = ROOT / "results" / "stream_star_law" / "law.json"
SMALL, LARGE = (Shape(w, d, m, 8, 4, 16, "none") for w, d, m in ((16, 1, 64), (256, 4, 1024)))
CLASSES = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "hardware.jsonl"
    return path, profile([SMALL, LARGE], batch_sizes=(1, 4), num_classes=CLASSES, repeats=2, out=path)


# measuring -----------------------------------------------------------------------------------------------------------


def shape_of(row):
    return Shape(**{name: row[name] for name in Shape.__dataclass_fields__})


def test_a_row_agrees_with_the_counts(profiled):
    path, rows = profiled
    assert read_profiles(path) == rows and len({row["profile_id"] for row in rows}) == 4
    for row in rows:
        shape = shape_of(row)
        assert row["status"] == "ok" and row["num_repeats"] == len(row["forward_samples"]) == 2
        assert min(row["forward_samples"]) <= row["forward_seconds_low"] <= row["forward_seconds"]
        assert row["forward_seconds"] <= row["forward_seconds_high"] <= max(row["forward_samples"])
        forward = shape.forward_flops + shape.head_flops(CLASSES)
        done = row["forward_flops_per_second"] * row["forward_seconds"]
        assert done == pytest.approx(forward * row["batch_size"], rel=1e-12)
        assert row["images_per_second"] * row["forward_seconds"] == pytest.approx(row["batch_size"], rel=1e-12)
        assert row["num_params"] == shape.num_params and row["clock"] == "cpu" and row["threads"] == 1
        step = shape.train_flops_per_image(CLASSES) * row["batch_size"]
        assert row["train_flops_per_second"] * row["train_step_seconds"] == pytest.approx(step, rel=1e-12)
        assert row["train_step_seconds"] > row["forward_seconds"]


def test_memory_holds_the_model_and_its_optimiser(profiled):
    _, rows = profiled
    large = next(row for row in rows if row["width"] == 256 and row["batch_size"] == 4)
    small = next(row for row in rows if row["width"] == 16 and row["batch_size"] == 4)
    params = LARGE.num_params + LARGE.head_params(CLASSES)
    assert 4 * params < large["forward_bytes"] < 4 * 4 * params
    assert 16 * params < large["train_bytes"] < 3 * 16 * params  # weights, gradients, two moments: 4 bytes each
    assert small["train_bytes"] < large["train_bytes"] / 5


def test_the_peak_is_what_torch_holds_at_once():
    def work():
        first = torch.empty(1000)
        del first
        return torch.empty(500), torch.empty(700)

    assert peak_bytes(work, "cpu") == 4 * (500 + 700)


def test_what_is_there_is_not_measured_again(profiled, tmp_path):
    path, rows = profiled
    text, inode = path.read_text(), path.stat().st_ino
    said: list = []
    common = dict(batch_sizes=(1, 4), num_classes=CLASSES, repeats=2, on_progress=said.append)
    assert profile([LARGE, SMALL], out=path, **common) == rows[2:] + rows[:2]
    assert said == [] and path.read_text() == text and path.stat().st_ino == inode
    part = tmp_path / "h.jsonl"
    part.write_text("".join(text.splitlines(keepends=True)[:3]))  # as after a kill
    assert profile([SMALL, LARGE], out=part, **common)[:3] == rows[:3] and said == ["4/4: 256x4x1024, batch 4"]
    assert read_profiles(part)[:3] == rows[:3] and len(read_profiles(part)) == 4


def test_a_batch_that_does_not_fit_is_recorded_and_the_rest_goes_on(tmp_path):
    """In a process that may take 1.5 GiB more than it has: a million images of 3 KiB are 3 GiB."""
    code = (
        "import resource, sys, json, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; from sovit.train.profile import profile, profile_text\n"
        "from sovit.spec.shape import Shape\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 2**29,) * 2)\n"
        "shape = Shape(16, 1, 64, 8, 4, 16, 'none')\n"
        "rows = profile([shape], batch_sizes=(1, 2, 10**6), num_classes=16, repeats=1, out=Path(sys.argv[1]))\n"
        "print(profile_text(rows))"
    )
    out = tmp_path / "h.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in read_profiles(out)] == ["ok", "ok", "out_of_memory"]
    assert "out of memory: " in done.stdout and "forward_seconds" not in read_profiles(out)[2]


def test_the_command_has_a_table_and_a_twin(tmp_path, capsys):
    options = ["profile", "16x1x64", "--law", str(LAW), "--batch-sizes", "1", "--repeats", "1"]
    options += ["--out", str(tmp_path / "h.jsonl")]
    assert main(options) == 0
    text = capsys.readouterr()
    assert "16x1x64 h8" in text.out and "1 thread" in text.out and "1/1: 16x1x64, batch 1" in text.err
    assert main([*options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["pool"], row["num_classes"]) == ("none", 16) and row["train_step_seconds"]


def test_shapes_of_a_command_line():
    shapes, classes = shapes_for(["33x2x64x11", "16x1x64", "32x1x64"], LAW)
    assert classes == 16 and [s.head_dim for s in shapes] == [11, 8, 8]
    assert all((s.patch_size, s.image_size, s.pool) == (4, 16, "none") for s in shapes)
    assert shapes_for(["B/16"], image_size=64, patch_size=16)[0] == [Shape(768, 12, 3072, image_size=64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no shape to profile"),
        (["nonsense"], "unknown shape 'nonsense'"),
        (["B/16", "--dtype", "int8"], "dtype='int8' is unknown"),
        (["B/16", "--repeats", "0"], "repeats=0"),
        (["B/16", "--batch-sizes", "0"], "batch_sizes=0 must be at least 1"),
        (["B/16", "--threads", "0"], "--threads 0 must be at least 1"),
        (["B/16", "--device", "abacus"], "--device abacus cannot be used"),
        (["31x1x64", "--head-dim", "8"], "width=31 is not a multiple of head_dim=8"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, message, tmp_path, capsys):
    assert main(["profile", *options, "--out", str(tmp_path / "h.jsonl")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "h.jsonl").exists()


# what is committed -----------------------------------------------------------------------------------------------------


def test_the_committed_profiles_agree_with_the_counts():
    for row in read_profiles(ROOT / "results" / "hardware.jsonl"):
        assert row["status"] == "ok" and row["num_repeats"] >= 5 and shape_of(row).num_params == row["num_params"]


def test_profiles_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "h.jsonl"
    with pytest.raises(UserError, match="no profiles at"):
        read_profiles(path)
    path.write_text('{"status": "ok"}\n')
    with pytest.raises(UserError, match="h.jsonl:1 lacks profile_id"):
        read_profiles(path)


def test_the_line_of_the_manual_works_as_printed(tmp_path, monkeypatch, capsys):
    line = next(x for x in (ROOT / "docs" / "predict.md").read_text().splitlines() if x.startswith("sovit profile "))
    monkeypatch.chdir(ROOT)
    command = line.partition("#")[0].split()[1:]
    assert main([*command, "--batch-sizes", "1", "--repeats", "1", "--out", str(tmp_path / "h.jsonl")]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
