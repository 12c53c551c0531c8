"""Fine-tuning: what is trained and what is not, its FLOPs by torch's own counter, its files, and what starts where."""

import json
import random
import re

import pytest
import timm
import torch
from random_shapes import random_shape
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.cli.main import main
from sovit.data import NORMALISATION, open_data
from sovit.encoder.model import build, parameter_groups
from sovit.encoder.resize import resize_state
from sovit.encoder.trained import base_of, load_branch, open_base
from sovit.encoder.weights import load_weights
from sovit.ledger.ledger import read_ledger
from sovit.ledger.measurements import measurements
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import TRAINED, Shape
from sovit.train.evaluate import validate
from sovit.train.finetune import begin, freeze, stored_names
from sovit.train.finetune_command import tuning as tuning_of
from sovit.train.trainer import train

BASE = Shape(16, 2, 24, head_dim=8, patch_size=4, image_size=32, pool="none")
RECIPE = Recipe(0.01, warmup_examples=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """runs/ with a trunk of two branches: folder, its rows."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, train(Run(BASE, RECIPE, (160, 320), preset="small"), folder)


def tuning(rows, trained="attention", image_size=64, **more):
    fields = dict(budgets=(80, 160), preset="small", base=rows[-1]["run_id"], trained=trained) | more
    return Run(BASE.replace(image_size=image_size), RECIPE, **fields)


# what is trained -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", TRAINED)
def test_step_flops_and_trained_params_equal_what_torch_counts(trained):
    rng = random.Random(2203)
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)  # a fused kernel counts gradients that nobody asked it for
    try:
        for _ in range(12):
            shape = random_shape(rng)
            shape = shape.replace(num_registers=0) if shape.pool == "none" else shape
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = build(shape, 10)
                freeze(model, trained)
                model(torch.empty(1, 3, shape.image_size, shape.image_size)).sum().backward()
            assert counter.get_total_flops() == shape.step_flops(10, trained), shape
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == shape.trained_params(10, trained)
    finally:
        timm.layers.set_fused_attn(bool(fused))


def test_full_is_three_forward_passes_less_the_gradient_of_the_images():
    shape = Shape(768, 12, 3072, patch_size=16, image_size=384)
    embed = 2 * shape.num_patches * 3 * 16**2 * 768
    assert shape.train_flops_per_image(10) - shape.step_flops(10, "full") == embed


def test_attention_is_exactly_the_projections_positions_and_head():
    names = freeze(build(BASE.replace(pool="map", layer_scale=True), 10), "attention")
    kinds = {re.sub(r"\d+", "0", name) for name in names}
    ends = ("weight", "bias")
    expected = {f"blocks.0.attn.{part}.{end}" for part in ("qkv", "proj") for end in ends}
    expected |= {f"attn_pool.{part}.{end}" for part in ("q", "kv", "proj") for end in ends}
    assert kinds == expected | {"pos_embed", "head.weight", "head.bias"}
    assert len(names) == 2 * 4 + 6 + 3


@pytest.mark.parametrize("trained", ["attention", "mlp", "head"])
def test_frozen_tensors_have_no_gradient_no_state_no_decay_and_stay(trained):
    model = build(BASE, 10, "fan_in", seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = freeze(model, trained)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        mine = name in names
        assert (p.grad is not None) == (p in optimizer.state) == mine == (not torch.equal(p, before[name])), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


# files and rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_part", TRAINED)
def test_a_file_holds_what_was_trained_and_merges_back_bit_equal(trained, monkeypatch, trained_part):
    folder, rows = trained
    run = tuning(rows, trained_part)
    ended = {}
    from sovit.train import trainer as module

    def keep(model, path, *arguments, **more):
        save(model, path, *arguments, **more)
        ended[path.stem] = {name: t.clone() for name, t in model.state_dict().items()}

    save = module.save_weights
    monkeypatch.setattr(module, "save_weights", keep)
    for row in train(run, folder):
        path = folder / run.trunk_id / f"{row['run_id']}.safetensors"
        model, again = load_branch(row["run_id"], folder)
        assert again.base == rows[-1]["run_id"]
        assert all(torch.equal(t, ended[row["run_id"]][name]) for name, t in model.state_dict().items())
        stored, _ = load_weights(path)
        if trained_part == "head":  # the positions are of the new grid, which the base does not have
            assert set(stored) == {"head.weight", "head.bias", "pos_embed"}
        else:
            assert set(stored) == set(freeze(model, trained_part))
            assert sum(t.numel() for t in stored.values()) == row["trained_params"]
        assert row["stored_bytes"] == path.stat().st_size
        assert row["train_flops"] == run.shape.step_flops(16, trained_part) * row["num_examples"]
        assert row["base_train_flops"] == BASE.train_flops_per_image(16) * 320 == rows[-1]["train_flops"]
        assert (row["base"], row["trained"], row["base_examples"]) == (rows[-1]["run_id"], trained_part, 320)
        assert (row["base_image_size"], row["image_size"]) == (32, 64)


def test_a_chain_of_fine_tunings_adds_up(trained):
    folder, rows = trained
    first = train(tuning(rows, "attention", budgets=(80,)), folder)
    second = Run(BASE, RECIPE, (80,), preset="small", base=first[0]["run_id"], trained="mlp")
    (row,) = train(second, folder)
    assert row["base_train_flops"] == rows[-1]["train_flops"] + first[0]["train_flops"]
    model, _ = load_branch(row["run_id"], folder)
    assert model.patch_embed.grid_size == (8, 8)


def test_a_base_that_was_replaced_is_noticed(trained, tmp_path):
    import shutil

    folder, rows = trained
    shutil.copytree(folder, tmp_path / "runs")
    (row,) = train(tuning(rows, budgets=(80,)), tmp_path / "runs")
    base = tmp_path / "runs" / rows[-1]["trunk_id"]
    shutil.copy(base / f"{rows[0]['run_id']}.safetensors", base / f"{rows[-1]['run_id']}.safetensors")
    with pytest.raises(UserError, match=f"its base {rows[-1]['run_id']} holds other weights than it was trained from"):
        load_branch(row["run_id"], tmp_path / "runs")


def test_laws_leave_fine_tunings_out_and_say_so(trained, tmp_path):
    folder, rows = trained
    more = train(tuning(rows, budgets=(80,)), folder)
    ledger = tmp_path / "both.jsonl"
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows + more))
    read = measurements([ledger])
    assert [row["run_id"] for row in read.rows] == [row["run_id"] for row in rows]
    ((run_id, reason),) = read.left_out
    assert run_id == more[0]["run_id"] and f"fine-tuned from {rows[-1]['run_id']}" in reason


# where it starts -----------------------------------------------------------------------------------------------------


def test_at_the_same_size_it_starts_as_the_base_and_stores_what_is_trained(trained):
    folder, rows = trained
    run = tuning(rows, "attention", image_size=32)
    base = base_of(run, folder)
    model = begin(run, base, 16)
    assert all(torch.equal(t, base.weights[name]) for name, t in model.state_dict().items())
    assert stored_names(model, base) == freeze(model, "attention")


def test_other_data_get_a_new_head_and_the_normalisation_they_need(trained):
    """The patch embedding takes up the difference, so that an image gives the tokens that it gave the base."""
    folder, rows = trained
    run = tuning(rows, image_size=32, data="hub", preset="somewhere")
    base = base_of(run, folder)
    model = begin(run, base, 5)
    assert model.head.weight.shape == (5, 16)
    assert NORMALISATION["hub"] != NORMALISATION["stream"]
    image = torch.rand(2, 3, 32, 32)
    seen = [(image - mean) / std for mean, std in (NORMALISATION["hub"], NORMALISATION["stream"])]
    old, _ = load_branch(rows[-1]["run_id"], folder)
    torch.testing.assert_close(model.eval().forward_features(seen[0]), old.forward_features(seen[1]), rtol=0, atol=2e-5)
    stored = set(stored_names(model, base))
    assert "patch_embed.proj.bias" in stored and "patch_embed.proj.weight" not in stored  # the spreads are equal here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(base="0000000000-1600"), "no run '0000000000-1600'"),
        (dict(shape=BASE.replace(width=24)), "width=16 cannot become 24"),
    ],
)
def test_bad_bases_are_refused_in_one_line(trained, change, message):
    folder, rows = trained
    with pytest.raises(UserError, match=message) as caught:
        train(tuning(rows).replace(**change), folder)
    assert "\n" not in str(caught.value)


def test_a_part_without_a_base_is_refused():
    with pytest.raises(UserError, match="trained=attention without a base"):
        Run(BASE, RECIPE, (160,), trained="attention")
    with pytest.raises(UserError, match="trained='some' is unknown; choose one of full, attention, mlp, head"):
        Run(BASE, RECIPE, (160,), base="0123456789-1600", trained="some")


def test_what_lacks_its_base_says_so_and_is_not_called_damaged(trained, tmp_path):
    import shutil

    folder, rows = trained
    shutil.copytree(folder, tmp_path / "runs")
    (row,) = train(tuning(rows, budgets=(80,)), tmp_path / "runs")
    (tmp_path / "runs" / rows[-1]["trunk_id"] / f"{rows[-1]['run_id']}.safetensors").unlink()
    with pytest.raises(UserError, match=f"beside its base {rows[-1]['run_id']}: no run") as caught:
        load_branch(row["run_id"], tmp_path / "runs")
    assert "damaged" not in str(caught.value)


def test_a_base_that_diverged_is_told_from_one_that_was_never_trained(tmp_path):
    (row,) = train(Run(BASE, Recipe(1e30, warmup_examples=0), (160,), preset="small"), tmp_path)
    assert row["status"] == "diverged"
    with pytest.raises(UserError, match=f"{row['run_id']} diverged .* has no weights"):
        train(tuning([row]), tmp_path)


@pytest.mark.slow
def test_a_state_from_before_its_base_was_replaced_is_not_gone_on_from(trained, tmp_path, capsys):
    """What was frozen in it is the old base's: the file would be laid over other weights than it was trained with."""
    import shutil

    folder, rows = trained
    shutil.copytree(folder, tmp_path / "runs")
    run = tuning(rows, budgets=(80,), data_seed=7)  # a trunk that no other test has trained
    train(run, tmp_path / "runs")  # leaves the state at which its branch left the trunk
    base = tmp_path / "runs" / rows[-1]["trunk_id"]
    shutil.copy(base / f"{rows[0]['run_id']}.safetensors", base / f"{rows[-1]['run_id']}.safetensors")
    longer = run.replace(budgets=(80, 160))
    capsys.readouterr()
    train(longer, tmp_path / "runs")
    assert "a base with other weights" in capsys.readouterr().err
    model, _ = load_branch(longer.run_ids[-1], tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / run.trunk_id)
    train(longer, tmp_path / "runs")
    anew, _ = load_branch(longer.run_ids[-1], tmp_path / "runs")
    assert all(torch.equal(t, anew.state_dict()[name]) for name, t in model.state_dict().items())


# the command ---------------------------------------------------------------------------------------------------------


def test_the_command_says_the_cost_trains_and_merges(trained, tmp_path, capsys):
    folder, rows = trained
    asked = ["finetune", rows[-1]["run_id"], "--image-size", "64", "--examples", "80", "--runs", str(folder)]
    asked += ["--results", str(tmp_path), "--json"]
    assert main([*asked, "--dry-run"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert not list(tmp_path.iterdir())
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["cost"] == cost and row["train_flops"] == cost["train_flops"]
    assert row["trained"] == "attention" and row["trained_params"] == cost["trained_params"]
    assert row["peak_lr"] == pytest.approx(2 * RECIPE.peak_lr)  # of a part, twice the base's
    model, _ = load_branch(row["run_id"], folder)
    assert model.patch_embed.grid_size == (16, 16)
    assert [r["run_id"] for r in read_ledger(tmp_path / "finetune.jsonl")] == [row["run_id"]]
    old, _ = load_branch(rows[-1]["run_id"], folder)
    resized = build(BASE.replace(image_size=64), 16)
    resized.load_state_dict(resize_state(old.state_dict(), BASE, BASE.replace(image_size=64)))
    source = open_data("stream", "small", 64, 4, 0)
    assert found["before"]["val_loss"] == validate(resized, source)["val_loss"]


def test_the_rate_does_not_grow_along_a_chain(trained):
    folder, rows = trained
    rate = RECIPE.peak_lr
    for part, expected in (("attention", 2 * rate), ("mlp", 2 * rate), ("full", rate), ("head", 2 * rate)):
        run = tuning_of(open_base(rows[-1]["run_id"], folder), part, image_size=64, budgets=(80,))
        assert run.recipe.peak_lr == pytest.approx(expected)
        rows = train(run, folder)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train", "neck"], "--train neck is unknown"),
        (["--image-size", "66"], "image_size=66 is not a multiple of patch_size=4"),
        (["--data", "icons"], "--data icons names no preset; give SOURCE:PRESET"),
        (["--examples", "81"], "budget of 81 examples is not a multiple"),
        (["--results", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_input_to_the_command_is_one_line(trained, tmp_path, capsys, more, message):
    folder, rows = trained
    asked = ["finetune", rows[-1]["run_id"], "--image-size", "64", "--examples", "80", "--runs", str(folder)]
    assert main([*asked, "--results", str(tmp_path), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_refused_before_the_base_is_opened(capsys):
    assert main(["finetune", "timm:no_such_model", "--train", "neck"]) == 2
    assert "--train neck is unknown" in capsys.readouterr().err
