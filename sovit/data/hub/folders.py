"""What lies in a local folder or file: images by class, archives, or what `datasets` reads; and what is left out.

A folder of images follows the rules of torchvision's ImageFolder: the folders of its first level are its classes. Where all
of them are called like splits (train, val, test, ... in any case), each holds the classes of that split. A folder without
two classes of that kind, but with a table (metadata.csv, .jsonl or .parquet), is read by `datasets`, by the rules of its
own. Names that begin with a dot are not looked at; every other file is read, or counted with the reason why not.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit import UserError

TRAIN_SPLITS = ("train", "training")
VAL_SPLITS = ("validation", "val", "valid", "dev", "test")  # the first one that has labels
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "cls")
IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
SPLITS = (*TRAIN_SPLITS, *VAL_SPLITS)
SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(SPLITS)})(?![a-z])")
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


def files_below(root: Path) -> list[Path]:
    """Every file below a folder, as a path relative to it, sorted; hidden ones apart."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(folder, name).relative_to(root) for name in sorted(names) if name[0] != "."]
    return found


def file_kind(location: Location) -> tuple[str, dict[str, int]]:
    """`images`, or the builder of `datasets` that reads what lies there; and reason -> files that it does not read.

    Raises UserError for nothing, or a mixture without classes in folders.
    """
    path = location.path
    assert path is not None
    if path.is_file():
        kind = KINDS.get(path.suffix.lower())
        if kind in (None, "images"):
            raise UserError(
                f"preset={location.preset!r} is a file of no known kind; give a folder, a .parquet or a .tar file"
            )
        return kind, {}
    files = files_below(path)
    classes = {label for images in labelled_images(location, files).values() for _, label in images} - {None}
    if len(classes) > 1:
        return "images", {}
    if any(re.fullmatch(r"metadata\.(csv|jsonl|parquet)", file.name) for file in files):
        return "imagefolder", _not_read([f for f in files if not is_image(f) and f.stem != "metadata"])
    kinds = sorted({KINDS[suffix] for file in files if (suffix := file.suffix.lower()) in KINDS})
    if len(kinds) != 1:
        what = f"files of {' and '.join(kinds)}" if kinds else "no images and no parquet files, nor .tar"
        raise UserError(f"preset={location.preset!r} holds {what}; give a folder of one kind")
    return kinds[0], _not_read([file for file in files if KINDS.get(file.suffix.lower()) != kinds[0]])


def is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_FILES


def _not_read(files: list[Path]) -> dict[str, int]:
    counts = Counter(file.suffix.lower() for file in files)
    return {f"of a kind that is not read ({suffix or 'no suffix'})": n for suffix, n in sorted(counts.items())}


def labelled_images(location: Location, files: list[Path]) -> dict[str, list[tuple[Path, str | None]]]:
    """Split name -> its images, each with its class, None for one that lies in no class folder.

    Raises UserError for two folders of one split, and for folders of splits beside others.
    """
    images = [file for file in files if is_image(file)]
    tops = sorted({file.parts[0] for file in images if len(file.parts) > 1})
    splits = [top for top in tops if top.lower() in SPLITS]
    if not splits or (len(splits) == 1 and len(tops) > 1):  # a class may be called train
        return {"train": [(file, file.parts[0] if len(file.parts) > 1 else None) for file in images]}
    if splits != tops:
        other = next(top for top in tops if top not in splits)
        raise UserError(
            f"preset={location.preset!r} has {' and '.join(splits)} beside {other}: splits, or classes? move what is no"
            " split elsewhere, or rename the classes"
        )
    if len({top.lower() for top in tops}) < len(tops):
        raise UserError(
            f"preset={location.preset!r} has one split twice among {', '.join(tops)}; keep one folder of it"
        )
    found: dict[str, list[tuple[Path, str | None]]] = {top.lower(): [] for top in tops}
    for file in images:
        split = file.parts[0].lower() if len(file.parts) > 1 else splits[0].lower()
        found[split].append((file, file.parts[1] if len(file.parts) > 2 else None))
    return found


def image_folder(location: Location, files: list[Path]) -> tuple[dict, dict[str, int]]:
    """Split name -> datasets.Dataset of the images and classes of a folder (see the module); what is left out, by reason."""
    import datasets

    assert location.path is not None
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    loose, splits = 0, {}
    for split, images in labelled_images(location, files).items():
        own = [(file, label) for file, label in images if label is not None]
        loose += len(images) - len(own)
        paths = [{"bytes": None, "path": str(location.path / file)} for file, _ in own]
        columns = {"image": paths, "label": [label for _, label in own]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
        splits[split].info.builder_name = "imagefolder"
    return splits, _not_read([file for file in files if not is_image(file)]) | {"in no class folder": loose}


def shards(location: Location, kind: str) -> dict[str, list[Path]]:
    """Split name -> its parquet files or archives: by a word of their names, else by a folder's name, else train.

    Raises UserError where only some are named after splits.
    """
    root, found = location.path, dict[str, list[Path]]()
    assert root is not None
    if root.is_file():
        return {"train": [root]}
    for file in files_below(root):
        if KINDS.get(file.suffix.lower()) == kind:
            folders = [name.lower() for name in file.parts[:-1] if name.lower() in SPLITS]
            words = {*(SPLIT_WORD.findall(file.stem.lower()) or folders)}
            found.setdefault(words.pop() if len(words) == 1 else "", []).append(root / file)
    if "" in found and len(found) > 1:
        other = found[""][0].name
        raise UserError(f"preset={location.preset!r} names files after splits, but not {other}; name all so, or none")
    return {split or "train": paths for split, paths in found.items()}


def archives(location: Location, scratch: str) -> dict:
    """Split name -> datasets.Dataset of webdataset archives.

    A sample is what shares a name up to the first dot: its image, whatever the kind, and its labels. Raises UserError for
    two images in a sample, and for a damaged archive.
    """
    import datasets

    splits = {}
    for split, paths in shards(location, "webdataset").items():
        kinds: dict[str, str] = {}
        for sample in archive_samples(paths):
            for name, value in sample.items():
                whole = str(value).lstrip("-").isdecimal() and kinds.get(name) != "string"
                kinds[name] = "int64" if whole else "string"
        kinds.pop("image", None)
        features = {"image": datasets.Image(decode=False)} | {n: datasets.Value(kinds[n]) for n in sorted(kinds)}
        splits[split] = datasets.Dataset.from_generator(
            archive_samples, datasets.Features(features), scratch, gen_kwargs=dict(paths=paths, kinds=kinds)
        )
    return splits


def archive_samples(paths: list[Path], kinds: dict[str, str] | None = None) -> Iterator[dict]:
    """The samples of webdataset archives: image {bytes, path} and labels. kinds: label -> type; None: text, no bytes."""

    def whole(sample: dict) -> dict:
        if kinds is None:
            return sample
        labels = {n: int(sample[n]) if kind == "int64" and n in sample else sample.get(n) for n, kind in kinds.items()}
        return {"image": sample.get("image"), **labels}

    for path in paths:
        key: str | None = None
        sample: dict[str, Any] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                stem, dot, field = os.path.basename(member.name).partition(".")
                content, field = archive.extractfile(member) if stem and dot else None, field.lower()
                if content is None:  # a folder, or hidden
                    continue
                own = os.path.join(os.path.dirname(member.name), stem)
                if own != key and key is not None:
                    yield whole(sample)
                    sample = {}
                key = own
                if f".{field}" in IMAGE_FILES:
                    if "image" in sample:
                        raise UserError(f"{path} has two images of the name {own}; keep one")
                    sample["image"] = {"bytes": None if kinds is None else content.read(), "path": member.name}
                elif field in ("json", "jsn"):
                    body = json.load(content)
                    sample |= {name: str(body[name]) for name in LABEL_COLUMNS if body.get(name) is not None}
                elif field in (*LABEL_COLUMNS, "txt", "text"):
                    sample[field] = content.read().decode("utf-8").strip()
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)  # tarfile takes a header that it cannot read for the end
            if archive.fileobj.read(512) != bytes(512):
                raise UserError(f"{path} is cut off or damaged at byte {archive.offset:,}; copy it again")
        if key is not None:
            yield whole(sample)
