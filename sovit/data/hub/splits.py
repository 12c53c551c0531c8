"""What is in the files of a preset: splits that `datasets` opens, their columns of images and labels, and the classes.

A local folder of images follows the rules of torchvision's ImageFolder: the folders of its first level are its classes.
Where all of them are called like splits (train, val, test, ... in any case), each holds the classes of that split. A folder
with a table beside the images (metadata.csv, .jsonl or .parquet) is read by `datasets`, by the rules of its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sovit import UserError, reason
from sovit.data.hub.rows import Part, class_names

TRAIN_SPLITS = ("train", "training")
VAL_SPLITS = ("validation", "val", "valid", "dev", "test")  # the first one that has labels
NUM_VAL = 10_000  # validation images at most: a fixed random choice where a set has more, the first ones of a stream
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls")
IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
KINDS = {".parquet": "parquet", ".tar": "webdataset", **dict.fromkeys(IMAGE_FILES, "images")}


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
class Opened:
    """A set whose rows can be read. `parts`: in this order. `classes`: the names, None where they are found on the way.

    `columns`: those of images and labels. `splits`: the names of training and validation, None where it has none.
    """

    parts: tuple[Part, ...]
    classes: list[str] | None
    columns: tuple[str, str]
    splits: tuple[str, str | None]
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


def open_set(location: Location, scratch: str, revision: str | None, limit: float) -> Opened:
    """Open a set with `datasets`, which keeps what it makes of local files in the folder `scratch`.

    `revision`: the commit of a hub's set that an earlier, unfinished decoding has read from. `limit`: training images to
    read of a streamed set. Validation comes first there, so that the folder can grow; without a validation split the
    part has is_val=None, and images are held out as they come.
    Raises UserError for whatever does not open, and for a set without images or labels.
    """
    splits, revision = _load(location, scratch, revision)
    train_name = next((name for name in TRAIN_SPLITS if name in splits), next(iter(splits)))
    train = splits[train_name]
    if train.features is None:
        raise UserError(f"preset={location.preset!r} does not say its columns when streamed; leave ?stream out")
    columns = find_image_column(location, train), find_label_column(location, train)
    if not location.streamed and len(set(train[columns[1]])) < 2:
        raise UserError(
            f"preset={location.preset!r} has fewer than two classes in column {columns[1]!r};"
            " sort the images into a folder for each class, or name another column with ?label=COLUMN"
        )
    classes = class_names(train, columns[1])
    num_val = NUM_VAL if location.streamed else math.inf
    for name in VAL_SPLITS:
        if name not in splits or name == train_name or columns[1] not in splits[name].column_names:
            continue
        if Part(splits[name], columns, True, num_val).any_label():  # the labels of test splits are often kept back
            parts = Part(splits[name], columns, True, num_val), Part(train, columns, False, limit)
            return Opened(parts if location.streamed else parts[::-1], classes, columns, (train_name, name), revision)
    part = Part(train, columns, None if location.streamed else False, limit)
    return Opened((part,), classes, columns, (train_name, None), revision)


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
        elif (kind := file_kind(location)) == "images":
            return image_folder(location), None
        else:
            # what `datasets` makes of a folder's names is cached below scratch: the folder may change, its path not
            where = {"data_files" if location.path.is_file() else "data_dir": str(location.path)}
            opened = datasets.load_dataset(kind, cache_dir=scratch, **where, **streaming)
    except UserError:
        raise
    except Exception as error:  # the hub client, the builders and pyarrow raise a dozen unrelated kinds
        raise UserError(
            f"preset={location.preset!r} cannot be opened ({reason(error)}); {remedy(location, error)}"
        ) from error
    if location.path is None and not location.streamed:
        revision = revision or hub_revision(next(iter(opened.values())))
    return dict(opened), revision


def file_kind(location: Location) -> str:
    """`images`, or the builder of `datasets` that reads what lies there: by the first file that is of a known kind."""
    path = location.path
    assert path is not None
    if path.is_file():
        kind = KINDS.get(path.suffix)
        if kind in (None, "images"):
            raise UserError(
                f"preset={location.preset!r} is a file of no known kind; give a folder, a .parquet or a .tar file"
            )
        return kind
    for _, _, files in os.walk(path):
        if any(re.fullmatch(r"metadata\.(csv|jsonl|parquet)", name) for name in files):
            return "imagefolder"
        for name in files:
            if Path(name).suffix.lower() in KINDS:
                return KINDS[Path(name).suffix.lower()]
    raise UserError(
        f"preset={location.preset!r} holds no images and no parquet files, nor .tar; give a folder that does"
    )


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
    used = {i: k for k, i in enumerate(sorted({i for _, i in rows}))}  # a folder without images is no class
    if not used:
        raise UserError(
            f"preset={location.preset!r} has no classes in {root}; sort the images into a folder for each class"
        )
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[names[i] for i in used])}
    columns = {
        "image": [{"bytes": None, "path": file} for file, _ in rows],
        "label": [used[i] for _, i in rows],
    }
    split = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    split.info.builder_name = "imagefolder"
    return split


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
