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
CHUNK = 256  # boxes drawn from one random stream, so that a batch's size and start cannot change a box
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


def resized_crop(
    images: np.ndarray, rows: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray, size: int, device: str
) -> Tensor:
    """Cut a box out of each of some images, resize it to `size` pixels and mirror it where told.

    images [I, H, W, 3] uint8, which may be memory-mapped, rows [B] into it, boxes [B, 4] as of `crop_boxes`, mirrored
    [B] bool -> [B, 3, size, size] float32 on `device`, a pixel's value / 127.5 - 1. Downscaling is antialiased. For a
    CPU each image goes through torch's own resize, whose result is torchvision's `resized_crop` to 1 of 255; elsewhere
    the batch goes through `affine_crop`, which agrees with that to about 1 of 255 in the mean.
    """
    order = np.argsort(rows)  # rising reads of a memory map are several times faster than random ones
    crop = _one_by_one if torch.device(device).type == "cpu" else _in_batches
    return crop(images, rows, boxes, mirrored, size, device, order)


def _one_by_one(images, rows, boxes, mirrored, size: int, device: str, order: np.ndarray) -> Tensor:
    out = torch.empty((len(rows), 3, size, size), device=device)
    for i in order:  # each image alone, which stays in a core's cache
        out[i].copy_(_resized(images[rows[i]], boxes[i], mirrored[i], size)).div_(127.5).sub_(1)
    return out


def _in_batches(images, rows, boxes, mirrored, size: int, device: str, order: np.ndarray) -> Tensor:
    out = torch.empty((len(rows), 3, size, size), device=device)
    theta = box_affine(boxes, mirrored, images.shape[1], images.shape[2])
    samples = max(1, round(max(images.shape[1:3]) / size))
    for start in range(0, len(rows), AT_ONCE):
        part = order[start : start + AT_ONCE]
        # pinned memory is copied while the GPU is busy with the step before and this process reads on
        pixels = torch.empty((len(part), *images.shape[1:]), dtype=torch.uint8, pin_memory=out.is_cuda)
        np.take(images, rows[part], axis=0, out=pixels.numpy(), mode="clip")  # unbuffered, unlike mode="raise"
        pixels = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()  # [b, 3, H, W]
        views = affine_crop(pixels, theta[part].to(device), size, samples)
        out[torch.from_numpy(part).to(device)] = views.div_(127.5).sub_(1)
    return out


def _resized(image: np.ndarray, box: np.ndarray, mirrored: bool, size: int) -> Tensor:
    """[H, W, 3] uint8 -> [3, size, size] uint8."""
    top, left, height, width = box
    pixels = torch.from_numpy(np.array(image[top : top + height, left : left + width])).permute(2, 0, 1)
    if (height, width) != (size, size):
        pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    return pixels.flip(-1) if mirrored else pixels


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
