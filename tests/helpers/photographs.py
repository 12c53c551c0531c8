"""Real photographs that installed packages bring: crops of them at any size, as pixels or as a folder of JPEG files."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """scikit-learn's two photographs (640 x 427) and matplotlib's (512 x 600); the test is skipped without them."""
    matplotlib = pytest.importorskip("matplotlib")
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    images = [Image.fromarray(image) for image in sklearn_datasets.load_sample_images().images]
    return *images, Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


def crop(number: int, width: int, height: int) -> Image.Image:
    """A part of photograph number % 3, another one for each number, at `width` x `height` pixels."""
    photo = photographs()[number % len(photographs())]
    random = np.random.default_rng(number)
    share = random.uniform(0.5, 1) * min(photo.width / width, photo.height / height)
    w, h = share * width, share * height
    left, top = random.uniform(0, photo.width - w), random.uniform(0, photo.height - h)
    return photo.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def write_folder(folder: Path, count: int, width: int = 500, height: int = 375, quality: int = 90) -> None:
    """`count` JPEG files in a folder for each of the photographs, ImageNet's median size unless told."""
    names = ("china", "flower", "hopper")
    for name in names:
        (folder / name).mkdir(parents=True)
    for i in range(count):
        crop(i, width, height).save(folder / names[i % 3] / f"{i:05d}.jpg", quality=quality)
