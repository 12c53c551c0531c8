"""Copies between training and validation drawings: planted ones are found, others are not."""

import json

import numpy as np
from scipy.ndimage import gaussian_filter

from sovit.data.icons import near_copies
from sovit.data.icons.near_copies import MIN_OVERLAP, best_overlap, copies_folder, shrunk


def drawings(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Random blobs of ink [count, side, side] uint8, no two alike."""
    noise = np.random.default_rng(seed).standard_normal((count, side, side))
    smooth = gaussian_filter(noise, (0, side / 12, side / 12))
    return (255 / (1 + np.exp(-40 * smooth / smooth.std()))).astype(np.uint8)


def test_best_overlap_is_the_best_of_all():
    train, val = drawings(300), drawings(40, seed=1)
    val[:5] = np.maximum(train[10:15], 20)
    overlap = best_overlap(train, val)
    a, b = val[:, None].astype(float), train[None].astype(float)
    everything = np.minimum(a, b).sum((2, 3)) / np.maximum(a, b).sum((2, 3))  # [J, I]
    assert overlap[:5].min() > MIN_OVERLAP
    found = overlap > MIN_OVERLAP
    assert found.tolist() == (everything.max(1) > MIN_OVERLAP).tolist()
    np.testing.assert_allclose(overlap[found], everything.max(1)[found])


def test_nothing_to_compare_with():
    blank, full = np.zeros((3, 8, 8), np.uint8), np.full((2, 8, 8), 255, np.uint8)
    assert best_overlap(blank, full).tolist() == [0, 0]


def test_shrinking_averages():
    fine = drawings(3, 64)
    small = shrunk(fine)
    assert small.shape == (3, 32, 32) and shrunk(small) is small
    np.testing.assert_allclose(small, fine.reshape(3, 32, 2, 32, 2).mean((2, 4)), atol=0.51)


def test_planted_copies_are_found_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "cache"))
    masks = np.concatenate([drawings(200), drawings(50, seed=1)])
    masks[200:210] = masks[:10] * 0.95  # a little paler
    masks[210] = masks[11, ::-1]  # upside down is another drawing
    folder = tmp_path / "masks"
    folder.mkdir()
    is_val = np.arange(250) >= 200
    np.save(folder / "masks.npy", masks)
    np.save(folder / "is_val.npy", is_val)
    found = copies_folder(folder)
    assert np.flatnonzero(np.load(found / "copied.npy")).tolist() == list(range(10))
    info = json.loads((found / "info.json").read_text())
    assert info["num_val"] == 50 and info["copies_in_val"] == 10 <= info["near_duplicates_in_val"] < 50
    monkeypatch.setattr(near_copies, "find", None)  # the second time it is looked up
    assert copies_folder(folder) == found
