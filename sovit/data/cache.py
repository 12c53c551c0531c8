"""What the sources over files share: folders built once, locked and atomic, for all workers; and their zero line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.data.assets import cache_dir, writable
from sovit.files import beside, locked


def content_key(**identity) -> str:
    """16 hex digits that change when any of the named values (JSON types) changes."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_once(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder <cache>/<kind>/<key>, filled by `build(folder)` if it is not there yet.

    A folder under its final name is always complete: it is built under another name and renamed. Processes that ask
    for the same key at the same time wait for the first one; the lock dies with its process. Raises UserError where
    the folder has to be built and the cache cannot be written.
    """
    parent = cache_dir() / kind
    folder = parent / key
    if os.path.isdir(folder):  # False, and no error, in a parent that may not be read
        return folder
    writable(parent)
    with locked(parent / f".{key}.lock"):
        if folder.is_dir():
            return folder
        building = beside(folder)
        building.mkdir()
        try:
            build(building)
            os.replace(building, folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return folder


def track(items: Iterable, description: str, total: int | None) -> Iterable:
    """`items`, with a progress bar on standard error where rich is installed; `total` None: nobody knows."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return items
    return rich_track(items, description, total, console=Console(file=sys.stderr))


def say(line: str) -> None:
    """One line for the person who waits; standard output stays clean for `--json`."""
    print(line, file=sys.stderr, flush=True)


def prior_cross_entropy(train_labels: np.ndarray, val_labels: np.ndarray, num_classes: int) -> float:
    """Nats: cross-entropy on the validation labels of the constant answer "the class frequencies of training"."""
    # a class may be absent from a small training set; one pseudo-count keeps its price finite
    prior = np.bincount(train_labels, minlength=num_classes) + 1.0
    val = np.bincount(val_labels, minlength=num_classes)
    return float(-(val / val.sum() * np.log(prior / prior.sum())).sum())


def check_val(num_val: int, start: int, count: int) -> None:
    if start < 0 or start + count > num_val:
        raise UserError(f"validation images {start} .. {start + count - 1} do not exist; num_val={num_val}")
