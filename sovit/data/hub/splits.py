"""What a preset holds: rows for training and validation, their images and labels, and the classes."""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError, reason
from sovit.data.hub.folders import (
    LABEL_COLUMNS,
    TRAIN_SPLITS,
    VAL_SPLITS,
    Location,
    archives,
    file_kind,
    files_below,
    image_folder,
    shards,
)


@dataclass(frozen=True)
class Rows:
    """The rows of a set, those of training first. labels [I] int64, -1 for a row without a label of training.

    `files`: a datasets.Dataset of one column, image files; `names_files`: whether its rows may name a file of this machine.
    `splits`: the names of training and validation, None where it has none; `column`: that of the labels. `left_out`:
    reason -> number of files or rows that are not among these.
    """

    files: Any
    names_files: bool
    labels: np.ndarray
    num_train: int
    classes: list[str]
    splits: tuple[str, str | None]
    column: str
    revision: str | None
    left_out: dict[str, int]

    def read(self, start: int, stop: int) -> list[dict | None]:
        """The files of rows start .. stop - 1, each a dict of bytes or path, None where a row has none."""
        (files,) = self.files[start:stop].values()
        return files if self.names_files else [file and {**file, "path": None} for file in files]


def open_set(location: Location, scratch: str) -> Rows:
    """Open a set with `datasets`, which keeps what it makes of local files in the folder `scratch`.

    Raises UserError for whatever does not open, and for a set without images, labels or two classes.
    """
    import datasets

    preset, (splits, left_out) = location.preset, _load(location, scratch)
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
            found = _labels(splits[name], column)
            known = [i for i, label in enumerate(found) if label is None or label in number]
            numbers = [number.get(found[i], -1) for i in known]
            if max(numbers, default=-1) >= 0:  # the labels of test splits are often kept back
                strange = Counter(label for label in found if label is not None and label not in number)
                left_out |= {f"of class {label}, which training lacks": n for label, n in strange.items()}
                val = splits[name] if len(known) == len(found) else splits[name].select(known)
                parts, labels, val_name = [train, val], labels + numbers, name
                break
    unused = [name for name in splits if name not in (train_name, val_name)]
    left_out |= {f"of split {name}, not used": len(splits[name]) for name in unused}
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
        left_out=left_out,
    )


def _labels(split, column: str) -> list:
    """The label of each row, as a name where the column has names; None where a row has none."""
    values, names = split.select_columns([column])[:][column], getattr(split.features[column], "names", None)
    return values if names is None else [None if value is None or value < 0 else names[value] for value in values]


def _load(location: Location, scratch: str) -> tuple[dict, dict[str, int]]:
    """Split name -> datasets.Dataset; and reason -> number of files that are in none."""
    import datasets

    try:
        if location.path is None:
            return dict(datasets.load_dataset(location.name, location.config, revision=location.revision)), {}
        kind, left_out = file_kind(location)
        if kind == "images":
            return image_folder(location, files_below(location.path))
        # what `datasets` makes of a folder's names is cached below scratch: the folder may change, its path not
        if kind == "webdataset":
            return archives(location, scratch), left_out
        if kind == "parquet":
            where = {split: [glob.escape(str(f)) for f in paths] for split, paths in shards(location, kind).items()}
            return dict(datasets.load_dataset(kind, data_files=where, cache_dir=scratch)), left_out
        return dict(datasets.load_dataset(kind, data_dir=str(location.path), cache_dir=scratch)), left_out
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


def hub_revision(split) -> str | None:
    """The commit that a split was downloaded from, which `datasets` keeps in the path of its own cache; None if not."""
    found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", " ".join(file["filename"] for file in split.cache_files))
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
