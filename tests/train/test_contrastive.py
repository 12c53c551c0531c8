"""The sigmoid objective: its loss against slow and foreign formulas, what it judges, and runs that train with it."""

import contextlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.data import Batch, open_data
from sovit.data.captions import open_captions
from sovit.encoder.export import export_encoder
from sovit.encoder.model import build, parameter_groups
from sovit.encoder.open import load_encoder
from sovit.encoder.trained import open_base
from sovit.encoder.weights import load_weights
from sovit.ledger.ledger import update_ledger
from sovit.ledger.measurements import measurements
from sovit.spec.run import Recipe, Run, budgets_for, task_flops
from sovit.spec.shape import Shape
from sovit.spec.siglip_costs import EMBED_DIM, NUM_WORDS, pair_flops, text_flops, text_params
from sovit.train.command import main
from sovit.train.finetune import begin
from sovit.train.loop import Position, Task, fit
from sovit.train.siglip import (
    Pairs,
    build_pair,
    embed_images,
    embed_words,
    pair_loss,
    sigmoid_loss,
    validate_pairs,
    zero_line,
)
from sovit.train.trainer import train

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
RECIPE = Recipe(peak_lr=0.01, batch_size=32, warmup_examples=320, objective="siglip")
SHORT, LONG = 3200, 6400  # 100 and 200 steps
RUN = Run(SHAPE, RECIPE, (SHORT, LONG), study="s")


def pair(pool="none", seed=0):
    source = open_data("stream", "cpu", 16, 4, 0)
    captions = open_captions("stream", source)
    return build_pair(SHAPE.replace(pool=pool), RECIPE, captions, seed), source, captions


# loss ----------------------------------------------------------------------------------------------------------------


def embeddings(batch, dim=8):
    generator = torch.Generator().manual_seed(batch)
    return (F.normalize(torch.randn(batch, dim, generator=generator), dim=-1) for _ in range(2))


@pytest.mark.parametrize("batch", [2, 7])
def test_the_loss_is_the_sum_over_all_pairs(batch):
    x, y = embeddings(batch)
    t, b = torch.tensor(1.3), torch.tensor(-2.0)
    total = 0.0
    for i in range(batch):
        for j in range(batch):
            z = 1 if i == j else -1
            logit = math.exp(1.3) * sum(p * q for p, q in zip(x[i].tolist(), y[j].tolist())) - 2.0
            total += math.log1p(math.exp(-z * logit))
    assert sigmoid_loss(x, y, t, b).mean().item() == pytest.approx(total / batch, rel=1e-5)


def test_the_loss_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(
        text_config=dict(vocab_size=30, max_position_embeddings=5, projection_size=16, **size),
        vision_config=dict(image_size=16, patch_size=8, **size),
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-3.0)
        out = model(input_ids=torch.randint(0, 30, (6, 5)), pixel_values=torch.randn(6, 3, 16, 16), return_loss=True)
        ours = sigmoid_loss(out.image_embeds, out.text_embeds, model.logit_scale[0], model.logit_bias[0]).mean()
    assert ours.item() == pytest.approx(out.loss.item(), rel=1e-5)


def test_the_zero_line_is_the_best_constant():
    same = F.normalize(torch.ones(64, 4), dim=-1)
    losses = [sigmoid_loss(same, same, torch.tensor(-30.0), b).mean() for b in torch.linspace(-8, 0, 4001)]
    assert min(losses).item() == pytest.approx(zero_line(64), abs=1e-4)
    assert zero_line(64) == pytest.approx(5.151, abs=1e-3)


def test_a_new_pair_begins_at_the_published_temperature_and_bias():
    model, *_ = pair()
    assert model.text.temperature.exp().item() == pytest.approx(10) and model.text.bias.item() == -10


@pytest.mark.parametrize("pool", ["none", "avg", "map", "token"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_embedding_in_parts_changes_nothing(pool, rows):
    model, source, captions = pair(pool)
    batch = Pairs(source.train(0, 8).images, captions.train(0, 8))
    assert embed_images(model, batch.images).shape == (8, EMBED_DIM)
    found = []
    for n in (8, rows):
        model.zero_grad()
        total, count = pair_loss(model, batch, n)
        total.backward()
        assert count == 8
        found.append((total.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert len(found[0][1]) == len(list(model.parameters()))
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_where_memory_runs_out_all_pairs_of_a_batch_still_count():
    trained = []
    for most in (16, 5):
        model, source, captions = pair()

        def loss_fn(batch, rows, model=model, most=most):
            assert len(batch.images) == 16
            if rows > most:
                raise torch.OutOfMemoryError("no room")
            return pair_loss(model, batch, rows)

        splits = []
        task = Task(
            [*model.parameters()],
            torch.optim.SGD(model.parameters(), lr=0.0),
            lambda step: Pairs(source.train(16 * step, 16).images, captions.train(16 * step, 16)),  # noqa: B023
            loss_fn,
            lambda step: 0.01,
            clip_norm=1.0,
            pairwise=True,
        )
        fit(task, Position(), 5, on_split=splits.append)
        assert splits == ([] if most == 16 else [4])
        trained.append(list(model.parameters()))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


# text tower ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted():
    """Count by attention's plain products: old versions of torch do not count its fused one on the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def test_counts_of_the_text_tower_are_what_torch_counts():
    model, _, captions = pair()
    words = captions.train(0, 3)
    with counted() as counter, torch.no_grad():
        model.text(words)
    assert counter.get_total_flops() == 3 * text_flops(captions.num_words)
    assert sum(p.numel() for p in model.text.parameters()) == text_params(captions.num_words, len(captions.words))
    assert captions.num_words == NUM_WORDS["stream"]


def test_the_pair_costs_what_torch_counts():
    model, source, captions = pair()
    batch = Pairs(source.train(0, 16).images, captions.train(0, 16))
    with counted() as counter, torch.no_grad():
        pair_loss(model, batch, 16)
    run = RUN.replace(recipe=Recipe(0.004, 16, objective="siglip"), budgets=(160,))
    assert counter.get_total_flops() == 16 * (SHAPE.forward_flops + task_flops(run.shape, run.recipe, run.data))
    assert run.train_flops(160) == 3 * 160 * (SHAPE.forward_flops + task_flops(run.shape, run.recipe, run.data))


def test_what_fills_a_caption_up_is_not_read():
    model, _, captions = pair()
    words = captions.train(0, 4)
    words[:, 10:] = 0
    with torch.no_grad():
        before = embed_words(model.text, words)
        model.text.words.weight[0] += 1
        model.text.positions[10:] += 1
        assert torch.equal(embed_words(model.text, words), before)


def test_the_encoder_of_a_pair_is_the_one_that_a_control_draws():
    model, *_ = pair(seed=5)
    alone = build(SHAPE, EMBED_DIM, "fan_in", 5)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in alone.state_dict().items())
    again, *_ = pair(seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    decayed = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    kept = ("text.words.weight", "text.positions", "text.temperature", "text.bias", "text.head.bias", "pos_embed")
    assert not any(id(model.get_parameter(name)) in decayed for name in kept)
    assert id(model.text.head.weight) in decayed


# judging -------------------------------------------------------------------------------------------------------------


class Planted(torch.nn.Module):
    """An eye that sees the number written in an image, and its parity, both wrongly where it is below `blind`."""

    num_prefix_tokens = 0

    def __init__(self, blind):
        super().__init__()
        self.blind, self.head = blind, torch.nn.Identity()
        self.text = PlantedText()

    def forward_features(self, images):
        number = images[:, 0, 0, 0].long()
        number = number + (number < self.blind).long()  # the next one, of the other parity
        return torch.cat((F.one_hot(number % 64, 64), F.one_hot(number % 2, 2)), 1).float()

    def forward_head(self, x, pre_logits):
        return x


class PlantedText(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature, self.bias = torch.tensor(3.0), torch.tensor(-10.0)

    def forward(self, words):
        return F.one_hot(words[:, 0] - 1, 66).float()


class PlantedData:
    """130 images, each with its number: two batches of validation and two images left over. Word 1 + n says number n
    modulo 64, words 65 and 66 the parity."""

    num_val = 130

    def val(self, start, count):
        number = torch.arange(start, start + count)
        return Batch(number.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), None, None)


class PlantedCaptions:
    def val(self, start, count):
        return 1 + torch.arange(start, start + count)[:, None] % 64

    def zero_shot(self):
        number = torch.arange(130)
        even = torch.stack((number % 2 == 0, number % 2 == 1), 1)
        return {
            "parity": (torch.tensor([[65], [66]]), even),
            "any": (torch.tensor([[65], [66]]), torch.ones_like(even)),
        }


@pytest.mark.parametrize("blind", [0, 13, 130])
def test_judging_finds_the_planted_errors(blind):
    found = validate_pairs(Planted(blind), PlantedData(), PlantedCaptions())
    assert found["val_error"] == pytest.approx(min(blind, 128) / 128)
    assert found["val_zero_shot_error/parity"] == pytest.approx(blind / 130)
    assert found["val_zero_shot_error/any"] == 0
    assert found["val_zero_shot_error"] == pytest.approx(blind / 260)
    assert (found["val_loss"] < zero_line(64)) == (blind < 130)


# runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    runs_dir = tmp_path_factory.mktemp("siglip")
    yield runs_dir, train(RUN, runs_dir)
    torch.set_num_threads(before)


def measured(rows):
    incidental = ("seconds", "spent_seconds", "date", "commit", "commit_dirty", "spent_flops")
    return [{k: v for k, v in row.items() if k not in incidental} for row in rows]


def test_a_row_says_what_was_learned_and_what_it_cost(trained):
    short, long = trained[1]
    assert long["objective"] == "siglip" and long["num_classes"] is None
    assert (long["num_params"], long["forward_flops"]) == (SHAPE.num_params, SHAPE.forward_flops)
    assert long["head_params"] == 16 * EMBED_DIM + EMBED_DIM and long["head_flops"] == pair_flops(16, 32)
    assert long["text_flops"] == text_flops(21) and long["text_params"] == text_params(21, 39)
    assert long["train_flops"] == 3 * LONG * sum(long[k] for k in ("forward_flops", "head_flops", "text_flops"))
    assert sum(row["spent_flops"] for row in trained[1]) == RUN.total_examples * long["train_flops"] / LONG
    assert long["zero_line"] == zero_line(64) and long["val_batch"] == 64
    assert long["val_error"] < short["val_error"] < 63 / 64  # which a guess gets
    assert long["val_zero_shot_error/colour"] < long["zero_shot_chance/colour"] - 0.05
    assert long["zero_shot_majority/colour"] < long["zero_shot_chance/colour"]
    assert 0 < long["val_zero_shot_error"] < 1 and "val_zero_shot_error/kind" in long


def test_its_budgets_spend_what_they_say():
    (n,) = budgets_for(SHAPE, [1e11], 0, 32, task_flops(RUN.shape, RUN.recipe, RUN.data))
    assert RUN.replace(budgets=(n,)).train_flops(n) == pytest.approx(1e11, rel=0.01)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(trained, tmp_path):
    class Killed(BaseException):
        pass

    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 3:
            raise Killed

    with pytest.raises(Killed):
        train(RUN, tmp_path, on_progress=stop, save_seconds=0)
    assert measured(train(RUN, tmp_path)) == measured(trained[1])
    for run_id in RUN.run_ids:
        name = f"{RUN.trunk_id}/{run_id}.safetensors"
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()


def test_the_stored_branch_gives_its_metrics_back_and_its_encoder_alone(trained, tmp_path):
    runs_dir, rows = trained
    model, _, captions = pair()
    weights, _ = load_weights(runs_dir / RUN.trunk_id / f"{RUN.run_id(LONG)}.safetensors")
    model.load_state_dict(weights)
    model.eval()
    found = validate_pairs(model, open_data("stream", "cpu", 16, 4, 0), captions)
    assert found == {k: rows[1][k] for k in found}
    encoder = load_encoder(RUN.run_id(LONG), runs_dir)
    assert encoder.num_params == SHAPE.num_params + rows[1]["head_params"]  # no text tower
    images = open_data("stream", "cpu", 16, 4, 0).val(0, 4).images
    embedded = F.normalize(encoder.module.head(encoder.pooled(images)), dim=-1)
    torch.testing.assert_close(embedded, embed_images(model, images))
    assert encoder.tokens(images).shape == (4, 16, 16)
    control = load_encoder(f"random:{RUN.run_id(LONG)}", runs_dir)
    assert torch.equal(control.module.pos_embed, pair()[0].pos_embed)
    report = export_encoder(RUN.run_id(LONG), runs_dir, tmp_path / "out", format="timm")
    assert report["tokens_max_difference"] < 1e-9 and "text" not in (tmp_path / "out" / "config.json").read_text()
    export_encoder(RUN.run_id(LONG), runs_dir, tmp_path / "out", format="siglip")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "which caption is an image's own (SigLIP's sigmoid loss",
        "the mean of these tokens was compared with",
    ):
        assert said in card
    assert "read out at every patch" not in card  # so are those that learned from labels


def test_rows_are_measurements_and_do_not_mix_with_classification(trained, tmp_path):
    ledger = tmp_path / "siglip.jsonl"
    update_ledger(ledger, trained[1])
    data = measurements([ledger])
    assert data.zero_line == zero_line(64) and list(data.y) == [row["val_loss"] for row in trained[1]]
    other = [row | {"objective": "classification", "run_id": f"a-{i}"} for i, row in enumerate(trained[1])]
    update_ledger(tmp_path / "other.jsonl", other)
    with pytest.raises(UserError, match="mix objective=classification"):
        measurements([ledger, tmp_path / "other.jsonl"])


def test_the_map_to_the_captions_is_no_task_head_of_a_fine_tuning(trained, tmp_path):
    """On the same data a classifier's head goes on; this one has another number of outputs, or another meaning."""
    base = open_base(RUN.run_id(SHORT), trained[0])
    run = Run(SHAPE, Recipe(0.004, 32), (160,), base=base.name, init_seed=3)
    model = begin(run, base, 16)
    assert torch.equal(model.pos_embed, base.weights["pos_embed"])
    assert torch.equal(model.head.weight, build(SHAPE, 16, "fan_in", 3).head.weight)
    assert begin(run, base, EMBED_DIM).head.weight.ne(base.weights["head.weight"]).any()


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "fields", "said"),
    [
        ({"objective": "clip"}, {}, "objective='clip' is unknown; choose one of classification, siglip"),
        (
            {},
            {"data": "hub", "preset": "cifar10"},
            "data='hub' has no captions; objective=siglip needs data=stream or icons",
        ),
        ({}, {"base": "0123456789-1600"}, "objective=siglip trains from scratch at one patch size; leave a base out"),
        ({"patch_sizes": [2, 4]}, {}, "leave patch_sizes out"),
        ({"batch_size": 1}, {}, "batch_size=1 has no pair to tell an image's caption from"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_line(tmp_path, capsys, recipe, fields, said):
    d = RUN.to_dict() | fields
    d["recipe"] |= recipe
    (tmp_path / "run.json").write_text(json.dumps(d))
    assert main([str(tmp_path / "run.json"), str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_captions_fit_any_pooling(tmp_path):
    """The stream's labels are the patches'; its captions are the image's."""
    run = Run(SHAPE.replace(pool="map"), RECIPE, (160,))
    (row,) = train(run, tmp_path)
    assert row["status"] == "ok" and row["pool"] == "map"


def test_fine_tuning_to_labels_draws_its_task_head_anew(trained):
    base = open_base(RUN.run_id(LONG), trained[0])
    model = begin(Run(SHAPE, Recipe(0.004), (160,), base=base.name), base, 16)
    assert model.head.weight.shape == (16, 16)
    assert torch.equal(model.pos_embed, base.weights["pos_embed"])
    assert base.train_flops == RUN.train_flops(LONG)
