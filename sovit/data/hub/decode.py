"""The bytes of an image file of any kind -> square RGB pixels."""

from __future__ import annotations

import io

import numpy as np

MAX_PIXELS = 89_000_000  # an image that would unpack to more is left out (Pillow itself warns a little above)


def decode(row: dict | None, size: int) -> tuple[np.ndarray, str] | None:
    """A file's bytes or local path -> RGB [S, S, 3] uint8, the centre square resized, and the file's mode in Pillow's words.

    None for a file that is no image.
    """
    from PIL import Image, ImageOps

    if row is None:
        return None
    try:
        with Image.open(io.BytesIO(row["bytes"]) if row["bytes"] is not None else row["path"]) as file:
            if file.width * file.height > MAX_PIXELS:
                return None
            mode = file.mode
            file.draft(None, (2 * size, 2 * size))  # JPEG: decode no more detail than is kept
            image = ImageOps.exif_transpose(file)
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            # crop and resize in one step: a strip of 1 x 10^7 pixels must not grow on the way
            box = (left, top, left + side, top + side)
            return np.asarray(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)), mode
    except Exception:  # whatever Pillow's forty decoders raise on damaged files, one image must not end the run
        return None


def to_rgb(image):
    """A Pillow image of any mode as RGB: transparency on white, 16-bit grey scaled to 8 bits."""
    from PIL import Image

    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit values, which leaves white
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
