"""The constants of the stream's presets, and the pure functions that its scenes are drawn with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CYCLE = ("attr", "fact", "hist", "attr", "major", "fact", "group", "same")
POINTING_CYCLE = CYCLE * 7 + CYCLE[:-1] + ("right",)  # one question in 64 points at the cell to the right
NUM_ANSWERS = 16
COLOURS = ("grey", "blue", "green", "cyan", "red", "magenta", "yellow", "white")  # in the order of the palette
CHUNK = 256  # samples drawn at once; a sample does not depend on how it is asked for
WORLD_SEED = 2305_13035  # of the fixed tables: glyphs, marks, answers; the same for every run
VAL_SEED = 1 << 40  # validation samples come from a key that no data_seed (below 2^32) can reach


@dataclass(frozen=True)
class World:
    """The constants of one preset. Powers are Zipf exponents: p(rank r) ~ r^-power, r = 1, 2, ..."""

    grid: int = 4  # cells a side
    cell: int = 4  # pixels a side of a cell at native size; a quarter of it is margin
    num_questions: int = 256
    num_glyphs: int = 128
    num_colours: int = 8
    question_power: float = 0.9
    glyph_power: float = 1.0
    colour_power: float = 0.5
    cycle: tuple[str, ...] = CYCLE
    pixel_noise: float = 0.1  # s.d., in units of the image's [0, 1] range
    label_flip: float = 0.0  # share of answers replaced by a uniform one: a floor of known entropy
    num_val: int = 4096

    @property
    def image_size(self) -> int:
        return self.grid * self.cell

    @property
    def ranks(self) -> dict[str, tuple[int, float]]:
        """Latent of a cell -> how many values it takes, and its Zipf exponent."""
        return {
            "question": (self.num_questions, self.question_power),
            "glyph": (self.num_glyphs, self.glyph_power),
            "colour": (self.num_colours, self.colour_power),
        }


@dataclass(frozen=True)
class Detail(World):
    """The constants of sovit/data/stream/detail.py. Strengths are in units of the image's [0, 1] range."""

    num_questions: int = 16
    num_glyphs: int = 36
    question_power: float = 0.5
    cycle: tuple[str, ...] = ("weave", "attr", "cloth", "weave", "hist", "fact", "major", "group")
    num_val: int = 2048
    ground: float = 0.15
    ink: float = 0.15
    contrast: float = 0.1  # of an octave of texture
    num_textures: int = 6  # of each octave
    texture_power: float = 0.0
    zoom_share: float = 0.5  # of the quadrants: one cell at double size in place of four

    @property
    def image_size(self) -> int:
        return 2 * super().image_size  # at half of it no texture shows

    @property
    def ranks(self) -> dict[str, tuple[int, float]]:
        return super().ranks | {"texture": (self.num_textures**2, self.texture_power)}


PRESETS = {
    "cpu": World(),
    "cpu-flip": World(label_flip=0.05),
    "small": World(cell=8, num_questions=1024, num_glyphs=512, num_colours=16, cycle=POINTING_CYCLE),
    "gpu": World(grid=8, cell=8, num_questions=1024, num_glyphs=512, num_colours=16, cycle=POINTING_CYCLE),
    "detail": Detail(),
}

# template -> number of different scene readings, the columns of the answer table it uses
COLUMNS = {
    "attr": lambda w: w.num_glyphs,
    "fact": lambda w: w.num_glyphs * w.num_colours,
    "same": lambda w: 8,
    "hist": lambda w: 4 * w.num_colours,
    "major": lambda w: w.num_colours**2,
    "group": lambda w: 64,
    "right": lambda w: w.num_colours,
}


def hash_uniform(seed: int, index: Tensor, salts: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 [*index.shape, salts], from a counter-based hash of (seed, index, salt).

    The mixing function is splitmix64 (Steele et al., OOPSLA 2014) in wrapping int64 arithmetic, so that every device
    gives the same bits.
    """

    def signed(constant: int) -> int:
        return constant - (1 << 64) if constant >> 63 else constant

    def shift(x: Tensor, bits: int) -> Tensor:  # logical right shift
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    salt = torch.arange(1, salts + 1, device=index.device)
    x = index.unsqueeze(-1) * signed(0xD1342543DE82EF95) + salt * signed(0x9E3779B97F4A7C15)  # [..., salts]
    x = x ^ signed((seed * 0xA24BAED4963EE407 + 0x9FB21C651E98DF25) % (1 << 64))
    for _ in range(2):
        x = (x ^ shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
        x = (x ^ shift(x, 27)) * signed(0x94D049BB133111EB)
        x = x ^ shift(x, 31)
    return shift(x, 11).double() / (1 << 53)


def zipf(count: int, power: float) -> Tensor:
    p = torch.arange(1, count + 1, dtype=torch.float64) ** -power
    return p / p.sum()


def tiled(cells: Tensor) -> Tensor:
    """Square cells [B, C, c, c, 3] in raster order, side by side: [B, 3, H, W]."""
    grid, cell = math.isqrt(cells.shape[1]), cells.shape[2]
    square = cells.view(-1, grid, grid, cell, cell, 3).permute(0, 5, 1, 3, 2, 4)  # [B, 3, G, c, G, c]
    return square.reshape(-1, 3, grid * cell, grid * cell)
