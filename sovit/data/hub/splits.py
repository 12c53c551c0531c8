"""What Hugging Face `datasets` makes of a preset: its splits, its columns of images and labels, and the classes."""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit import UserError

TRAIN_SPLITS = ("train", "training")
VAL_SPLITS = ("validation", "val", "valid", "dev", "test")  # the first one that has labels
NUM_VAL = 10_000  # validation images at most: a fixed random choice where a set has more, the first ones of a stream
NUM_FETCHED = 16  # files of a streamed folder that are asked for at the same time
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls")
IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
KINDS = {".parquet": "parquet", ".tar": "webdataset", **dict.fromkeys(IMAGE_FILES, "imagefolder")}  # of `datasets`


@dataclass(frozen=True)
class Location:
    """Where images and labels are. Without `path` (a local file or folder), `name`, `revision`, `config` are the hub's.

    `preset` is how the user wrote it; `streamed`: rows are read as they come, nothing is downloaded beforehand.
    """

    preset: str
    path: Path | None
    name: str
    revision: str | None = None
    config: str | None = None
    label: str = ""
    streamed: bool = False


@dataclass(frozen=True)
class Splits:
    """An opened set: its splits are datasets.Dataset, or IterableDataset where streamed.

    `vals`: name and split of what may serve as validation, the best first, all with the label column.
    """

    train: Any
    train_name: str
    vals: tuple[tuple[str, Any], ...]
    image_column: str
    label_column: str
    revision: str | None


def fingerprint(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, bytes, time of change) of every file below `path`, sorted: changes when the data set does.

    An image link that leads nowhere has -1 bytes. Raises UserError for links whose absence would not be noticed.
    """
    if path.is_file():
        stat = path.stat()
        yield str(path), stat.st_size, stat.st_mtime_ns
        return
    yield str(path), 0, 0
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):  # `datasets` would leave its classes out without a word
                raise UserError(f"{os.path.join(folder, name)} is a link to a folder; put the folder itself there")
        for name in sorted(files):
            file = os.path.join(folder, name)
            try:
                stat = os.stat(file)
            except OSError:
                if name.endswith((".parquet", ".tar")):
                    raise UserError(f"{file} is a link that leads nowhere; mend or remove it") from None
                yield os.path.relpath(file, path), -1, 0
            else:
                yield os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns


def num_dead_links(path: Path | None) -> int:
    """Image links below `path` that lead nowhere: `datasets` passes them over, so that decoding does not see them."""
    files = fingerprint(path) if path else ()
    return sum(size < 0 and Path(name).suffix.lower() in IMAGE_FILES for name, size, _ in files)


def open_splits(location: Location, scratch: str, revision: str | None = None) -> Splits:
    """Open a set with `datasets`, which keeps what it makes of local files in the folder `scratch`.

    `revision`: the commit of a hub's set that an earlier, unfinished decoding has read from.
    Raises UserError for whatever does not open, and for a set without images or labels.
    """
    splits, revision = _load(location, scratch, revision)
    train_name = next((name for name in TRAIN_SPLITS if name in splits), next(iter(splits)))
    train = splits[train_name]
    if train.features is None:
        raise UserError(f"preset={location.preset!r} does not say its columns when streamed; leave ?stream out")
    image_column, label_column = find_image_column(location, train), find_label_column(location, train)
    names = [name for name in VAL_SPLITS if name in splits and name != train_name]
    vals = tuple((name, splits[name]) for name in names if label_column in splits[name].column_names)
    return Splits(train, train_name, vals, image_column, label_column, revision)


def _load(location: Location, scratch: str, recorded: str | None) -> tuple[dict, str | None]:
    """Split name -> datasets.Dataset or IterableDataset, and the hub's revision."""
    import datasets

    revision = recorded or location.revision
    streaming = {"streaming": True} if location.streamed else {}
    try:
        if location.path is None:
            if location.streamed and recorded is None:  # rows read on another day must be of the same commit
                from huggingface_hub import HfApi

                revision = HfApi().dataset_info(location.name, revision=revision).sha
            opened = datasets.load_dataset(location.name, location.config, revision=revision, **streaming)
        else:
            # what `datasets` makes of a folder's names is cached below scratch: the folder may change, its path not
            kind, where = file_kind(location), str(location.path)
            files = {"data_files": where} if location.path.is_file() else {"data_dir": where}
            opened = datasets.load_dataset(kind, cache_dir=scratch, **files, **streaming)
    except UserError:
        raise
    except Exception as error:  # the hub client, the builders and pyarrow raise a dozen unrelated kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"preset={location.preset!r} cannot be opened ({reason}); {remedy(location, error)}") from error
    if location.path is None and not location.streamed:
        revision = revision or hub_revision(next(iter(opened.values())))
    return dict(opened), revision


def remedy(location: Location, error: BaseException) -> str:
    """What to do about a set that does not open."""
    if location.path:
        return "check the files"
    kinds: list[str] = []
    at: BaseException | None = error
    while at is not None:  # a gated set comes as an error of `datasets`, raised from the hub client's
        kinds.append(type(at).__name__)
        at = at.__cause__ or at.__context__
    if "GatedRepoError" in kinds or "gated" in str(error):
        return f"accept its terms at https://huggingface.co/datasets/{location.name}, then run: hf auth login"
    login = ", run `hf auth login` if it is private" if "RepositoryNotFoundError" in kinds else ""
    return f"check the name and the network{login}, or give a local folder"


def hub_revision(split) -> str | None:
    """The commit that a split was downloaded from, which `datasets` keeps in the path of its own cache; None if not."""
    files = " ".join(file["filename"] for file in split.cache_files)
    found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files)
    return found[1] if found else None


def file_kind(location: Location) -> str:
    """`imagefolder`, `parquet` or `webdataset`, by the file, or the first that is one of them. Raises UserError."""
    path = location.path
    assert path is not None
    if path.is_file():
        kind = KINDS.get(path.suffix)
        if kind in (None, "imagefolder"):
            raise UserError(
                f"preset={location.preset!r} is a file of no known kind; give a folder, a .parquet or a .tar file"
            )
        return kind
    for _, _, files in os.walk(path):
        for name in files:
            if Path(name).suffix.lower() in KINDS:
                return KINDS[Path(name).suffix.lower()]
    raise UserError(
        f"preset={location.preset!r} holds no images and no parquet files, nor .tar; give a folder that does"
    )


def find_image_column(location: Location, split) -> str:
    """The first column of images: an Image feature, or what parquet files of other writers have in its place."""
    from datasets import Image, Value

    for name, feature in split.features.items():
        if isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()):
            return name
    for name, feature in split.features.items():
        if feature in (Value("binary"), Value("large_binary")):
            return name
    raise UserError(
        f"preset={location.preset!r} has no image column among {', '.join(split.column_names)};"
        " give an image classification set"
    )


def find_label_column(location: Location, split) -> str:
    """The column asked for; else the first of LABEL_COLUMNS; else the first of type ClassLabel."""
    from datasets import ClassLabel

    columns = split.column_names
    if location.label:
        if location.label not in columns:
            raise UserError(
                f"label={location.label!r} is not a column of {location.name}; choose of {', '.join(columns)}"
            )
        return location.label
    typed = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    for name in [*LABEL_COLUMNS, *typed]:
        if name in columns:
            return name
    raise UserError(
        f"preset={location.preset!r} has no label column among {', '.join(columns)};"
        " sort the images into a folder for each class, or name the column with ?label=COLUMN"
    )


def class_names(split, column: str) -> list[str] | None:
    """The names of a column of type ClassLabel; None for columns of other types."""
    from datasets import ClassLabel

    feature = split.features[column]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def number_labels(location: Location, split, column: str) -> tuple[list[str], np.ndarray]:
    """Class names and a number for each row, -1 where it has no label. Names and numbers are sorted where untyped."""
    classes = class_names(split, column)
    if classes is None:
        values = {value for value in split[column] if value is not None}
        for value in values:
            check_label(location, column, value)
        classes = [str(value) for value in sorted(values)]
    labels = apply_numbers(split, column, classes)
    if len(np.unique(labels[labels >= 0])) < 2:
        raise UserError(
            f"preset={location.preset!r} has fewer than two classes in column {column!r};"
            " sort the images into a folder for each class, or name another column with ?label=COLUMN"
        )
    return classes, labels


def check_label(location: Location, column: str, value) -> None:
    if not isinstance(value, str | int):
        raise UserError(
            f"label={column!r} of {location.preset!r} holds neither names nor numbers; choose another column"
        )


def apply_numbers(split, column: str, classes: list[str]) -> np.ndarray:
    """The class number of each row, [rows]; -1 for a missing label or one that is not among `classes`."""
    number = {name: i for i, name in enumerate(classes)}
    names = class_names(split, column)
    if names is not None:
        return np.array([number.get(names[v], -1) if v is not None and v >= 0 else -1 for v in split[column]], np.int64)
    return np.array([-1 if v is None else number.get(str(v), -1) for v in split[column]], np.int64)


# rows -----------------------------------------------------------------------------------------------------------------


class Part:
    """The rows of one split, from a position on: `take(count)` gives (file, label) pairs, [] at the end.

    `file` is a dict of bytes or path; `position` is a JSON value to go on from. Only rows that `datasets` made of a folder
    of images may name a file: what stands in a parquet file could name any file of this machine.
    """

    def __init__(self, split, splits: Splits, labels: np.ndarray | None, is_val: bool | None, limit: float):
        from datasets import Image

        self.image_column, self.label_column = splits.image_column, splits.label_column
        if labels is None:
            split = split.decode(False)  # of a hub's stream `datasets` decodes by itself, and one broken file ends it
        columns = [self.image_column] if labels is not None else [self.image_column, self.label_column]
        self.split = split.select_columns(columns).cast_column(self.image_column, Image(decode=False))
        self.names = class_names(split, self.label_column)
        self.of_folder = split.info.builder_name == "imagefolder"
        self.labels, self.is_val, self.limit = labels, is_val, limit
        self.rows: Iterator | None = None
        self.position: Any = None

    def take(self, count: int) -> list[tuple[dict | None, Any]]:
        if self.labels is not None:  # a Dataset, whose labels have been numbered beforehand
            start = self.position or 0
            files = self.split[start : start + count][self.image_column]
            self.position = start + len(files)
            return list(zip(self._files(files), self.labels[start : self.position].tolist(), strict=True))
        rows = self._next(count)
        files = self._files([row[self.image_column] for row in rows])
        return [(file, self._label(row[self.label_column])) for file, row in zip(files, rows, strict=True)]

    def any_label(self) -> bool:
        """Whether the first row of a stream has a label."""
        return any(self._label(row[self.label_column]) is not None for row in self._next(1))

    def _next(self, count: int) -> list[dict]:
        if self.rows is None:
            if self.position is not None:
                self.split.load_state_dict(self.position)
            self.rows = iter(self.split)
        rows = list(itertools.islice(self.rows, count))
        self.position = copy.deepcopy(self.split.state_dict())
        return rows

    def _files(self, files: list[dict | None]) -> list[dict | None]:
        if not self.of_folder:
            return [file and {**file, "path": None} for file in files]
        with ThreadPoolExecutor(NUM_FETCHED) as pool:  # of a stream each file is a request of its own
            return list(pool.map(fetched, files))

    def _label(self, value):
        if self.names is None or value is None:
            return value
        return self.names[value] if value >= 0 else None


def fetched(file: dict | None) -> dict | None:
    """A file that lies elsewhere (hf://, https://) with its bytes, others as they are. Raises what the network does."""
    if file is None or file["bytes"] is not None or "://" not in (file["path"] or ""):
        return file
    from datasets.utils.file_utils import xopen

    with xopen(file["path"], "rb") as stream:
        return {"bytes": stream.read(), "path": None}


def parts_of(location: Location, splits: Splits, limit: float) -> tuple[list[Part], list[str] | None, str | None]:
    """What to read in which order, the class names (None: found on the way), the name of the validation split.

    Of a streamed set validation comes first, so that the folder can grow; without a validation split the part has
    is_val=None, and images are held out as they come.
    """
    column = splits.label_column
    if not location.streamed:
        classes, labels = number_labels(location, splits.train, column)
        train = Part(splits.train, splits, labels, False, math.inf)
        for name, split in splits.vals:
            val_labels = apply_numbers(split, column, classes)
            if (val_labels >= 0).any():  # the labels of test splits are often kept back, as -1
                return [train, Part(split, splits, val_labels, True, math.inf)], classes, name
        return [train], classes, None
    names = class_names(splits.train, column)
    for name, split in splits.vals:
        if Part(split, splits, None, True, NUM_VAL).any_label():
            val = Part(split, splits, None, True, NUM_VAL)
            return [val, Part(splits.train, splits, None, False, limit)], names, name
    return [Part(splits.train, splits, None, None, limit)], names, None
