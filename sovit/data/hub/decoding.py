"""Decoding a set once, into a folder of plain arrays; what a kill leaves is gone on with.

Files of a folder, a row for each row of the set: images.raw [I, S, S, 3] uint8, modes.raw [I] (what a file was: a mode of
Pillow, or BROKEN), hashes.raw [I] uint64 (see sovit.data.image_hash), labels.npy [I] int64 (-1: left out), is_val.npy [I]
bool, info.json (what is in it).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sovit import UserError
from sovit.data.assets import cache_dir, writable
from sovit.data.cache import content_key, say, track
from sovit.data.hub.decode import decode
from sovit.data.hub.folders import Location, fingerprint
from sovit.data.hub.splits import Rows, open_set
from sovit.data.image_hash import difference_hash, within
from sovit.files import locked

RECIPE = 6  # part of a folder's name: raise it when the decoding changes, or what info.json must tell of it
HOLDOUT = 0.1  # of the training images, where a set has no labelled validation or test split
BLOCK = 256  # images that are read together; a kill loses as many
NEAR = 4  # bits of the difference hash between two images that count as near-duplicates
BROKEN = b"broken"
SPLIT_KEY = 0x53504C4954  # hold-out, validation order and subsets do not depend on data_seed


class Table(NamedTuple):
    """A decoded set: images [I, S, S, 3], memory-mapped, labels [I] (-1: left out), is_val [I]."""

    images: np.ndarray
    labels: np.ndarray
    is_val: np.ndarray
    info: dict


def fixed_random(*counter: int) -> np.random.Generator:
    """One of the random streams that are the same for every data_seed, named by up to two numbers."""
    # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried on
    return np.random.Generator(np.random.Philox(key=SPLIT_KEY, counter=[0, 0, *counter]))


def read_table(folder: Path) -> Table:
    """What `decoded` has put into a folder."""
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    labels, is_val = (np.load(folder / f"{name}.npy") for name in ("labels", "is_val"))
    images = np.memmap(folder / "images.raw", np.uint8, "r", shape=(len(labels), info["size"], info["size"], 3))
    return Table(images, labels, is_val, info)


def decoded(location: Location, size: int) -> Path:
    """The cache folder of a set at `size` pixels, decoded first where that has not been done.

    Its name changes when the files of a folder, the revision, label or size differ. Processes that ask at the same time
    wait for the first one. Raises UserError for what cannot be opened, read or written.
    """
    source = list(fingerprint(location.path)) if location.path else [location.name, location.revision, location.config]
    key = content_key(recipe=RECIPE, size=size, source=source, label=location.label)
    parent = cache_dir() / "hub"
    folder = parent / key
    if os.path.isdir(folder):  # False, and no error, in a parent that may not be read
        return folder
    writable(parent)
    with locked(parent / f".{key}.lock"), tempfile.TemporaryDirectory(dir=parent, prefix=".arrow-") as scratch:
        if not folder.is_dir():
            rows = open_set(location, scratch)
            filling = parent / f".{key}-{rows.revision or ''}"  # another day, a hub's set may have another revision
            filling.mkdir(exist_ok=True)
            _fill(location, rows, size, filling)
            os.replace(filling, folder)
    return folder


def _fill(location: Location, rows: Rows, size: int, folder: Path) -> None:
    """Decode what `folder` lacks, and say what is in it then."""
    num_rows = len(rows.labels)
    try:
        modes, hashes = _mapped(folder, "modes", "S8", num_rows), _mapped(folder, "hashes", np.uint64, num_rows)
        images = _mapped(folder, "images", np.uint8, num_rows, size, size, 3)
    except OSError as error:
        shutil.rmtree(folder)
        raise UserError(
            f"{num_rows:,} images of {size} px take {num_rows * size * size * 3 / 1e9:,.1f} GB in {folder.parent}"
            f" ({error.strerror}); take a smaller ?cache_size=, or set SOVIT_CACHE to another disk"
        ) from None

    def work(row: int, file: dict | None) -> None:
        if image := decode(file, size):
            images[row], hashes[row] = image[0], difference_hash(image[0][None])[0]
        modes[row] = image[1].encode() if image else BROKEN  # last: it says that the row is done

    left = np.flatnonzero((modes == b"") & (rows.labels >= 0))
    say(f"hub: decoding {len(left):,} images of {location.preset} to {size} px, once")
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # Pillow decodes and resizes outside the GIL
        blocks = np.unique(left // BLOCK).tolist()
        for block in track(blocks, "decoding", len(blocks)):
            files = rows.read(block * BLOCK, (block + 1) * BLOCK)
            numbers = left[left // BLOCK == block].tolist()
            list(pool.map(work, numbers, [files[row % BLOCK] for row in numbers]))
    _finish(location, rows, np.array(modes), np.array(hashes), size, folder)


def _mapped(folder: Path, name: str, dtype, *shape: int) -> np.memmap:
    """A file of zeros, or as it was left, memory-mapped. Its space is taken at once: to miss it later kills."""
    with open(folder / f"{name}.raw", "ab") as file:
        os.posix_fallocate(file.fileno(), 0, np.dtype(dtype).itemsize * math.prod(shape))
    return np.memmap(folder / f"{name}.raw", dtype, "r+", shape=shape)


def _finish(location: Location, rows: Rows, modes: np.ndarray, hashes: np.ndarray, size: int, folder: Path) -> None:
    """Hold out validation images where a set has none, count near-duplicates, write info.json and say what there is."""
    labels, is_val = np.where(modes == BROKEN, -1, rows.labels), np.arange(len(modes)) >= rows.num_train
    read = labels >= 0
    if len(np.unique(labels[read])) < 2:
        shutil.rmtree(folder)  # another reader, or a mended disk, may read more next time
        broken = int((modes == BROKEN).sum())
        raise UserError(
            f"preset={location.preset!r} has fewer than two classes of readable images ({broken:,} of {len(modes):,} are"
            " broken); give a fuller set"
        )
    if not is_val.any():
        is_val[fixed_random(0, 1).permutation(np.flatnonzero(read))[: max(1, round(HOLDOUT * read.sum()))]] = True
    train, val = read & ~is_val, read & is_val
    refused = {"broken": int((modes == BROKEN).sum()), "without a label": int((rows.labels < 0).sum())} | rows.left_out
    info: dict[str, Any] = {
        "preset": location.preset,
        "revision": rows.revision,
        "size": size,
        "column": rows.column,
        "splits": [rows.splits[0], rows.splits[1] or f"{HOLDOUT:.0%} of {rows.splits[0]}, held out"],
        "num_train": int(train.sum()),
        "num_val": int(val.sum()),
        "found": len(labels) + sum(rows.left_out.values()),
        "refused": {why: n for why, n in refused.items() if n},
        "classes_without_val": int((np.bincount(labels[val], minlength=len(rows.classes)) == 0).sum()),
        "converted": {mode.decode(): n for mode, n in Counter(modes[read].tolist()).most_common() if mode != b"RGB"},
        "near_duplicates_in_val": int(within(hashes[train], hashes[val], NEAR).sum()),
        "classes": rows.classes,
    }
    np.save(folder / "labels.npy", labels)
    np.save(folder / "is_val.npy", is_val)
    (folder / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    say(account(info))


def account(info: dict) -> str:
    """What a set holds: every file or row found is read, or refused for a reason."""
    read, why = info["num_train"] + info["num_val"], [f"{n:,} {reason}" for reason, n in info["refused"].items()]
    train, val = info["splits"]
    converted = ", ".join(f"{count:,} of mode {mode}" for mode, count in info["converted"].items())
    missing = info["classes_without_val"]
    return (
        f"hub: {info['found']:,} files or rows found = {read:,} images read + {info['found'] - read:,} refused"
        + (f" ({', '.join(why)})" if why else "")
        + f"\nhub: {info['num_train']:,} training images ({train}), {info['num_val']:,} validation images ({val}),"
        f" {len(info['classes'])} classes in column {info['column']!r}"
        + (f", {missing} of them without a validation image" if missing else "")
        + (f"; made RGB: {converted}" if converted else "")
        + f"; {info['near_duplicates_in_val']:,} validation images"
        f" have a near-duplicate in training (64-bit difference hash within {NEAR} bits)"
    )
