"""Near-duplicates: planted copies are found, other pictures are not, and the look-up is exact and fast."""

import io
import time

import numpy as np
import pytest
from photographs import crop
from PIL import Image, ImageEnhance

from sovit.data.image_hash import difference_hash, within


def near_duplicates(train, val, max_distance=4):
    return within(difference_hash(train), difference_hash(val), max_distance)


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


CHANGES = {
    "copied": lambda image: image,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.75),
    "brighter": lambda image: image.point(lambda value: 20 + value * 0.9),
    "recompressed": recompressed,
    "smaller and back": lambda image: image.resize((40, 40), Image.Resampling.BILINEAR).resize((96, 96)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
}


def stacked(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change):
    train = [crop(i, 96, 96) for i in range(60)]
    copies = [CHANGES[change](image) for image in train[:30]]
    found = near_duplicates(stacked(train), stacked(copies))
    assert found.shape == (30,) and found.mean() > 0.95


def test_other_pictures_are_not_found_and_sizes_may_differ():
    train = stacked(crop(i, 96, 96) for i in range(60))
    others = np.random.default_rng(0).integers(0, 256, (40, 12, 12), dtype=np.uint8)
    smooth = stacked(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in others)
    assert not near_duplicates(train, smooth).any()  # grey ones among them, of another size
    assert near_duplicates(train, train[:, ::-1], max_distance=0).mean() < 0.1  # upside down is another picture
    halves = stacked(crop(i, 96, 96).resize((48, 48), Image.Resampling.BOX) for i in range(60))
    assert near_duplicates(train, halves).all()
    assert near_duplicates(
        np.rint(train @ [0.299, 0.587, 0.114]).astype(np.uint8), halves
    ).all()  # greys against colours


def test_hash_is_that_of_cells():
    random = np.random.default_rng(0)
    cells = random.permutation(72 * 3)[:72].reshape(8, 9).astype(np.uint8)
    image = cells.repeat(5, 0).repeat(4, 1)  # [40, 36]
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    assert int(difference_hash(image[None])[0]) == int("".join("01"[int(bit)] for bit in bits), 2)
    assert difference_hash(np.full((2, 33, 41, 3), 77, np.uint8)).tolist() == [0, 0]  # flat: no bit by chance


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7])
def test_lookup_is_exact(max_distance):
    random = np.random.default_rng(max_distance)
    train = random.integers(0, 2**64, 3000, dtype=np.uint64)
    train[:1500] &= np.uint64(0x0F0000FF00000F01)  # drawings on a plain background: most bits are always 0
    val = random.integers(0, 2**64, 400, dtype=np.uint64)
    for j in range(300):
        hash_ = int(train[random.integers(3000)])
        for bit in random.choice(64, j % 10, replace=False):
            hash_ ^= 1 << int(bit)
        val[j] = hash_
    wanted = (np.bitwise_count(train[:, None] ^ val) <= max_distance).any(0)
    assert 0 < wanted.sum() < 400
    assert np.array_equal(within(train, val, max_distance), wanted)
    assert not within(train[:0], val, max_distance).any() and within(train, val[:0], max_distance).shape == (0,)


def test_large_sets_take_seconds():
    random = np.random.default_rng(0)
    train, val = (random.integers(0, 2**64, n, dtype=np.uint64) for n in (150_000, 20_000))
    started = time.process_time()
    within(train, val, 4)
    assert time.process_time() - started < 5  # 3e9 pairs one by one would take a minute
