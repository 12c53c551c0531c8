"""Questions about the stream: every answer is worked out again, another way, from text and latents."""

import json
import re
from collections import Counter, defaultdict

import pytest
import torch

from sovit import UserError
from sovit.cli.main import main
from sovit.data.stream.scene import Stream
from sovit.data.stream.world import PRESETS, VAL_SEED
from sovit.vlm.questions.questions import KINDS, Question, Questions, open_questions, salt, text_only_accuracy
from sovit.vlm.questions.stream import REFERENCE_SEED, read_scenes

ROW = {word: i for i, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight"))}


@pytest.fixture(scope="module")
def cpu():
    return open_questions("stream", "cpu", 16, data_seed=5)


def worked_out(question: str, colour: list[str], mark: str, side: int) -> str:
    """The answer, from flat lists of the colours and marks of all cells; fails where it is not the only one."""

    def at(row, column):
        return ROW[row] * side + ROW[column]

    def only(name):
        assert colour.count(name) == 1
        return colour.index(name)

    def beside(step, cell):
        found = cell + {"left of": -1, "right of": 1, "above": -side, "below": side}[step]
        assert 0 <= found < side * side and (step in ("above", "below") or found // side == cell // side)
        return colour[found]

    corner = {"top left": 0, "top right": side - 1, "bottom left": side * (side - 1), "bottom right": side**2 - 1}
    step = "(left of|right of|above|below)"
    rules = [
        ("Read the marks in order.", lambda: " ".join(mark)),
        (r"Read the marks of row (\w+)\.", lambda r: " ".join(mark[ROW[r] * side :][:side])),
        (r"Name the colours of row (\w+)\.", lambda r: " ".join(colour[ROW[r] * side :][:side])),
        (r"What colour is row (\w+), column (\w+)\?", lambda r, c: colour[at(r, c)]),
        (r"How many cells are (.+)\?", lambda name: str(sum(c == name for c in colour))),
        (r"How many colours are in row (\w+)\?", lambda r: str(len({*colour[ROW[r] * side :][:side]}))),
        (r"How many colours are in column (\w+)\?", lambda c: str(len({*colour[ROW[c] :: side]}))),
        (rf"What colour is {step} row (\w+), column (\w+)\?", lambda s, r, c: beside(s, at(r, c))),
        (r"How many cells have the colour of the (\w+ \w+) cell\?", lambda k: str(colour.count(colour[corner[k]]))),
        (rf"What colour is {step} the only (.+) cell\?", lambda s, name: beside(s, only(name))),
        (r"Which mark has the only (.+) cell\?", lambda name: mark[only(name)]),
    ]  # fmt: skip
    if question == "Which colour is the most frequent?":
        (first, most), *rest = Counter(colour).most_common()
        assert not rest or rest[0][1] < most
        return first
    if found := re.fullmatch("Are there more (.+) cells than (.+) cells\\?", question):
        difference = colour.count(found[1]) - colour.count(found[2])
        assert difference
        return "yes" if difference > 0 else "no"
    ((found, rule),) = [(m, rule) for pattern, rule in rules if (m := re.fullmatch(pattern, question))]
    return rule(*found.groups())


@pytest.mark.parametrize(
    ("preset", "split"), [("cpu", "train"), ("cpu", "val"), ("cpu-flip", "val"), ("small", "train"), ("gpu", "val")]
)
def test_answers_of_the_stream(preset, split):
    world = PRESETS[preset]
    questions = open_questions("stream", preset, world.image_size, data_seed=5)
    stream = Stream(world, world.image_size, world.cell, 5, "cpu")
    batch = (stream.train if split == "train" else stream.val)(300, 20)
    scene = stream.latents(VAL_SEED if split == "val" else 5, torch.arange(300, 320))
    seen = set()
    for i, asked in enumerate(questions.ask(split, 300, 20)):
        colour = [stream.colour_names[c].replace("-", " ") for c in scene["colour"][i]]
        mark = "".join("ABCDEFGHIJKLMNOP"[label] for label in batch.labels[i])  # as an encoder is taught them
        for q in asked:
            told = worked_out(q.question, colour, mark, world.grid)
            assert q.answer == told, q
            assert q.answer in q.choices or not q.choices
            seen.add(q.family)
        families = [q.family for q in asked]
        assert families == [f for f in questions.families if f in families]
        assert set(questions.families) - set(families) <= {"most", "beside_only", "mark_of_only"}
    assert seen == set(questions.families)
    assert {questions.kinds[f] for f in seen} == set(KINDS)


def test_images_are_those_that_are_asked_about(cpu):
    """The glyphs of what is drawn have the colours that are named, row by row."""
    stream = Stream(PRESETS["cpu"], 16, 4, 5, "cpu")
    images = cpu.images("val", 250, 50)
    assert images.shape == (50, 3, 16, 16) and images.dtype == torch.float32
    scene = stream.latents(VAL_SEED, torch.arange(250, 300))
    ink = 0.2 + 0.8 * stream.glyph[scene["glyph"]]  # [B, C, 3, 3]
    seen = images.view(50, 3, 4, 4, 4, 4)[:, :, :, 1:, :, 1:].permute(0, 2, 4, 3, 5, 1)  # [B, rows, columns, 3, 3, rgb]
    drawn = stream.palette[:, None, None] * ink.view(50, 4, 4, 1, 3, 3, 1)  # [B, rows, columns, colours, 3, 3, rgb]
    nearest = (seen[:, :, :, None] - drawn).square().flatten(4).sum(4).argmin(3)  # [B, rows, columns]
    right = total = 0
    for image, asked in zip(nearest.tolist(), cpu.ask("val", 250, 50)):
        (q,) = [q for q in asked if q.family == "colours_row"]
        row = image[ROW[q.question.split()[-1].rstrip(".")]]
        right += sum(stream.colour_names[c] == name for c, name in zip(row, q.answer.split(), strict=True))
        total += 4
    assert right / total > 0.97


def test_questions_are_pure_functions_of_seed_and_index(cpu):
    again = open_questions("stream", "cpu", 16, data_seed=5)
    for split in ("train", "val"):
        whole = cpu.ask(split, 250, 20)
        assert [image for k in range(0, 20, 7) for image in again.ask(split, 250 + k, min(7, 20 - k))] == whole
        assert torch.equal(again.images(split, 253, 4), cpu.images(split, 250, 20)[3:7])
    other = open_questions("stream", "cpu", 64, data_seed=6)  # of another size as well
    assert other.ask("val", 0, 20) == cpu.ask("val", 0, 20) != cpu.ask("train", 0, 20)
    assert other.ask("train", 0, 20) != cpu.ask("train", 0, 20)


def test_no_scene_is_shown_in_training_and_in_validation(cpu):
    """Of a seed near the key of validation too; what tells how common answers are is of neither."""
    seeds = (5, 2**32 - 1, VAL_SEED, REFERENCE_SEED)
    told = {str(scene) for seed in seeds for scene in read_scenes(cpu.stream, seed, 0, 300)}
    assert len(told) == 1200


def test_families_are_asked_alike_whichever_others_are(cpu):
    some = open_questions("stream", "cpu", 16, data_seed=5, families=("count", "marks"))
    assert some.families == ("count", "marks") and some.kinds == {"count": "counting", "marks": "reading"}
    for few, all_ in zip(some.ask("train", 0, 20), cpu.ask("train", 0, 20)):
        assert few == sorted((q for q in all_ if q.family in some.families), key=lambda q: q.family)
    assert len({salt(family) for family in cpu.families}) == len(cpu.families)


def test_little_can_be_guessed_from_the_text(cpu):
    """No family but that of the most frequent colour, which has one text, is answered without looking."""
    baseline = text_only_accuracy(cpu, 1024)
    assert set(baseline) == set(cpu.families)
    most = {"most": 0.55, "more": 0.55, "num_colours": 0.4}
    for family, accuracy in baseline.items():
        assert accuracy < most.get(family, 0.22), (family, accuracy)
    yes = [q.answer == "yes" for image in cpu.ask("val", 0, 1024) for q in image if q.family == "more"]
    assert 0.45 < sum(yes) / len(yes) < 0.55
    by_text = defaultdict(list)
    for (q,) in Questions(cpu.stream, ("more",)).ask("train", 0, 4096):
        by_text[q.question].append(q.answer)
    assert len(by_text) == 56
    for text, answers in by_text.items():
        assert 0.25 < answers.count("yes") / len(answers) < 0.75, text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("hub", "cpu", 16, 0), "data='hub' has no questions"),
        (("stream", "detail", 32, 0), "preset='detail'.*choose one of cpu"),
        (("stream", "moon", 16, 0), "preset='moon'"),
        (("stream", "cpu", 17, 0), "image_size=17"),
        (("stream", "cpu", 16, 0, ("counts",)), "family='counts' is unknown; choose from marks"),
    ],
)
def test_what_cannot_be_asked_is_said(wrong, message):
    with pytest.raises(UserError, match=message):
        open_questions(*wrong)


def test_images_that_do_not_exist(cpu):
    for split, start, count in (("val", 4090, 7), ("train", -1, 2), ("test", 0, 1)):
        for refused in (cpu.ask, cpu.images):
            with pytest.raises(UserError, match=split):
                refused(split, start, count)
            with pytest.raises(UserError, match="count=0"):
                refused("train", 0, 0)


# the text-only baseline itself


def made(answers: str, texts: str, choices=("a", "b")) -> list[Question]:
    return [Question("f", text, answer, choices) for answer, text in zip(answers, texts, strict=True)]


def test_the_text_only_baseline_knows_the_text_and_no_more():
    """Where the text says the answer they are right; where it does not they know the share of each answer."""

    class Made:
        families, num_val = ("f",), 400

        def __init__(self, questions):
            self.questions = questions

        def ask(self, split, start, count):
            return [[q] for q in self.questions]

    assert text_only_accuracy(Made(made("aabb" * 100, "ttuu" * 100)), 400) == {"f": 1.0}
    assert text_only_accuracy(Made(made("abbb" * 100, "t" * 400)), 400) == {"f": 0.75}
    words = [Question("f", "t", answer, ()) for answer in ("a b", "a c", "a b", "d b") * 100]
    assert text_only_accuracy(Made(words), 400) == {"f": 0.5}


def test_the_command(tmp_path, capsys):
    assert main(["vlm", "questions", "stream:cpu", "--count", "2", "--out", str(tmp_path / "sheet.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    asked = open_questions("stream", "cpu", 16, 0).ask("train", 0, 2)
    assert [[q["answer"] for q in image] for image in found["images"]] == [[q.answer for q in image] for image in asked]
    assert set(found["text_only_accuracy"]) == {q.family for image in asked for q in image} | {"most"}
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert main(["vlm", "questions", "stream:detail"]) == 2 and "preset='detail'" in capsys.readouterr().err
