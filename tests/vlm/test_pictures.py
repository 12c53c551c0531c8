"""Image files as a model reads them: upright, RGB, and square as timm makes them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sovit import UserError
from sovit.encoder.open import Preprocess
from sovit.vlm import ask as pictures
from sovit.vlm.ask import open_picture, to_tensor


def read(image, path, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    path.write_bytes(file.getvalue())
    return open_picture(path)


def test_images_become_rgb_upright_and_transparency_white(tmp_path):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    half.putpixel((0, 0), (255, 0, 0, 0))
    path = tmp_path / "x"
    assert read(half, path).getpixel((0, 0)) == (255, 255, 255) and read(half, path).getpixel((1, 1)) == (255, 0, 0)
    assert read(Image.new("L", (4, 4), 7), path).getpixel((0, 0)) == (7, 7, 7)
    assert read(Image.new("CMYK", (4, 4)), path, "JPEG").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert read(Image.new("RGB", (8, 4)), path, "JPEG", exif=exif).size == (4, 8)


def test_an_image_that_is_broken_or_too_large_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"this is text")
    with pytest.raises(UserError, match=r"^the image .*x.png cannot be read \(.+\); give another file$"):
        open_picture(path)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="x.png has 30 x 20 pixels, more than 100; make it smaller"):
        read(Image.new("RGB", (30, 20)), path)


@pytest.mark.parametrize("size", [(50, 31), (20, 64), (224, 224), (7, 5)])
@pytest.mark.parametrize(
    ("crop", "crop_pct", "resample"),
    [("squash", 1.0, "bicubic"), ("center", 0.9, "bicubic"), ("center", 1.0, "bilinear")],
)
def test_to_tensor_is_what_timm_does(size, crop, crop_pct, resample):
    timm = pytest.importorskip("timm.data")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    transform = timm.create_transform(
        (3, 28, 28), is_training=False, interpolation=resample, crop_mode=crop, crop_pct=crop_pct,
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    ours = to_tensor(image, Preprocess(28, (0,) * 3, (1,) * 3, resample, crop, crop_pct))
    assert ours.shape == (3, 28, 28) and torch.equal(ours, transform(image))


def test_a_long_strip_is_refused_before_it_grows():
    strip = Image.new("RGB", (1, 400_000))
    assert to_tensor(strip, Preprocess(224, (0,) * 3, (1,) * 3)).shape == (3, 224, 224)
    with pytest.raises(UserError, match="an image of 1 x 400000 pixels is too long to be resized to 224 pixels"):
        to_tensor(strip, Preprocess(224, (0,) * 3, (1,) * 3, crop="center"))
