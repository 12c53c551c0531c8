"""Images decoded once: rows of a set -> square uint8 pixels in a folder that only grows, so that a kill loses little.

Files of a folder: images.npy [I, S, S, 3] uint8, labels.npy [I] int64, is_val.npy [I] bool, hashes.npy [I] uint64 (see
sovit.data.image_hash), progress.json (how far it has come) and at the end info.json (what is in it).

A set that is streamed may be read up to a number of training images now and further another day: its folder grows, and
holds for any number the same images as if it had been read so far at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sovit import UserError
from sovit.data.assets import cache_dir, writable
from sovit.data.cache import content_key, say, track
from sovit.data.hub.decode import decode
from sovit.data.hub.splits import (
    NUM_VAL,
    Location,
    Part,
    Splits,
    check_label,
    fingerprint,
    num_dead_links,
    open_splits,
    parts_of,
)
from sovit.data.image_hash import difference_hash, within
from sovit.ledger import locked, write_atomic

RECIPE = 2  # part of a folder's name: raise it when the decoding changes, or what info.json must tell of it
HOLDOUT = 0.1  # of the training images, where a set has no labelled validation or test split
SPLIT_KEY = 0x53504C4954  # hold-out, validation order and subsets do not depend on data_seed
BLOCK = 256  # images that are read and decoded together
SAVE_SECONDS = 2.0  # of decoding that a kill may cost
NEAR = 4  # bits of the difference hash between two images that count as near-duplicates

COLUMNS = {"images": np.uint8, "labels": np.int64, "is_val": np.bool_, "hashes": np.uint64}


class Table(NamedTuple):
    """What of a folder is in use: images [I, S, S, 3], memory-mapped, labels [I] (-1: no class), is_val [I]."""

    images: np.ndarray
    labels: np.ndarray
    is_val: np.ndarray
    classes: list[str]
    info: dict


def fixed_random(*counter: int) -> np.random.Generator:
    """One of the random streams that are the same for every data_seed, named by up to two numbers."""
    # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried on
    return np.random.Generator(np.random.Philox(key=SPLIT_KEY, counter=[0, 0, *counter]))


def decoded(location: Location, size: int, limit: float) -> Path:
    """The cache folder of a set at `size` pixels, decoded first where that has not been done.

    Its name changes when the files of a folder, the revision, label or size differ. `limit`: training images to read of
    a streamed set, or infinity. Processes that ask at the same time wait for the first one. Raises UserError for what
    cannot be opened, read or written; what has been decoded is kept then.
    """
    source = list(fingerprint(location.path)) if location.path else [location.name, location.revision, location.config]
    streamed = {"streamed": True} if location.streamed else {}
    key = content_key(recipe=RECIPE, size=size, source=source, label=location.label, **streamed)
    folder = cache_dir() / "hub" / key
    if is_complete(folder, location, limit):
        return folder
    writable(folder.parent)
    with locked(folder.parent / f".{key}.lock"):
        if not is_complete(folder, location, limit):
            folder.mkdir(exist_ok=True)
            try:
                fill(location, size, limit, folder)
            except BaseException:
                if not _progress(folder).get("num_rows"):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    return folder


def _progress(folder: Path) -> dict:
    try:
        return json.loads((folder / "progress.json").read_text())
    except FileNotFoundError:
        return {}


def is_complete(folder: Path, location: Location, limit: float) -> bool:
    """Whether nothing is left to decode. False, and no error, in a folder that may not be read."""
    if not os.path.isfile(folder / "info.json"):
        return False
    done = _progress(folder)
    return not location.streamed or done["exhausted"] or done["num_train"] >= limit


# writing what was decoded ---------------------------------------------------------------------------------------------


class Growing:
    """A .npy file that rows are appended to. A reader finds the number of rows elsewhere: see `read_rows`."""

    def __init__(self, path: Path, dtype, row_shape: tuple[int, ...], num_rows: int):
        self.dtype, self.row_shape = np.dtype(dtype), row_shape
        self.file = open(path, "r+b" if path.exists() else "w+b")
        self.flush(num_rows)
        self.file.truncate(self.file.tell() + num_rows * self.dtype.itemsize * math.prod(row_shape))
        self.file.seek(0, os.SEEK_END)

    def append(self, rows) -> None:
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)

    def flush(self, num_rows: int) -> None:
        """Write the header for so many rows; numpy leaves room in it for any number."""
        end = self.file.tell()
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (num_rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.file.seek(max(end, self.file.tell()))
        self.file.flush()


def read_rows(path: Path, num_rows: int) -> np.ndarray:
    """The first rows of a .npy file, memory-mapped, whatever its header says at this moment of their number."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), (num_rows, *shape[1:]))


def fill(location: Location, size: int, limit: float, folder: Path) -> None:
    """Decode what `folder` lacks, and say what is in it then."""
    fresh: dict = {
        "num_rows": 0, "num_train": 0, "num_val": 0, "part": 0, "position": None, "exhausted": False, "revision": None,
        "values": [], "left_out": {"broken": 0, "unlabelled": 0}, "converted": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".arrow-") as scratch:
        done = fresh | _progress(folder)
        splits = open_splits(location, scratch, done["revision"])
        if done["revision"] != splits.revision:  # another day, another revision of a set that names none
            done = fresh | {"revision": splits.revision}
        parts, classes, val_name = parts_of(location, splits, limit)
        try:
            read_on(location, parts, classes, done, size, folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"the disk of {folder} is full after {done['num_rows']:,} images; free some, and run the same again"
            ) from None
    finish(location, classes, splits, val_name, done, size, folder)


def read_on(
    location: Location, parts: list[Part], classes: list[str] | None, done: dict, size: int, folder: Path
) -> None:
    """Decode from where `done` stands until each part's limit or end; `done` and the files are kept in step."""
    total = _num_left(parts, done)
    before = f", after {done['num_rows']:,} of an earlier time" if done["num_rows"] else ""
    number = "as many images as come" if total is None else f"{total:,} images"
    say(f"hub: decoding {number} of {location.preset} to {size} px, once{before}")
    _check_space(folder, total, size)
    arrays = {
        name: Growing(folder / f"{name}.npy", dtype, (size, size, 3) if name == "images" else (), done["num_rows"])
        for name, dtype in COLUMNS.items()
    }
    numbers = {str(name): i for i, name in enumerate(classes if classes is not None else done["values"])}
    held_out = fixed_random(0, 3)  # under this key the very first image is one, so that no stream is without
    held_out.random(done["num_rows"])  # a number for each image kept: go on after those that are there
    converted = Counter(done["converted"])
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        done["converted"] = dict(converted)
        for array in arrays.values():
            array.flush(done["num_rows"])
        write_atomic(folder / "progress.json", json.dumps(done))  # last: rows that it does not count are overwritten
        saved_at = time.monotonic()

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # Pillow decodes and resizes outside the GIL
        for part, rows in track(_blocks(location, parts, done), "decoding", total and math.ceil(total / BLOCK)):
            kept = []
            for image, (_, label) in zip(pool.map(lambda row: decode_hashed(row[0], size), rows), rows, strict=True):
                if part.labels is None and label is not None:
                    label = _number(location, part.label_column, label, numbers, done["values"], classes)
                if label is None or label < 0 or image is None:
                    done["left_out"]["unlabelled" if label is None or label < 0 else "broken"] += 1
                    continue
                pixels, mode, bits = image
                is_val = part.is_val
                if is_val is None:
                    is_val = bool(held_out.random() < HOLDOUT) and done["num_val"] < NUM_VAL
                kept.append((pixels, label, is_val, bits))
                converted[mode] += mode != "RGB"
                done["num_rows"] += 1
                done["num_val" if is_val else "num_train"] += 1
            for array, column in zip(arrays.values(), zip(*kept)):
                array.append(np.stack(column))
            done["position"] = part.position
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
    save()
    for array in arrays.values():
        array.file.close()


def _blocks(location: Location, parts: list[Part], done: dict) -> Iterator[tuple[Part, list]]:
    """The rows still to be read, in blocks; `done` tells how many images of the blocks before were kept."""
    while done["part"] < len(parts):
        part = parts[done["part"]]
        part.position = done["position"]
        rows: list | None = None
        while (left := part.limit - done["num_val" if part.is_val else "num_train"]) > 0:
            try:
                rows = part.take(int(min(BLOCK, left)))
            except Exception as error:  # of the network, the hub client or pyarrow
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(
                    f"preset={location.preset!r} cannot be read after {done['num_rows']:,} images ({reason});"
                    " they are kept: run the same again to go on"
                ) from error
            if not rows:
                break
            yield part, rows
        if rows != [] and part is parts[-1]:
            return  # another day it may be read further
        done["part"], done["position"] = done["part"] + 1, None
    done["exhausted"] = True


def _number(location: Location, column: str, label, numbers: dict, values: list, classes: list[str] | None) -> int:
    """The number of a streamed label; of a column without names each new value gets the next one, in `values`."""
    number = numbers.get(str(label), -1)
    if number < 0 and classes is None:
        check_label(location, column, label)
        number = numbers[str(label)] = len(values)
        values.append(label)
    return number


def _num_left(parts: list[Part], done: dict) -> int | None:
    """Images still to be decoded at most; None for a stream that does not say."""
    total = 0
    for part in parts[done["part"] :]:
        kept = done["num_val" if part.is_val else "num_train"]
        if part.labels is not None:
            total += len(part.labels) - kept
        elif part.limit < math.inf:
            total += int(part.limit) - kept
        else:
            return None
    return total


def _check_space(folder: Path, total: int | None, size: int) -> None:
    need, free = (total or 0) * size * size * 3, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{total:,} images of {size} px take {need / 1e9:,.1f} GB, and {folder.parent} has {free / 1e9:,.1f} GB left;"
            " read fewer with ?stream=NUMBER, take a smaller ?cache_size=, or set SOVIT_CACHE to another disk"
        )


def finish(location: Location, classes: list[str] | None, splits: Splits, val_name: str | None, done: dict, size: int,
           folder: Path) -> None:  # fmt: skip
    """Hold out validation images where a set has none, count near-duplicates, write info.json and say what there is."""
    num_rows = done["num_rows"]
    labels = np.array(read_rows(folder / "labels.npy", num_rows)) if num_rows else np.zeros(0, np.int64)
    is_val = np.array(read_rows(folder / "is_val.npy", num_rows)) if num_rows else np.zeros(0, bool)
    if not location.streamed and not done["num_val"]:
        is_val[:] = False
        is_val[fixed_random(0, 1).permutation(num_rows)[: max(1, round(HOLDOUT * num_rows))]] = True
        np.save(folder / "is_val.npy", is_val)
        val_name = None
    seen = len(np.unique(labels[~is_val]))
    if seen < 2:
        if not location.streamed:
            shutil.rmtree(folder)
        more = "read more of the stream" if location.streamed else "give a fuller set"
        raise UserError(f"preset={location.preset!r} has fewer than two classes of readable images; {more}")
    hashes = read_rows(folder / "hashes.npy", num_rows)
    near = int(within(hashes[~is_val], hashes[is_val], NEAR).sum())
    val_name = val_name or f"{HOLDOUT:.0%} of {splits.train_name}, held out"
    dead = num_dead_links(location.path)
    info = {
        "preset": location.preset,
        "revision": done["revision"],
        "size": size,
        "columns": [splits.image_column, splits.label_column],
        "splits": [splits.train_name, val_name],
        "num_train": int((~is_val).sum()),
        "num_val": int(is_val.sum()),
        "broken": done["left_out"]["broken"] + dead,
        "unlabelled": done["left_out"]["unlabelled"],
        "converted": {mode: n for mode, n in Counter(done["converted"]).most_common() if n},
        "near_duplicates_in_val": near,
        "classes": classes if classes is not None else [str(value) for value in sorted(done["values"])],
    }
    write_atomic(folder / "info.json", json.dumps(info, indent=1))
    say(
        f"hub: {info['num_train']:,} training images ({splits.train_name}), {info['num_val']:,} validation images"
        f" ({val_name}), {len(info['classes'])} classes in column {splits.label_column!r}; left out {info['broken']}"
        f" broken and {info['unlabelled']} unlabelled; made RGB: "
        + (", ".join(f"{count:,} of mode {mode}" for mode, count in info["converted"].items()) or "none")
    )
    say(
        f"hub: {near:,} of {info['num_val']:,} validation images ({near / max(1, info['num_val']):.1%}) have a"
        f" near-duplicate in training (64-bit difference hash within {NEAR} bits)"
    )
    num_classes, seen_val = len(info["classes"]), len(np.unique(labels[is_val]))
    if location.streamed and min(seen, seen_val / 0.9) < num_classes:
        say(
            f"hub: of {num_classes:,} classes {seen:,} came by in training and {seen_val:,} in validation; where a set is"
            " stored class by class, its first images are no fair sample: leave ?stream out, or read on"
        )


def decode_hashed(row: dict | None, size: int) -> tuple[np.ndarray, str, np.uint64] | None:
    """As `decode`, and the image's difference hash."""
    image = decode(row, size)
    return image and (*image, difference_hash(image[0][None])[0])


# reading a folder -----------------------------------------------------------------------------------------------------


def read_table(folder: Path, location: Location, limit: float) -> Table:
    """What `decoded` has put into a folder; of a stream, what came up to training image number `limit`."""
    info = json.loads((folder / "info.json").read_text())
    if not location.streamed:
        labels = np.load(folder / "labels.npy")
        images = np.load(folder / "images.npy", mmap_mode="r")[: len(labels)]
        return Table(images, labels, np.load(folder / "is_val.npy"), info["classes"], info)
    done = _progress(folder)
    is_val = np.array(read_rows(folder / "is_val.npy", done["num_rows"]))
    if limit < math.inf:
        if done["num_train"] < limit:
            raise UserError(
                f"preset={location.preset!r} has {done['num_train']:,} training images; give ?stream=all, or fewer"
            )
        is_val = is_val[: np.searchsorted(np.cumsum(~is_val), limit) + 1]
    num_rows = len(is_val)
    labels = np.array(read_rows(folder / "labels.npy", num_rows))
    classes = info["classes"]
    if done["values"]:  # numbered as they came; a class is one that training has
        values = sorted(done["values"][i] for i in np.unique(labels[~is_val]))
        rank = {value: i for i, value in enumerate(values)}
        labels = np.array([rank.get(value, -1) for value in done["values"]])[labels]
        classes = [str(value) for value in values]
    return Table(read_rows(folder / "images.npy", num_rows), labels, is_val, classes, info)
