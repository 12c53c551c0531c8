"""Real drawings: single-colour icons of many open-source sets, labelled by the concept in their names.

The drawings are those of the pinned asset `iconify`. They are rendered once, at the size that is asked for, into a
memory-mapped cache with a table of who drew what under which licence (ATTRIBUTION.tsv beside the masks).

An icon's label is the one concept word in its name (`calendar-off-outline` -> calendar). Training and validation icons
come from disjoint families of sets, never from one family, because families repeat a design in many weights.

Presets with `views` draw pose, colours and background anew for every sample (sovit.data.icons.views), and validate on no
drawing that training shows under another name (sovit.data.icons.near_copies). What an image shows is told in words by
`Icons.facts` and `Icons.text` (sovit.data.icons.text).

These are drawings, not photographs, and families copy each other's ideas: a loss here says nothing of natural images.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sovit import UserError
from sovit.data import Batch, assets, pieces
from sovit.data.cache import check_val, content_key, prior_cross_entropy
from sovit.data.icons import views as icon_views
from sovit.data.icons.near_copies import copies_folder
from sovit.data.icons.render import masks_folder, masks_key
from sovit.data.icons.text import text_folder
from sovit.data.icons.views import NAMES, Views


@dataclass(frozen=True)
class Preset:
    """What an image is. `grid` x `grid` icons; labels one a patch token (grid > 1) or one an image (grid = 1).

    `noise` is the standard deviation of the Gaussian added to a pixel, which runs from 0 to 1. `num_val` validation
    images at most. With `views` no two samples of an icon look alike; without, an icon always stands as it was drawn.
    """

    num_classes: int
    grid: int
    noise: float
    num_val: int = 4096
    views: Views | None = None


# What a small model can learn at 1e12 FLOPs, and not by heart: of larger poses it learns nothing yet (see docs/log.md)
GENTLE = Views(rotation=20, scale=(0.75, 1.1), stretch=0.15, outside=0.05, mirror=False, colour=False, gentle=2.0)

# `mosaic` is the one to study with on a CPU (32 pixels, patch 4). An image of it is never an upsample: a larger
# image_size renders the same drawings with more detail
PRESETS = {
    "mosaic": Preset(num_classes=40, grid=2, noise=0.1),
    "mosaic-views": Preset(num_classes=40, grid=2, noise=0.1, views=GENTLE),
    "single40": Preset(num_classes=40, grid=1, noise=0.1),
    "single200": Preset(num_classes=200, grid=1, noise=0.1, num_val=1 << 14),
    "single1000": Preset(num_classes=1000, grid=1, noise=0.1, num_val=1 << 15),
    "colour200": Preset(num_classes=200, grid=1, noise=0.05, num_val=1 << 14, views=Views()),
    "colour1000": Preset(num_classes=1000, grid=1, noise=0.05, num_val=1 << 15, views=Views()),
}

CHUNK = 256  # samples drawn from one random stream, so that a batch's size and start cannot change a sample
CENTRE, GAIN = 0.4, 2.0  # x = GAIN * (pixel - CENTRE): of white ink at 16 px mean -0.2, standard deviation 0.8
VAL_KEY = 0x56414C  # validation does not depend on data_seed
VAL_SEED = 1 << 40  # the same for views, whose data_seed is no key of Philox
FINER = 2  # masks of views have so many pixels to one of a tile, which keeps turned edges sharp ...
FINEST = 64  # ... in tiles of so many pixels at most: larger ones are sharp enough, and twice their masks too large
RESIDENT = 8 << 30  # bytes of masks that are kept on an accelerator; more stay in the memory map

# what is told of icons that stand as they were drawn
STAMPED = {
    "ink": NAMES.index("white"),
    "background": NAMES.index("black"),
    **{"rotation": 0.0, "size": 1.0, "stretch": 1.0, "x": 0.0, "y": 0.0, "mirrored": False},
}


class Icons:
    """An opened preset. masks [I, M, M] uint8 (255 = ink), memory-mapped; see sovit.data.Source for the rest.

    `content_key` is the key of the masks: another one when the package, the number of classes or the icons' size differ;
    with views, also when anything differs in how they are drawn or which validation drawings were found to be copies.
    """

    def __init__(self, preset: Preset, folder: Path, image_size: int, patch_size: int, data_seed: int, device: str):
        self.preset, self.image_size, self.patch_size = preset, image_size, patch_size
        self.data_seed, self.device, self.folder = data_seed, device, folder
        self.info = json.loads((folder / "info.json").read_text())
        self.class_names: tuple[str, ...] = tuple(self.info["classes"])
        self.label_grid = preset.grid
        self.num_classes = len(self.class_names)
        self.skills: tuple[str, ...] = ()
        self.blind: dict[str, float] = {}
        self.readout = "tokens" if preset.grid > 1 else "pooled"
        self._classes = np.load(folder / "classes.npy")  # [I]
        self._masks = np.load(folder / "masks.npy", mmap_mode="r")[: len(self._classes)]
        is_val = np.load(folder / "is_val.npy")  # [I]
        self._train_icons, val_icons = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        self.content_key = folder.name
        self._resident: torch.Tensor | None = None  # the masks, on an accelerator
        if preset.views:
            copies, text = copies_folder(folder), text_folder(folder)
            new = ~np.load(copies / "copied.npy")
            if not new.any():
                raise UserError(
                    f"all {len(new)} validation drawings are nearly training drawings; choose a preset without views, or"
                    " a fuller icon package"
                )
            val_icons = val_icons[new]
            mirror = np.load(text / "mirror.npy") & preset.views.mirror  # [I]
            self._mirror = torch.from_numpy(mirror).to(device)
            self._train_icons_there = torch.from_numpy(self._train_icons).to(device)
            self._shared = icon_views.tables((3 if preset.views.colour else 1) * image_size**2, device)
            found = {"masks": folder.name, "copies": copies.name, "text": text.name}
            self.content_key = content_key(recipe=icon_views.RECIPE, preset=asdict(preset), **found)
            if device != "cpu" and self._masks.nbytes <= RESIDENT:
                self._resident = torch.from_numpy(self._masks[:]).to(device)
        # each comes up equally often, in a fixed order
        self._val_icons = np.random.Generator(np.random.Philox(key=VAL_KEY)).permutation(val_icons)
        self.num_val = preset.num_val if preset.grid > 1 else min(preset.num_val, len(val_icons))
        self.zero_line = prior_cross_entropy(
            self._classes[self._train_icons], self._classes[self._val_icons], self.num_classes
        )
        self._chunks: dict[tuple[bool, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1: images [B, 3, H, W], labels [B] or [B, N]. Icons are drawn uniformly."""
        return self._batch(False, start, count)

    def val(self, start: int, count: int) -> Batch:
        """Validation images start .. start + count - 1, made of validation icons; the same for every data_seed."""
        check_val(self.num_val, start, count)
        return self._batch(True, start, count)

    # what the images show, in words ------------------------------------------------------------------------------------

    def facts(self, start: int, count: int, val: bool = False) -> dict[str, np.ndarray]:
        """What stands in samples start .. start + count - 1, name -> [B, C], cells in raster order.

        icon: its number (see `text`); label: its class; ink, background: numbers of icon_views.NAMES; and its pose as
        in icon_views.draw: rotation in degrees, size, stretch, x and y in tiles, mirrored.
        """
        if val:
            check_val(self.num_val, start, count)
        parts = []
        for chunk, rows in pieces(start, count, CHUNK):
            if self.preset.views:
                drawn = {k: v.cpu().numpy() for k, v in self._drawn(self.preset.views, val, chunk).items()}
            else:
                drawn = {"icon": self._stamped(val, chunk)[0].reshape(CHUNK, -1)}
            whole = STAMPED | drawn | {"label": self._classes[drawn["icon"]]}
            parts.append({k: np.broadcast_to(whole[k], drawn["icon"].shape)[rows] for k in ("icon", "label", *STAMPED)})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    def text(self, icon: int) -> dict:
        """What the name of an icon says: set, name, caption, concept, split and attributes; see text.describe."""
        return json.loads(self._lines[icon])

    def texts(self) -> list[dict]:
        """`text` of all icons, in the order of their numbers."""
        return [json.loads(line) for line in self._lines]

    @cached_property
    def _lines(self) -> list[str]:
        return (text_folder(self.folder) / "icons.jsonl").read_text(encoding="utf-8").splitlines()

    def notes(self) -> list[str]:
        """Lines for whoever looks at the data: how far validation drawings are new."""
        found = json.loads((copies_folder(self.folder) / "info.json").read_text())
        what = "left out of validation" if self.preset.views else "kept in validation"
        return [
            f"{found['copies_in_val']:,} of {found['num_val']:,} validation drawings are nearly a training drawing:"
            f" {what} ({found['near_duplicates_in_val']:,} look alike at a glance, by a 64-bit hash)"
        ]

    # drawing -----------------------------------------------------------------------------------------------------------

    def _batch(self, is_val: bool, start: int, count: int) -> Batch:
        images, labels = [], []
        for chunk, rows in pieces(start, count, CHUNK):
            pixels, classes = self._chunk(is_val, chunk)
            images.append(pixels[rows])
            labels.append(classes[rows])
        shown = torch.cat(images).to(self.device)  # [B, 1 or 3, H, W]
        return Batch(shown.repeat(1, 3 // shown.shape[1], 1, 1), torch.cat(labels).to(self.device), None)

    def _chunk(self, is_val: bool, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [256, 1 or 3, H, W] float32 and labels [256] or [256, N] int64 of a chunk; the last of each is kept."""
        if (is_val, chunk) not in self._chunks:
            if self.preset.views:
                drawn = self._drawn(self.preset.views, is_val, chunk)
                chosen = drawn["icon"].flatten().cpu().numpy()
                images = icon_views.render(self._ink(drawn["icon"]), drawn, self._tile, self.preset.noise, self._shared)
                images = GAIN * (images - CENTRE)
            else:
                chosen, random = self._stamped(is_val, chunk)
                images = self._stamp(chosen, random)
            g, labels = self.preset.grid, self._classes[chosen]
            if g > 1:
                side = self._tile // self.patch_size
                labels = labels.reshape(CHUNK, g, g).repeat(side, axis=1).repeat(side, axis=2).reshape(CHUNK, -1)
            self._chunks = {k: v for k, v in self._chunks.items() if k[0] != is_val}
            self._chunks[is_val, chunk] = images, torch.from_numpy(labels)
        return self._chunks[is_val, chunk]

    @property
    def _tile(self) -> int:
        return self.image_size // self.preset.grid

    def _val_chosen(self, chunk: int) -> np.ndarray:
        slots = CHUNK * self.preset.grid**2
        return self._val_icons[np.arange(chunk * slots, (chunk + 1) * slots) % len(self._val_icons)]

    def _stamped(self, is_val: bool, chunk: int) -> tuple[np.ndarray, np.random.Generator]:
        """The icons of a chunk, [256 * C], and the generator that goes on to make their noise."""
        # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried between chunks
        key = VAL_KEY if is_val else self.data_seed
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, chunk, int(is_val)]))
        if is_val:
            return self._val_chosen(chunk), random
        return self._train_icons[random.integers(len(self._train_icons), size=CHUNK * self.preset.grid**2)], random

    def _stamp(self, chosen: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        """Icons [256 * C] as they were rendered, white on black, with noise: [256, 1, H, W]."""
        g, tile = self.preset.grid, self._tile
        ink = np.empty((len(chosen), tile, tile), np.uint8)
        order = np.argsort(chosen)  # rising reads of a memory map are several times faster than random ones
        ink[order] = self._masks[chosen[order]]
        ink = ink.reshape(CHUNK, g, g, tile, tile).swapaxes(2, 3).reshape(CHUNK, self.image_size, self.image_size)
        pixels = random.standard_normal(ink.shape, dtype=np.float32)  # [256, H, W]
        pixels *= GAIN * self.preset.noise
        pixels += ink * np.float32(GAIN / 255) - np.float32(GAIN * CENTRE)
        return torch.from_numpy(pixels)[:, None]

    def _drawn(self, views: Views, is_val: bool, chunk: int) -> dict[str, torch.Tensor]:
        """icon_views.draw for the samples of a chunk, with icons chosen [256, C] and mirrored as they may be."""
        index = torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK, device=self.device)
        cells = self.preset.grid**2
        drawn = icon_views.draw(views, VAL_SEED if is_val else self.data_seed, index, cells)
        if is_val:
            icon = torch.from_numpy(self._val_chosen(chunk)).to(self.device).view(CHUNK, cells)
        else:
            icon = self._train_icons_there[(drawn["icon"] * len(self._train_icons)).long()]
        return drawn | {"icon": icon, "mirrored": (drawn["mirrored"] < 0.5) & self._mirror[icon]}

    def _ink(self, icon: torch.Tensor) -> torch.Tensor:
        """The masks of icons [256, C], as [256, C, M, M] uint8."""
        if self._resident is not None:
            return self._resident[icon]
        order, back = np.unique(icon.cpu().numpy(), return_inverse=True)  # rising, as in _stamp
        return torch.from_numpy(self._masks[order][back]).to(self.device).view(*icon.shape, *self._masks.shape[1:])


def open_source(preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Icons:
    """Open a preset of PRESETS ("" = mosaic) at `image_size` pixels; the first opening of a size renders its masks.

    Raises UserError for an unknown preset, sizes that do not divide, or where the asset or the renderer is missing.
    """
    preset = preset or "mosaic"
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is unknown to icons; choose one of {', '.join(PRESETS)}")
    grid = PRESETS[preset].grid
    if image_size < grid or image_size % grid:
        raise UserError(f"image_size={image_size} cannot hold {grid} x {grid} icons; give a multiple of {grid}")
    if patch_size < 1 or (image_size // grid) % patch_size:
        raise UserError(
            f"patch_size={patch_size} does not divide the {image_size // grid} pixels of an icon in preset {preset!r};"
            " give one that does"
        )
    if data_seed < 0:
        raise UserError(f"data_seed={data_seed} is negative; give 0 or more")
    folder = masks_folder(PRESETS[preset].num_classes, masks_size(preset, image_size))
    return Icons(PRESETS[preset], folder, image_size, patch_size, data_seed, device)


def masks_size(preset: str, image_size: int) -> int:
    """Pixels a side at which the icons of a preset are rendered for images of that size."""
    tile = image_size // PRESETS[preset].grid
    return (FINER if PRESETS[preset].views and tile <= FINEST else 1) * tile


def licences(preset: str, image_size: int) -> dict[str, list[str]]:
    """Licence -> icon sets whose drawings a preset shows, sorted; {} where its masks are not in the cache."""
    preset = preset or "mosaic"
    try:
        key = masks_key(PRESETS[preset].num_classes, masks_size(preset, image_size))
    except UserError:  # a package of the user's own that has gone
        return {}
    table = assets.cache_dir() / "icons" / key / "ATTRIBUTION.tsv"
    if not table.exists():
        return {}
    sets: dict[str, set[str]] = {}
    for line in table.read_text(encoding="utf-8").splitlines()[1:]:
        title, _, licence, *_ = line.split("\t")
        sets.setdefault(licence, set()).add(title.partition(":")[0])
    return {licence: sorted(sets[licence]) for licence in sorted(sets)}
