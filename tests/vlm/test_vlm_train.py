"""Training in stages: what is trained and what is not, resume, files, rows, the end of bad runs."""

import dataclasses
import errno
import json
import math
import shutil

import pytest
import torch

from sovit import UserError
from sovit.encoder.trained import load_branch
from sovit.encoder.weights import load_weights, save_weights
from sovit.files import CannotWrite
from sovit.ledger.schema import INCIDENTAL
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.spec.vlm_run import Part, Stage, VlmRun, preset_run
from sovit.train.base import Hooks
from sovit.train.checkpoint import Checkpoints
from sovit.train.command import main
from sovit.train.loop import Interrupted
from sovit.train.trainer import train as train_encoder

pytest.importorskip("transformers")

from sovit.vlm.evaluate import validate  # noqa: E402
from sovit.vlm.packing import NO_LABEL  # noqa: E402
from sovit.vlm.questions.questions import Question  # noqa: E402
from sovit.vlm.trained import build, open_vlm, trained_names  # noqa: E402
from sovit.vlm.trainer import VlmTrainer, check_validation, train  # noqa: E402

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
PROJECTOR = Stage(20, projector=Part("full", 0.01))
TINY = dict(language_model="random:1x32", families=("most", "more"), template="short", batch_size=4, num_val=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    runs_dir = tmp_path_factory.mktemp("runs")
    run = Run(SHAPE, Recipe(peak_lr=0.01, warmup_examples=80), (160,))
    train_encoder(run, runs_dir)
    return runs_dir, run.run_ids[0]


def run_of(trained, *stages, **more) -> VlmRun:
    return VlmRun(trained[1], stages or (PROJECTOR,), **(TINY | {"max_length": 2048} | more))


def weights_of(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


LORA = Stage(20, projector=Part(), language_model=Part("lora", 0.01))
VISION = Stage(20, vision=Part("full", 0.01), projector=Part())
WORDS = Stage(20, projector=Part(), language_model=Part("full", 0.01))


@pytest.mark.parametrize(
    "stages, changed",
    [
        ((PROJECTOR,), {"projector"}),
        ((LORA,), {"lora"}),
        ((VISION,), {"vision"}),
        ((WORDS,), {"lm"}),
        ((PROJECTOR, LORA), {"projector", "lora"}),
        ((PROJECTOR, VISION), {"projector", "vision"}),
    ],
    ids=lambda v: "-".join(sorted(v)) if isinstance(v, set) else "",
)
def test_a_stage_changes_what_it_trains_and_nothing_else(trained, tmp_path, stages, changed):
    if any(stage.language_model.mode == "lora" for stage in stages):
        pytest.importorskip("peft")
    runs_dir, _ = trained
    run = run_of(trained, *stages)
    before = weights_of(build(run, runs_dir))
    trainer = VlmTrainer(run, runs_dir, "cpu", Hooks())
    trainer.folder = tmp_path
    (row,) = train(run, runs_dir)
    after = weights_of(open_vlm(row["run_id"], runs_dir))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {"lora" if "lora_" in name else name.partition(".")[0] for name in moved}
    assert kinds == changed
    stored, _ = load_weights(runs_dir / run.trunk_id / f"{row['run_id']}.safetensors")
    assert moved <= set(stored) == set(trained_names(trainer.model, run))
    assert row["trained_params"] == sum(t.numel() for t in stored.values())


def test_adapters_change_nothing_before_they_are_trained(trained):
    pytest.importorskip("peft")
    runs_dir, _ = trained
    images, prompt = torch.rand(1, 3, 16, 16), ["Which colour is the most frequent?"]
    plain, adapted = (build(run_of(trained, stage), runs_dir) for stage in (PROJECTOR, LORA))
    scores = [model.score(images, prompt, [["red", "blue"]])[0] for model in (plain, adapted)]
    torch.testing.assert_close(*scores)
    assert sum("lora_" in name for name, _ in adapted.named_parameters()) == 14  # A and B of seven linear layers


def test_what_is_reopened_is_what_was_measured(trained):
    runs_dir, _ = trained
    (row,) = train(run_of(trained), runs_dir)
    trainer = VlmTrainer(run_of(trained), runs_dir, "cpu", Hooks())
    again = validate(open_vlm(row["run_id"], runs_dir), trainer.all_questions, 4, 2048, TINY["families"])
    assert {k: row[k] for k in again} == again
    assert row["kind"] == row["objective"] == "vlm" and row["status"] == "ok" and row["control"] == "none"
    assert all(not isinstance(value, dict) for name, value in row.items() if name != "versions"), "a row is flat"
    assert train(run_of(trained), runs_dir) == [row], "what has a record is not trained again"
    families = {name.partition("/")[2] for name in row if name.startswith("val_loss/")}
    assert families > {"most", "more", "count"}, "all families are asked, whichever were trained"


@pytest.mark.parametrize("stop_at", [2, 5, 7])  # within the first stage, at its end, within the second
def test_resume_gives_the_same_bits(trained, tmp_path, stop_at):
    runs_dir = tmp_path
    for folder in trained[0].iterdir():
        if folder.name == trained[1].partition("-")[0]:
            shutil.copytree(folder, runs_dir / folder.name)
    run = run_of(trained, PROJECTOR, WORDS, data_seed=stop_at)
    whole = tmp_path / "whole"
    shutil.copytree(runs_dir / trained[1].partition("-")[0], whole / trained[1].partition("-")[0])
    (expected,) = train(run, whole)
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        train(run, runs_dir, should_stop=lambda: next(asked) >= stop_at)
    assert (runs_dir / run.trunk_id / "latest.pt").exists()
    (row,) = train(run, runs_dir)
    differing = {k for k in row if row[k] != expected[k]} - INCIDENTAL
    assert not differing
    name = f"{run.run_ids[0]}.safetensors"
    a, b = (load_weights(folder / run.trunk_id / name)[0] for folder in (runs_dir, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (runs_dir / run.trunk_id / "latest.pt").exists()


def test_rates_are_each_parts_own(trained, monkeypatch):
    """Warm-up and peak by part; cosine to a tenth, or constant and then cooled down to nothing."""
    runs_dir, _ = trained
    stage = Stage(40, projector=Part("full", 0.5, warmup=0.0), language_model=Part("full", 0.1, warmup=0.4))
    for schedule, last in (("cosine", 0.1), ("cooldown", 0.0)):
        run = run_of(trained, stage, schedule=schedule, final_lr=0.1)
        trainer = VlmTrainer(run, runs_dir, "cpu", Hooks())
        of_projector = [trainer._factor(step, 10, stage.projector) for step in range(11)]
        of_words = [trainer._factor(step, 10, stage.language_model) for step in range(11)]
        assert of_words[:4] == [0.25, 0.5, 0.75, 1.0] and of_projector[0] == 1.0
        assert of_projector[10] == pytest.approx(last)
        assert of_projector == sorted(of_projector, reverse=True)
    assert of_projector[:9] == [1.0] * 9 and of_projector[9] == pytest.approx(1 - math.sqrt(0.5))


def test_flops_are_those_of_the_matrix_products(trained):
    """A frozen language model spends forward and the gradient of its input, 2 of the 3 products of a trained one."""
    runs_dir, _ = trained
    counts = {}
    for name, stage in (("frozen", PROJECTOR), ("full", Stage(20, language_model=Part("full", 0.01)))):
        trainer = VlmTrainer(run_of(trained, stage), runs_dir, "cpu", Hooks())
        for part in ("projector", "language_model"):
            for p in getattr(trainer.model, {"projector": "projector", "language_model": "lm"}[part]).parameters():
                p.requires_grad_(stage.parts[part].mode == "full")
        counts[name] = trainer._count(0)
    batch = trainer.batch_at(0)
    linear = sum(p.numel() for n, p in trainer.model.lm.model.layers.named_parameters() if p.ndim == 2)
    tokens = batch.ids.numel()
    labels = int((batch.labels != -100).sum())
    head = trainer.model.lm.lm_head.weight.numel()
    # what the two differ by: a gradient of each weight, 2 FLOPs a weight and token
    assert (counts["full"] - counts["frozen"]) * 4 == pytest.approx(2 * linear * tokens + 2 * head * labels, rel=0.02)


def test_a_run_that_diverges_is_recorded_as_such(trained):
    runs_dir, _ = trained
    (row,) = train(run_of(trained, Stage(20, projector=Part("full", 1e30))), runs_dir)
    assert row["status"] == "diverged" and row["val_loss"] is None and row["train_flops"] > 0


def test_a_frozen_language_model_in_half_precision_is_reopened_as_it_was_measured(trained):
    """Held in bfloat16 while the projector learns in float32; validated, and opened again, in float32."""
    runs_dir, _ = trained
    run = run_of(trained, precision="bfloat16")
    (row,) = train(run, runs_dir)
    model = open_vlm(row["run_id"], runs_dir)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = build(run_of(trained), runs_dir).lm.state_dict()
    assert all(torch.equal(t, exact[name].bfloat16().float()) for name, t in model.lm.state_dict().items())
    trainer = VlmTrainer(run, runs_dir, "cpu", Hooks())
    assert trainer.model.lm.dtype == torch.bfloat16 and trainer.model.projector.linear_1.weight.dtype == torch.float32
    again = validate(model, trainer.all_questions, 4, 2048, TINY["families"])
    assert {k: row[k] for k in again} == again


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_val": 10**6}, "num_val=1000000 of stream:cpu is too much"),
        ({"max_length": 120}, "max_length=120; raise it"),  # enough for what is trained, not for all families
    ],
)
def test_what_validation_would_refuse_is_refused_before_training(trained, monkeypatch, change, words):
    monkeypatch.setattr(VlmTrainer, "batch_at", lambda *_: pytest.fail("training began"))
    with pytest.raises(UserError, match=words):
        train(run_of(trained, **change), trained[0])


def test_validation_without_a_question_of_what_is_trained_is_refused(trained):
    class Tied:  # as image 1 of the stream is, whose most frequent colour has an equal
        num_val = 1
        ask = staticmethod(lambda split, start, count: [[Question("more", "a", "b", ())]])

    run = run_of(trained, families=("most",), num_val=1)
    with pytest.raises(UserError, match="no question of most about the first 1 validation"):
        check_validation(run, build(run, trained[0]), Tied())


def test_a_batch_of_which_nothing_is_asked_is_no_divergence(trained):
    runs_dir, _ = trained
    run = run_of(trained, families=("most",), batch_size=1)
    trainer = VlmTrainer(run, runs_dir, "cpu", Hooks())
    assert any((trainer.batch_at(step).labels == NO_LABEL).all() for step in range(20))
    (row,) = train(run, runs_dir)
    assert row["status"] == "ok"


def test_a_batch_that_does_not_fit_into_memory_is_taken_in_parts(trained, monkeypatch):
    """From the counting of its FLOPs on, which is the first to try it; to the same loss."""
    runs_dir, _ = trained
    run = run_of(trained, Stage(100, projector=Part("full", 0.01)), batch_size=20, max_length=400)
    (whole,) = train(run, runs_dir)
    loss_fn = VlmTrainer.loss_fn

    def small(self, batch):
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("planted")
        return loss_fn(self, batch)

    monkeypatch.setattr(VlmTrainer, "loss_fn", small)
    shutil.rmtree(runs_dir / run.trunk_id)
    (row,) = train(run, runs_dir)
    assert row["micro_batch"] == 1 and whole["micro_batch"] is None
    assert row["train_flops"] == whole["train_flops"] and row["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)


def test_a_state_that_cannot_be_saved_for_once_ends_nothing(trained, monkeypatch, capsys):
    def full(self, state):
        raise CannotWrite("latest.pt", OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(Checkpoints, "save_latest", full)
    (row,) = train(run_of(trained, init_seed=5), trained[0], save_seconds=0.0)
    assert row["status"] == "ok" and "training goes on" in capsys.readouterr().err


def test_a_part_that_has_changed_since_is_refused(trained, tmp_path):
    """The file holds the projector alone: before another eye it would answer anything."""
    import shutil

    runs_dir, run_id = trained
    (row,) = train(run_of(trained), runs_dir)
    for folder in (run_id.partition("-")[0], row["trunk_id"]):
        shutil.copytree(runs_dir / folder, tmp_path / folder)
    assert open_vlm(row["run_id"], tmp_path) is not None
    path = tmp_path / run_id.partition("-")[0] / f"{run_id}.safetensors"
    model, _ = load_branch(run_id, tmp_path)
    with torch.no_grad():
        model.norm.bias += 0.1
    save_weights(model, path, run_id)
    with pytest.raises(UserError, match="trained with another encoder"):
        open_vlm(row["run_id"], tmp_path)


def test_an_encoder_of_another_size_is_refused_with_the_size(trained):
    with pytest.raises(UserError, match="reads 16 px.*have 32; set image_size=16"):
        build(run_of(trained, image_size=32), trained[0])


def test_the_blind_model_trains_and_a_random_eye_is_told_apart(trained):
    runs_dir, run_id = trained
    (blind,) = train(run_of(("", "blind:4")), runs_dir)
    assert blind["control"] == "blind" and blind["num_image_tokens"] == 4 and blind["encoder_width"] is None
    assert blind["val_loss"] == pytest.approx(blind["shuffled_loss"], rel=1e-6)
    pytest.importorskip("peft")
    sighted = Stage(20, vision=Part("lora", 0.01))  # what is asked of the others, who have eyes
    assert train(run_of(("", "blind:4"), sighted), runs_dir)[0]["vision_params"] == 0
    assert VlmRun(f"random:{run_id}", (Stage(40),)).control == "random"


def test_the_command_trains_from_json(trained, tmp_path, capsys):
    runs_dir, _ = trained
    path = tmp_path / "run.json"
    run = run_of(trained)
    path.write_text(json.dumps(run.to_dict()))
    assert main([str(path), str(runs_dir)], "sovit.vlm.trainer", VlmRun.from_dict, train) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == run.run_ids[0]
    path.write_text("{}")
    assert main([str(path)], "sovit.vlm.trainer", VlmRun.from_dict, train) == 2


# what a run is ---------------------------------------------------------------------------------------------------------


def test_json_both_ways_and_ids(trained):
    run = run_of(trained, PROJECTOR, LORA)
    assert VlmRun.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert run.num_examples == 40 and run.budgets == (40,)
    same = dataclasses.replace(run, study="other")
    assert same.trunk_id == run.trunk_id
    for other in (run.replace(layer=-2), run.replace(init_seed=1), run.replace(stages=(LORA, PROJECTOR))):
        assert other.trunk_id != run.trunk_id
    golden = VlmRun("4c9e52e26e-142272", (Stage(1_000, projector=Part("full", 2e-3)),))
    assert golden.trunk_id == "93a941c748"


def test_presets_train_what_the_systems_train():
    llava = preset_run("llava15", "x-1", 1000, 2)
    assert [s.num_examples for s in llava.stages] == [456, 544]
    assert [s.parts["language_model"].mode for s in llava.stages] == ["frozen", "full"]
    assert [s.projector.peak_lr for s in llava.stages] == [1e-3, 2e-5] and not llava.norm and llava.layer == -2
    nano = preset_run("nanovlm", "x-1", 80, 8)
    assert {name: p.peak_lr for name, p in nano.stages[0].parts.items()} == {
        "vision": 5e-5, "projector": 5.12e-3, "language_model": 5e-5
    }  # fmt: skip


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Part("full"), "needs a rate"),
        (lambda: Part("frozen", 0.1), "frozen none"),
        (lambda: Part("half", 0.1), "choose one of frozen"),
        (lambda: Part("full", 0.1, warmup=1.5), "must be at least 0 and under 1"),
        (lambda: Stage(80, projector=Part("lora", 0.1)), "train it in full"),
        (lambda: Stage(80, projector=Part()), "trains nothing"),
        (lambda: preset_run("llama", "a-1", 80), "choose one of projector"),
        (lambda: preset_run("llava15", "a-1", 81), "no multiple"),
        (lambda: VlmRun("a-1", ()), "at least one stage"),
        (lambda: VlmRun("a-1", (Stage(81),)), "no multiple of the batch"),
        (lambda: VlmRun("blind:x", (Stage(80),)), "blind:16"),
        (lambda: VlmRun("blind:0", (Stage(80),)), "blind:16"),
        (lambda: VlmRun("blind:4", (VISION,), batch_size=4), "has no vision"),
        (lambda: VlmRun("a-1", (Stage(80),), families=("most", "most")), "remove the repeat"),
        (lambda: VlmRun("a-1", (Stage(80),), beta2=1.0), "under 1"),
        (lambda: VlmRun("a-1", (Stage(80),), template="poem"), "choose one of chat"),
        (
            lambda: VlmRun.from_dict({"encoder": "a-1", "stages": [{"num_examples": 80, "eyes": 2}]}),
            "unknown key 'eyes'",
        ),
    ],
)
def test_bad_runs_are_refused_with_the_remedy(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no trained vision-language model 'a-1'"):
        open_vlm("a-1", tmp_path)
