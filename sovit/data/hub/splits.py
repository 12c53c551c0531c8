"""What is in the files of a preset: rows for training and validation, their images and labels, and the classes.

A local folder of images follows the rules of torchvision's ImageFolder: the folders of its first level are its classes.
Where all of them are called like splits (train, val, test, ... in any case), each holds the classes of that split. A folder
with a table beside the images (metadata.csv, .jsonl or .parquet) is read by `datasets`, by the rules of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit import UserError, reason

TRAIN_SPLITS = ("train", "training")
VAL_SPLITS = ("validation", "val", "valid", "dev", "test")  # the first one that has labels
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls")
IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
KINDS = {".parquet": "parquet", ".tar": "webdataset", **dict.fromkeys(IMAGE_FILES, "images")}


@dataclass(frozen=True)
class Location:
    """Where images and labels are. Without `path` (a local file or folder), `name`, `revision`, `config` are the hub's.

    `preset` is how the user wrote it; `label`: the column asked for.
    """

    preset: str
    path: Path | None
    name: str
    revision: str | None = None
    config: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Rows:
    """The rows of a set, those of training first. labels [I] int64, -1 for a row without a label of training.

    `files`: a datasets.Dataset of one column, image files; `names_files`: whether its rows may name a file of this machine.
    `splits`: the names of training and validation, None where it has none; `column`: that of the labels.
    """

    files: Any
    names_files: bool
    labels: np.ndarray
    num_train: int
    classes: list[str]
    splits: tuple[str, str | None]
    column: str
    revision: str | None

    def read(self, start: int, stop: int) -> list[dict | None]:
        """The files of rows start .. stop - 1, each a dict of bytes or path, None where a row has none."""
        (files,) = self.files[start:stop].values()
        return files if self.names_files else [file and {**file, "path": None} for file in files]


def fingerprint(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, bytes, time of change) of every file below `path`, sorted: changes when the data set does.

    Raises UserError for links whose absence would not be noticed.
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
            there = os.path.exists(file)
            if not there and name.endswith((".parquet", ".tar")):
                raise UserError(f"{file} is a link that leads nowhere; mend or remove it")
            stat = os.stat(file, follow_symlinks=there)  # of an image link that leads nowhere, its own
            yield os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns


def open_set(location: Location, scratch: str) -> Rows:
    """Open a set with `datasets`, which keeps what it makes of local files in the folder `scratch`.

    Raises UserError for whatever does not open, and for a set without images, labels or two classes.
    """
    import datasets

    preset, splits = location.preset, _load(location, scratch)
    train_name = next((name for name in splits if name in TRAIN_SPLITS or len(splits) == 1), None)
    if train_name is None:
        raise UserError(f"preset={preset!r} has the splits {', '.join(splits)}, none for training; name one train")
    train = splits[train_name]
    image, column = find_image_column(location, train), find_label_column(location, train)
    found = _labels(train, column)
    if not all(isinstance(label, str | int | None) for label in found):
        raise UserError(
            f"label={column!r} of {preset!r} holds neither names nor numbers; name another with ?label=COLUMN"
        )
    classes = getattr(train.features[column], "names", None) or sorted({label for label in found if label is not None})
    if len({*found} - {None}) < 2:
        raise UserError(
            f"preset={preset!r} has fewer than two classes in column {column!r};"
            " sort the images into a folder for each class, or name another column with ?label=COLUMN"
        )
    number = {label: i for i, label in enumerate(classes)}
    parts, labels, val_name = [train], [number.get(label, -1) for label in found], None
    for name in VAL_SPLITS:
        if name in splits and name != train_name and column in splits[name].column_names:
            numbers = [number.get(label, -1) for label in _labels(splits[name], column)]
            if max(numbers, default=-1) >= 0:  # the labels of test splits are often kept back
                parts, labels, val_name = [train, splits[name]], labels + numbers, name
                break
    files = [part.select_columns([image]).cast_column(image, datasets.Image(decode=False)) for part in parts]
    return Rows(
        files=datasets.concatenate_datasets(files),
        names_files=train.info.builder_name == "imagefolder",
        labels=np.array(labels),
        num_train=len(train),
        classes=[str(label) for label in classes],
        splits=(train_name, val_name),
        column=column,
        revision=location.revision if location.path or location.revision else hub_revision(train),
    )


def _labels(split, column: str) -> list:
    """The label of each row, as a name where the column has names; None where a row has none."""
    values, names = split.select_columns([column])[:][column], getattr(split.features[column], "names", None)
    return values if names is None else [None if value is None or value < 0 else names[value] for value in values]


def _load(location: Location, scratch: str) -> dict:
    """Split name -> datasets.Dataset."""
    import datasets

    try:
        if location.path is None:
            return dict(datasets.load_dataset(location.name, location.config, revision=location.revision))
        if (kind := file_kind(location)) == "images":
            return image_folder(location)
        # what `datasets` makes of a folder's names is cached below scratch: the folder may change, its path not
        where = {"data_files" if location.path.is_file() else "data_dir": str(location.path)}
        return dict(datasets.load_dataset(kind, cache_dir=scratch, **where))
    except UserError:
        raise
    except Exception as error:  # the hub client, the builders and pyarrow raise a dozen unrelated kinds
        remedy = "check the files"
        if location.path is None:
            remedy = "check the name and the network, run `hf auth login` if it is private, or give a local folder"
            if "gated" in str(error):
                page = f"https://huggingface.co/datasets/{location.name}"
                remedy = f"accept its terms at {page}, then run: hf auth login"
        raise UserError(f"preset={location.preset!r} cannot be opened ({reason(error)}); {remedy}") from error


def file_kind(location: Location) -> str:
    """`images`, or the builder of `datasets` that reads what lies there. Raises UserError for nothing, or a mixture."""
    path = location.path
    assert path is not None
    if path.is_file():
        kind = KINDS.get(path.suffix)
        if kind in (None, "images"):
            raise UserError(
                f"preset={location.preset!r} is a file of no known kind; give a folder, a .parquet or a .tar file"
            )
        return kind
    names = {name for _, _, files in os.walk(path) for name in files}
    if any(re.fullmatch(r"metadata\.(csv|jsonl|parquet)", name) for name in names):
        return "imagefolder"
    kinds = sorted({KINDS[suffix] for name in names if (suffix := Path(name).suffix.lower()) in KINDS})
    if not kinds:
        raise UserError(
            f"preset={location.preset!r} holds no images and no parquet files, nor .tar; give a folder that does"
        )
    if len(kinds) > 1:
        raise UserError(f"preset={location.preset!r} holds files of {' and '.join(kinds)}; keep one kind in a folder")
    return kinds[0]


def image_folder(location: Location) -> dict:
    """Split name -> datasets.Dataset of the files and classes of a folder (see the module)."""
    root = location.path
    assert root is not None
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
    if not folders or not folders.keys() <= {*TRAIN_SPLITS, *VAL_SPLITS}:
        folders = {"train": root}
    return {name: _class_folders(location, path) for name, path in sorted(folders.items())}


def _class_folders(location: Location, root: Path):
    import datasets
    from torchvision.datasets.folder import make_dataset

    def is_image(file: str) -> bool:
        return os.path.basename(file)[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_FILES

    names = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    number = {name: i for i, name in enumerate(names)}
    rows = make_dataset(str(root), number, is_valid_file=is_image, allow_empty=True) if names else []
    if not rows:
        raise UserError(
            f"preset={location.preset!r} has no classes in {root}; sort the images into a folder for each class"
        )
    columns = {"image": [{"bytes": None, "path": file} for file, _ in rows], "label": [names[i] for _, i in rows]}
    features = {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    split = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    split.info.builder_name = "imagefolder"
    return split


def hub_revision(split) -> str | None:
    """The commit that a split was downloaded from, which `datasets` keeps in the path of its own cache; None if not."""
    files = " ".join(file["filename"] for file in split.cache_files)
    found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files)
    return found[1] if found else None


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
