"""Real drawings: single-colour icons of many open-source sets, labelled by the concept in their names.

The drawings are those of the pinned asset `iconify`. They are rendered once, at the size that is asked for, into a
memory-mapped cache with a table of who drew what under which licence (ATTRIBUTION.tsv beside the masks).

An icon's label is the one concept word in its name (`calendar-off-outline` -> calendar). Training and validation icons
come from disjoint families of sets, never from one family, because families repeat a design in many weights.

These are drawings, not photographs, and families copy each other's ideas: a loss here says nothing of natural images.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sovit import UserError
from sovit.data import Batch, assets, pieces
from sovit.data.cache import check_val, prior_cross_entropy
from sovit.data.icons.render import masks_folder, masks_key
from sovit.data.icons.text import describe


@dataclass(frozen=True)
class Preset:
    """What an image is: `grid` x `grid` icons, with a label a patch token (grid > 1) or one an image (grid = 1)."""

    num_classes: int
    grid: int
    num_val: int = 4096  # validation images at most


# `mosaic` is the one to study with on a CPU (32 pixels, patch 4). An image of it is never an upsample: a larger
# image_size renders the same drawings with more detail
PRESETS = {
    "mosaic": Preset(num_classes=40, grid=2),
    "single40": Preset(num_classes=40, grid=1),
    "single200": Preset(num_classes=200, grid=1, num_val=1 << 14),
}

CHUNK = 256  # samples drawn from one random stream, so that a batch's size and start cannot change a sample
CENTRE, GAIN = 0.4, 2.0  # x = GAIN * (pixel - CENTRE): of white ink at 16 px mean -0.2, standard deviation 0.8
NOISE = 0.1  # standard deviation of the Gaussian added to a pixel, which runs from 0 to 1
VAL_KEY = 0x56414C  # validation does not depend on data_seed


class Icons:
    """An opened preset. classes [I]: of each icon; see sovit.data.Source for the rest.

    `content_key` is the key of the masks: another one when the package, the number of classes or the icons' size differ.
    """

    skills: tuple[str, ...] = ()

    def __init__(self, preset: Preset, folder: Path, image_size: int, patch_size: int, data_seed: int, device: str):
        self.preset, self.image_size, self.patch_size = preset, image_size, patch_size
        self.data_seed, self.device, self.folder = data_seed, device, folder
        self.content_key = folder.name
        self.class_names = tuple(json.loads((folder / "info.json").read_text(encoding="utf-8"))["classes"])
        self.num_classes, self.label_grid = len(self.class_names), preset.grid
        self.blind: dict[str, float] = {}
        self.readout = "tokens" if preset.grid > 1 else "pooled"
        self.classes = np.load(folder / "classes.npy")  # [I]
        self._masks = np.load(folder / "masks.npy", mmap_mode="r")
        is_val = np.load(folder / "is_val.npy")  # [I]
        self._train_icons, val_icons = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        # each comes up equally often, in a fixed order
        self._val_icons = np.random.Generator(np.random.Philox(key=VAL_KEY)).permutation(val_icons)
        self.num_val = preset.num_val if preset.grid > 1 else min(preset.num_val, len(val_icons))
        self.zero_line = prior_cross_entropy(
            self.classes[self._train_icons], self.classes[self._val_icons], self.num_classes
        )
        self._chunks: dict[tuple[bool, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1: images [B, 3, H, W], labels [B] or [B, N]. Icons are drawn uniformly."""
        return self._batch(False, start, count)

    def val(self, start: int, count: int) -> Batch:
        """Validation images start .. start + count - 1, made of validation icons; the same for every data_seed."""
        check_val(self.num_val, start, count)
        return self._batch(True, start, count)

    def shown(self, start: int, count: int, val: bool = False) -> np.ndarray:
        """The numbers of the icons in samples start .. start + count - 1: [B, C], cells in raster order."""
        if val:
            check_val(self.num_val, start, count)
        drawn = (self._chosen(val, chunk)[0].reshape(CHUNK, -1)[rows] for chunk, rows in pieces(start, count, CHUNK))
        return np.concatenate(list(drawn))

    @cached_property
    def texts(self) -> list[dict]:
        """What the name of each icon says, in the order of their numbers; see text.describe."""
        rows = attribution(self.folder)
        return describe((row["title"], row["concept"], row["split"]) for row in rows)

    def _batch(self, is_val: bool, start: int, count: int) -> Batch:
        images, labels = [], []
        for chunk, rows in pieces(start, count, CHUNK):
            pixels, classes = self._chunk(is_val, chunk)
            images.append(pixels[rows])
            labels.append(classes[rows])
        shown = torch.cat(images).to(self.device)  # [B, 1, H, W]
        return Batch(shown.repeat(1, 3, 1, 1), torch.cat(labels).to(self.device), None)

    def _chunk(self, is_val: bool, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [256, 1, H, W] float32 and labels [256] or [256, N] int64 of a chunk; the last of each is kept."""
        if (is_val, chunk) not in self._chunks:
            chosen, random = self._chosen(is_val, chunk)
            images = self._stamp(chosen, random)
            g, labels = self.preset.grid, self.classes[chosen]
            if g > 1:
                side = self.image_size // g // self.patch_size
                labels = labels.reshape(CHUNK, g, g).repeat(side, axis=1).repeat(side, axis=2).reshape(CHUNK, -1)
            self._chunks = {k: v for k, v in self._chunks.items() if k[0] != is_val}
            self._chunks[is_val, chunk] = images, torch.from_numpy(labels)
        return self._chunks[is_val, chunk]

    def _chosen(self, is_val: bool, chunk: int) -> tuple[np.ndarray, np.random.Generator]:
        """The icons of a chunk, [256 * C], and the generator that goes on to make their noise."""
        # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried between chunks
        key, slots = VAL_KEY if is_val else self.data_seed, CHUNK * self.preset.grid**2
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, chunk, int(is_val)]))
        if is_val:
            return self._val_icons[np.arange(chunk * slots, (chunk + 1) * slots) % len(self._val_icons)], random
        return self._train_icons[random.integers(len(self._train_icons), size=slots)], random

    def _stamp(self, chosen: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Icons [256 * C] as they were rendered, white on black, with noise: [256, 1, H, W]."""
        g, tile = self.preset.grid, self.image_size // self.preset.grid
        ink = np.empty((len(chosen), tile, tile), np.uint8)
        order = np.argsort(chosen)  # rising reads of a memory map are several times faster than random ones
        ink[order] = self._masks[chosen[order]]
        ink = ink.reshape(CHUNK, g, g, tile, tile).swapaxes(2, 3).reshape(CHUNK, self.image_size, self.image_size)
        pixels = random.standard_normal(ink.shape, dtype=np.float32)  # [256, H, W]
        pixels *= GAIN * NOISE
        pixels += ink * np.float32(GAIN / 255) - np.float32(GAIN * CENTRE)
        return torch.from_numpy(pixels)[:, None]


def open_source(preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Icons:
    """Open a preset of PRESETS ("" = mosaic) at `image_size` pixels; the first opening of a size renders its masks.

    Raises UserError for sizes that do not divide, or where the asset or the renderer is missing.
    """
    preset = preset or "mosaic"
    grid = PRESETS[preset].grid
    if image_size < grid or image_size % grid:
        raise UserError(f"image_size={image_size} cannot hold {grid} x {grid} icons; give a multiple of {grid}")
    if patch_size < 1 or (image_size // grid) % patch_size:
        raise UserError(
            f"patch_size={patch_size} does not divide the {image_size // grid} pixels of an icon in preset {preset!r};"
            " give one that does"
        )
    folder = masks_folder(PRESETS[preset].num_classes, image_size // grid)
    return Icons(PRESETS[preset], folder, image_size, patch_size, data_seed, device)


def attribution(folder: Path) -> list[dict[str, str]]:
    """Who drew each icon in a folder of masks: title (SET:NAME), concept, licence, author, family, split."""
    with open(folder / "ATTRIBUTION.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def licences(preset: str, image_size: int) -> dict[str, list[str]]:
    """Licence -> icon sets whose drawings a preset shows, sorted; {} where its masks are not in the cache."""
    shown = PRESETS.get(preset or "mosaic")
    if shown is None:  # a preset of an earlier version
        return {}
    try:
        folder = assets.cache_dir() / "icons" / masks_key(shown.num_classes, image_size // shown.grid)
    except UserError:  # a package of the user's own that has gone
        return {}
    if not folder.exists():
        return {}
    pairs = sorted({(row["licence"], row["title"].partition(":")[0]) for row in attribution(folder)})
    sets: dict[str, list[str]] = {}
    for licence, name in pairs:
        sets.setdefault(licence, []).append(name)
    return sets
