"""Training: records that depend on the run alone, whatever was killed, branched or added later."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import open_data
from sovit.encoder import weights as encoder_weights
from sovit.encoder.model import build
from sovit.encoder.trained import load_branch
from sovit.files import CannotWrite
from sovit.ledger.ledger import merge
from sovit.ledger.records import read_record
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.train import trainer as train_module
from sovit.train.command import main
from sovit.train.evaluate import validate
from sovit.train.loop import OutOfMemory
from sovit.train.trainer import train

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
RECIPE = Recipe(peak_lr=0.008, warmup_examples=160)
SHORT, LONG = 2400, 4800  # 150 and 300 steps; the trunk is left at 120 and 240
RUN = Run(SHAPE, RECIPE, (SHORT, LONG), study="s")
INCIDENTAL = {
    "seconds",
    "spent_seconds",
    "spent_flops",
    "device",
    "versions",
    "commit",
    "commit_dirty",
    "date",
    "study",
    "micro_batch",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and rows of RUN, trained without interruption."""
    runs_dir = tmp_path_factory.mktemp("trained")
    return runs_dir, train(RUN, runs_dir)


def measured(rows):
    """What must be equal to the bit when a measurement is repeated."""
    return [{k: v for k, v in row.items() if k not in INCIDENTAL} for row in rows]


def metrics(runs_dir, run=RUN):
    lines = (Path(runs_dir) / run.trunk_id / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# what is recorded ----------------------------------------------------------------------------------------------------


def test_a_row_has_the_columns_of_the_schema(trained):
    names = (
        "schema run_id trunk_id study status init_seed data_seed data preset num_classes objective width depth mlp_dim"
        " head_dim num_heads patch_size image_size pool num_params head_params num_examples trunk_examples"
        " cooldown_examples forward_flops head_flops compute train_flops spent_flops batch_size peak_lr weight_decay"
        " parametrisation precision warmup_examples val_loss val_error data_key zero_line micro_batch seconds spent_seconds"
        " device versions commit commit_dirty date"
    )
    skills = {
        f"{metric}/{name}"
        for metric in ("val_loss", "val_error")
        for name in ("attr", "fact", "hist", "major", "group", "same")
    }
    for row, n in zip(trained[1], RUN.budgets, strict=True):
        assert set(row) == set(names.split()) | skills
        assert (row["status"], row["num_examples"], row["run_id"]) == ("ok", n, RUN.run_id(n))
        assert all(v is not None for k, v in row.items() if not k.startswith("commit"))
        assert row == json.loads((trained[0] / RUN.trunk_id / "records" / f"{RUN.run_id(n)}.json").read_text())


def test_short_training_beats_the_zero_line_and_longer_training_is_better(trained):
    short, long = trained[1]
    assert long["val_loss"] < short["val_loss"] < short["zero_line"] - 0.1
    assert short["val_error"] < 0.9
    blind = open_data("stream", "cpu", 16, 4, 0).blind
    assert long["val_loss/attr"] < blind["attr"]  # and not only because it knows the question


def test_bills_add_up_to_what_was_trained(trained):
    paid = sum(row["spent_flops"] for row in trained[1])
    assert paid == RUN.total_examples * SHAPE.train_flops_per_image(16)


def test_the_log_has_every_window_once(trained):
    trunk = [(m["step"], m["branch"]) for m in metrics(trained[0]) if m["branch"] is None]
    assert trunk == [(50, None), (100, None), (120, None), (150, None), (200, None), (240, None)]
    assert [(m["step"], m["branch"]) for m in metrics(trained[0]) if m["branch"]] == [
        (150, SHORT),
        (250, LONG),
        (300, LONG),
    ]
    assert all(m["examples"] == 16 * m["step"] for m in metrics(trained[0]))


@pytest.mark.parametrize("n", RUN.budgets)
def test_saved_weights_reproduce_the_loss(trained, n):
    runs_dir, rows = trained
    model = build(SHAPE, 16, seed=99)
    model.load_state_dict(safetensors.torch.load_file(runs_dir / RUN.trunk_id / f"{RUN.run_id(n)}.safetensors"))
    row = rows[RUN.budgets.index(n)]
    found = validate(model, open_data("stream", "cpu", 16, 4, 0))
    assert found == {k: row[k] for k in found}


def test_training_again_does_nothing(trained):
    runs_dir, rows = trained
    before = {p: p.stat().st_mtime_ns for p in runs_dir.rglob("*") if p.is_file()}
    assert train(RUN, runs_dir, on_progress=lambda p: pytest.fail("trained again")) == rows
    assert {p: p.stat().st_mtime_ns for p in runs_dir.rglob("*") if p.is_file()} == before


def test_progress_rises_to_the_end(tmp_path):
    seen = []
    train(RUN, tmp_path, on_progress=seen.append)
    share = [p["share"] for p in seen]
    assert share == sorted(share) and share[0] > 0 and share[-1] == pytest.approx(1)
    assert seen[-1]["seconds_left"] == 0
    assert [p["phase"] for p in seen].count("trunk") == 6


# the same numbers, however they were reached -------------------------------------------------------------------------


def test_branches_do_not_depend_on_each_other(trained, tmp_path):
    alone = [train(RUN.replace(budgets=(n,)), tmp_path / str(n))[0] for n in RUN.budgets]
    assert measured(alone) == measured(trained[1])
    assert merge(alone + trained[1]) == merge(alone)


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_a_larger_budget_added_later_goes_on_from_the_trunk(schedule, tmp_path):
    run = RUN.replace(recipe=Recipe(0.008, warmup_examples=160, schedule=schedule, rsqrt_examples=1600))
    first = train(run.replace(budgets=(SHORT,)), tmp_path / "grown")
    seen = []
    grown = train(run, tmp_path / "grown", on_progress=seen.append)
    assert grown[0] == first[0]
    assert min(p["examples"] for p in seen) > run.trunk_examples(SHORT)
    assert measured(grown) == measured(train(run, tmp_path / "whole"))
    assert metrics(tmp_path / "grown", run) == sorted_like(
        metrics(tmp_path / "whole", run), metrics(tmp_path / "grown", run)
    )
    assert sum(row["spent_flops"] for row in grown) == run.total_examples * SHAPE.train_flops_per_image(16)


def sorted_like(lines, order):
    assert len(lines) == len(order)
    return sorted(lines, key=order.index)


def test_a_smaller_budget_added_later_gives_the_same_number(trained, tmp_path):
    train(RUN.replace(budgets=(LONG,)), tmp_path)
    long_log = metrics(tmp_path)
    assert measured(train(RUN, tmp_path)) == measured(trained[1])
    log = metrics(tmp_path)
    assert len({(m["step"], m["branch"]) for m in log}) == len(log)
    assert all(m in log for m in long_log)


def test_seeds_change_the_number(trained, tmp_path):
    (row,) = train(RUN.replace(budgets=(SHORT,), init_seed=1), tmp_path)
    (other,) = train(RUN.replace(budgets=(SHORT,), data_seed=1), tmp_path)
    assert len({row["val_loss"], other["val_loss"], trained[1][0]["val_loss"]}) == 3


def end_training(folder, targets):
    """Start RUN, end it as often as there are targets, then finish it here. Returns how each ended, what all of them
    said, and the number of examples at which the last one went on."""
    (folder / "run.json").write_text(json.dumps(RUN.to_dict()))
    script = Path(__file__).parents[1] / "helpers" / "killed_training.py"
    command = [sys.executable, str(script), str(folder / "run.json"), str(folder / "runs"), *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_record(folder / "runs", RUN.trunk_id, RUN.run_id(LONG)) is None
    seen = []
    train(RUN, folder / "runs", on_progress=seen.append)
    return done.stdout.split(), done.stderr.splitlines(), min(p["examples"] for p in seen)


def expect_the_same_bits(runs_dir, trained):
    rows = [read_record(runs_dir, RUN.trunk_id, run_id) for run_id in RUN.run_ids]
    assert measured(rows) == measured(trained[1])
    log, expected = metrics(runs_dir), metrics(trained[0])
    assert sorted_like(log, expected) == expected
    for run_id in RUN.run_ids:
        name = f"{RUN.trunk_id}/{run_id}.safetensors"
        assert (runs_dir / name).read_bytes() == (trained[0] / name).read_bytes()


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bits(trained, tmp_path):
    """SIGKILL on the trunk, in either cooldown and between them; then the run is finished here."""
    ends, _, first = end_training(tmp_path, ["KILL:1", "KILL:2", "KILL:3", "KILL:4", "KILL:5", "KILL:7", "KILL:8"])
    assert ends == ["-9"] * 7
    assert first > RUN.trunk_examples(SHORT)  # what had been reached is not trained again
    expect_the_same_bits(tmp_path / "runs", trained)
    assert metrics(tmp_path / "runs") == metrics(trained[0])  # in their order, too


@pytest.mark.slow
def test_stopped_training_saves_says_how_to_go_on_and_resumes_to_the_same_bits(trained, tmp_path):
    """SIGINT and SIGTERM, which come between two windows and long before a periodic save."""
    ends, said, first = end_training(tmp_path, ["INT:1", "TERM:3", "INT:5", "TERM:8"])
    assert ends == ["130"] * 4
    assert first > RUN.trunk_examples(LONG)
    steps = [
        int(re.search(r"sovit: stopped after (\d+) steps, with the state in .*; go on with: ", s)[1]) for s in said
    ]
    assert len(steps) == 4 and steps == sorted(steps) and any(step % 50 for step in steps)
    progress = json.loads((tmp_path / "runs" / RUN.trunk_id / "progress.json").read_text())
    assert 0 <= time.time() - progress["updated"] < 600 and progress["trunk_id"] == RUN.trunk_id
    expect_the_same_bits(tmp_path / "runs", trained)
    assert metrics(tmp_path / "runs") == metrics(trained[0])
    assert not [r for r in (tmp_path / "runs").rglob("records/*.json") if '"failed"' in r.read_text()]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("window", "save_seconds"), [(1, 0), (3, 0), (4, 0), (6, 0), (8, 0), (2, 1e9), (4, 1e9), (7, 1e9)]
)
def test_resuming_after_a_window_repeats_the_log(trained, tmp_path, window, save_seconds):
    """Ended in the middle, with a periodic checkpoint after every window or with none."""
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == window:
            raise Killed

    with pytest.raises(Killed):
        train(RUN, tmp_path, on_progress=stop, save_seconds=save_seconds)
    with open(tmp_path / RUN.trunk_id / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')  # a line that the kill cut short
    assert measured(train(RUN, tmp_path)) == measured(trained[1])
    assert metrics(tmp_path) == metrics(trained[0])


def test_the_furthest_state_is_resumed(tmp_path):
    """A periodic checkpoint of step 50 is older than the branch point of step 120 that a later call reached."""

    def stop_after(examples):
        def stop(progress):
            if progress["examples"] > examples:
                raise Killed

        return stop

    run = RUN.replace(budgets=(SHORT,))
    for examples, save_seconds in ((50 * 16, 0), (120 * 16, 1e9)):
        with pytest.raises(Killed):
            train(run, tmp_path, on_progress=stop_after(examples), save_seconds=save_seconds)
    seen = []
    train(run, tmp_path, on_progress=seen.append)
    assert [p["phase"] for p in seen] == ["cooldown"]


def test_a_branch_with_a_record_has_its_weights(tmp_path, monkeypatch):
    """Ended between the two files of a branch: no record may stand without weights."""
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(RUN.replace(budgets=(SHORT,)), tmp_path)
    assert read_record(tmp_path, RUN.trunk_id, RUN.run_id(SHORT)) is None


# damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory):
    """RUN ended in its second cooldown: latest.pt at step 250, previous.pt at 240, and both branch points."""
    runs_dir = tmp_path_factory.mktemp("cut_short")
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 9:
            raise Killed

    with pytest.raises(Killed):
        train(RUN, runs_dir, on_progress=stop, save_seconds=0)
    return runs_dir


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def of_another_shape(path):
    state = torch.load(path, weights_only=True)
    state["model"]["head.weight"] = torch.zeros(7, 16)
    torch.save(state, path)


def of_another_trunk(path):
    torch.save(torch.load(path, weights_only=True) | {"trunk_id": "0123456789"}, path)


POINTS = [f"trunk-{RUN.trunk_examples(n)}.pt" for n in RUN.budgets]


@pytest.mark.parametrize(
    ("damages", "first"),
    [
        ({"latest.pt": truncated}, 250),
        ({"latest.pt": emptied, POINTS[1]: bit_flipped}, 250),  # previous.pt stands where the branch leaves
        ({"latest.pt": of_another_shape, "previous.pt": of_another_trunk, POINTS[1]: bit_flipped}, 150),
        (dict.fromkeys(["latest.pt", "previous.pt", *POINTS], bit_flipped), 50),
    ],
)
def test_damaged_checkpoints_are_said_and_cost_time_alone(trained, cut_short, tmp_path, capfd, damages, first):
    shutil.copytree(cut_short, tmp_path / "runs")
    folder = tmp_path / "runs" / RUN.trunk_id
    for name, damage in damages.items():
        damage(folder / name)
    seen = []
    train(RUN, tmp_path / "runs", on_progress=seen.append)
    assert seen[0]["examples"] == 16 * first
    said = capfd.readouterr().err.splitlines()
    for name in damages:
        assert [f"{folder / name} is not used (" in line for line in said].count(True) == 1, said
    assert len(said) == len(damages)
    expect_the_same_bits(tmp_path / "runs", trained)
    if POINTS[0] in damages:
        assert encoder_weights.load(folder / POINTS[0])["step"] == 120  # made again on the way, for a later branch


def test_a_branch_point_damaged_during_its_own_branch(trained, tmp_path, capfd):
    """The next branch cannot leave from it: the trunk is trained again, and nothing else."""
    seen = []

    def spoil(progress):
        seen.append(progress["examples"] // 16)
        if seen == [50, 100, 120, 150]:
            bit_flipped(tmp_path / RUN.trunk_id / POINTS[0])

    train(RUN, tmp_path, on_progress=spoil)
    assert seen == [50, 100, 120, 150, 50, 100, 120, 150, 200, 240, 250, 300]
    assert f"{POINTS[0]} is not used" in capfd.readouterr().err
    expect_the_same_bits(tmp_path, trained)


def test_a_damaged_log_keeps_its_sound_lines(trained, cut_short, tmp_path):
    shutil.copytree(cut_short, tmp_path / "runs")
    path = tmp_path / "runs" / RUN.trunk_id / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\xff\xfe{\n5\n[]\n{}\n" + b'{"step": "x", "branch": null}\n')
    train(RUN, tmp_path / "runs")
    expect_the_same_bits(tmp_path / "runs", trained)


def test_a_damaged_record_is_measured_again_from_its_branch_point(trained, tmp_path, capfd):
    shutil.copytree(trained[0], tmp_path / "runs")
    record = tmp_path / "runs" / RUN.trunk_id / "records" / f"{RUN.run_id(SHORT)}.json"
    truncated(record)
    seen = []
    rows = train(RUN, tmp_path / "runs", on_progress=seen.append)
    assert [p["examples"] // 16 for p in seen] == [150]  # its cooldown alone
    assert measured(rows) == measured(trained[1])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"sovit: the record {record} is damaged and counts as missing (")


def test_damaged_weights_are_not_given_out_and_can_be_made_again(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "runs")
    run_id = RUN.run_id(LONG)
    weights = tmp_path / "runs" / RUN.trunk_id / f"{run_id}.safetensors"
    bit_flipped(weights)
    with pytest.raises(UserError, match=f"{run_id} is damaged .* delete .*{run_id}.json and run python -m") as caught:
        load_branch(run_id, tmp_path / "runs")
    remedy = re.search(r"delete (\S+) and run python -m sovit.train (\S+) (\S+)$", str(caught.value))
    Path(remedy[1]).unlink()
    assert main([remedy[2], remedy[3]]) == 0
    expect_the_same_bits(tmp_path / "runs", trained)


# a full disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_larger_than(num_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_disk_too_full_for_a_checkpoint_is_said_and_loses_nothing(trained, tmp_path, capfd):
    """Periodic saves are left out, the branch point is needed: there it ends, and goes on when there is room."""
    folder, seen = tmp_path / RUN.trunk_id, []
    with (
        no_file_larger_than(20_000),
        pytest.raises(
            CannotWrite, match=f"cannot write {folder / POINTS[0]}: File too large; free some space, and run"
        ),
    ):
        train(RUN, tmp_path, on_progress=seen.append, save_seconds=0)
    assert len(seen) == 3
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and all("latest.pt: File too large; free some" in line for line in said)
    assert said[0].endswith("training goes on") and not list(folder.glob("*.pt*"))

    def fill(progress):
        if progress["examples"] == RUN.trunk_examples(LONG):
            raise Killed

    with pytest.raises(Killed):
        train(RUN, tmp_path, on_progress=fill, save_seconds=0)
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}
    with no_file_larger_than(20_000), pytest.raises(CannotWrite, match="trunk-3840.pt"):
        train(RUN, tmp_path, save_seconds=0)
    assert {p.name: p.read_bytes() for p in folder.glob("*.pt")} == before
    train(RUN, tmp_path, save_seconds=0)
    expect_the_same_bits(tmp_path, trained)


# memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_for(monkeypatch):
    """A function that lets the models of training have room for so many images, and validation for so many."""

    def limit(training, validation):
        def build_small(*arguments):
            model = build(*arguments)

            def check(module, inputs):
                if len(inputs[0]) > (training if module.training else validation):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

            model.register_forward_pre_hook(check)
            return model

        monkeypatch.setattr(train_module, "build", build_small)

    return limit


def test_a_batch_that_does_not_fit_is_trained_in_parts(trained, tmp_path, memory_for, capfd):
    memory_for(5, 100)
    rows = train(RUN, tmp_path)
    assert [row["micro_batch"] for row in trained[1]] == [16, 16]
    assert [row["micro_batch"] for row in rows] == [4, 4]
    for row, whole in zip(rows, trained[1], strict=True):
        for name in ("val_loss", "val_loss/attr"):
            assert row[name] == pytest.approx(whole[name], rel=1e-5)
        assert row["status"] == "ok" and row["val_error"] == pytest.approx(whole["val_error"], abs=1e-3)
    (line,) = capfd.readouterr().err.splitlines()  # said once, also after the trunk was gone back to
    assert line == f"sovit: out of memory: {RUN.trunk_id} goes on with 4 images at a time, the same batch a step"
    assert merge([trained[1][0], trained[1][0] | {"micro_batch": 4}]) == trained[1][:1]


@pytest.mark.slow
def test_a_resumed_run_keeps_to_its_parts(tmp_path, memory_for):
    def stop(progress):
        if progress["examples"] > 1600:
            raise Killed

    memory_for(4, 256)
    with pytest.raises(Killed):
        train(RUN, tmp_path, on_progress=stop, save_seconds=0)
    memory_for(16, 256)
    assert [row["micro_batch"] for row in train(RUN, tmp_path)] == [4, 4]


def test_an_image_that_does_not_fit_ends_the_run_in_one_line(tmp_path, memory_for, capsys):
    memory_for(0, 0)
    with pytest.raises(
        OutOfMemory, match=r"^out of memory with one sample at a time \(CUDA out .* 2.00 GiB.\); take a"
    ):
        train(RUN, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN.to_dict()))
    assert main([str(tmp_path / "run.json"), str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sovit: out of memory with one")


def test_a_model_that_does_not_fit_is_said_so(tmp_path, monkeypatch):
    def build_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_module, "build", build_large)
    with pytest.raises(
        OutOfMemory, match=r"^out of memory for the model and its optimiser \(CUDA out of memory.\); take a"
    ):
        train(RUN, tmp_path)


# divergence ----------------------------------------------------------------------------------------------------------


def test_bfloat16_trains_nearly_the_same_with_float32_weights(trained, tmp_path):
    run = RUN.replace(recipe=Recipe(peak_lr=0.008, warmup_examples=160, precision="bfloat16"), budgets=(SHORT,))
    (row,) = train(run, tmp_path)
    exact = trained[1][0]
    assert row["precision"] == "bfloat16" and exact["precision"] == "float32"
    assert row["val_loss"] != exact["val_loss"] and row["val_loss"] == pytest.approx(exact["val_loss"], rel=0.01)
    weights = safetensors.torch.load_file(tmp_path / run.trunk_id / f"{run.run_ids[0]}.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_divergence_is_recorded_with_its_step_and_without_a_loss(tmp_path):
    run = RUN.replace(recipe=Recipe(peak_lr=1e30, warmup_examples=0))
    rows = train(run, tmp_path)
    assert [row["status"] for row in rows] == ["diverged", "diverged"]
    for row in rows:
        assert row["val_loss"] is None and row["val_error"] is None
        assert row["error"] == "trunk: not finite at step 1"
    assert train(run, tmp_path, on_progress=lambda p: pytest.fail("trained again")) == rows


@pytest.mark.slow
def test_a_validation_that_is_not_finite_is_a_divergence(tmp_path, monkeypatch):
    """The last step can spoil the weights after its own loss was found finite."""

    def open_poisoned(*arguments):
        source = open_data(*arguments)
        draw = source.val
        monkeypatch.setattr(source, "val", lambda *a: (b := draw(*a))._replace(images=b.images * float("nan")))
        return source

    monkeypatch.setattr(train_module, "open_data", open_poisoned)
    rows = train(RUN, tmp_path)
    assert [(row["status"], row["val_loss"]) for row in rows] == [("diverged", None)] * 2
    assert rows[0]["error"] == f"cooldown: not finite at step {RUN.budgets[0] // 16}"


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (60, ("trunk", "trunk")),
        (130, ("cooldown", "trunk")),  # the short branch sees it in its cooldown, the long one on the trunk
        (160, (None, "trunk")),
        (270, (None, "cooldown")),
    ],
)
def test_a_bad_batch_ends_only_what_sees_it(trained, tmp_path, monkeypatch, step, expected):
    def open_poisoned(*arguments):
        source = open_data(*arguments)
        draw = source.train

        def poisoned(start, count):
            batch = draw(start, count)
            return batch._replace(images=batch.images * float("nan")) if start == 16 * step else batch

        source.train = poisoned
        return source

    monkeypatch.setattr(train_module, "open_data", open_poisoned)
    rows = train(RUN, tmp_path)
    for row, phase, clean in zip(rows, expected, trained[1], strict=True):
        if phase:
            assert (row["status"], row["val_loss"]) == ("diverged", None)
            assert row["error"] == f"{phase}: not finite at step {step}"
        else:
            assert measured([row]) == measured([clean])


# validation ----------------------------------------------------------------------------------------------------------


def test_validation_against_a_plain_computation():
    source = open_data("stream", "cpu", 16, 4, 0)
    source.num_val = 300  # one full batch and a part of one
    model = build(SHAPE, 16, "fan_in", seed=0)
    found = validate(model, source)
    batch = source.val(0, 300)
    logits = model.eval()(batch.images).detach().double()
    losses = -F.log_softmax(logits, -1).gather(-1, batch.labels[..., None])[..., 0]
    wrong = (logits.argmax(-1) != batch.labels).double()
    assert found["val_loss"] == pytest.approx(losses.mean().item(), abs=1e-6)
    assert found["val_error"] == pytest.approx(wrong.mean().item())
    for i, name in enumerate(source.skills):
        assert found[f"val_loss/{name}"] == pytest.approx(losses[batch.skills == i].mean().item(), abs=1e-6)
        assert found[f"val_error/{name}"] == pytest.approx(wrong[batch.skills == i].mean().item())
    share = torch.bincount(batch.skills.flatten()).double() / batch.skills.numel()
    parts = [found[f"val_loss/{name}"] for name in source.skills]
    assert found["val_loss"] == pytest.approx((share * torch.tensor(parts)).sum().item(), abs=1e-5)


class Oracle(torch.nn.Module):
    """Sure of the right answer, but for the first `wrong` of the four patches of each cell."""

    def __init__(self, source, wrong):
        super().__init__()
        self.source, self.wrong, self.seen = source, wrong, 0

    def forward(self, images):
        labels = self.source.val(self.seen, len(images)).labels.clone()
        self.seen += len(images)
        rows, columns = torch.arange(64) // 8 % 2, torch.arange(64) % 2
        order = 2 * rows + columns  # of a patch in its cell
        labels[:, order < self.wrong] = (labels[:, order < self.wrong] + 1) % 16
        return F.one_hot(labels, 16).float() * 10


@pytest.mark.parametrize(
    ("wrong", "error", "cell_error"), [(0, 0.0, 0.0), (1, 0.25, 0.0), (3, 0.75, 1.0), (4, 1.0, 1.0)]
)
def test_patches_of_a_cell_answer_together(wrong, error, cell_error):
    source = open_data("stream", "cpu", 32, 4, 0)
    source.num_val = 40
    found = validate(Oracle(source, wrong), source)
    assert (found["val_error"], found["val_cell_error"]) == (error, cell_error)
    right = torch.tensor([10.0 * (4 - wrong) / 4, 10.0 * wrong / 4, *[0.0] * 14])  # the mean of a cell's logits
    expected = F.cross_entropy(right[None], torch.tensor([0])).item()
    assert found["val_cell_loss"] == pytest.approx(expected, abs=1e-5)


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "map", "token"])
def test_a_pool_that_does_not_fit_the_labels_is_bad_input(tmp_path, pool):
    with pytest.raises(
        UserError, match=f"pool='{pool}' does not fit stream:cpu, whose labels are tokens; use pool=none"
    ):
        train(RUN.replace(shape=SHAPE.replace(pool=pool)), tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the run .*bad.json"),
        ("[]", "run must be an object"),
        ("{}", "run lacks shape, recipe, budgets"),
        (json.dumps({**RUN.to_dict(), "budgets": [1601]}), "budget of 1601 examples"),
        (json.dumps({**RUN.to_dict(), "preset": "x"}), "preset='x' is unknown"),
        (json.dumps({**RUN.to_dict(), "data": "x"}), "data='x' is unknown"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys, text, message):
    (tmp_path / "bad.json").write_text(text)
    assert main([str(tmp_path / "bad.json"), str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.removesuffix("\n")
    assert "\n" not in line
    assert re.match(f"sovit: .*{message}", line), line


def test_the_command_needs_a_run(tmp_path, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert main([str(tmp_path / "none.json")]) == 2
    assert "cannot read the run" in capsys.readouterr().err


@pytest.mark.slow
def test_training_needs_torch_and_timm_only(trained, tmp_path):
    """`python -m sovit.train RUN.json RUNS_DIR` on a machine without the packages of the edges."""
    (tmp_path / "run.json").write_text(json.dumps(RUN.replace(budgets=(SHORT,)).to_dict()))
    hidden = tmp_path / "hidden"
    for package in ("optuna", "mlflow", "datasets", "matplotlib", "rich", "tyro", "transformers"):
        (hidden / package).mkdir(parents=True)
        (hidden / package / "__init__.py").write_text("raise ImportError('not installed here')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(hidden), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "sovit.train", str(tmp_path / "run.json"), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row == {k: trained[1][0][k] for k in ("run_id", "status", "num_examples", "val_loss", "val_error")}
