"""Decoding a set once, into a folder that only grows, so that a kill loses little (see sovit.data.hub.pixel_cache)."""

from __future__ import annotations

import copy
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

import numpy as np

from sovit import UserError, reason
from sovit.data.assets import cache_dir, writable
from sovit.data.cache import content_key, say, track
from sovit.data.hub.decode import decode
from sovit.data.hub.pixel_cache import COLUMNS, FRESH, fixed_random, progress, read_rows
from sovit.data.hub.rows import Part
from sovit.data.hub.splits import NUM_VAL, Location, Opened, fingerprint, open_set
from sovit.data.image_hash import difference_hash, within
from sovit.files import locked, write_atomic

RECIPE = 3  # part of a folder's name: raise it when the decoding changes, or what info.json must tell of it
HOLDOUT = 0.1  # of the training images, where a set has no labelled validation or test split
BLOCK = 256  # images that are read and decoded together
SAVE_SECONDS = 2.0  # of decoding that a kill may cost
NEAR = 4  # bits of the difference hash between two images that count as near-duplicates


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
                if not progress(folder)["num_rows"]:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    return folder


def is_complete(folder: Path, location: Location, limit: float) -> bool:
    """Whether nothing is left to decode. False, and no error, in a folder that may not be read."""
    if not os.path.isfile(folder / "info.json"):
        return False
    done = progress(folder)
    return not location.streamed or done["exhausted"] or done["num_train"] >= limit


def fill(location: Location, size: int, limit: float, folder: Path) -> None:
    """Decode what `folder` lacks, and say what is in it then."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".arrow-") as scratch:
        done = progress(folder)
        opened = open_set(location, scratch, done["revision"], limit)
        if done["revision"] != opened.revision:  # another day, another revision of a set that names none
            done = copy.deepcopy(FRESH) | {"revision": opened.revision}
        try:
            read_on(location, opened, done, size, folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"the disk of {folder} is full after {done['num_rows']:,} images; free some, and run the same again"
            ) from None
    finish(location, opened, done, size, folder)


def read_on(location: Location, opened: Opened, done: dict, size: int, folder: Path) -> None:
    """Decode from where `done` stands until each part's limit or end; `done` and the files are kept in step."""
    total = _num_left(opened.parts, done)
    before = f", after {done['num_rows']:,} of an earlier time" if done["num_rows"] else ""
    number = "as many images as come" if total is None else f"{total:,} images"
    say(f"hub: decoding {number} of {location.preset} to {size} px, once{before}")
    _check_space(folder, total, size)
    files = {name: open(folder / f"{name}.raw", "ab") for name in COLUMNS}
    for name, file in files.items():
        row = np.dtype(COLUMNS[name]).itemsize * (3 * size * size if name == "images" else 1)
        os.truncate(file.fileno(), done["num_rows"] * row)

    def save() -> None:
        for file in files.values():
            file.flush()
        write_atomic(folder / "progress.json", json.dumps(done))  # last: it counts no row that is not there

    held_out = fixed_random(0, 3)  # under this key the very first image is one, so that no stream is without
    held_out.random(done["num_rows"])  # a number for each image kept: go on after those that are there
    numbers = {str(name): i for i, name in enumerate(done["values"] if opened.classes is None else opened.classes)}
    saved_at = time.monotonic()
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # Pillow decodes and resizes outside the GIL
        blocks = _blocks(location, opened.parts, done)
        for part, rows in track(blocks, "decoding", total and math.ceil(total / BLOCK)):
            images = pool.map(lambda row: decode_hashed(row[0], size), rows)
            labels = (_number(location, part, label, numbers, opened.classes, done) for _, label in rows)
            kept = _kept(zip(images, labels, strict=True), part.is_val, held_out, done)
            _append(files.values(), kept)
            done["position"] = part.position
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
    save()
    for file in files.values():
        file.close()


def _kept(rows, is_val: bool | None, held_out: np.random.Generator, done: dict) -> list[tuple]:
    """Of rows of (image or None, label or -1) those to keep, as values of COLUMNS; `done` counts them and the others."""
    kept = []
    for image, label in rows:
        if label < 0 or image is None:
            done["unlabelled" if label < 0 else "broken"] += 1
            continue
        pixels, mode, bits = image
        val = is_val
        if val is None:
            val = bool(held_out.random() < HOLDOUT) and done["num_val"] < NUM_VAL
        kept.append((pixels, label, val, bits))
        if mode != "RGB":
            done["converted"][mode] = done["converted"].get(mode, 0) + 1
        done["num_rows"] += 1
        done["num_val" if val else "num_train"] += 1
    return kept


def _append(files, kept: list[tuple]) -> None:
    for file, dtype, column in zip(files, COLUMNS.values(), zip(*kept)):
        file.write(np.ascontiguousarray(np.stack(column), dtype).data)


def _blocks(location: Location, parts: tuple[Part, ...], done: dict) -> Iterator[tuple[Part, list]]:
    """The rows still to be read, in blocks; `done` tells how many images of the blocks before were kept."""
    while done["part"] < len(parts):
        part = parts[done["part"]]
        part.position = done["position"]
        rows: list | None = None
        while (left := part.limit - done["num_val" if part.is_val else "num_train"]) > 0:
            try:
                rows = part.take(int(min(BLOCK, left)))
            except Exception as error:  # of the network, the hub client or pyarrow
                raise UserError(
                    f"preset={location.preset!r} cannot be read after {done['num_rows']:,} images ({reason(error)});"
                    " they are kept: run the same again to go on"
                ) from error
            if not rows:
                break
            yield part, rows
        if rows != [] and part is parts[-1]:
            return  # another day it may be read further
        done["part"], done["position"] = done["part"] + 1, None
    done["exhausted"] = True


def _number(location: Location, part: Part, label, numbers: dict, classes: list[str] | None, done: dict) -> int:
    """The number of a label, -1 for none; in a column without names each new value gets the next one, in `values`."""
    if label is None:
        return -1
    if classes is None and str(label) not in numbers:
        if not isinstance(label, str | int):
            raise UserError(
                f"label={part.label_column!r} of {location.preset!r} holds neither names nor numbers; choose another column"
            )
        numbers[str(label)] = len(done["values"])
        done["values"].append(label)
    return numbers.get(str(label), -1)


def _num_left(parts: tuple[Part, ...], done: dict) -> int | None:
    """Images still to be decoded at most; None for a stream that does not say."""
    kept = {True: done["num_val"], False: done["num_train"], None: done["num_train"]}
    left = sum(min(part.limit, part.num_rows) - kept[part.is_val] for part in parts[done["part"] :])
    return int(left) if left < math.inf else None


def _check_space(folder: Path, total: int | None, size: int) -> None:
    need, free = (total or 0) * size * size * 3, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{total:,} images of {size} px take {need / 1e9:,.1f} GB, and {folder.parent} has {free / 1e9:,.1f} GB left;"
            " read fewer with ?stream=NUMBER, take a smaller ?cache_size=, or set SOVIT_CACHE to another disk"
        )


def finish(location: Location, opened: Opened, done: dict, size: int, folder: Path) -> None:
    """Hold out validation images where a set has none, count near-duplicates, write info.json and say what there is."""
    num_rows = done["num_rows"]
    labels, is_val, hashes = (read_rows(folder, name, num_rows) for name in ("labels", "is_val", "hashes"))
    val_name = opened.splits[1]
    if not location.streamed and not done["num_val"]:
        is_val[:] = False
        is_val[fixed_random(0, 1).permutation(num_rows)[: max(1, round(HOLDOUT * num_rows))]] = True
        is_val.tofile(folder / "is_val.raw")
        val_name = None
    seen = len(np.unique(labels[~is_val]))
    if seen < 2:
        if not location.streamed:
            shutil.rmtree(folder)
        more = "read more of the stream" if location.streamed else "give a fuller set"
        raise UserError(f"preset={location.preset!r} has fewer than two classes of readable images; {more}")
    info = {
        "preset": location.preset,
        "revision": done["revision"],
        "size": size,
        "columns": list(opened.columns),
        "splits": [opened.splits[0], val_name or f"{HOLDOUT:.0%} of {opened.splits[0]}, held out"],
        "num_train": int((~is_val).sum()),
        "num_val": int(is_val.sum()),
        "broken": done["broken"],
        "unlabelled": done["unlabelled"],
        "converted": dict(Counter(done["converted"]).most_common()),
        "near_duplicates_in_val": int(within(hashes[~is_val], hashes[is_val], NEAR).sum()),
        "classes": opened.classes or [str(value) for value in sorted(done["values"])],
    }
    write_atomic(folder / "info.json", json.dumps(info, indent=1))
    _say_what_there_is(info)
    num_classes, seen_val = len(info["classes"]), len(np.unique(labels[is_val]))
    if location.streamed and min(seen, seen_val / 0.9) < num_classes:
        say(
            f"hub: of {num_classes:,} classes {seen:,} came by in training and {seen_val:,} in validation; where a set is"
            " stored class by class, its first images are no fair sample: leave ?stream out, or read on"
        )


def _say_what_there_is(info: dict) -> None:
    train_name, val_name = info["splits"]
    say(
        f"hub: {info['num_train']:,} training images ({train_name}), {info['num_val']:,} validation images"
        f" ({val_name}), {len(info['classes'])} classes in column {info['columns'][1]!r}; left out {info['broken']}"
        f" broken and {info['unlabelled']} unlabelled; made RGB: "
        + (", ".join(f"{count:,} of mode {mode}" for mode, count in info["converted"].items()) or "none")
    )
    near, num_val = info["near_duplicates_in_val"], info["num_val"]
    say(
        f"hub: {near:,} of {num_val:,} validation images ({near / max(1, num_val):.1%}) have a near-duplicate in training"
        f" (64-bit difference hash within {NEAR} bits)"
    )


def decode_hashed(row: dict | None, size: int) -> tuple[np.ndarray, str, np.uint64] | None:
    """As `decode`, and the image's difference hash."""
    image = decode(row, size)
    return image and (*image, difference_hash(image[0][None])[0])
