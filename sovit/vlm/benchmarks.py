"""Public question sets about images: VQAv2, TextVQA, POPE, MMStar, one record and four functions each.

    open_items(BENCHMARKS["pope"])                                   from the hub
    open_items(BENCHMARKS["pope"], folder="/data/pope", limit=500)   from a folder, which may hold
        what `Dataset.save_to_disk` wrote, or parquet files, or one .jsonl file whose `image` names a file beside it,
    with the columns of the hub's set in each.

`limit` takes the first ones of one fixed permutation, so that a smaller subset lies within every larger one.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sovit import UserError
from sovit.data.cache import track
from sovit.data.hub.decode import MAX_PIXELS, to_rgb
from sovit.data.hub.splits import Location, remedy
from sovit.vlm import metrics

SUBSET_KEY = 0x56514153554253  # the permutation of a set's rows depends on their number and this alone


@dataclass(frozen=True)
class Picture:
    """An image file that is not read before `open`. `where` says in an error which row it is of."""

    read: Callable[[], bytes | Path]
    where: str

    def open(self):
        """The image, Pillow RGB: upright by its EXIF data, transparency on white. Raises UserError where there is none."""
        from PIL import Image, ImageOps

        try:
            data = self.read()
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise UserError(
                        f"the image of {self.where} has {file.width} x {file.height} pixels, more than {MAX_PIXELS:,};"
                        " make it smaller"
                    )
                return to_rgb(ImageOps.exif_transpose(file))
        except UserError:
            raise
        except Exception as error:  # whatever Pillow's forty decoders raise on damaged files
            raise UserError(
                f"the image of {self.where} cannot be read ({reason(error)}); mend or drop the row"
            ) from None


@dataclass(frozen=True)
class Item:
    """One question. `choices`: the answers to choose of, () where it is open; `answers`: those of the annotators.

    `image_id` is the same for questions about the same image; `meta`: what the benchmark's `score` needs besides.
    """

    id: str
    images: tuple[Picture, ...]
    question: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    image_id: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """How one public set is read, asked and scored.

    from_row(row, pictures)     a row of the set -> Item
    score(prediction, item)     -> a dict with score (0 to 1), parsed (whether the answer can be read at all), and more
    aggregate(scores, weights)  -> named numbers, `headline` among them; weights [n] or [R, n] count items so often
    chance                      the headline number of guessing; None where answers are open
    """

    name: str
    hub: str
    split: str
    columns: tuple[str, ...]
    tail: str
    max_new_tokens: int
    headline: str
    chance: float | None
    from_row: Callable[[dict, tuple[Picture, ...]], Item]
    score: Callable[[str, Item], dict]
    aggregate: Callable[..., dict[str, np.ndarray]]

    def prompt(self, item: Item) -> str:
        return item.question + self.tail


# VQAv2, TextVQA ------------------------------------------------------------------------------------------------------


def _vqav2_item(row: dict, pictures: tuple[Picture, ...]) -> Item:
    answers = row["answers"]
    if isinstance(answers, dict):  # a dict of lists, as older versions of `datasets` give a list of dicts
        answers = [{"answer": answer} for answer in answers["answer"]]
    return Item(
        id=str(row["question_id"]),
        images=pictures,
        question=row["question"].strip(),
        choices=(),
        answers=tuple(answer["answer"] for answer in _listed(answers)),
        image_id=str(row["image_id"]),
        meta={"group": str(row["answer_type"])},
    )


def _textvqa_item(row: dict, pictures: tuple[Picture, ...]) -> Item:
    return Item(
        id=str(row["question_id"]),
        images=pictures,
        question=row["question"].strip().capitalize(),
        choices=(),
        answers=tuple(_listed(row["answers"])),
        image_id=str(row["image_id"]),
    )


def _listed(answers: Any) -> Sequence:
    """The ten annotators' answers; () where a test split keeps them. Raises ValueError for what cannot score 1."""
    if answers is not None and (isinstance(answers, str) or 0 < len(answers) < 4):
        raise ValueError(f"answers={answers!r}: by soft accuracy 1 takes 4 alike, so give those of ten annotators")
    return answers or ()


def _vqa_score(prediction: str, item: Item) -> dict:
    said = metrics.normalise(prediction)
    score = metrics.vqa_accuracy(prediction, item.answers)
    return {"score": score, "parsed": bool(said), "said": said, "group": item.meta.get("group", "")}


def _vqa_aggregate(scores: Sequence[dict], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """accuracy, and accuracy/<answer type> where the set has types."""
    values = np.array([s["score"] for s in scores])
    groups = metrics.by_group(metrics.mean, [s["group"] for s in scores], values, weights=weights)
    return {"accuracy": metrics.mean(values, weights)} | {f"accuracy/{g}": v for g, v in groups.items() if g}


# POPE ----------------------------------------------------------------------------------------------------------------


def _pope_item(row: dict, pictures: tuple[Picture, ...]) -> Item:
    answer = str(row["answer"]).strip().lower()
    return Item(
        id=f"{row['category']}/{row['question_id']}",  # the numbers begin anew in each category
        images=pictures,
        question=row["question"].strip(),
        choices=("yes", "no"),
        answers=(answer,) if answer in ("yes", "no") else (),
        image_id=str(row["image_source"]),
        meta={"group": str(row["category"])},
    )


def _pope_score(prediction: str, item: Item) -> dict:
    said, parsed = metrics.yes_or_no(prediction)
    (right,) = item.answers
    return {
        "score": float(said == right),
        "parsed": parsed,
        "said": said,
        "right": right,
        "group": item.meta["group"],
    }


def _pope_aggregate(scores: Sequence[dict], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The rates over all questions, f1/<category>, and f1_macro: the mean of these, which LLaVA's tables print."""
    said = np.array([s["said"] == "yes" for s in scores])
    right = np.array([s["right"] == "yes" for s in scores])
    groups = metrics.by_group(
        lambda *of: metrics.yes_no_rates(*of)["f1"], [s["group"] for s in scores], said, right, weights=weights
    )
    rates = metrics.yes_no_rates(said, right, weights)
    return rates | {"f1_macro": metrics.macro(groups)} | {f"f1/{g}": v for g, v in groups.items()}


# MMStar --------------------------------------------------------------------------------------------------------------


def _mmstar_item(row: dict, pictures: tuple[Picture, ...]) -> Item:
    question, answer = row["question"].strip(), str(row["answer"]).strip().upper()
    letters = tuple("ABCD")
    return Item(
        id=str(row["index"]),
        images=pictures,
        question=question,
        choices=letters,
        answers=(answer,) if answer in letters else (),
        image_id=str(row["index"]),
        meta={"group": str(row["l2_category"]), "category": str(row["category"]), "options": _options(question)},
    )


def _options(question: str) -> tuple[str, ...]:
    """Texts of the options that a question ends in, "Options: A: a cat, B: a dog"; () where they are not told so."""
    parts = re.split(r"(?:^|[\s,(])([A-D])[:.)]\s+", question.rpartition("Options:")[2])
    letters, texts = parts[1::2], parts[2::2]
    if letters != list("ABCD"):
        return ()
    return tuple(text.strip(" ,.;\n") for text in texts)


def _mmstar_score(prediction: str, item: Item) -> dict:
    said = metrics.option_letter(prediction, len(item.choices), item.meta["options"])
    return {
        "score": float(said == item.answers[0]),
        "parsed": said is not None,
        "said": said,
        "group": item.meta["group"],
        "category": item.meta["category"],
    }


def _mmstar_aggregate(scores: Sequence[dict], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """accuracy: the mean over l2_category, as published; accuracy/<category>: likewise; accuracy_micro: over questions."""
    values = np.array([s["score"] for s in scores])
    groups = metrics.by_group(metrics.mean, [s["group"] for s in scores], values, weights=weights)
    within = {s["group"]: s["category"] for s in scores}
    named = {
        f"accuracy/{category}": metrics.macro({g: v for g, v in groups.items() if within[g] == category})
        for category in sorted(set(within.values()))
    }
    return {"accuracy": metrics.macro(groups), "accuracy_micro": metrics.mean(values, weights)} | named


# the table -----------------------------------------------------------------------------------------------------------

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly"

# tails and lengths as in lmms-eval 0.7.3, which names no length for TextVQA and MMStar: that of VQAv2 is taken
BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark(
            name="vqav2",
            hub="lmms-lab/VQAv2",
            split="validation",
            columns=("question_id", "image_id", "question", "answers", "answer_type", "image"),
            tail=SHORT,
            max_new_tokens=16,
            headline="accuracy",
            chance=None,
            from_row=_vqav2_item,
            score=_vqa_score,
            aggregate=_vqa_aggregate,
        ),
        Benchmark(
            name="textvqa",
            hub="lmms-lab/textvqa",
            split="validation",
            columns=("question_id", "image_id", "question", "answers", "image"),
            tail=SHORT,
            max_new_tokens=16,
            headline="accuracy",
            chance=None,
            from_row=_textvqa_item,
            score=_vqa_score,
            aggregate=_vqa_aggregate,
        ),
        Benchmark(
            name="pope",
            hub="lmms-lab/POPE",
            split="test",
            columns=("question_id", "question", "answer", "image_source", "image", "category"),
            tail=SHORT,
            max_new_tokens=128,
            headline="accuracy",
            chance=0.5,
            from_row=_pope_item,
            score=_pope_score,
            aggregate=_pope_aggregate,
        ),
        Benchmark(
            name="mmstar",
            hub="Lin-Chen/MMStar",
            split="val",
            columns=("index", "question", "image", "answer", "category", "l2_category"),
            tail=LETTER,
            max_new_tokens=16,
            headline="accuracy",
            chance=0.25,
            from_row=_mmstar_item,
            score=_mmstar_score,
            aggregate=_mmstar_aggregate,
        ),
    )
}


def benchmark(name: str) -> Benchmark:
    """Raises UserError for an unknown name."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is not known; choose of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


# items ---------------------------------------------------------------------------------------------------------------


def open_items(
    of: Benchmark, folder: Path | str | None = None, hub: str | None = None, limit: int | None = None
) -> list[Item]:
    """The questions of a benchmark: of `folder`, or of `hub` (NAME[@REVISION][#CONFIG]), its own set if neither is given.

    Images are read when they are asked for. Raises UserError for what cannot be opened, missing columns, an id that two
    rows have, rows without an answer, and a limit over the number of rows.
    """
    if folder is not None and hub is not None:
        raise UserError("give a folder or a hub name, not both")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} takes no question; give 1 or more")
    rows = _hub_rows(hub or of.hub, of) if folder is None else _folder_rows(Path(folder).expanduser(), of)
    if not rows.num:
        raise UserError(f"{rows.where} has no rows; give a set that has")
    if limit is not None and limit > rows.num:
        raise UserError(f"limit={limit} is more than the {rows.num:,} questions of {rows.where}; give at most that")
    order = np.random.Generator(np.random.Philox(SUBSET_KEY)).permutation(rows.num)[:limit].tolist()
    items = [_item(of, rows, i) for i in track(order, f"reading {of.name}", len(order))]
    ((first, times),) = Counter(item.id for item in items).most_common(1)
    if times > 1:
        raise UserError(f"{times} rows of {rows.where} have the id {first!r}; leave one in")
    return items


def _item(of: Benchmark, rows: Rows, index: int) -> Item:
    row, where = rows.text(index), f"row {index} of {rows.where}"
    try:
        item = of.from_row(row, (Picture(lambda: rows.image(index), where),))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{where} cannot be read as {of.name} ({reason(error)}); mend or drop it") from None
    if not item.answers or not all(isinstance(answer, str) for answer in item.answers):
        raise UserError(f"{where} has no answer to score by (test splits keep theirs); give the split {of.split!r}")
    return item


@dataclass(frozen=True)
class Rows:
    """The rows of a set, text and image apart, so that reading the first does not read the second."""

    where: str
    num: int
    text: Callable[[int], dict]
    image: Callable[[int], bytes | Path]


def _dataset_rows(dataset: Any, of: Benchmark, where: str, kept: Any = None) -> Rows:
    """Rows of a datasets.Dataset. `kept`: a temporary folder that lives as long as they do."""
    from datasets import Image

    _check_columns(dataset.column_names, of, where)
    words = dataset.select_columns([name for name in of.columns if name != "image"])  # another may hold images, too
    images = dataset.select_columns("image").cast_column("image", Image(decode=False))

    def image(index: int, kept: Any = kept) -> bytes:
        file = images[index]["image"]
        if file is None or file["bytes"] is None:  # a path that a set names could be of any file of this machine
            raise ValueError("the set holds no bytes for it")
        return file["bytes"]

    return Rows(where, len(words), lambda index: words[index], image)


def _json_rows(file: Path, of: Benchmark) -> Rows:
    """Rows of a .jsonl file, whose image files lie beside or below it."""
    lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
    rows = [_json_row(line, f"{file}:{number}", of) for number, line in lines if line.strip()]
    folder = file.parent.resolve()

    def image(index: int) -> Path:
        path = (folder / str(rows[index]["image"])).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"{rows[index]['image']} lies outside of {folder}")
        return path

    return Rows(str(file), len(rows), rows.__getitem__, image)


def _json_row(line: str, where: str, of: Benchmark) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON ({error}); mend the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object; mend the line")
    _check_columns(list(row), of, where)
    return row


def _hub_rows(name: str, of: Benchmark) -> Rows:
    import datasets

    found = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([^#]+))?(?:#(.+))?", name)
    if found is None:
        raise UserError(f"{name!r} is no hub name; give NAME[@REVISION][#CONFIG], or a folder with --folder")
    try:
        opened = datasets.load_dataset(found[1], found[3], split=of.split, revision=found[2])
    except Exception as error:  # the hub client, the builders and pyarrow raise a dozen unrelated kinds
        location = Location(name, None, found[1], found[2], found[3])
        raise UserError(f"{name} cannot be opened ({reason(error)}); {remedy(location, error)}") from error
    return _dataset_rows(opened, of, name)


def _folder_rows(folder: Path, of: Benchmark) -> Rows:
    import datasets

    if not folder.exists():
        raise UserError(f"{folder} does not exist; give the folder of {of.name}")
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            opened = datasets.load_from_disk(str(folder))
            if isinstance(opened, datasets.DatasetDict):
                opened = opened[_of_split(dict.fromkeys(opened), of, folder)]
            return _dataset_rows(opened, of, str(folder))
        if files := _files(folder, ".parquet", of):
            scratch = tempfile.TemporaryDirectory(prefix="sovit-")  # for the copy that `datasets` makes
            opened = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=scratch.name)
            return _dataset_rows(opened, of, str(folder), scratch)
        if files := _files(folder, ".jsonl", of):
            if len(files) > 1:
                raise UserError(f"{folder} has {len(files)} .jsonl files; give one of them")
            return _json_rows(files[0], of)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} cannot be opened ({reason(error)}); check the files") from error
    raise UserError(
        f"{folder} holds no set: neither what save_to_disk writes, nor .parquet or .jsonl files;"
        f" give the folder of {of.name}"
    )


def _files(folder: Path, suffix: str, of: Benchmark) -> list[Path]:
    """The files of the benchmark's split: those whose name begins with it, or all where the names tell no splits."""
    if folder.is_file():
        return [folder] if folder.suffix == suffix else []
    splits: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob(f"*{suffix}"), *folder.glob(f"data/*{suffix}")]):  # data/: as the hub lays it out
        splits.setdefault(re.split(r"[-.]", file.name)[0], []).append(file)
    return splits[_of_split(splits, of, folder)] if splits else []


def _of_split(splits: Mapping[str, Any], of: Benchmark, folder: Path) -> str:
    if of.split in splits or len(splits) == 1:
        return of.split if of.split in splits else next(iter(splits))
    raise UserError(f"{folder} has the splits {', '.join(sorted(splits))}; {of.name} is scored on {of.split!r}")


def _check_columns(columns: Sequence[str], of: Benchmark, where: str) -> None:
    missing = [name for name in of.columns if name not in columns]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing)} of the columns of {of.name} (it has {', '.join(columns)});"
            f" give them the names of {of.hub}"
        )


def reason(error: BaseException) -> str:
    """An error of another library in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
