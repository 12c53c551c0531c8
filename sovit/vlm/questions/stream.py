"""Questions about the scenes of the stream: grids of cells, each of a colour and with a mark.

A mark is read as one of 16 letters, A .. P: the answer that the stream's own encoders were trained to give at that cell.
Rows and columns count from one, from the top and from the left; nothing lies right of the last column. `detail` is not
asked about: its zoomed cells stand in four places at once.

The words are those that small language models have one token for, "row two" rather than "row 2".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sovit import UserError
from sovit.data.stream.scene import Stream
from sovit.data.stream.world import NUM_ANSWERS, PRESETS, VAL_SEED, Detail
from sovit.vlm.questions.family import Family

LETTERS = tuple(chr(ord("A") + i) for i in range(NUM_ANSWERS))
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
REFERENCE_SEED = VAL_SEED + 2  # VAL_SEED + 1 is the stream's own, of its baselines
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)


class Cells(NamedTuple):
    """What one image shows, by row: names of colours, letters of marks; and how many cells have each colour."""

    colours: list[list[str]]
    marks: list[list[str]]
    counts: dict[str, int]


class StreamPictures:
    """Images and scenes of an opened preset; see sovit.vlm.questions.questions.Pictures."""

    data = "stream"

    def __init__(self, preset: str, image_size: int, data_seed: int):
        preset = preset or next(iter(PRESETS))
        if preset not in PRESETS or isinstance(PRESETS[preset], Detail):
            known = ", ".join(name for name, world in PRESETS.items() if not isinstance(world, Detail))
            raise UserError(f"preset={preset!r} of the stream has no questions; choose one of {known}")
        world = PRESETS[preset]
        patch_size = max(1, image_size // world.grid)  # any that divides a cell; questions ask of cells alone
        self.stream = Stream(world, image_size, patch_size, data_seed, "cpu")
        self.data_seed, self.num_val = data_seed, self.stream.num_val
        self.colours = tuple(name.replace("-", " ") for name in self.stream.colour_names)
        self.table = families(self.colours, world.grid)

    def images(self, split: str, start: int, count: int) -> Tensor:
        return (self.stream.train if split == "train" else self.stream.val)(start, count).images

    def scenes(self, split: str, start: int, count: int) -> list[Cells]:
        return self._scenes(VAL_SEED if split == "val" else self.data_seed, start, count)

    def reference(self, split: str, count: int) -> list[Cells]:
        return self._scenes(REFERENCE_SEED, 0, count)

    def _scenes(self, seed: int, start: int, count: int) -> list[Cells]:
        scene = self.stream.latents(seed, torch.arange(start, start + count))
        grid = self.stream.world.grid
        found = []
        for colours, marks in zip(scene["colour"].tolist(), self.stream.answers(scene, seed).tolist(), strict=True):
            named = [self.colours[c] for c in colours]
            letters = [LETTERS[m] for m in marks]
            rows = range(0, grid**2, grid)
            found.append(
                Cells(
                    [named[i : i + grid] for i in rows],
                    [letters[i : i + grid] for i in rows],
                    {name: named.count(name) for name in self.colours},
                )
            )
        return found


def families(colours: tuple[str, ...], grid: int) -> dict[str, Family]:
    """The questions about a grid of `grid` x `grid` cells in these colours, in the order in which they are asked."""
    line, numbers = range(grid), NUMBERS[:grid]
    corners = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}
    counts = tuple(str(n) for n in range(grid**2 + 1))
    inside = [
        (name, y, x, y + dy, x + dx)
        for name, (dy, dx) in STEPS.items()
        for y in line
        for x in line
        if y + dy in line and x + dx in line
    ]  # every cell that has a neighbour there

    def place_of_only(cells: Cells) -> list[tuple[str, int, int]]:
        return [
            (colour, y, x)
            for y, row in enumerate(cells.colours)
            for x, colour in enumerate(row)
            if cells.counts[colour] == 1
        ]

    def most(cells: Cells):
        largest = max(cells.counts.values())
        first = [colour for colour, n in cells.counts.items() if n == largest]
        return [((), first[0])] if len(first) == 1 else []

    def colours_in_line(cells: Cells):
        rows = [(("row", numbers[i]), str(len(set(row)))) for i, row in enumerate(cells.colours)]
        return rows + [(("column", numbers[i]), str(len(set(c)))) for i, c in enumerate(zip(*cells.colours))]

    def more(cells: Cells):
        n = cells.counts
        return [((a, b), "yes" if n[a] > n[b] else "no") for a in colours for b in colours if n[a] != n[b]]

    def beside_only(cells: Cells):
        where = {(y, x): colour for colour, y, x in place_of_only(cells)}
        return [((step, where[y, x]), cells.colours[v][u]) for step, y, x, v, u in inside if (y, x) in where]

    return {
        "marks": Family(
            "reading", "Read the marks in order.", lambda c: [((), " ".join(mark for row in c.marks for mark in row))]
        ),
        "marks_row": Family(
            "reading", "Read the marks of row {}.", lambda c: [((numbers[y],), " ".join(c.marks[y])) for y in line]
        ),
        "colours_row": Family(
            "naming", "Name the colours of row {}.", lambda c: [((numbers[y],), " ".join(c.colours[y])) for y in line]
        ),
        "most": Family("attribute", "Which colour is the most frequent?", most, colours),
        "colour_at": Family(
            "attribute",
            "What colour is row {}, column {}?",
            lambda c: [((numbers[y], numbers[x]), c.colours[y][x]) for y in line for x in line],
            colours,
        ),
        "count": Family(
            "counting",
            "How many cells are {}?",
            lambda c: [((colour,), str(c.counts[colour])) for colour in colours],
            counts,
        ),
        "num_colours": Family("counting", "How many colours are in {} {}?", colours_in_line, counts[1 : grid + 1]),
        "beside": Family(
            "relation",
            "What colour is {} row {}, column {}?",
            lambda c: [((step, numbers[y], numbers[x]), c.colours[v][u]) for step, y, x, v, u in inside],
            colours,
        ),
        "more": Family("relation", "Are there more {} cells than {} cells?", more, ("yes", "no")),
        "count_like": Family(
            "two_hops",
            "How many cells have the colour of the {} cell?",
            lambda c: [((corner,), str(c.counts[c.colours[y][x]])) for corner, (y, x) in corners.items()],
            counts[1:],
        ),
        "beside_only": Family("two_hops", "What colour is {} the only {} cell?", beside_only, colours),
        "mark_of_only": Family(
            "two_hops",
            "Which mark has the only {} cell?",
            lambda c: [((colour,), c.marks[y][x]) for colour, y, x in place_of_only(c)],
            LETTERS,
        ),
    }
