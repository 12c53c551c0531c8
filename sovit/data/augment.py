"""Random crops that a batch's own device cuts: boxes as pure functions of (seed, sample index), and the resampling.

A box is drawn as torchvision's RandomResizedCrop draws it (Szegedy et al., arXiv 1409.4842, "Inception crop"): a share
of the area, uniform from `min_area` to 1; an aspect ratio, log-uniform from 3/4 to 4/3; a place, uniform. SoViT, big_vision
and most ImageNet recipes train on it; their least areas are 0.05 (big_vision) and 0.08 (torchvision, timm).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10  # boxes tried until one lies inside of the image; the whole image where none does
CHUNK = 1024  # boxes drawn from one random stream, so that a batch's size and start cannot change a box
CROP_KEY = 0x43524F50  # apart from the streams that order the samples of an epoch
AT_ONCE = 128  # images of a batch that are cropped together: their grids take as much memory as they do


def crop_boxes(seed: int, start: int, count: int, side: int, min_area: float) -> np.ndarray:
    """[count, 4] int64: top, left, height, width of the boxes of samples start .. start + count - 1, in pixels.

    The images are squares of `side` pixels.
    """
    first, last = start // CHUNK, (start + count - 1) // CHUNK
    boxes = [_box_chunk(seed, chunk, side, min_area) for chunk in range(first, last + 1)]
    return np.concatenate(boxes)[start - first * CHUNK :][:count]


def _box_chunk(seed: int, chunk: int, side: int, min_area: float) -> np.ndarray:
    # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried between chunks
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, chunk, CROP_KEY]))
    share = random.uniform(min_area, 1, (CHUNK, ATTEMPTS))
    ratio = np.exp(random.uniform(np.log(RATIO[0]), np.log(RATIO[1]), (CHUNK, ATTEMPTS)))
    width = np.round(side * np.sqrt(share * ratio)).astype(np.int64)
    height = np.round(side * np.sqrt(share / ratio)).astype(np.int64)
    fits = (np.minimum(width, height) >= 1) & (np.maximum(width, height) <= side)  # [CHUNK, ATTEMPTS]
    chosen = np.arange(CHUNK), fits.argmax(1)  # the first that fits
    width, height = (np.where(fits.any(1), length[chosen], side) for length in (width, height))
    top, left = (np.floor(random.random(CHUNK) * (side - length + 1)).astype(np.int64) for length in (height, width))
    return np.stack([top, left, height, width], axis=1)


def resized_crop(images: Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: int) -> Tensor:
    """Cut a box out of each image, resize it to `size` pixels and mirror it where told.

    images [B, H, W, 3] uint8, boxes [B, 4] as of `crop_boxes`, mirrored [B] bool -> [B, 3, size, size] float32 in
    0 .. 255, on the device of the images. Downscaling is antialiased. On a CPU each image goes through torch's own
    resize, whose result has whole numbers and is torchvision's `resized_crop(antialias=True)` to 1 of 255; elsewhere
    the batch goes through `affine_crop`, which agrees with that to about 1 of 255 in the mean.
    """
    out = torch.empty((len(images), 3, size, size), device=images.device)
    if images.device.type == "cpu":
        for start in range(0, len(images), 8):  # few enough for a core's cache
            part = torch.stack([
                _resize(image[top : top + height, left : left + width], size, flip)
                for image, (top, left, height, width), flip in zip(
                    images[start : start + 8], boxes[start : start + 8].tolist(), mirrored[start : start + 8].tolist()
                )
            ])  # fmt: skip
            out[start : start + 8] = part
        return out
    theta = box_affine(boxes, mirrored, images.shape[1], images.shape[2]).to(images.device)
    samples = max(1, round(max(images.shape[1:3]) / size))
    for start in range(0, len(images), AT_ONCE):
        part = images[start : start + AT_ONCE].permute(0, 3, 1, 2).float()
        out[start : start + AT_ONCE] = affine_crop(part, theta[start : start + AT_ONCE], size, samples)
    return out


def _resize(image: Tensor, size: int, mirrored: bool) -> Tensor:
    """[h, w, 3] uint8 -> [3, size, size] uint8."""
    if image.shape[:2] == (size, size):
        out = image.permute(2, 0, 1)
    else:
        out = F.interpolate(image.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)[0]
    return out.flip(-1) if mirrored else out


def box_affine(boxes: np.ndarray, mirrored: np.ndarray, height: int, width: int) -> Tensor:
    """[B, 2, 3] float32: maps of the output square onto boxes (top, left, height, width) of images of that size.

    Both in the coordinates of torch's affine_grid: -1 and 1 are the outer edges.
    """
    top, left, box_height, box_width = torch.from_numpy(boxes).double().unbind(1)
    theta = torch.zeros(len(boxes), 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = box_width / width * torch.from_numpy(np.where(mirrored, -1.0, 1.0))
    theta[:, 0, 2] = (2 * left + box_width) / width - 1
    theta[:, 1, 1] = box_height / height
    theta[:, 1, 2] = (2 * top + box_height) / height - 1
    return theta.float()


def affine_crop(images: Tensor, theta: Tensor, size: int, samples: int = 1, padding: str = "border") -> Tensor:
    """Any affine view of each image, bilinear: images [B, C, H, W] float, theta [B, 2, 3] -> [B, C, size, size].

    `theta` maps the output square to the input, both from -1 to 1 between their outer edges (torch's affine_grid).
    Each output pixel is the mean of `samples` x `samples` points: give about the largest downscaling, or it aliases.
    Outside of the image stands its nearest pixel (padding="border") or 0 ("zeros").
    """
    fine = size * samples
    grid = F.affine_grid(theta, [len(images), images.shape[1], fine, fine], align_corners=False)
    out = F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return F.avg_pool2d(out, samples) if samples > 1 else out
