"""Any image classification set that Hugging Face `datasets` opens, or that lies in a folder.

A preset is one of

    uoft-cs/cifar10                      a data set of the hub; NAME[@REVISION][#CONFIG]
    /data/birds                          a folder with a folder of images for each class, or train/ and test/ of those
    /data/birds.parquet, /data/birds     a parquet file, or a folder of them, as `datasets` writes and reads

and may end in options: `?label=COLUMN` (which labels, where a set has several), `?flip=0` (no mirrored training images:
digits, text, left and right), `?label=coarse_label&flip=0` (both).

Images are decoded once, resized to the short side, centre-cropped and kept as a memory-mapped uint8 array. A hub set
without a revision is taken as it is on the day it is decoded; its revision stands in info.json beside the images.
Files that are no image and rows without a label are left out, images of other modes become RGB: info.json counts them.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch

from sovit import UserError
from sovit.data import Batch
from sovit.data.cache import build_once, content_key, prior_cross_entropy, say, track

RECIPE = 2  # part of the cache key: raise it when the decoding below changes, or what info.json tells of it
NUM_VAL = 10_000  # validation images at most: a fixed random choice where a set has more
HOLDOUT = 0.1  # of the training images, where a set has no labelled validation or test split
SPLIT_KEY = 0x53504C4954  # hold-out and validation order do not depend on data_seed
MAX_PIXELS = 89_000_000  # an image that would unpack to more is left out (Pillow itself warns a little above)
BLOCK = 256  # images that are read and decoded together

TRAIN_SPLITS = ("train", "training")
VAL_SPLITS = ("validation", "val", "valid", "dev", "test")  # the first one that has labels
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
OPTIONS = {"label": "", "flip": "1"}


@dataclass(frozen=True)
class Location:
    """A preset, taken apart. Without `path` (a local file or folder), `name`, `revision`, `config` are the hub's."""

    preset: str
    path: Path | None
    name: str
    revision: str | None
    config: str | None
    label: str
    flip: bool


class Hub:
    """An opened data set. images [I, S, S, 3] uint8, memory-mapped; see sovit.data.Source for the rest.

    `content_key` is the key of the cache: another one when the files of a folder, the revision, label or size differ.
    Images come as value / 127.5 - 1, between -1 and 1. A training epoch shows every image once, in an order that
    depends on (data_seed, epoch) alone, mirrored or not.
    """

    def __init__(self, folder: Path, flip: bool, data_seed: int, device: str):
        self.flip, self.data_seed, self.device = flip, data_seed, device
        self.content_key = folder.name
        self.info = json.loads((folder / "info.json").read_text())
        self.class_names: tuple[str, ...] = tuple(self.info["classes"])
        self.label_grid = 1
        self.num_classes = len(self.class_names)
        self.readout = "pooled"
        self.skills: tuple[str, ...] = ()
        self.blind: dict[str, float] = {}
        self._labels = np.load(folder / "labels.npy")  # [I]
        self._images = np.load(folder / "images.npy", mmap_mode="r")[: len(self._labels)]
        is_val = np.load(folder / "is_val.npy")  # [I]
        self._train_rows, val_rows = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        self._val_rows = np.random.Generator(np.random.Philox(key=SPLIT_KEY)).permutation(val_rows)[:NUM_VAL]
        self.num_train, self.num_val = len(self._train_rows), len(self._val_rows)
        self.zero_line = prior_cross_entropy(
            self._labels[self._train_rows], self._labels[self._val_rows], self.num_classes
        )
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def train(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1 of endless epochs: images [B, 3, H, W], labels [B]."""
        rows, flips = [], []
        size = len(self._train_rows)
        while count > 0:
            epoch, offset = divmod(start, size)
            order, mirrored = self._epoch_order(epoch)
            stop = min(size, offset + count)
            rows.append(order[offset:stop])
            flips.append(mirrored[offset:stop])
            start, count = start + stop - offset, count - (stop - offset)
        return self._batch(np.concatenate(rows), np.concatenate(flips))

    def val(self, start: int, count: int) -> Batch:
        """Validation images start .. start + count - 1, never mirrored; the same for every data_seed."""
        if start < 0 or start + count > self.num_val:
            raise UserError(f"validation images {start} .. {start + count - 1} do not exist; num_val={self.num_val}")
        return self._batch(self._val_rows[start : start + count], np.zeros(count, bool))

    def _batch(self, rows: np.ndarray, mirrored: np.ndarray) -> Batch:
        order = np.argsort(rows)  # rising reads of a memory map are several times faster than random ones
        raw = np.empty((len(rows), *self._images.shape[1:]), np.uint8)  # [B, H, W, 3]
        raw[order] = self._images[rows[order]]
        raw[mirrored] = raw[mirrored, :, ::-1]
        pixels = torch.from_numpy(raw).to(self.device).permute(0, 3, 1, 2).float().contiguous()  # [B, 3, H, W]
        return Batch(pixels.div_(127.5).sub_(1), torch.from_numpy(self._labels[rows]).to(self.device), None)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the images of an epoch in their order, and whether each is mirrored; the last epoch is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried on
            random = np.random.Generator(np.random.Philox(key=self.data_seed, counter=[0, 0, epoch, 0]))
            order = random.permutation(self._train_rows)
            self._epoch = epoch, order, (random.random(len(order)) < 0.5) & self.flip
        return self._epoch[1], self._epoch[2]


def open_source(preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Hub:
    """Open the data set that `preset` names (see the module) at `image_size` pixels; the first opening decodes it.

    Raises UserError for a name or folder that cannot be opened, a set without images or labels or with one class,
    and sizes that do not divide.
    """
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise UserError(f"patch_size={patch_size} does not divide image_size={image_size}; give one that does")
    if data_seed < 0:
        raise UserError(f"data_seed={data_seed} is negative; give 0 or more")
    location = locate(preset)
    source = list(fingerprint(location.path)) if location.path else [location.name, location.revision, location.config]
    key = content_key(recipe=RECIPE, size=image_size, source=source, label=location.label)
    folder = build_once("hub", key, lambda folder: decode_all(location, image_size, folder))
    return Hub(folder, location.flip, data_seed, device)


def locate(preset: str) -> Location:
    """Take a preset apart. Raises UserError for an empty one, an unknown option or a path that does not exist."""
    base, _, query = preset.partition("?")
    if not base:
        raise UserError("data='hub' needs a preset; name a folder of images, or a hub name such as uoft-cs/cifar10")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if options.keys() - OPTIONS.keys() or (query and not options) or options.get("flip", "1") not in ("0", "1"):
        raise UserError(f"preset={preset!r} has an unknown option; the options are ?label=COLUMN and ?flip=0 or 1")
    options = OPTIONS | options
    label, flip = options["label"], options["flip"] == "1"
    path = Path(base).expanduser()
    if path.exists():
        return Location(preset, path.resolve(), base, None, None, label, flip)
    hub = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([^#]+))?(?:#(.+))?", base)
    if hub is None or path.suffix == ".parquet":
        raise UserError(f"preset={preset!r} is neither a file or folder here nor a hub name; correct the path")
    return Location(preset, None, hub[1], hub[2], hub[3], label, flip)


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
                if name.endswith(".parquet"):
                    raise UserError(f"{file} is a link that leads nowhere; mend or remove it") from None
                yield os.path.relpath(file, path), -1, 0
            else:
                yield os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns


def num_dead_links(path: Path | None) -> int:
    """Image links below `path` that lead nowhere: `datasets` passes them over, so that decoding does not see them."""
    files = fingerprint(path) if path else ()
    return sum(size < 0 and Path(name).suffix.lower() in IMAGE_FILES for name, size, _ in files)


def decode_all(location: Location, size: int, folder: Path) -> None:
    """Decode a data set into `folder`: images.npy [I or more, S, S, 3], labels.npy [I], is_val.npy [I], info.json."""
    from datasets import Image

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".arrow-") as scratch:
        splits, revision = load_splits(location, scratch)
        train_name = next((name for name in TRAIN_SPLITS if name in splits), next(iter(splits)))
        train = splits[train_name]
        image_column = find_image_column(location, train)
        label_column = find_label_column(location, train)
        classes, train_labels = number_labels(location, train, label_column)
        parts = [(train, train_labels, False)]
        for val_name in VAL_SPLITS:
            if val_name in splits and val_name != train_name and label_column in splits[val_name].column_names:
                val_labels = apply_numbers(splits[val_name], label_column, classes)
                if (val_labels >= 0).any():  # the labels of test splits are often kept back, as -1
                    parts.append((splits[val_name], val_labels, True))
                    break
        else:
            val_name = f"{HOLDOUT:.0%} of {train_name}, held out"

        total = sum(len(split) for split, _, _ in parts)
        say(f"hub: decoding {total:,} images of {location.preset} to {size} px, once")
        images = np.lib.format.open_memmap(
            folder / "images.npy", mode="w+", dtype=np.uint8, shape=(total, size, size, 3)
        )
        found: list[tuple[int, bool]] = []  # label and side of each image kept
        left_out = Counter(broken=num_dead_links(location.path), unlabelled=0)
        modes: Counter[str] = Counter()  # of the images kept
        for row, val in track(decoded(parts, image_column, Image(decode=False), size, left_out), "decoding", total):
            if row is not None:
                image, mode, label = row
                images[len(found)] = image
                found.append((label, val))
                modes[mode] += 1
        images.flush()
        del images, splits, train, parts

    labels = np.array([label for label, _ in found], dtype=np.int64)
    is_val = np.array([val for _, val in found], dtype=bool)
    if not is_val.any():
        random = np.random.Generator(np.random.Philox(key=SPLIT_KEY, counter=[0, 0, 0, 1]))
        is_val[random.permutation(len(labels))[: max(1, round(HOLDOUT * len(labels)))]] = True
        val_name = f"{HOLDOUT:.0%} of {train_name}, held out"
    if len(np.unique(labels[~is_val])) < 2:
        raise UserError(f"preset={location.preset!r} has fewer than two classes of readable images; give a fuller set")
    np.save(folder / "labels.npy", labels)
    np.save(folder / "is_val.npy", is_val)
    converted = {mode: count for mode, count in modes.most_common() if mode != "RGB"}
    info = {
        "preset": location.preset,
        "revision": revision,
        "size": size,
        "columns": [image_column, label_column],
        "splits": [train_name, val_name],
        "num_train": int((~is_val).sum()),
        "num_val": int(is_val.sum()),
        **left_out,
        "converted": converted,
        "classes": classes,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1))
    say(
        f"hub: {info['num_train']:,} training images ({train_name}), {info['num_val']:,} validation images"
        f" ({val_name}), {len(classes)} classes in column {label_column!r}; left out {left_out['broken']} broken and"
        f" {left_out['unlabelled']} unlabelled; made RGB: "
        + (", ".join(f"{count:,} of mode {mode}" for mode, count in converted.items()) or "none")
    )


def load_splits(location: Location, scratch: str) -> tuple[dict, str | None]:
    """Split name -> datasets.Dataset, and the hub's revision. Raises UserError for whatever does not open."""
    import datasets

    try:
        if location.path is None:
            opened = datasets.load_dataset(location.name, location.config, revision=location.revision)
        elif location.path.is_file():
            if location.path.suffix != ".parquet":
                raise UserError(
                    f"preset={location.preset!r} is a file of no known kind; give a folder or a .parquet file"
                )
            opened = datasets.load_dataset("parquet", data_files=str(location.path), cache_dir=scratch)
        else:
            # what `datasets` makes of a folder's names is cached below scratch: the folder may change, its path not
            kind = folder_kind(location.preset, location.path)
            opened = datasets.load_dataset(kind, data_dir=str(location.path), cache_dir=scratch)
    except UserError:
        raise
    except Exception as error:  # the hub client, the builders and pyarrow raise a dozen unrelated kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "check the files" if location.path else "check the name and the network, or give a local folder"
        raise UserError(f"preset={location.preset!r} cannot be opened ({reason}); {remedy}") from error
    return dict(opened), location.revision or (None if location.path else hub_revision(next(iter(opened.values()))))


def hub_revision(split) -> str | None:
    """The commit that a split was downloaded from, which `datasets` keeps in the path of its own cache; None if not."""
    files = " ".join(file["filename"] for file in split.cache_files)
    found = re.search(r"[/\\]([0-9a-f]{40})[/\\]", files)
    return found[1] if found else None


def folder_kind(preset: str, folder: Path) -> str:
    """`imagefolder` or `parquet`, by the first file that is one or the other. Raises UserError where none is."""
    for _, _, files in os.walk(folder):
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix == ".parquet":
                return "parquet"
            if suffix in IMAGE_FILES:
                return "imagefolder"
    raise UserError(f"preset={preset!r} holds no images and no parquet files; give a folder that does")


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


def number_labels(location: Location, split, column: str) -> tuple[list[str], np.ndarray]:
    """Class names and a number for each row, -1 where it has no label. Names and numbers are sorted where untyped."""
    from datasets import ClassLabel

    if isinstance(split.features[column], ClassLabel):
        classes = list(split.features[column].names)
    else:
        values = {value for value in split[column] if value is not None}
        if not all(isinstance(value, str | int) for value in values):
            raise UserError(
                f"label={column!r} of {location.preset!r} holds neither names nor numbers; choose another column"
            )
        classes = [str(value) for value in sorted(values)]
    labels = apply_numbers(split, column, classes)
    if len(np.unique(labels[labels >= 0])) < 2:
        raise UserError(
            f"preset={location.preset!r} has fewer than two classes in column {column!r};"
            " sort the images into a folder for each class, or name another column with ?label=COLUMN"
        )
    return classes, labels


def apply_numbers(split, column: str, classes: list[str]) -> np.ndarray:
    """The class number of each row, [rows]; -1 for a missing label or one that is not among `classes`."""
    from datasets import ClassLabel

    feature = split.features[column]
    number = {name: i for i, name in enumerate(classes)}
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names is not None:
        return np.array([number.get(names[v], -1) if v is not None and v >= 0 else -1 for v in split[column]], np.int64)
    return np.array([-1 if v is None else number.get(str(v), -1) for v in split[column]], np.int64)


def decoded(parts: list, column: str, undecoded, size: int, left_out: Counter) -> Iterator[tuple]:
    """((image [S, S, 3] uint8, mode, label) or None, is_val) for each row; None for those counted in `left_out`."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # Pillow decodes and resizes outside the GIL
        for split, labels, is_val in parts:
            split = split.select_columns(column).cast_column(column, undecoded)
            for start in range(0, len(split), BLOCK):
                rows = split[start : start + BLOCK][column]
                images = pool.map(lambda row: decode(row, size), rows)
                for image, label in zip(images, labels[start : start + BLOCK], strict=True):
                    if label < 0 or image is None:
                        left_out["unlabelled" if label < 0 else "broken"] += 1
                        yield None, is_val
                    else:
                        yield (*image, int(label)), is_val


def decode(row: dict | None, size: int) -> tuple[np.ndarray, str] | None:
    """A file's bytes or path -> RGB [S, S, 3] uint8, the centre square resized, and the file's mode in Pillow's words.

    None for a file that is no image.
    """
    from PIL import Image, ImageOps

    if row is None:
        return None
    try:
        with Image.open(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"]) as file:
            if file.width * file.height > MAX_PIXELS:
                return None
            mode = file.mode
            file.draft(None, (2 * size, 2 * size))  # JPEG: decode no more detail than is kept
            image = ImageOps.exif_transpose(file)
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            # crop and resize in one step: a strip of 1 x 10^7 pixels must not grow on the way
            box = (left, top, left + side, top + side)
            return np.asarray(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)), mode
    except Exception:  # whatever Pillow's forty decoders raise on damaged files, one image must not end the run
        return None


def to_rgb(image):
    """A Pillow image of any mode as RGB: transparency on white, 16-bit grey scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values, which leaves white
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
