"""Adapters of public question sets, on rows with their columns and drawn images, in every form that a set comes in."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_hub
from PIL import Image

from sovit import UserError
from sovit.vlm import benchmarks
from sovit.vlm.benchmarks import BENCHMARKS, open_items

datasets = pytest.importorskip("datasets")

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (230, 220, 10)}
NUM = 12  # rows of every set, two for each image


def drawn(k: int) -> Image.Image:
    """A square of one colour on grey: image k of a set shows colour number k % 4."""
    pixels = np.full((20 + k, 30, 3), 128, np.uint8)
    pixels[4:-4, 5:-5] = list(COLOURS.values())[k % 4]
    return Image.fromarray(pixels)


def rows_of(name: str) -> list[dict]:
    """Rows with the columns of the hub's set, as it orders them."""
    names = list(COLOURS)
    rows = []
    for i in range(NUM):
        k = i // 2
        colour = names[k % 4]
        if name == "vqav2":
            said = [colour] * 8 + ["a thing", "Colour"]
            answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said, 1)]
            row = {"question_type": "what color", "multiple_choice_answer": colour, "answers": answers, "image_id": k,
                   "answer_type": "other" if i % 2 else "number", "question_id": 100 + i,
                   "question": "What color is the square?"}  # fmt: skip
        elif name == "textvqa":
            row = {"image_id": f"img{k}", "question_id": 34602 + i, "question": "what does the SIGN say?",
                   "answers": [colour] * 10, "ocr_tokens": ["STOP"], "image_classes": ["sign"],
                   "set_name": "val"}  # fmt: skip
        elif name == "pope":
            row = {"id": str(i), "question_id": str(i // 2 + 1), "question": "Is there a red square in the image?",
                   "answer": "yes" if k % 4 == 0 else "no", "image_source": f"COCO_{k}",
                   "category": ("random", "adversarial")[i % 2]}  # fmt: skip
        else:
            letters = ", ".join(f"{letter}: the {c} square" for letter, c in zip("ABCD", names))
            row = {"index": i, "question": f"Which square is shown?\nOptions: {letters}.", "answer": "ABCD"[k % 4],
                   "category": "coarse perception" if i % 2 else "math", "l2_category": f"part {i % 3}",
                   "meta_info": {"source": "drawn", "split": "val"}}  # fmt: skip
        rows.append(row | {"image": drawn(k)})
    return rows


def dataset_of(rows: list[dict]):
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "image"}
    dataset = datasets.Dataset.from_dict(columns)
    files = [{"bytes": png(row["image"]), "path": None} for row in rows]
    return dataset.add_column("image", files).cast_column("image", datasets.Image())


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def save(rows: list[dict], of, folder, form: str) -> None:
    folder.mkdir()
    if form == "disk":
        dataset_of(rows).save_to_disk(str(folder / "set"))
        for file in (folder / "set").iterdir():
            file.rename(folder / file.name)
    elif form == "disk of splits":
        datasets.DatasetDict({"other": dataset_of(rows[:2]), of.split: dataset_of(rows)}).save_to_disk(str(folder))
    elif form == "parquet":
        for part in range(2):
            dataset_of(rows[6 * part : 6 * part + 6]).to_parquet(folder / f"{of.split}-0000{part}-of-00002.parquet")
        dataset_of(rows[:2]).to_parquet(folder / "other-00000-of-00001.parquet")
    else:
        (folder / "images").mkdir()
        for i, row in enumerate(rows):
            row["image"].save(folder / "images" / f"{i}.png")
        lines = [json.dumps(row | {"image": f"images/{i}.png"}) for i, row in enumerate(rows)]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def seen(items) -> list[tuple]:
    """What an item says and the colour in the middle of its image, in the order of their ids."""
    told = []
    for item in items:
        image = item.images[0].open()
        colour = image.getpixel((image.width // 2, image.height // 2))
        name = next(name for name, value in COLOURS.items() if value == colour)
        told.append((item.id, item.question, item.choices, item.answers, item.image_id, name))
    return sorted(told)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_set_reads_alike_in_every_form(tmp_path, name):
    of, rows = BENCHMARKS[name], rows_of(name)
    told = {}
    for form in ("disk", "disk of splits", "parquet", "jsonl"):
        save(rows, of, tmp_path / form, form)
        told[form] = seen(open_items(of, tmp_path / form))
    assert len(told["disk"]) == NUM
    assert all(of_form == told["disk"] for of_form in told.values())
    for _, question, choices, answers, _, colour in told["disk"]:
        right = {
            "vqav2": colour,
            "textvqa": colour,
            "pope": "yes" if colour == "red" else "no",
            "mmstar": "ABCD"[list(COLOURS).index(colour)],
        }
        assert answers[0] == right[name] and question == question.strip()
        assert choices == {"pope": ("yes", "no"), "mmstar": ("A", "B", "C", "D")}.get(name, ())


def test_prompts(tmp_path):
    prompts = {}
    for name, of in BENCHMARKS.items():
        save(rows_of(name), of, tmp_path / name, "jsonl")
        prompts[name] = of.prompt(open_items(of, tmp_path / name, limit=1)[0])
    short = "\nAnswer the question using a single word or phrase."
    assert prompts["vqav2"] == "What color is the square?" + short
    assert prompts["textvqa"] == "What does the sign say?" + short  # only the first letter is large, as everyone has it
    assert prompts["pope"] == "Is there a red square in the image?" + short
    assert prompts["mmstar"] == (
        "Which square is shown?\nOptions: A: the red square, B: the green square, C: the blue square,"
        " D: the yellow square.\nAnswer with the option's letter from the given choices directly"
    )


def test_smaller_subsets_lie_within_larger_ones(tmp_path):
    of = BENCHMARKS["pope"]
    save(rows_of("pope"), of, tmp_path / "set", "jsonl")
    whole = [item.id for item in open_items(of, tmp_path / "set")]
    assert len(set(whole)) == NUM and whole != sorted(whole)
    for limit in (1, 5, NUM):
        assert [item.id for item in open_items(of, tmp_path / "set", limit=limit)] == whole[:limit]
    for limit, message in ((0, "limit=0 takes no question"), (13, "limit=13 is more than the 12 questions of")):
        with pytest.raises(UserError, match=message):
            open_items(of, tmp_path / "set", limit=limit)


def test_scores_of_one_item_each(tmp_path):
    items = {}
    for name, of in BENCHMARKS.items():
        save(rows_of(name), of, tmp_path / name, "jsonl")
        items[name] = min(open_items(of, tmp_path / name), key=lambda item: item.id)
    score = {name: lambda text, name=name: BENCHMARKS[name].score(text, items[name]) for name in BENCHMARKS}
    assert score["vqav2"]("Red.")["score"] == 1 and score["vqav2"]("colour")["score"] == pytest.approx(0.3)
    assert score["vqav2"]("The thing")["score"] == pytest.approx(0.3)
    assert score["vqav2"]("")["parsed"] is False and score["vqav2"]("thing")["parsed"]
    assert score["textvqa"]("red")["score"] == 1 and score["textvqa"]("blue")["score"] == 0
    assert score["pope"]("Yes, there is.")["score"] == 1 and score["pope"]("a square")["parsed"] is False
    assert score["mmstar"]("(A)")["score"] == 1 and score["mmstar"]("the red square")["score"] == 1
    assert score["mmstar"]("the blue square")["said"] == "C" and score["mmstar"]("E")["parsed"] is False


def test_aggregates_by_part():
    def scores(name, said):
        of = BENCHMARKS[name]
        return of.aggregate([of.score(text, of.from_row(row, ())) for text, row in zip(said, rows_of(name))])

    always = {name: float(value) for name, value in scores("pope", ["yes"] * NUM).items()}
    # images 0 and 4 of 6 are red: 4 of 12 questions
    assert always == pytest.approx(
        {"accuracy": 1 / 3, "precision": 1 / 3, "recall": 1, "f1": 0.5, "yes_ratio": 1, "f1_macro": 0.5}
        | {"f1/adversarial": 0.5, "f1/random": 0.5}
    )
    # the first of parts 0, 1, 2 has four questions of which A is right for 2, 1 and 1
    stars = {name: float(value) for name, value in scores("mmstar", ["A"] * NUM).items()}
    right = [[row["answer"] == "A" for row in rows_of("mmstar") if row["l2_category"] == f"part {k}"] for k in range(3)]
    assert stars["accuracy"] == pytest.approx(np.mean([np.mean(part) for part in right]))
    assert stars["accuracy_micro"] == pytest.approx(1 / 3)
    kinds = {name: float(value) for name, value in scores("vqav2", ["red", "blue"] * 6).items()}
    assert set(kinds) == {"accuracy", "accuracy/number", "accuracy/other"}
    assert kinds["accuracy"] == pytest.approx((kinds["accuracy/number"] + kinds["accuracy/other"]) / 2)


def test_options_of_a_question():
    assert benchmarks._options("Which?\nOptions: A: 3, 4, B: 5., C: a (big) cat, D: none") == (
        "3, 4",
        "5",
        "a (big) cat",
        "none",
    )
    assert benchmarks._options("Which?\n(A) one\n(B) two\n(C) three\n(D) four") == ("one", "two", "three", "four")
    assert benchmarks._options("Which letter?\nOptions: A, B, C, D") == ()


# images


def read(image: Image.Image, kind="PNG", **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return benchmarks.Picture(file.getvalue, "row 3").open()


def test_images_become_rgb_upright_and_transparency_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    half.putpixel((0, 0), (255, 0, 0, 0))
    assert read(half).getpixel((0, 0)) == (255, 255, 255) and read(half).getpixel((1, 1)) == (255, 0, 0)
    assert read(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert read(Image.new("P", (4, 4))).mode == "RGB" and read(Image.new("CMYK", (4, 4)), "JPEG").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert read(Image.new("RGB", (8, 4)), "JPEG", exif=exif).size == (4, 8)


def test_an_image_that_is_broken_or_too_large_is_named(monkeypatch):
    for data in (b"this is text", png(drawn(0))[:60], b""):
        with pytest.raises(UserError, match=r"^the image of row 3 of set cannot be read \(.+\); mend or drop the row$"):
            benchmarks.Picture(lambda data=data: data, "row 3 of set").open()
    monkeypatch.setattr(benchmarks, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="the image of row 3 has 30 x 20 pixels, more than 100; make it smaller"):
        read(drawn(0))
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own bound comes first: an error, no warning
    with pytest.raises(UserError, match="the image of row 3 cannot be read .*decompression bomb"):
        read(drawn(0))


# bad input


def check(of, folder, match, **more):
    with pytest.raises(UserError, match=match) as caught:
        open_items(of, folder, **more)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_set(tmp_path):
    of = BENCHMARKS["pope"]
    check(of, tmp_path / "gone", "gone does not exist; give the folder of pope")
    check(of, tmp_path, "holds no set: neither what save_to_disk writes, nor .parquet or .jsonl files")
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    check(of, tmp_path, r"cannot be opened \(.+\); check the files")
    with pytest.raises(UserError, match="benchmark 'popo' is not known; choose of vqav2, textvqa, pope, mmstar"):
        benchmarks.benchmark("popo")
    check(of, tmp_path, "give a folder or a hub name, not both", hub="lmms-lab/POPE")
    with pytest.raises(UserError, match="'a b' is no hub name"):
        open_items(of, hub="a b")


@pytest.mark.parametrize("form", ["disk", "parquet", "jsonl"])
def test_missing_columns_are_named(tmp_path, form):
    of = BENCHMARKS["pope"]
    rows = [{k: v for k, v in row.items() if k not in ("answer", "category")} for row in rows_of("pope")]
    save(rows, of, tmp_path / "set", form)
    check(of, tmp_path / "set", r"lacks answer, category of the columns of pope \(it has id, question_id, question, ")


def test_rows_that_cannot_be_asked(tmp_path):
    of = BENCHMARKS["pope"]

    def given(name, lines):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("\n".join(lines))
        return tmp_path / name

    row = rows_of("pope")[0] | {"image": "0.png"}
    check(of, given("text", [json.dumps(row), "{no json"]), r"rows.jsonl:2 is no JSON \(.+\); mend the line")
    check(of, given("list", ["[1]"]), "rows.jsonl:1 is no JSON object")
    check(of, given("empty", [""]), "rows.jsonl has no rows")
    check(of, given("twice", [json.dumps(row)] * 2), "2 rows of .*rows.jsonl have the id 'random/1'; leave one in")
    check(of, given("hidden", [json.dumps(row | {"answer": None})]), "row 0 of .* has no answer to score by")
    check(of, given("odd", [json.dumps(row | {"question": 3})]), r"row 0 of .* cannot be read as pope \('int'")
    check(
        BENCHMARKS["vqav2"],
        given("vqa", [json.dumps({**rows_of("vqav2")[0], "image": "0.png", "answers": None})]),
        "row 0 of .* has no answer",
    )
    for i, answers in enumerate(("red", ["red"])):  # of a text each letter would be an answer; of one none could score
        line = json.dumps({**rows_of("textvqa")[0], "image": "0.png", "answers": answers})
        check(BENCHMARKS["textvqa"], given(f"few{i}", [line]), "row 0 of .* as textvqa .*give those of ten annotators")
    two = given("two", [json.dumps(row)])
    (two / "rows.jsonl").rename(two / "train.jsonl")
    (two / "val.jsonl").write_text(json.dumps(row))
    check(of, two, "has the splits train, val; pope is scored on 'test'")


@pytest.mark.parametrize(
    ("name", "column"), [("vqav2", "answer_type"), ("pope", "category"), ("mmstar", "l2_category")]
)
def test_rows_without_a_group_are_a_group(tmp_path, name, column):
    of, rows = BENCHMARKS[name], [row | {"image": "0.png"} for row in rows_of(name)]
    rows[0] |= {column: None}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    scores = [of.score("yes", item) for item in open_items(of, tmp_path)]
    assert {s["group"] for s in scores} == {str(row[column]) for row in rows}
    assert 0 <= of.aggregate(scores)[of.headline] <= 1


def test_only_the_columns_asked_for_are_read(tmp_path):
    """Another column may hold an image, which `datasets` would open wherever it lies, of whatever size."""
    of = BENCHMARKS["pope"]
    more = dataset_of(rows_of("pope")).add_column("mask", [{"bytes": b"no image", "path": None}] * NUM)
    more.cast_column("mask", datasets.Image()).to_parquet(tmp_path / "test.parquet")
    assert len(open_items(of, tmp_path / "test.parquet")) == NUM


def test_a_set_names_no_file_outside_of_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(drawn(0)))
    (tmp_path / "set").mkdir()
    of, row = BENCHMARKS["pope"], rows_of("pope")[0]
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        (tmp_path / "set" / "rows.jsonl").write_text(json.dumps(row | {"image": path}))
        (item,) = open_items(of, tmp_path / "set")
        with pytest.raises(UserError, match="row 0 of .* cannot be read .*lies outside of"):
            item.images[0].open()
    columns = {name: [value] for name, value in row.items() if name != "image"}
    named = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    datasets.Dataset.from_dict(columns | named).to_parquet(tmp_path / "named.parquet")
    (item,) = open_items(of, tmp_path / "named.parquet")
    with pytest.raises(UserError, match="row 0 of .* cannot be read .*holds no bytes"):
        item.images[0].open()


# the hub

ASK = """
import json
from sovit import UserError
from sovit.vlm.benchmarks import BENCHMARKS, open_items
items = open_items(BENCHMARKS["pope"], hub="team/pope")
print(json.dumps([len(items), items[0].images[0].open().mode]))
try:
    open_items(BENCHMARKS["pope"], hub="gated/pope")
except UserError as error:
    print(error)
"""


def test_over_http_with_the_real_client(tmp_path):
    of = BENCHMARKS["pope"]
    save(rows_of("pope"), of, tmp_path / "files", "parquet")
    with tiny_hub.serve(tmp_path / "files") as (address, sent):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        asked = subprocess.run(
            [sys.executable, "-c", ASK], env=os.environ | environment, capture_output=True, text=True
        )
    assert asked.returncode == 0, asked.stderr
    opened, gated = asked.stdout.splitlines()
    assert json.loads(opened) == [NUM, "RGB"] and sent
    assert (
        "gated/pope cannot be opened" in gated and "accept its terms at https://huggingface.co/datasets/gated" in gated
    )


def test_offline_is_one_line_with_what_to_do(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'lmms-lab/POPE'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(
        BENCHMARKS["pope"], None, "lmms-lab/POPE cannot be opened .*; check the name and the network, or give a local"
    )
