"""Profiles of shapes and Pareto fronts: numbers that agree with the counts, resume, memory that runs out, brute force."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sovit import UserError
from sovit.cli.main import main
from sovit.law.fitted_law import read_law
from sovit.ledger.profiles import read_profiles, shape_of
from sovit.predict.pareto import DECADES, front, loss_of_images, pareto
from sovit.spec.shape import Shape
from sovit.train.profile import profile
from sovit.train.profile.memory import peak_bytes
from sovit.train.profile.shapes import shapes_for

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
        if row["batch_size"] == 1:
            assert row["train_step_seconds"] is None and row["train_step_samples"] == []
        else:
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
    common = dict(batch_sizes=(1, 4), num_classes=CLASSES, out=path)
    assert profile([LARGE, SMALL], repeats=2, on_progress=said.append, **common) == rows[2:] + rows[:2]
    assert said == [] and path.read_text() == text and path.stat().st_ino == inode
    more = profile([SMALL], repeats=3, **common)  # as after a kill between two turns
    assert [row["forward_samples"][:2] for row in more] == [row["forward_samples"] for row in rows[:2]]
    assert [row["num_repeats"] for row in more] == [3, 3] and more[0]["forward_bytes"] == rows[0]["forward_bytes"]
    assert [row["num_repeats"] for row in read_profiles(path)] == [3, 3, 2, 2]  # those of the other shape stand


def test_a_batch_that_does_not_fit_is_recorded_and_the_rest_goes_on(tmp_path):
    """In a process that may take 1.5 GiB more than it has: a million images of 3 KiB are 3 GiB."""
    code = (
        "import resource, sys, json, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; from sovit.train.profile import profile; from sovit.spec.shape import Shape\n"
        "from sovit.train.profile.shapes import profile_text\n"
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
    assert "out of memory: " in done.stdout and read_profiles(out)[2]["forward_seconds"] is None


def test_the_command_has_a_table_and_a_twin(tmp_path, capsys):
    options = ["profile", "16x1x64", "--law", str(LAW), "--batch-sizes", "1", "--repeats", "1"]
    options += ["--out", str(tmp_path / "h.jsonl")]
    assert main(options) == 0
    text = capsys.readouterr()
    assert "16x1x64 h8" in text.out and "1 thread" in text.out and "repeat 1/1" in text.err
    assert main([*options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["pool"], row["num_classes"]) == ("none", 16) and row["train_step_seconds"]  # 1 is the only batch


def test_shapes_of_a_command_line():
    shapes, classes = shapes_for(["33x2x64x11", "16x1x64", "32x1x64"], LAW, 1e12)
    assert classes == 16 and shapes[2].head_dim == 11 and [s.width for s in shapes[3:]] == [16, 32]
    assert all((s.patch_size, s.image_size, s.pool) == (4, 16, "none") for s in shapes)
    assert shapes_for(["B/16"], image_size=64, patch_size=16)[0] == [Shape(768, 12, 3072, image_size=64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no shape to profile"),
        (["nonsense"], "unknown shape 'nonsense'"),
        (["B/16", "--dtype", "int8"], "dtype='int8' is unknown"),
        (["B/16", "--repeats", "0"], "repeats=0"),
        (["B/16", "--batch-sizes", "0"], "each must be at least 1"),
        (["B/16", "--threads", "0"], "--threads 0 must be at least 1"),
        (["B/16", "--device", "abacus"], "--device abacus cannot be used"),
        (["--train-flops", "1e12"], "name one"),
        (["31x1x64", "--head-dim", "8"], "width=31 is not a multiple of head_dim=8"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, message, tmp_path, capsys):
    assert main(["profile", *options, "--out", str(tmp_path / "h.jsonl")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "h.jsonl").exists()


# fronts --------------------------------------------------------------------------------------------------------------


def test_the_front_is_that_of_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cost, loss = rng.integers(0, 8, (2, 30)).astype(float)  # many ties
        beaten = [
            any(
                (cost[j] <= cost[i] and loss[j] <= loss[i]) and (cost[j] < cost[i] or loss[j] < loss[i])
                for j in range(30)
            )
            for i in range(30)
        ]
        found = front(cost, loss)
        assert set(found.tolist()) == set(np.flatnonzero(~np.array(beaten)).tolist())
        assert (np.diff(cost[found]) >= 0).all()


def made_up(shapes, rate, batch=32, **more):
    """Profiles of a machine that does rate(shape) FLOPs a second."""
    out = []
    for i, shape in enumerate(shapes):
        for b in (1, batch):
            forward = (shape.forward_flops + shape.head_flops(CLASSES)) * b / rate(shape)
            out.append(
                dict(profile_id=f"{i}-{b}", status="ok", **shape.to_dict(), batch_size=b, device="cpu", device_name="x")
                | dict(
                    dtype="float32", threads=1, clock="cpu", forward_seconds=forward, train_bytes=16 * shape.num_params
                )
                | dict(train_step_seconds=3 * forward if b > 1 else None)
                | more
            )
    return out


GRID = [Shape(w, d, m, 8, 4, 16, "none") for w in (16, 32, 64, 96) for d in (1, 2, 4) for m in (128, 512)]


def test_a_machine_of_one_rate_has_one_optimum():
    fit = read_law(LAW)
    found = pareto(fit, made_up(GRID, lambda s: 1e10), 1e12)
    assert found["flop_optimal"]["label"] == found["time_optimal"]["label"]
    assert found["flop_optimal"]["excess_at_seconds"] == found["time_optimal"]["excess_at_flops"] == 0
    assert found["train_seconds"] == pytest.approx(1e12 / 1e10, rel=1e-9)
    curves = found["curves"]
    assert np.allclose(curves["train_flops"]["loss"], curves["train_seconds"]["loss"], rtol=1e-9)
    assert curves["train_flops"]["budget"][0] == pytest.approx(1e12 / 10**DECADES)


def test_where_width_is_fast_the_best_per_second_is_wider_and_both_losses_are_said():
    fit = read_law(LAW)
    rate = {s: 1e8 * s.width**1.5 / s.depth for s in GRID}
    found = pareto(fit, made_up(GRID, rate.get), 1e12)
    step = np.array([s.train_flops_per_image(CLASSES) / rate[s] for s in GRID])
    flops = np.array([s.train_flops_per_image(CLASSES) for s in GRID])
    by_flops = loss_of_images(fit, GRID, 1e12 / flops)
    seconds = 1e12 / flops[by_flops.argmin()] * step[by_flops.argmin()]
    by_seconds = loss_of_images(fit, GRID, seconds / step)
    first, second = int(by_flops.argmin()), int(by_seconds.argmin())
    assert first != second and GRID[second].width > GRID[first].width
    assert found["flop_optimal"]["label"] == GRID[first].label
    assert found["time_optimal"]["label"] == GRID[second].label
    excess = by_seconds[first] / by_seconds[second] - 1
    assert found["flop_optimal"]["excess_at_seconds"] == pytest.approx(excess, rel=1e-9) and excess > 0
    assert found["time_optimal"]["excess_at_flops"] == pytest.approx(by_flops[second] / by_flops[first] - 1, rel=1e-9)
    assert found["on_every_front"] == [r["label"] for r in found["shapes"] if len(r["fronts"]) == 4]


def test_rows_that_the_law_does_not_speak_of_are_left_out_and_said():
    fit = read_law(LAW)
    rows = made_up(GRID, lambda s: 1e10) + made_up([Shape(32, 2, 64, 8, 8, 16, "none")], lambda s: 1e10)
    rows[1] |= dict(status="out_of_memory")
    found = pareto(fit, rows)
    assert len(found["shapes"]) == len(GRID) - 1
    assert any("patch_size=8, where the law is of 4" in line for line in found["left_out"])
    assert any("16x1x128 at batch 32: out of memory" in line for line in found["left_out"])
    with pytest.raises(UserError, match="several machines or settings"):
        pareto(fit, rows + made_up(GRID[:1], lambda s: 1e10, threads=2))
    with pytest.raises(UserError, match="no profiled shape is of the law's kind"):
        pareto(fit, made_up([Shape(64, 2, 64)], lambda s: 1e10))


def script():
    spec = importlib.util.spec_from_file_location("pareto_script", ROOT / "analysis" / "pareto.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_same_bytes_again(tmp_path, capsys):
    profiles = tmp_path / "h.jsonl"
    profiles.write_text("".join(json.dumps(row) + "\n" for row in made_up(GRID, lambda s: 1e8 * s.width)))
    run = script().main
    for out in ("a", "b"):
        assert run([str(LAW), str(profiles), "--train-flops", "1e12", "--out", str(tmp_path / out)]) == 0
    assert "best per FLOP:" in capsys.readouterr().out
    for name in ("pareto.json", "pareto.png", "pareto.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert run([str(LAW), str(tmp_path / "none.jsonl")]) == 2
    profiles.write_text('{"status": "ok"}\n')
    assert run([str(LAW), str(profiles)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "no profiles at" in err and "h.jsonl:1 lacks profile_id" in err


def test_the_committed_example_is_what_its_profiles_give(tmp_path):
    profiles = ROOT / "results" / "hardware.jsonl"
    found = pareto(read_law(LAW), read_profiles(profiles))
    kept = json.loads((ROOT / "results" / "hardware" / "pareto.json").read_text())
    assert kept["flop_optimal"]["label"] == found["flop_optimal"]["label"]
    assert kept["time_optimal"]["excess_at_flops"] == pytest.approx(found["time_optimal"]["excess_at_flops"], rel=1e-6)
    for row in read_profiles(profiles):
        assert row["status"] == "ok" and row["num_repeats"] >= 5 and shape_of(row).num_params == row["num_params"]


def test_the_line_of_the_manual_works_as_printed(tmp_path, monkeypatch, capsys):
    line = next(x for x in (ROOT / "docs" / "predict.md").read_text().splitlines() if x.startswith("sovit profile "))
    monkeypatch.chdir(ROOT)
    command = line.partition("#")[0].split()[1:]
    assert main([*command, "--batch-sizes", "1", "--repeats", "1", "--out", str(tmp_path / "h.jsonl")]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
