"""Questions about the scenes of the stream: grids of cells, each of a colour and with a mark.

A mark is read as one of 16 letters, A .. P: the answer that the stream's own encoders were trained to give at that cell.
Rows and columns count from one, from the top and from the left; nothing lies right of the last column. `detail` is not
asked about: its zoomed cells stand in four places at once.

The words are those that small language models have one token for, "row two" rather than "row 2".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sovit import UserError
from sovit.data.stream.scene import Stream
from sovit.data.stream.world import NUM_ANSWERS, PRESETS, VAL_SEED, Detail

LETTERS = tuple(chr(ord("A") + i) for i in range(NUM_ANSWERS))
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}  # (row, column)
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)
REFERENCE_SEED = VAL_SEED + 2  # VAL_SEED + 1 is the stream's own, of its baselines


Asks = list[tuple[tuple, str]]  # what a family can ask of an image: (arguments of its text, answer)


@dataclass(frozen=True)
class Family:
    """A family of questions; `asks(scene)` lists what it can ask of an image."""

    kind: str
    text: str  # with places for arguments, as of str.format
    asks: Callable[[Any], Asks]
    choices: tuple[str, ...] = ()


class Cells(NamedTuple):
    """What one image shows, by row: names of colours, letters of marks; and how many cells have each colour."""

    colours: list[list[str]]
    marks: list[list[str]]
    counts: dict[str, int]

    def only(self) -> dict[tuple[int, int], str]:
        """(row, column) -> colour, of the cells whose colour no other has."""
        cells = ((y, x, colour) for y, row in enumerate(self.colours) for x, colour in enumerate(row))
        return {(y, x): colour for y, x, colour in cells if self.counts[colour] == 1}

    def neighbours(self) -> list[tuple[str, int, int, str]]:
        """(step, row, column, colour of the cell there), of every cell that has a neighbour there."""
        line = range(len(self.colours))
        return [
            (step, y, x, self.colours[y + dy][x + dx])
            for step, (dy, dx) in STEPS.items()
            for y in line
            for x in line
            if y + dy in line and x + dx in line
        ]


def open_scenes(preset: str, image_size: int, data_seed: int) -> Stream:
    """Open a preset of the stream, "" its first. Raises UserError for one without questions."""
    preset = preset or next(iter(PRESETS))
    if preset not in PRESETS or isinstance(PRESETS[preset], Detail):
        known = ", ".join(name for name, world in PRESETS.items() if not isinstance(world, Detail))
        raise UserError(f"preset={preset!r} of the stream has no questions; choose one of {known}")
    # any patch size that divides a cell would do; questions ask of cells alone
    return Stream(PRESETS[preset], image_size, max(1, image_size // PRESETS[preset].grid), data_seed, "cpu")


def colours_of(stream: Stream) -> tuple[str, ...]:
    return tuple(name.replace("-", " ") for name in stream.colour_names)


def read_scenes(stream: Stream, seed: int, start: int, count: int) -> list[Cells]:
    """What images start .. start + count - 1 of a seed show."""
    names, grid = colours_of(stream), stream.world.grid
    latents = stream.latents(seed, torch.arange(start, start + count))
    found = []
    for colours, marks in zip(latents["colour"].tolist(), stream.answers(latents, seed).tolist(), strict=True):
        named, letters = [names[c] for c in colours], [LETTERS[m] for m in marks]
        lines = [slice(i, i + grid) for i in range(0, grid**2, grid)]
        counts = {name: named.count(name) for name in names}
        found.append(Cells([named[line] for line in lines], [letters[line] for line in lines], counts))
    return found


def families_of(stream: Stream) -> dict[str, Family]:
    """The questions about the scenes of a stream, in the order in which they are asked."""
    colours, grid = colours_of(stream), stream.world.grid
    counts = tuple(map(str, range(grid**2 + 1)))
    return {
        "marks": Family("reading", "Read the marks in order.", _marks),
        "marks_row": Family("reading", "Read the marks of row {}.", lambda c: _rows(c.marks)),
        "colours_row": Family("naming", "Name the colours of row {}.", lambda c: _rows(c.colours)),
        "most": Family("attribute", "Which colour is the most frequent?", _most, colours),
        "colour_at": Family("attribute", "What colour is row {}, column {}?", _colour_at, colours),
        "count": Family("counting", "How many cells are {}?", _count, counts),
        "num_colours": Family("counting", "How many colours are in {} {}?", _num_colours, counts[1 : grid + 1]),
        "beside": Family("relation", "What colour is {} row {}, column {}?", _beside, colours),
        "more": Family("relation", "Are there more {} cells than {} cells?", _more, ("yes", "no")),
        "count_like": Family("two_hops", "How many cells have the colour of the {} cell?", _count_like, counts[1:]),
        "beside_only": Family("two_hops", "What colour is {} the only {} cell?", _beside_only, colours),
        "mark_of_only": Family("two_hops", "Which mark has the only {} cell?", _mark_of_only, LETTERS),
    }


def _marks(cells: Cells) -> Asks:
    return [((), " ".join(mark for row in cells.marks for mark in row))]


def _rows(rows: list[list[str]]) -> Asks:
    return [((number,), " ".join(row)) for number, row in zip(NUMBERS, rows)]


def _most(cells: Cells) -> Asks:
    largest = max(cells.counts.values())
    first = [colour for colour, n in cells.counts.items() if n == largest]
    return [((), first[0])] if len(first) == 1 else []


def _colour_at(cells: Cells) -> Asks:
    return [((r, c), colour) for r, row in zip(NUMBERS, cells.colours) for c, colour in zip(NUMBERS, row)]


def _count(cells: Cells) -> Asks:
    return [((colour,), str(n)) for colour, n in cells.counts.items()]


def _num_colours(cells: Cells) -> Asks:
    lines = (("row", cells.colours), ("column", zip(*cells.colours)))
    return [((kind, number), str(len(set(line)))) for kind, of in lines for number, line in zip(NUMBERS, of)]


def _beside(cells: Cells) -> Asks:
    return [((step, NUMBERS[y], NUMBERS[x]), colour) for step, y, x, colour in cells.neighbours()]


def _more(cells: Cells) -> Asks:
    n = cells.counts
    return [((a, b), "yes" if n[a] > n[b] else "no") for a in n for b in n if n[a] != n[b]]


def _count_like(cells: Cells) -> Asks:
    return [((corner,), str(cells.counts[cells.colours[y][x]])) for corner, (y, x) in CORNERS.items()]


def _beside_only(cells: Cells) -> Asks:
    only = cells.only()
    return [((step, only[y, x]), colour) for step, y, x, colour in cells.neighbours() if (y, x) in only]


def _mark_of_only(cells: Cells) -> Asks:
    return [((colour,), cells.marks[y][x]) for (y, x), colour in cells.only().items()]
