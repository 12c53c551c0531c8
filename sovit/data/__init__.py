"""Data sources. One file a source; all of them look the same to training (see Source)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from sovit import UserError


class Batch(NamedTuple):
    """images [B, 3, H, W] float32; labels [B] (pooled) or [B, N] (one a patch token) int64; skills like labels or None.

    `skills` holds, for each label, the index into `Source.skills` of the family that it belongs to.
    """

    images: Any  # torch.Tensor, which this module need not import
    labels: Any
    skills: Any


class Source(Protocol):
    """An opened data set at one image size. Samples are pure functions of (seed, index)."""

    class_names: tuple[str, ...]
    num_classes: int
    label_grid: int  # squares a side of an image that carry one label each: 1 where the image has a single label
    readout: str  # "pooled": labels [B]; "tokens": labels [B, N], one for each patch token
    skills: tuple[str, ...]  # label families, () where there is one
    zero_line: float  # nats: cross-entropy of the best answer that looks at nothing
    blind: dict[str, float]  # skill -> nats: best answer that knows the question but not the image ({} where none)
    num_val: int  # validation images
    content_key: str  # changes when the samples do: two folders of one name are two data sets

    def train(self, start: int, count: int) -> Batch:
        """Training samples start .. start + count - 1 of an endless sequence."""

    def val(self, start: int, count: int) -> Batch:
        """Validation samples start .. start + count - 1, start + count <= num_val."""


SOURCES = {  # each has open_source
    "stream": "sovit.data.stream.stream",
    "icons": "sovit.data.icons.icons",
    "hub": "sovit.data.hub.images",
}

# source -> preset -> (native image size in pixels, what it is); hub's presets are names, folders and files of the user's
PRESETS = {
    "stream": {
        "cpu": (16, "4 x 4 question marks of 4 px, one of 16 answers a cell; minutes of a CPU"),
        "cpu-flip": (16, "the same with 5 % of the answers flipped: a floor of known entropy"),
        "small": (32, "4 x 4 cells of 8 px, four patches to a cell, longer tails"),
        "gpu": (64, "8 x 8 cells of 8 px, 256 tokens, longer tails"),
        "detail": (32, "4 x 4 cells of 8 px, some of them zoomed in; textures that show at a higher resolution only"),
    },
    "icons": {
        "mosaic": (32, "2 x 2 real icons of 16 px, 40 classes, one label a patch"),
        "single40": (32, "one icon, 40 classes"),
        "single200": (32, "one icon, 200 classes"),
    },
    "hub": {},
}


# mean and standard deviation, the same for every channel: a source shows an image in [0, 1] as (x - mean) / std
NORMALISATION = {"stream": (0.4, 0.5), "icons": (0.4, 0.5), "hub": (0.5, 0.5)}


def pieces(start: int, count: int, size: int) -> Iterator[tuple[int, slice]]:
    """Cut samples start .. start + count - 1 into chunks of `size`: the number of each, and which of its samples."""
    for chunk in range(start // size, -(-(start + count) // size)):
        yield chunk, slice(max(0, start - chunk * size), min(size, start + count - chunk * size))


class NamedData(NamedTuple):
    """What SOURCE:PRESET names; image_size: the preset's own, in pixels a side."""

    data: str
    preset: str
    image_size: int


def named_data(name: str) -> NamedData:
    """Read SOURCE[:PRESET]; without a preset the first of the source, "" where it has none of its own.

    Raises UserError for an unknown source or preset.
    """
    data, _, preset = name.partition(":")
    check_preset(data, preset)
    known = PRESETS.get(data, {})
    preset = preset or next(iter(known), "")
    return NamedData(data, preset, known.get(preset, (64, ""))[0])


def check_preset(data: str, preset: str) -> None:
    """Raise UserError for an unknown source or preset; "" is the first preset of a source."""
    if data not in SOURCES:
        raise UserError(f"data={data!r} is unknown; choose one of {', '.join(SOURCES)}")
    if preset and PRESETS[data] and preset not in PRESETS[data]:
        raise UserError(f"preset={preset!r} is unknown to {data}; choose one of {', '.join(PRESETS[data])}")


def open_data(data: str, preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Source:
    """Open source `data` (a key of SOURCES) with a preset of its own, drawn at `image_size` pixels.

    Raises UserError for an unknown source or preset, a size that the source cannot draw, or missing files.

    >>> source = sovit.open_data("stream", "cpu", image_size=16, patch_size=4, data_seed=0)
    >>> source.train(0, 2).images.shape, source.num_classes
    (torch.Size([2, 3, 16, 16]), 16)
    """
    check_preset(data, preset)
    if data_seed < 0:
        raise UserError(f"data_seed={data_seed} is negative; give 0 or more")
    return importlib.import_module(SOURCES[data]).open_source(preset, image_size, patch_size, data_seed, device)


def baselines(source: Source) -> str:
    """What can be had without looking, in nats: the lines that every loss is to be read against."""
    blind = ", ".join(f"{skill} {nats:.3f}" for skill, nats in source.blind.items())
    floor = getattr(source, "floor", 0.0)  # of sources that know what cannot be seen, or is not so
    return (
        f"chance loss {source.zero_line:.4f} nats"
        + (f", floor {floor:.4f}" if floor > 1e-9 else "")
        + (f"; text-only baseline by question: {blind}" if blind else "")
    )
