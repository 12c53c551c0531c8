"""Evaluation on public sets with models of known behaviour: one that sees, one that does not, one that is killed."""

import json
import multiprocessing
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from test_benchmarks import COLOURS, png

from sovit import UserError
from sovit.encoder import Preprocess
from sovit.vlm import evaluate_benchmark
from sovit.vlm.benchmarks import BENCHMARKS, Item, Picture
from sovit.vlm.evaluate_benchmark import donors, evaluate, image_weights, scored, scores_text, to_tensor

POPE, MMSTAR, VQA = BENCHMARKS["pope"], BENCHMARKS["mmstar"], BENCHMARKS["vqav2"]
SQUARE = Preprocess(8, (0.5,) * 3, (0.5,) * 3)


class Oracle:
    """Answers from the colour of the image's middle, by a table; without an image it says the table's first answer."""

    encoder = None  # what evaluate() reads of a model: `preprocess` is given in its place

    def __init__(self, answers: dict[str, str], cut: int | None = None):
        self.answers, self.asked, self.cut = answers, [], cut

    def generate(self, images, prompts, max_new_tokens):
        if self.cut is not None and len(self.asked) >= self.cut:
            raise KeyboardInterrupt
        self.asked += prompts
        return self._said(images, len(prompts))

    def score(self, images, prompts, answers):
        self.asked += prompts
        said = self._said(images, len(prompts))
        return [torch.tensor([-0.1 if a == s else -3.0 for a in given]) for s, given in zip(said, answers)]

    def _said(self, images, count):
        if images is None:
            return [next(iter(self.answers.values()))] * count
        assert images.shape == (count, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
        middle = images[:, :, 4, 4] * 255  # [B, 3]
        table = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        return [self.answers[list(COLOURS)[int(k)]] for k in torch.cdist(middle, table).argmin(1)]


def picture(k: int) -> Picture:
    pixels = np.full((16, 16, 3), list(COLOURS.values())[k % 4], np.uint8)
    return Picture(lambda: png(Image.fromarray(pixels)), f"row {k}")


def pope(num_images: int, each: int = 2) -> list[Item]:
    """Red images, of which there are half, are "yes"."""
    return [
        Item(f"random/{k}-{j}", (picture(k % 2),), f"Question {j} of {k}?", ("yes", "no"), (("yes", "no")[k % 2],),
             f"image {k}", {"group": "random"})
        for k in range(num_images) for j in range(each)
    ]  # fmt: skip


def stars(num: int) -> list[Item]:
    options = ("", "", "", "")
    return [
        Item(str(k), (picture(k),), f"Question {k}?", tuple("ABCD"), ("ABCD"[k % 4],), str(k),
             {"group": f"part {k % 3}", "category": "all", "options": options})
        for k in range(num)
    ]  # fmt: skip


YES = {"red": "yes", "green": "no", "blue": "no", "yellow": "no"}
LETTERS = dict(zip(COLOURS, "ABCD"))


@pytest.mark.parametrize("route", ["generate", "likelihood"])
@pytest.mark.parametrize(
    ("benchmark", "items", "answers", "chance"),
    [(POPE, pope(40), YES, 0.5), (MMSTAR, stars(48), LETTERS, 0.25)],
    ids=["pope", "mmstar"],
)
def test_a_model_that_sees_scores_1_and_its_controls_do_not(tmp_path, benchmark, items, answers, chance, route):
    said = {
        control: evaluate(
            Oracle(answers), items, benchmark, control, route, 7, tmp_path / f"{control}.jsonl", preprocess=SQUARE
        )
        for control in ("image", "blind", "shuffled")
    }
    result = scored(benchmark, items, said)
    own, blind, shuffled = (result["controls"][c]["metrics"]["accuracy"] for c in ("image", "blind", "shuffled"))
    assert own == {"value": 1, "low": 1, "high": 1}
    assert blind["value"] == pytest.approx(chance) and result["chance"] == chance
    assert blind["low"] < chance < blind["high"]
    assert shuffled["value"] < 0.75 and shuffled["high"] < 1
    assert result["over"]["blind"]["value"] == pytest.approx(1 - chance)
    assert result["over"]["blind"]["low"] == pytest.approx(1 - blind["high"])  # paired: the same draws
    assert all(result["controls"][c]["unparsed"] == 0 for c in result["controls"])
    assert (result["n"], result["num_images"]) == (len(items), len({item.image_id for item in items}))
    text = scores_text(json.loads(json.dumps(result)))
    assert f"{benchmark.name}: {len(items)} questions" in text and "accuracy over blind: " in text


def test_a_model_that_sees_nothing_scores_the_same_whatever_it_is_shown(tmp_path):
    items, constant = pope(10), dict.fromkeys(COLOURS, "no")
    said = {
        c: evaluate(Oracle(constant), items, POPE, c, out=tmp_path / c, preprocess=SQUARE)
        for c in ("image", "shuffled")
    }
    result = scored(POPE, items, said)
    assert result["over"]["shuffled"] == {"value": 0, "low": 0, "high": 0}
    assert result["controls"]["image"]["metrics"]["yes_ratio"]["value"] == 0


def test_a_model_without_an_encoder_is_given_no_image(tmp_path):
    broken = Picture(lambda: b"no image", "row 0")
    items = [Item("a", (broken,), "?", (), ("red",), "a"), Item("b", (broken,), "?", (), ("red",), "b")]

    class Blind:
        encoder = None

        def generate(self, images, prompts, max_new_tokens):
            assert max_new_tokens == 16
            return ["red"] * len(prompts)

    assert evaluate(Blind(), items, VQA, out=tmp_path / "a") == ["red", "red"]
    with pytest.raises(UserError, match="the image of row 0 cannot be read"):
        evaluate(Blind(), items, VQA, out=tmp_path / "b", preprocess=SQUARE)


def test_what_cannot_be_read_is_counted_apart(tmp_path):
    items = stars(8)
    said = ["A", "I see a square", "C", "", "A", "B", "perhaps (A) or (B)", "D"]
    result = scored(MMSTAR, items, {"image": said})
    assert result["controls"]["image"]["unparsed"] == pytest.approx(3 / 8) and result["over"] == {}
    assert result["controls"]["image"]["metrics"]["accuracy_micro"]["value"] == pytest.approx(5 / 8)


# whose image


def test_shuffled_images_are_those_of_others_and_each_serves_once():
    items = pope(15, each=3)
    found = donors(items)
    assert found == donors(items)
    assert all(items[i].image_id != items[j].image_id for i, j in enumerate(found))
    assert set(Counter(items[j].image_id for j in found).values()) == {3}
    of_image = {items[i].image_id: items[j].image_id for i, j in enumerate(found)}
    assert all(of_image[items[i].image_id] == items[j].image_id for i, j in enumerate(found))
    with pytest.raises(UserError, match="needs two images at least"):
        donors(pope(1, each=3))


# intervals


def test_the_bootstrap_draws_whole_images():
    cluster = np.array([0, 0, 0, 1, 2, 2])
    weights = np.concatenate(list(image_weights(cluster, 500)))
    assert weights.shape == (500, 6)
    assert (weights[:, [0]] == weights[:, :3]).all() and (weights[:, 4] == weights[:, 5]).all()
    assert (weights[:, [0, 3, 4]].sum(1) == 3).all()


def test_the_interval_of_a_mean_is_that_of_the_textbook(tmp_path):
    """Scores that agree within an image: the standard error is of the images, 2.2 times that of the questions."""
    right = np.random.default_rng(0).random(400) < 0.7
    items = pope(400, each=5)
    said = [("yes" if (item.answers[0] == "yes") == right[i // 5] else "no") for i, item in enumerate(items)]
    found = scored(POPE, items, {"image": said})["controls"]["image"]["metrics"]["accuracy"]
    error = 1.645 * np.sqrt(right.var() / 400)
    assert found["value"] == pytest.approx(right.mean())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(error, rel=0.12)


def test_intervals_of_few_images_stay_within_what_there_is():
    said = ["yes", "yes", "no", "no", "yes", "yes", "yes", "yes"]  # of four images the last is answered wrongly
    result = scored(POPE, pope(4), {"image": said, "blind": ["no"] * 8, "shuffled": ["yes", "no"] * 4})
    for of in result["controls"].values():
        for name, number in of["metrics"].items():
            assert 0 <= number["low"] <= number["value"] <= number["high"] <= 1, name
    assert result["controls"]["image"]["metrics"]["accuracy"]["high"] == 1
    assert -1 <= result["over"]["blind"]["low"] < 0.25 < result["over"]["blind"]["high"] <= 1
    alone = scored(POPE, pope(1), {"image": ["yes", "no"]})["controls"]["image"]["metrics"]["accuracy"]
    assert alone == {"value": 0.5, "low": None, "high": None} and "0.500\n" in scores_text(
        scored(POPE, pope(1), {"image": ["yes", "no"]})
    )


# images


@pytest.mark.parametrize("size", [(50, 31), (20, 64), (224, 224), (7, 5)])
@pytest.mark.parametrize(
    ("crop", "crop_pct", "resample"),
    [("squash", 1.0, "bicubic"), ("center", 0.9, "bicubic"), ("center", 1.0, "bilinear")],
)
def test_to_tensor_is_what_timm_does(size, crop, crop_pct, resample):
    timm = pytest.importorskip("timm.data")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    transform = timm.create_transform(
        (3, 28, 28), is_training=False, interpolation=resample, crop_mode=crop, crop_pct=crop_pct,
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    ours = to_tensor(image, Preprocess(28, (0,) * 3, (1,) * 3, resample, crop, crop_pct))
    assert ours.shape == (3, 28, 28)
    torch.testing.assert_close(ours, transform(image))


def test_a_long_strip_is_refused_before_it_grows():
    strip = Image.new("RGB", (1, 400_000))
    assert to_tensor(strip, Preprocess(224, (0,) * 3, (1,) * 3)).shape == (3, 224, 224)
    with pytest.raises(UserError, match="an image of 1 x 400000 pixels is too long to be resized to 224 pixels"):
        to_tensor(strip, Preprocess(224, (0,) * 3, (1,) * 3, crop="center"))


# the file of answers


def test_answers_are_kept_and_none_is_asked_for_again(tmp_path):
    items, out = pope(10), tmp_path / "run" / "pope.jsonl"
    first = Oracle(YES, cut=6)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, items, POPE, batch_size=3, out=out, name="a run", preprocess=SQUARE)
    assert len(first.asked) == 6 and len(out.read_text().splitlines()) == 7
    with open(out, "a") as file:
        file.write('{"id": "random/9-1", "sai')  # a kill in the middle of a line
    second = Oracle(YES)
    said = evaluate(second, items, POPE, batch_size=4, out=out, name="a run", preprocess=SQUARE)
    assert len(first.asked + second.asked) == len(set(first.asked + second.asked)) == 20
    header, *lines = map(json.loads, out.read_text().splitlines())
    assert header | {"items": ""} == {
        "schema": 1, "model": "a run", "benchmark": "pope", "control": "image", "route": "generate", "limit": 20,
        "items": "",
    }  # fmt: skip
    assert sorted(line["id"] for line in lines) == sorted(item.id for item in items)
    assert said == [item.answers[0] for item in items]
    third = Oracle(YES, cut=0)
    assert evaluate(third, items, POPE, out=out, name="a run", preprocess=SQUARE) == said and third.asked == []


def test_a_header_cut_in_two_is_written_anew(tmp_path):
    (tmp_path / "a").write_text('{"schema": 1, "mod')
    assert len(evaluate(Oracle(YES), pope(2), POPE, out=tmp_path / "a", preprocess=SQUARE)) == 4


def test_a_file_of_other_answers_is_left_alone(tmp_path):
    items, out = pope(4), tmp_path / "a"
    evaluate(Oracle(YES), items, POPE, out=out, name="run 1", preprocess=SQUARE)
    before = out.read_bytes()
    for given, more, match in (
        (items, {"name": "run 2"}, "holds other answers .model='run 1', not 'run 2'.; move it away"),
        (items, {"name": "run 1", "control": "blind"}, "control='image', not 'blind'"),
        (items, {"name": "run 1", "route": "likelihood"}, "route='generate', not 'likelihood'"),
        (items[:6], {"name": "run 1"}, "limit=8, not 6"),
        (items[::-1], {"name": "run 1"}, "items="),
    ):
        with pytest.raises(UserError, match=match):
            evaluate(Oracle(YES), given, POPE, out=out, preprocess=SQUARE, **more)
    assert out.read_bytes() == before
    (tmp_path / "notes").write_text("something else\n")
    with pytest.raises(UserError, match="is no file of answers"):
        evaluate(Oracle(YES), items, POPE, out=tmp_path / "notes", preprocess=SQUARE)
    assert (tmp_path / "notes").read_text() == "something else\n"


class Slow(Oracle):
    def generate(self, images, prompts, max_new_tokens):
        time.sleep(0.02)
        return super().generate(images, prompts, max_new_tokens)


@pytest.mark.slow
def test_kill_9_repeats_and_loses_nothing(tmp_path):
    items, out = pope(200), tmp_path / "pope.jsonl"
    process = multiprocessing.get_context("fork").Process(
        target=evaluate, args=(Slow(YES), items, POPE), kwargs=dict(batch_size=2, out=out, preprocess=SQUARE)
    )
    process.start()
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    there = out.read_bytes().count(b"\n") - 1
    assert 0 < there < 400
    model = Oracle(YES)
    said = evaluate(model, items, POPE, batch_size=50, out=out, preprocess=SQUARE)
    assert len(model.asked) == 400 - there and said == [item.answers[0] for item in items]


# bad input


def test_bad_input(tmp_path):
    items = pope(2)

    def check(match, items=items, benchmark=POPE, **more):
        with pytest.raises(UserError, match=match):
            evaluate(Oracle(YES), items, benchmark, out=tmp_path / "a", preprocess=SQUARE, **more)

    check("control='deaf' is not known; choose of image, blind, shuffled", control="deaf")
    check("route='guess' is not known; choose of generate, likelihood", route="guess")
    check("batch_size=0 is no batch", batch_size=0)
    check("vqav2 has open answers", [Item("a", (), "?", (), ("x",), "a")], VQA, route="likelihood")

    class Short(Oracle):
        def generate(self, images, prompts, max_new_tokens):
            raise UserError("a prompt of 900 tokens does not fit into the 512; shorten it")

    with pytest.raises(
        UserError, match="^pope, questions random/0-0 to random/1-1: a prompt of 900 tokens does not fit"
    ):
        evaluate(Short(YES), items, POPE, out=tmp_path / "b", preprocess=SQUARE)

    class Diverged(Oracle):
        def score(self, images, prompts, answers):
            return [torch.tensor([float("nan"), 0.0])] * len(prompts)

    with pytest.raises(UserError, match="no number for the answers to random/0-0"):
        evaluate(Diverged(YES), items, POPE, route="likelihood", out=tmp_path / "c", preprocess=SQUARE)


def test_progress_goes_to_standard_error(tmp_path, capfd):
    evaluate(Oracle(YES), pope(2), POPE, out=tmp_path / "a", preprocess=SQUARE)
    out, err = capfd.readouterr()
    assert out == "" and "pope, image" in err
    assert evaluate_benchmark.CONTROLS == ("image", "blind", "shuffled")
