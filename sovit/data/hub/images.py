"""Any image classification set that Hugging Face `datasets` opens, or that lies in a folder.

docs/your-images.md lists what a preset names, and its options. Images are decoded once, resized to the short side,
centre-cropped and kept as a memory-mapped uint8 array. Subsets are fixed random choices, the same for every seed, and
nested: what is in a smaller one is in a larger one.

With crop, training images are resized random crops of the decoded square, antialiased; validation images are its centre
7/8, the usual protocol (at image_size 224: 256 pixels decoded, the middle 224 shown as they are). Without, both are the
whole square.

A hub set without a revision is taken as it is on the day it is decoded; its revision stands in info.json beside the
images, with the account of what was read and refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch

from sovit import UserError
from sovit.data import Batch, pieces
from sovit.data.cache import check_val, content_key, prior_cross_entropy
from sovit.data.hub.augment import crop_boxes, resized_crop
from sovit.data.hub.decoding import Table, decoded, fixed_random, read_table
from sovit.data.hub.folders import Location

NUM_VAL = 10_000  # validation images at most: a fixed random choice where a set has more
CENTRE = 7 / 8  # side of the validation view beside random crops: 224 of 256

# option -> (what it takes, its pattern, the least and the largest number)
OPTIONS = {
    "label": ("COLUMN", r".+", None),
    "flip": ("0 or 1", r"[01]", None),
    "crop": ("SHARE", r"\d*\.?\d+(e-?\d+)?|\d+\.", (1e-9, 1)),
    "cache_size": ("PIXELS", r"\d+", (1, 100_000)),
    "num_train": ("NUMBER", r"\d+", (1, math.inf)),
    "per_class": ("NUMBER", r"\d+", (1, math.inf)),
    "classes": ("NUMBER", r"\d+", (2, math.inf)),
}


@dataclass(frozen=True)
class View:
    """What is shown of a set, and how: the options of a preset but the label."""

    flip: bool = True
    crop: float | None = None
    cache_size: int | None = None
    num_train: int | None = None
    per_class: int | None = None
    classes: int | None = None


class Hub:
    """An opened data set. images [I, S, S, 3] uint8, memory-mapped; see sovit.data.Source for the rest.

    `content_key` is the key of the cache, and another one for each subset, or way of cropping.
    Images come as value / 127.5 - 1, between -1 and 1. A training epoch shows every image once, in an order that
    depends on (data_seed, epoch) alone, mirrored or not; crops depend on (data_seed, index of the sample) alone.
    """

    label_grid, readout = 1, "pooled"
    skills: tuple[str, ...] = ()

    def __init__(self, table: Table, view: View, content_key: str, image_size: int, data_seed: int, device: str):
        self.view, self.content_key, self.image_size = view, content_key, image_size
        self.data_seed, self.device = data_seed, device
        self._images = table.images
        self._labels, self._train_rows, val_rows, class_names = choose(table, view)
        self.class_names: tuple[str, ...] = tuple(class_names)
        self.info = table.info | {"num_train": len(self._train_rows), "num_val": len(val_rows), "classes": class_names}
        self.num_classes = len(self.class_names)
        self.blind: dict[str, float] = {}
        self._val_rows = fixed_random(0, 0).permutation(val_rows)[:NUM_VAL]
        self.num_train, self.num_val = len(self._train_rows), len(self._val_rows)
        self.zero_line = prior_cross_entropy(
            self._labels[self._train_rows], self._labels[self._val_rows], self.num_classes
        )
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def train(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1 of endless epochs: images [B, 3, H, W], labels [B]."""
        parts = []
        for epoch, part in pieces(start, count, len(self._train_rows)):
            order, mirrored = self._epoch_order(epoch)
            parts.append((order[part], mirrored[part]))
        rows, flips = (np.concatenate(column) for column in zip(*parts))
        boxes, side = None, self._images.shape[1]
        if self.view.crop is not None:
            boxes = crop_boxes(self.data_seed, start, count, side, self.view.crop)
        return self._batch(rows, flips, boxes)

    def val(self, start: int, count: int) -> Batch:
        """Validation images start .. start + count - 1, never mirrored; the same for every data_seed."""
        check_val(self.num_val, start, count)
        boxes, side = None, self._images.shape[1]
        if self.view.crop is not None:
            middle = round(CENTRE * side)
            boxes = np.tile([(side - middle) // 2, (side - middle) // 2, middle, middle], (count, 1))
        return self._batch(self._val_rows[start : start + count], np.zeros(count, bool), boxes)

    def _batch(self, rows: np.ndarray, mirrored: np.ndarray, boxes: np.ndarray | None) -> Batch:
        side = self._images.shape[1]
        if boxes is None and side != self.image_size:
            boxes = np.tile([0, 0, side, side], (len(rows), 1))
        labels = torch.from_numpy(self._labels[rows]).to(self.device)
        if boxes is not None:
            pixels = resized_crop(self._images, rows, boxes, mirrored, self.image_size, self.device)
            return Batch(pixels, labels, None)
        order = np.argsort(rows)  # rising reads of a memory map are several times faster than random ones
        raw = np.empty((len(rows), *self._images.shape[1:]), np.uint8)  # [B, H, W, 3]
        raw[order] = self._images[rows[order]]
        raw[mirrored] = raw[mirrored, :, ::-1]
        pixels = torch.from_numpy(raw).to(self.device).permute(0, 3, 1, 2).contiguous().float()  # [B, 3, H, W]
        return Batch(pixels.div_(127.5).sub_(1), labels, None)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the images of an epoch in their order, and whether each is mirrored; the last epoch is kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=self.data_seed, counter=[0, 0, epoch, 0]))
            order = random.permutation(self._train_rows)
            self._epoch = epoch, order, (random.random(len(order)) < 0.5) & self.view.flip
        return self._epoch[1], self._epoch[2]


def open_source(preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Hub:
    """Open the data set that `preset` names (see the module) at `image_size` pixels; the first opening decodes it.

    Raises UserError for a name or folder that cannot be opened, a set without images or labels or with one class,
    more images or classes than there are, and sizes that do not divide.
    """
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise UserError(f"patch_size={patch_size} does not divide image_size={image_size}; give one that does")
    location, view = locate(preset)
    size = view.cache_size or (image_size if view.crop is None else round(image_size / CENTRE))
    if size < image_size:
        raise UserError(f"cache_size={size} is under image_size={image_size}; give that at least")
    folder = decoded(location, size)
    key, shown = folder.name, {name: getattr(view, name) for name in ("crop", "num_train", "per_class", "classes")}
    if any(value is not None for value in shown.values()) or size != image_size:
        key = content_key(cache=key, image_size=image_size, **shown)
    return Hub(read_table(folder), view, key, image_size, data_seed, device)


def locate(preset: str) -> tuple[Location, View]:
    """Take a preset apart. Raises UserError for an empty one, an unknown option or a path that does not exist."""
    # a folder may have a question mark in its name
    base, _, query = (preset, "", "") if preset and Path(preset).expanduser().exists() else preset.partition("?")
    if not base:
        raise UserError("data='hub' needs a preset; name a folder of images, or a hub name such as uoft-cs/cifar10")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if query and not options:
        options = {query: ""}
    for name, value in options.items():
        what, pattern, span = OPTIONS.get(name, ("", None, None))
        if pattern is None or not re.fullmatch(pattern, value):
            known = ", ".join(f"?{name}={what}" for name, (what, _, _) in OPTIONS.items())
            given = f"{name}={value}" if value else name
            raise UserError(f"preset={preset!r} has an unknown option; the options are {known}; given: {given}")
        if span and not span[0] <= float(value) <= span[1]:
            most = f" and at most {span[1]:,}" if span[1] < math.inf else ""
            raise UserError(f"preset={preset!r}: {name}={value} must be at least {span[0]}{most}")
    numbers = {
        name: int(options[name]) for name in ("cache_size", "num_train", "per_class", "classes") if name in options
    }
    if "per_class" in numbers and "num_train" in numbers:
        raise UserError(f"preset={preset!r} gives per_class and num_train; give one of them")
    crop = float(options["crop"]) if "crop" in options else None
    view = View(options.get("flip") != "0", crop, **numbers)
    label, path = options.get("label", ""), Path(base).expanduser()
    if path.exists():
        return Location(preset, path.resolve(), base, label=label), view
    hub = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([^#]+))?(?:#(.+))?", base)
    if hub is None or path.suffix in (".parquet", ".tar"):
        raise UserError(f"preset={preset!r} is neither a file or folder here nor a hub name; correct the path")
    return Location(preset, None, hub[1], hub[2], hub[3], label), view


def seen_share(preset: str) -> float:
    """Side of what a validation image shows, as a share of the decoded square: below 1 beside random crops."""
    _, question, options = preset.rpartition("?")
    return CENTRE if question and re.search(r"(^|&)crop=", options) else 1.0


def choose(table: Table, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """labels [I] (-1: left out), training rows, validation rows and class names of a view.

    Every choice goes by a fixed random rank of a row, or of a class among equals, so that smaller ones are nested.
    Raises UserError for more than there is.
    """
    labels, classes = table.labels, table.info["classes"]
    is_train = ~table.is_val & (labels >= 0)
    if view.classes is not None:
        if view.classes > len(classes):
            raise UserError(
                f"classes={view.classes} is more than the {len(classes)} classes that there are; give fewer"
            )
        counts = np.bincount(labels[is_train], minlength=len(classes))
        order = np.lexsort((fixed_random(0, 4).random(len(classes)), -counts))
        kept = np.sort(order[: view.classes])  # in the order of the names, as before
        number = np.full(len(classes) + 1, -1)  # the last one is for -1
        number[kept] = np.arange(len(kept))
        labels, classes = number[labels], [classes[i] for i in kept]
        is_train &= labels >= 0
    rows = np.flatnonzero(is_train)
    rank = fixed_random(0, 2).random(len(labels))[rows]
    if view.per_class is not None:
        counts = np.bincount(labels[rows], minlength=len(classes))
        if counts.min() < view.per_class:
            raise UserError(
                f"per_class={view.per_class}: class {classes[int(counts.argmin())]!r} has {counts.min()} training images;"
                " give at most that, or take the larger classes with ?classes=NUMBER"
            )
        order = np.lexsort((rank, labels[rows]))  # class by class, by rank
        place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[labels[rows[order]]]
        rows = np.sort(rows[order[place < view.per_class]])
    if view.num_train is not None:
        if view.num_train > len(rows):
            raise UserError(f"num_train={view.num_train} is more than the {len(rows)} training images; give fewer")
        rows = np.sort(rows[np.argsort(rank)[: view.num_train]])
    if len(np.unique(labels[rows])) < 2:
        raise UserError(f"{len(rows)} training images of fewer than two classes are left; give a larger subset")
    val_rows = np.flatnonzero(table.is_val & (labels >= 0))
    if not len(val_rows):
        raise UserError("no validation image is among those chosen; take more classes")
    return labels, rows, val_rows, classes
