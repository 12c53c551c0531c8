"""Near-duplicates between training and validation images, by a 64-bit difference hash."""

from __future__ import annotations

import numpy as np


def near_duplicates(train: np.ndarray, val: np.ndarray, max_distance: int = 4) -> np.ndarray:
    """[J] bool: whether a validation image has a training image whose hash differs in at most `max_distance` bits.

    train [I, H, W] uint8, val [J, H, W] uint8.
    """
    ours, theirs = np.unique(difference_hash(train)), difference_hash(val)
    parts = [theirs[start : start + 64, None] ^ ours for start in range(0, len(theirs), 64)]
    return np.concatenate([(np.bitwise_count(part) <= max_distance).any(1) for part in parts] or [np.zeros(0, bool)])


def difference_hash(images: np.ndarray) -> np.ndarray:
    """[I] uint64: for 8 x 9 cells of the image, whether each is darker than its right neighbour ("dHash")."""

    def cells(count: int, size: int) -> np.ndarray:  # [count, size]: averages over equal parts of a line
        edges, pixels = np.linspace(0, size, count + 1), np.arange(size)
        overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        return (overlap.clip(0) * count / size).astype(np.float32)

    down, across = cells(8, images.shape[1]), cells(9, images.shape[2]).T
    hashes = np.empty(len(images), np.uint64)
    for start in range(0, len(images), 256):
        grey = down @ images[start : start + 256].astype(np.float32) @ across  # [i, 8, 9]
        bits = (grey[:, :, 1:] > grey[:, :, :-1] + 1e-3).reshape(-1, 64)
        hashes[start : start + 256] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return hashes
