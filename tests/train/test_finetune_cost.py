"""What fine-tuning a part costs: counts against closed forms and torch's own, turns, resume."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sovit.cli.main import main
from sovit.encoder.model import build
from sovit.ledger.profiles import read_profiles, shape_of
from sovit.spec.named_shapes import named_shape, stored_params
from sovit.spec.shape import TRAINED, Shape
from sovit.train import profile as profiling
from sovit.train.finetune import freeze
from sovit.train.profile.memory import count_saved
from sovit.train.profile.step import DTYPES, Job, Settings, built, random_batch, saved_bytes, train_steps

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "results" / "finetune_cost.jsonl"
SMALL = Shape(128, 2, 512, 32, 4, 32, "avg")
CLASSES, BATCH = 10, 2
UNDER = Settings(num_classes=CLASSES)


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_short_turns():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "PART_SECONDS", 0.05)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path, said = tmp_path_factory.mktemp("cost") / "rows.jsonl", []
    common = dict(batch_sizes=(BATCH,), num_classes=CLASSES, repeats=2, out=path, on_progress=said.append)
    return path, profiling.profile([SMALL], trained=TRAINED, **common), said, common


# measuring -----------------------------------------------------------------------------------------------------------


def test_only_what_is_trained_has_gradients_and_state(measured):
    _, rows, *_ = measured
    assert [row["trained"] for row in rows] == list(TRAINED)
    for row in rows:
        model = build(SMALL, CLASSES)
        trained = [dict(model.named_parameters())[name] for name in freeze(model, row["trained"])]
        assert row["gradient_bytes"] == sum(p.nbytes for p in trained) == 4 * row["trained_params"]
        assert row["optimizer_bytes"] == 2 * row["gradient_bytes"] + 4 * len(trained)  # two moments, one count of steps


def test_the_trainers_step_moves_what_is_trained_and_nothing_else():
    for part in ("full", "attention", "head"):
        job = Job(SMALL, BATCH, part)
        model, optimizer = built(job, UNDER)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_steps(model, optimizer, random_batch(job, "cpu"), UNDER, 1)
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
            assert p.requires_grad or torch.equal(p, before[name]), name
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_row_agrees_with_itself_and_the_peak_holds_what_it_must(measured):
    path, rows, *_ = measured
    assert read_profiles(path) == rows and len({row["profile_id"] for row in rows}) == 4
    by_part = {row["trained"]: row for row in rows}
    for row in rows:
        assert row["status"] == "ok" and row["num_repeats"] == len(row["train_step_samples"]) == 2
        assert min(row["train_step_samples"]) <= row["train_step_seconds"] <= max(row["train_step_samples"])
        weights = 4 * (row["num_params"] + row["head_params"])
        assert row["peak_bytes"] > 0.9 * (weights + row["optimizer_bytes"] + row["saved_bytes"])
    assert by_part["head"]["peak_bytes"] < 0.7 * by_part["full"]["peak_bytes"]
    assert by_part["head"]["train_step_seconds"] < 0.8 * by_part["full"]["train_step_seconds"]


def test_parts_take_turns_there_and_back(measured):
    *_, said, common = measured
    turns = [line.split(", ")[2] for line in said if line.startswith("repeat")]
    assert turns == [*TRAINED, *TRAINED[::-1]]


def test_what_is_there_is_not_measured_again(measured, tmp_path):
    path, rows, _, common = measured
    copy, said = tmp_path / "rows.jsonl", []
    copy.write_text(path.read_text())
    common = common | dict(out=copy, on_progress=said.append)
    assert profiling.profile([SMALL], trained=TRAINED, **common) == rows and said == []
    left = [dict(row) for row in rows]
    left[1] |= dict(num_repeats=1, train_step_samples=rows[1]["train_step_samples"][:1])  # as after a kill in round 2
    copy.write_text("".join(json.dumps(row) + "\n" for row in left[:3]))
    again = profiling.profile([SMALL], trained=TRAINED, **common)
    assert [row["num_repeats"] for row in again] == [2] * 4 and again[0] == rows[0] and again[2] == rows[2]
    assert again[1]["train_step_samples"][:1] == left[1]["train_step_samples"]
    assert [line.split(", ")[2] for line in said if line.startswith("repeat")] == ["head", "head", "attention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trained", "nothing"], "trained='nothing' is unknown; choose of full, attention, mlp, head"),
        (["--trained", "head", "--dtype", "int8"], "dtype='int8' is unknown"),
        (["--trained", "head", "--batch-sizes", "0"], "each must be at least 1"),
        (["--trained", "head", "--device", "abacus"], "--device abacus cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_status_2(options, message, tmp_path, capsys):
    assert main(["profile", "S/16", *options, "--out", str(tmp_path / "h.jsonl")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "h.jsonl").exists()


def test_the_command_prints_a_row_a_part(tmp_path, capsys):
    options = ["profile", "16x1x32", "--head-dim", "8", "--patch-size", "4", "--image-size", "8", "--pool", "none"]
    options += [
        "--trained",
        "attention",
        "full",
        "--num-classes",
        "3",
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "h.jsonl"),
    ]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "16x1x32 h8 attention" in text and "stored MiB" in text and "forward ms" not in text and "1 thread;" in text
    assert main([*options, "--json"]) == 0
    assert [row["trained"] for row in json.loads(capsys.readouterr().out)] == ["attention", "full"]


# activations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "inputs"), [("full", "wwwm"), ("attention", "ww"), ("mlp", "wm")])
@pytest.mark.parametrize("fused", [True, False])
def test_one_block_keeps_what_its_gradients_need(part, inputs, fused):
    """Floats a token: of each norm its input (w) and two statistics; q, k, v (3 w); the hidden layer before GELU (m); of
    each trained Linear its input: those of qkv, output projection and fc1 (w), that of fc2 (m). Fused attention keeps its
    output itself, which is the projection's input too, and a sum a head; written out it keeps N weights a head."""
    b, n, w, m, heads = 3, 16, 24, 56, 3
    shape = Shape(w, 1, m, w // heads, 4, 16, "avg")
    attention = heads + w * (part == "mlp") if fused else heads * n
    block = 2 * (w + 2) + 3 * w + m + sum(dict(w=w, m=m)[x] for x in inputs) + attention
    ends = b * (2 * w + 2)  # of the pooled token: the last norm's input and statistics, the head's input
    assert saved_bytes(Job(shape, b, part), UNDER, fused) == 4 * (b * n * block + ends)


def test_the_head_alone_keeps_its_own_input():
    shape = Shape(24, 3, 56, 8, 4, 16, "avg")
    assert saved_bytes(Job(shape, 5, "head"), UNDER, True) == 4 * 5 * 24


@pytest.mark.parametrize("pool", ["avg", "map", "token", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_depths_tell_the_third(pool, dtype):
    shape = Shape(16, 3, 40, 8, 4, 16, pool)
    under = Settings(dtype=dtype, num_classes=CLASSES)
    for part in TRAINED:
        job = Job(shape, 2, part)
        model, _ = built(job, under)
        whole = count_saved(model, random_batch(job, "cpu").images, DTYPES[dtype])
        assert saved_bytes(job, under, True) == whole


# counts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["S/16@384", "B/16@384", "So150m/16@384", "So400m/14@378"])
def test_step_flops_are_those_that_torch_counts(name):
    shape = named_shape(name, depth=2)
    with torch.device("meta"):
        model, images = build(shape, CLASSES), torch.empty(1, 3, shape.image_size, shape.image_size)
        for part in TRAINED:
            freeze(model, part)
            with FlopCounterMode(display=False) as counter:
                model(images).sum().backward()
            assert counter.get_total_flops() == shape.step_flops(CLASSES, part), part


@pytest.mark.parametrize("name", ["S/16@384", "B/16@384", "So150m/16@384"])
def test_what_is_stored_is_what_a_built_model_holds(name):
    """Trained tensors and resized positions. Of ViT-B attention alone stores as little as is claimed."""
    shape = named_shape(name)
    with torch.device("meta"):
        model = build(shape, 1000)
    parameters = dict(model.named_parameters())
    stored = {p: parameters.keys() & ({*freeze(model, p)} | {"pos_embed"}) for p in TRAINED}
    count = {part: sum(parameters[n].numel() for n in names) for part, names in stored.items()}
    assert count == {part: stored_params(shape, 1000, part) for part in TRAINED}
    if name.startswith("B"):
        assert 1 - count["attention"] / count["full"] == pytest.approx(0.66, abs=0.005)  # 2203.09795, section 4


# what is committed ---------------------------------------------------------------------------------------------------


def test_the_committed_rows_say_what_the_library_counts():
    for row in read_profiles(COMMITTED):
        shape = shape_of(row)
        assert row["status"] == "ok" and row["num_repeats"] == len(row["train_step_samples"]) >= 1
        assert row["step_flops"] == shape.step_flops(row["num_classes"], row["trained"])
        assert row["stored_bytes"] == 4 * stored_params(shape, row["num_classes"], row["trained"])
        assert row["gradient_bytes"] == 4 * shape.trained_params(row["num_classes"], row["trained"])
