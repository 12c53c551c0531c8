"""The first vision-language model: exact questions, a blind control that is blind, a frozen encoder, one row."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from sovit import UserError
from sovit.data.stream import PRESETS, VAL_SEED, Stream
from sovit.ledger import INCIDENTAL, read_record
from sovit.loop import Interrupted
from sovit.run import Recipe, Run
from sovit.shape import Shape
from sovit.train import train as train_encoder

pytest.importorskip("transformers")

from sovit.encoder import open_encoder  # noqa: E402
from sovit.vlm.data import FAMILIES, NO_LABEL, StreamQuestions  # noqa: E402
from sovit.vlm.model import VisionLanguageModel, small_language_model  # noqa: E402
from sovit.vlm.train import VlmRun, encoder_flops_read, forward_flops, train, validate  # noqa: E402

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
RECIPE = Recipe(peak_lr=0.01, warmup_examples=80)


@pytest.fixture(scope="module")
def questions():
    return StreamQuestions(Stream(PRESETS["cpu"], 16, 4, data_seed=3, device="cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    runs_dir = tmp_path_factory.mktemp("runs")
    run = Run(SHAPE, Recipe(peak_lr=0.01, warmup_examples=80), (1600,))
    train_encoder(run, runs_dir)
    return runs_dir, run.run_ids[0]


# questions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_are_the_facts_of_the_scene(questions, split):
    """Each answer, read as text, against a plain count of the latents."""
    stream = questions.stream
    batch = getattr(questions, split)(40, 5)
    seed = VAL_SEED if split == "val" else stream.data_seed
    scene = stream.latents(seed, torch.arange(40, 45))
    labels = getattr(stream, split)(40, 5).labels
    for i in range(5):
        said = {}
        for q, family in enumerate(FAMILIES):
            text = questions.text(batch.words[i, q])
            assert text.startswith(FAMILIES[family] + " ")
            said[family] = text.removeprefix(FAMILIES[family]).split()
        colours = [stream.colour_names[c] for c in scene["colour"][i]]
        assert said["colours"] == colours
        assert said["counts"] == [str(colours.count(name)) for name in stream.colour_names]
        assert said["most"] == [max(stream.colour_names, key=colours.count)]  # ties: the first, as in the stream
        assert said["marks"] == [f"answer-{a}" for a in labels[i].tolist()]


def test_colour_names_are_the_colours_that_are_drawn():
    """Read off the palette by a person's thresholds: which of red, green and blue are lit."""
    stream = Stream(PRESETS["small"], 32, 4, 0, "cpu")
    lit = {"grey": None, "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
    lit |= {"magenta": (1, 0, 1), "cyan": (0, 1, 1), "white": (1, 1, 1)}
    assert len(stream.colour_names) == len(stream.palette) == 16
    for name, rgb in zip(stream.colour_names, stream.palette.tolist(), strict=True):
        expected = lit[name.removeprefix("pale-")]
        if expected is None:
            assert len(set(rgb)) == 1
        else:
            assert [
                round((v - min(rgb)) / (max(rgb) - min(rgb) or 1)) if max(rgb) > min(rgb) else 1 for v in rgb
            ] == list(expected)


def test_labels_are_the_next_words_of_the_answer_and_nothing_else(questions):
    batch = questions.train(0, 3)
    answers = {"marks": 16, "colours": 16, "counts": 8, "most": 1}
    for q, family in enumerate(FAMILIES):
        asked = len(FAMILIES[family].split())
        for t in range(batch.words.shape[-1]):
            inside = asked - 1 <= t < asked - 1 + answers[family]
            expected = batch.words[:, q, t + 1] if inside else torch.full((3,), NO_LABEL)
            assert torch.equal(batch.labels[:, q, t], expected)


def test_a_sample_does_not_depend_on_how_it_is_asked_for(questions):
    whole = questions.train(250, 12)
    parts = [questions.train(250, 5), questions.train(255, 7)]
    for a, *b in zip(whole, *parts):
        assert torch.equal(a, torch.cat(b))


# model -----------------------------------------------------------------------------------------------------------------


def test_the_blind_model_is_blind_and_the_other_is_not(questions, trained):
    runs_dir, run_id = trained
    batch = questions.train(0, 4)
    other = batch.images.flip(0)
    for encoder in (None, open_encoder(run_id, runs_dir)):
        model = VisionLanguageModel(encoder, small_language_model(len(questions.words), 32, 2, seed=0))
        same = torch.equal(model(batch.images, batch.words), model(other, batch.words))
        assert same == (encoder is None)


def test_no_word_is_told_before_it_is_asked(questions, trained):
    """Causal: changing an answer's word changes no logits before it."""
    runs_dir, run_id = trained
    batch = questions.train(0, 2)
    model = VisionLanguageModel(open_encoder(run_id, runs_dir), small_language_model(len(questions.words), 32, 2, 0))
    changed = batch.words.clone()
    changed[..., 10:] = 1
    before, after = model(batch.images, batch.words), model(batch.images, changed)
    torch.testing.assert_close(before[:, :, :10], after[:, :, :10])
    assert not torch.allclose(before[:, :, 10:], after[:, :, 10:])


def test_only_projector_and_language_model_learn(questions, trained):
    runs_dir, run_id = trained
    encoder = open_encoder(run_id, runs_dir)
    model = VisionLanguageModel(encoder, small_language_model(len(questions.words), 32, 2, 0))
    batch = questions.train(0, 2)
    model(batch.images, batch.words).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in encoder.module.parameters())
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in encoder.module.parameters()}


def test_flops_against_a_closed_form(questions, trained):
    """A Llama layer: q, k, v, o of w^2, three MLP matrices of 4 w^2, and the n^2 of attention; 2 per multiply-add."""
    runs_dir, run_id = trained
    w, depth, num_words = 32, 2, len(questions.words)
    batch = questions.train(0, 1)
    q, t = batch.words.shape[1:]
    for encoder in (None, open_encoder(run_id, runs_dir)):
        model = VisionLanguageModel(encoder, small_language_model(num_words, w, depth, 0))
        n = t + (0 if encoder is None else 16)
        layers = depth * (2 * n * (4 * w * w + 3 * w * 4 * w) + 2 * 2 * n * n * w)
        expected = q * (layers + 2 * t * w * num_words)
        if encoder is not None:
            expected += 16 * 2 * (16 * w + w * w)  # the projector, once an image
        assert forward_flops(model, batch) == expected


# training --------------------------------------------------------------------------------------------------------------


def test_a_run_gives_one_row_once(trained):
    runs_dir, run_id = trained
    run = VlmRun(run_id, RECIPE, 160, lm_width=32)
    seen = []
    row = train(run, runs_dir, on_progress=seen.append)
    assert row["status"] == "ok" and row["objective"] == "vlm" and row["control"] == "none"
    assert row == read_record(runs_dir, run.trunk_id, run.run_id)
    assert (row["width"], row["num_params"]) == (16, SHAPE.num_params) and row["encoder"] == run_id
    assert row["train_flops"] == 160 * (SHAPE.forward_flops + 3 * (row["forward_flops"] - SHAPE.forward_flops))
    assert seen[-1]["share"] == 1.0
    assert train(run, runs_dir, on_progress=lambda p: pytest.fail("trained again")) == row


def test_a_stopped_run_goes_on_to_the_same_bits(trained, tmp_path):
    """Stopped within a window, and again: the row and the weights are those of an uninterrupted run."""
    runs_dir, run_id = trained
    shutil.copytree(runs_dir / run_id.partition("-")[0], tmp_path / run_id.partition("-")[0])
    run = VlmRun(run_id, RECIPE, 960, lm_width=32, init_seed=1)
    whole = train(run, runs_dir)
    for at in (7, 46):  # steps of each call: 7, then 53, past the first window
        calls = iter(range(10_000))
        with pytest.raises(Interrupted):
            train(run, tmp_path, should_stop=lambda calls=calls, at=at: next(calls) >= at)
        assert (tmp_path / run.trunk_id / "latest.pt").exists()
    shorter = VlmRun(run_id, RECIPE, 640, lm_width=32, init_seed=1)
    assert train(shorter, tmp_path)["val_loss"] == train(shorter, runs_dir)["val_loss"]  # no other budget's state
    row = train(run, tmp_path)
    for key in set(whole) - INCIDENTAL:
        assert row[key] == whole[key], key
    weights = [(d / run.trunk_id / f"{run.run_id}.safetensors").read_bytes() for d in (runs_dir, tmp_path)]
    assert weights[0] == weights[1]
    assert not (tmp_path / run.trunk_id / "latest.pt").exists()


def test_validation_against_a_plain_loop(questions, trained, monkeypatch):
    import sovit.vlm.train as module

    monkeypatch.setattr(module, "VAL_IMAGES", 6)
    monkeypatch.setattr(module, "VAL_BATCH", 3)
    runs_dir, run_id = trained
    model = VisionLanguageModel(open_encoder(run_id, runs_dir), small_language_model(len(questions.words), 32, 1, 0))
    found = validate(model, questions)
    batch = questions.val(0, 6)
    with torch.no_grad():
        log_p = model(batch.images, batch.words).log_softmax(-1)
    losses = {family: [] for family in FAMILIES}
    for i, q, t in (batch.labels != NO_LABEL).nonzero().tolist():
        losses[list(FAMILIES)[q]].append(-log_p[i, q, t, batch.labels[i, q, t]].item())
    assert {f: len(v) for f, v in losses.items()} == {"marks": 96, "colours": 96, "counts": 48, "most": 6}
    for family, values in losses.items():
        assert found[f"val_loss/{family}"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert found["val_loss"] == pytest.approx(sum(map(sum, losses.values())) / 246, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [dict(preset="moon"), dict(num_examples="160"), dict(num_examples=16), dict(lm_width=8), dict(lm_depth=0)],
    ids=str,
)
def test_bad_runs_are_said(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        VlmRun(**{"encoder": "", "recipe": RECIPE, "num_examples": 160} | wrong)


def test_a_vision_language_model_is_no_encoder(trained):
    runs_dir, _ = trained
    run = VlmRun("", RECIPE, 160, lm_width=32, init_seed=5)
    train(run, runs_dir)
    with pytest.raises(UserError, match="is a vision-language model"):
        open_encoder(run.run_id, runs_dir)


def test_an_earlier_block_costs_less():
    shape = SHAPE.replace(depth=3)
    assert encoder_flops_read(shape, -1) == shape.forward_flops
    assert encoder_flops_read(shape, -2) == SHAPE.replace(depth=2).forward_flops


def test_controls_are_different_runs():
    ids = {VlmRun(encoder, RECIPE, 160).trunk_id for encoder in ("a-1", "random:a-1", "")}
    assert len(ids) == 3
    assert [VlmRun(e, RECIPE, 160).control for e in ("a-1", "random:a-1", "")] == ["none", "random", "blind"]
    assert VlmRun("", RECIPE, 320).trunk_id == VlmRun("", RECIPE, 160).trunk_id


def test_the_command(trained, tmp_path):
    runs_dir, _ = trained
    (tmp_path / "run.json").write_text(json.dumps({"encoder": "", "recipe": {"peak_lr": 0.01}, "num_examples": 80}))
    command = [sys.executable, "-m", "sovit.vlm.train"]
    done = subprocess.run([*command, str(tmp_path / "run.json"), str(runs_dir)], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["control"] == "blind", done.stderr
    (tmp_path / "bad.json").write_text(json.dumps({"encoder": "", "num_examples": 80}))
    done = subprocess.run([*command, str(tmp_path / "bad.json"), str(runs_dir)], capture_output=True, text=True)
    assert done.returncode == 2 and "not a VLM run" in done.stderr and done.stderr.count("\n") == 1


def test_an_encoder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no trained run"):
        train(VlmRun("ffffffffff-160", RECIPE, 160), tmp_path)
