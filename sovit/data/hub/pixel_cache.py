"""Images that were decoded once: the folder that sovit.data.hub.decoding fills with square uint8 pixels.

Files of a folder, of plain numbers, one after another: images.raw [I, S, S, 3] uint8, labels.raw [I] int64, is_val.raw [I]
bool, hashes.raw [I] uint64 (see sovit.data.image_hash); progress.json (how far it has come: rows that it does not count
are overwritten) and at the end info.json (what is in it).

A set that is streamed may be read up to a number of training images now and further another day: its folder grows, and
holds for any number the same images as if it had been read so far at once.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sovit import UserError
from sovit.data.hub.splits import Location

SPLIT_KEY = 0x53504C4954  # hold-out, validation order and subsets do not depend on data_seed
COLUMNS: dict[str, Any] = {"images": np.uint8, "labels": np.int64, "is_val": np.bool_, "hashes": np.uint64}
FRESH: dict[str, Any] = {
    "num_rows": 0, "num_train": 0, "num_val": 0, "part": 0, "position": None, "exhausted": False, "revision": None,
    "values": [], "broken": 0, "unlabelled": 0, "converted": {},
}  # fmt: skip


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


def progress(folder: Path) -> dict:
    try:
        return json.loads((folder / "progress.json").read_text())
    except FileNotFoundError:
        return copy.deepcopy(FRESH)


def read_rows(folder: Path, name: str, num_rows: int) -> np.ndarray:
    return np.fromfile(folder / f"{name}.raw", COLUMNS[name], num_rows)


def read_table(folder: Path, location: Location, limit: float) -> Table:
    """What `decoded` has put into a folder; of a stream, what came up to training image number `limit`."""
    info, done = json.loads((folder / "info.json").read_text()), progress(folder)
    is_val = read_rows(folder, "is_val", done["num_rows"])
    if location.streamed and limit < math.inf:
        if done["num_train"] < limit:
            raise UserError(
                f"preset={location.preset!r} has {done['num_train']:,} training images; give ?stream=all, or fewer"
            )
        is_val = is_val[: np.searchsorted(np.cumsum(~is_val), limit) + 1]
    num_rows, size = len(is_val), info["size"]
    labels, classes = read_rows(folder, "labels", num_rows), info["classes"]
    if done["values"]:  # numbered as they came; a class is one that training has
        values = sorted(done["values"][i] for i in np.unique(labels[~is_val]))
        rank = {value: i for i, value in enumerate(values)}
        labels = np.array([rank.get(value, -1) for value in done["values"]])[labels]
        classes = [str(value) for value in values]
    images = np.memmap(folder / "images.raw", np.uint8, "r", shape=(num_rows, size, size, 3))
    return Table(images, labels, is_val, classes, info)
