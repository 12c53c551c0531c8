"""Image files of any kind as the square images that a model was trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sovit import UserError, reason
from sovit.data.hub.decode import MAX_PIXELS, to_rgb
from sovit.encoder.open import Preprocess


def open_picture(path: Path) -> Any:
    """Read a Pillow RGB image: upright by its EXIF data, transparency on white. Raises UserError where there is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            size = file.width, file.height
            image = to_rgb(ImageOps.exif_transpose(file)) if math.prod(size) <= MAX_PIXELS else None
    except Exception as error:  # whatever Pillow's forty decoders raise on damaged files
        raise UserError(f"the image {path} cannot be read ({reason(error)}); give another file") from None
    if image is None:
        raise UserError(f"the image {path} has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}; make it smaller")
    return image


def to_tensor(image: Any, preprocess: Preprocess) -> Tensor:
    """Make a Pillow RGB image of any shape square, as the tower was shown its images: [3, S, S] in [0, 1].

    squash: both sides resized; center: the short side, and the middle cut out. Both leave crop_pct of the resized side.
    Rounded to 8 bits and by the half pixel as torchvision does it, which timm's own transforms are made of. Raises
    UserError for an image so long that its resized form has no room.
    """
    from PIL import Image

    side = preprocess.image_size
    larger = math.floor(side / preprocess.crop_pct + 1e-6)  # pixels
    if preprocess.crop == "squash":
        width, height = larger, larger
    else:
        short = min(image.size)
        width, height = (larger if n == short else int(larger * n / short) for n in image.size)
    kind = Image.Resampling.BILINEAR if preprocess.resample == "bilinear" else Image.Resampling.BICUBIC
    if width * height > MAX_PIXELS:  # a strip of 1 x 10^6 pixels grows on the way
        raise UserError(
            f"an image of {image.width} x {image.height} pixels is too long to be resized to {side} pixels; crop it"
        )
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), kind).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
