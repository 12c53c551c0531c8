"""`sovit vlm train` and `ask` as a user calls them."""

import json
import re

import pytest
import torch

from sovit.cli.main import main
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.train.trainer import train

pytest.importorskip("transformers")

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vlm")
    run = Run(SHAPE, Recipe(peak_lr=0.01, warmup_examples=80), (80,))
    train(run, folder / "runs")
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    sizes = ["--examples", "20", "--language-model", "random:1x32", "--set", "num_val=2", 'families=["most","more"]']
    assert main(["vlm", "train", run.run_ids[0], *places, *sizes]) == 0
    row = json.loads((folder / "results" / "vlm.jsonl").read_text())
    return folder, run.run_ids[0], row["run_id"]


def ask(trained, *more):
    return main(["vlm", "ask", trained[2], "--runs", str(trained[0] / "runs"), "--max-new-tokens", "3", *more])


def test_a_trained_model_is_asked_its_own_questions(trained, capsys):
    assert ask(trained, "--val", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image"] == "stream:cpu, validation image 3"
    assert len(found["answers"]) > 8 and all({"question", "answer", "right"} == set(a) for a in found["answers"])
    assert ask(trained, "--val", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.search(r"\((right|it is: .+)\)$", line) for line in lines) and len(lines) == len(found["answers"])


def test_an_image_file_is_read_as_the_encoder_reads_images(trained, tmp_path, capsys):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    assert ask(trained, "--image", str(path), "--question", "What is it?", "Why?", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [a["question"] for a in found["answers"]] == ["What is it?", "Why?"] and "right" not in found["answers"][0]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--val", "99999"], "val=99999 does not exist; give 0 to"),
        (["--val", "1", "--image", "x.png"], "give one"),
        (["--image", "/nowhere.png", "--question", "a"], "--image /nowhere.png is no file"),
        (["--image", "/nowhere.png"], "no questions of its own"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--question", "word " * 3000], "do not fit into"),
    ],
)
def test_bad_questions_end_in_one_line(trained, capsys, more, words):
    assert ask(trained, *more) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nobody-1"], "no run 'nobody-1'"),
        (["RUN", "--language-model", "smollm3"], "of no known kind"),
        (["RUN", "--preset", "flamingo"], "choose one of projector, llava15, nanovlm"),
        (["RUN", "--examples", "21"], "no multiple of the batch"),
        (["RUN", "--set", "colour=red"], "unknown key"),
        (["RUN", "--set", "projector=pixel_shuffle_linear?factor=3"], "factor=3"),
        (["RUN", "--set", "max_length=40"], "raise it"),
        (["RUN", "--data", "hub:photos"], "has no questions"),
        (["blind:many"], "blind:16"),
    ],
)
def test_bad_runs_end_in_one_line(trained, tmp_path, capsys, arguments, words):
    folder, run_id, _ = trained
    arguments = [run_id if a == "RUN" else a for a in arguments]
    common = ["--runs", str(folder / "runs"), "--results", str(tmp_path)]
    if "--language-model" not in arguments:
        common += ["--language-model", "random:1x32"]
    if "--examples" not in arguments:
        common += ["--examples", "20"]
    assert main(["vlm", "train", *arguments, *common]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
