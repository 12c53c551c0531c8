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
AT_ONCE = 128  # images of a batch that are cropped together


def crop_boxes(seed: int, start: int, count: int, side: int, min_area: float) -> np.ndarray:
    """[count, 4] int64: top, left, height, width of the boxes of samples start .. start + count - 1, in pixels.

    The images are squares of `side` pixels.
    """
    first, last = start // CHUNK, (start + count - 1) // CHUNK
    boxes = [_box_chunk(seed, chunk, side, min_area) for chunk in range(first, last + 1)]
    return np.concatenate(boxes)[start - first * CHUNK :][:count]


def _box_chunk(seed: int, chunk: int, side: int, min_area: float) -> np.ndarray:
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
    the batch goes through torchvision's `roi_align`, which agrees with that to about 1 of 255 in the mean.
    """
    order = np.argsort(rows)  # rising reads of a memory map are several times faster than random ones
    out = torch.empty((len(rows), 3, size, size), device=device)
    crop = _one_by_one if out.device.type == "cpu" else _in_batches
    crop(images, rows, boxes, mirrored, order, out)
    return out


def _one_by_one(images, rows, boxes, mirrored, order: np.ndarray, out: Tensor) -> None:
    size = out.shape[2:]
    for i in order:  # each image alone, which stays in a core's cache
        top, left, height, width = boxes[i]
        pixels = np.array(images[rows[i]][top : top + height, left : left + width])
        view = torch.from_numpy(pixels).permute(2, 0, 1)
        if (height, width) != size:
            view = F.interpolate(view[None], size, mode="bilinear", antialias=True)[0]
        out[i].copy_(view.flip(-1) if mirrored[i] else view).div_(127.5).sub_(1)


def _in_batches(images, rows, boxes, mirrored, order: np.ndarray, out: Tensor) -> None:
    from torchvision.ops import roi_align

    size, device = out.shape[2:], out.device
    samples = max(1, round(max(images.shape[1:3]) / size[0]))  # a side of an output pixel: the largest downscaling
    for start in range(0, len(rows), AT_ONCE):
        part = order[start : start + AT_ONCE]
        # pinned memory is copied while the GPU is busy with the step before and this process reads on
        pixels = torch.empty((len(part), *images.shape[1:]), dtype=torch.uint8, pin_memory=out.is_cuda)
        np.take(images, rows[part], axis=0, out=pixels.numpy(), mode="clip")  # unbuffered, unlike mode="raise"
        top, left, height, width = torch.from_numpy(boxes[part]).unbind(1)
        corners = torch.stack((torch.arange(len(part)), left, top, left + width, top + height), 1).float()
        views = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()  # [b, 3, H, W]
        views = roi_align(views, corners.to(device), size, sampling_ratio=samples, aligned=True)
        flips = torch.from_numpy(mirrored[part]).to(device)[:, None, None, None]
        out[torch.from_numpy(part).to(device)] = torch.where(flips, views.flip(-1), views).div_(127.5).sub_(1)
