"""Validation drawings that a training drawing shows already: sets borrow from each other, across families too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sovit.data.cache import build_once, content_key, say
from sovit.data.image_hash import near_duplicates

RECIPE = 2  # part of the key of what is found: raise it when anything here changes that
MAX_DISTANCE = (
    4  # bits of the 64 of the difference hash: 97 % of true copies are this near, and one suspect in six is one
)
MIN_OVERLAP = 0.9  # ink in common / ink of either
SIZE = 32  # pixels at which ink is compared, or what there is
TOP, BLOCK = 16, 64  # training drawings of the best correlation that are compared in full; drawings at once


def copies_folder(masks: Path) -> Path:
    """The cache folder of which validation icons of a folder of masks are copies, found if it is not there yet.

    copied.npy [J] bool in the order of the validation icons; info.json: num_val, near_duplicates_in_val (suspects by
    their hash alone), copies_in_val.
    """
    return build_once("icon_copies", content_key(recipe=RECIPE, masks=masks.name), lambda folder: find(masks, folder))


def find(masks: Path, folder: Path) -> None:
    is_val = np.load(masks / "is_val.npy")
    ink = shrunk(np.load(masks / "masks.npy", mmap_mode="r")[: len(is_val)])  # [I, S, S]
    train, val = np.flatnonzero(~is_val), np.flatnonzero(is_val)
    say(f"icons: looking for {len(val):,} validation drawings among {len(train):,} training ones, once")
    suspects = np.flatnonzero(near_duplicates(ink[train], ink[val], MAX_DISTANCE))
    copied = np.zeros(len(val), bool)
    copied[suspects] = best_overlap(ink[train], ink[val[suspects]]) > MIN_OVERLAP
    np.save(folder / "copied.npy", copied)
    info = {
        "num_val": len(val),
        "near_duplicates_in_val": len(suspects),
        "copies_in_val": int(copied.sum()),
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1))


def shrunk(masks: np.ndarray) -> np.ndarray:
    """masks [I, M, M] uint8, a memory map perhaps, at SIZE pixels where M is a multiple of it; else as they are."""
    side = masks.shape[1]
    if side <= SIZE or side % SIZE:
        return np.asarray(masks)
    step = side // SIZE
    small = np.empty((len(masks), SIZE, SIZE), np.uint8)
    for start in range(0, len(masks), 1024):
        part = masks[start : start + 1024].reshape(-1, SIZE, step, SIZE, step)
        small[start : start + 1024] = part.mean((2, 4), dtype=np.float32).round()
    return small


def best_overlap(train: np.ndarray, val: np.ndarray) -> np.ndarray:
    """For each drawing of `val` [J, S, S] uint8 the largest overlap with one of `train` [I, S, S]: [J].

    Overlap = sum of the lesser ink / sum of the greater (intersection over union, of grey values). Drawings whose ink
    as a whole differs by more than MIN_OVERLAP allows are not looked at: overlap 0 says that there was none.
    """
    train, val = train.reshape(len(train), -1), val.reshape(len(val), -1)
    train_ink, val_ink = train.sum(1, dtype=np.int64), val.sum(1, dtype=np.int64)
    by_ink, order = np.argsort(train_ink, kind="stable"), np.argsort(val_ink, kind="stable")
    sorted_ink = train_ink[by_ink]
    overlap = np.zeros(len(val))
    for start in range(0, len(val), BLOCK):
        ours = order[start : start + BLOCK]
        low, high = val_ink[ours[0]] * MIN_OVERLAP, val_ink[ours[-1]] / MIN_OVERLAP
        theirs = by_ink[np.searchsorted(sorted_ink, low) : np.searchsorted(sorted_ink, high, "right")]
        if not len(theirs):
            continue
        a, b = val[ours].astype(np.float32), train[theirs].astype(np.float32)  # [j, P], [i, P]
        likeness = a @ b.T / np.sqrt((b * b).sum(1))  # cosine, but for the length of a
        top = np.argpartition(-likeness, min(TOP, len(theirs) - 1), axis=1)[:, :TOP]  # [j, TOP]
        for row, candidates in enumerate(top):
            lesser = np.minimum(a[row], b[candidates]).sum(1)
            overlap[ours[row]] = (lesser / np.maximum(a[row], b[candidates]).sum(1)).max()
    return overlap
