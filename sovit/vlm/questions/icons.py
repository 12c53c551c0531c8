"""Questions about icons: one, or two by two, each of a concept that its name says.

What is true of an icon is what its name says (sovit.data.icons.text). What a name does not say is not asked: no question
takes the absence of a word for the absence of a thing, and an icon that says to be filled and outlined is asked neither.
Training and validation show drawings of disjoint families of sets, so a right answer is never one about a drawing that
training has shown.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sovit.data.icons import icons
from sovit.data.icons.text import ATTRIBUTES
from sovit.data.icons.views import NAMES
from sovit.data.stream.world import VAL_SEED
from sovit.vlm.questions.family import Family

PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # (row, column)
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
LOOKS = {"filled": "filled", "outline": "outlined"}
SIGNS = {state: "slash" if state == "off" else state for state in ATTRIBUTES["state"]}  # how it is drawn
REFERENCE_SEED = VAL_SEED + 2


class Picture(NamedTuple):
    """One icon; "" where its name does not say."""

    concept: str
    look: str  # of LOOKS
    sign: str  # of SIGNS
    shape: str  # around it
    arrow: str  # where the arrow in it points
    ink: str
    background: str


class IconPictures:
    """Images and scenes of an opened preset; see sovit.vlm.questions.questions.Pictures. A scene: Pictures in raster order."""

    data = "icons"

    def __init__(self, preset: str, image_size: int, data_seed: int):
        preset = preset or next(iter(icons.PRESETS))
        grid = icons.PRESETS[preset].grid if preset in icons.PRESETS else 1
        self._opened = partial(icons.open_source, preset, image_size, max(1, image_size // grid))
        self.source = self._opened(data_seed)
        self.data_seed, self.num_val = data_seed, self.source.num_val
        views = self.source.preset.views
        self.table = families(self.source.class_names, self.source.preset.grid, bool(views and views.colour))
        self._said: dict[int, Picture] = {}

    def images(self, split: str, start: int, count: int) -> Tensor:
        return (self.source.train if split == "train" else self.source.val)(start, count).images

    def scenes(self, split: str, start: int, count: int) -> list[list[Picture]]:
        return self._scenes(self.source.facts(start, count, val=split == "val"))

    def reference(self, split: str, count: int) -> list[list[Picture]]:
        if split == "val":  # whose drawings are of other sets, and the same for every data_seed
            return self.scenes("val", 0, min(count, self.num_val))
        return self._scenes(self._opened(REFERENCE_SEED).facts(0, count))

    def _scenes(self, facts: dict[str, np.ndarray]) -> list[list[Picture]]:
        columns = (facts[name].tolist() for name in ("icon", "ink", "background"))
        return [
            [
                self._says(icon)._replace(ink=NAMES[ink], background=NAMES[at])
                for icon, ink, at in zip(*image, strict=True)
            ]
            for image in zip(*columns, strict=True)
        ]

    def _says(self, icon: int) -> Picture:
        """The icon, in no colour yet."""
        if icon not in self._said:
            told = self.source.text(icon)
            looks = [LOOKS[style] for style in told["style"] if style in LOOKS]
            signs = [SIGNS[state] for state in told["state"]]
            # a bubble may have that shape, with nothing around it, and "hand-left" may be a left hand
            shapes = told["enclosure"] if told["concept"] != "chat" else []
            arrows = told["direction"] if "arrow" in told["caption"].split() else []
            if "duotone" in told["style"]:  # filled, in part
                looks = []
            look, sign, shape, arrow = (said[0] if len(said) == 1 else "" for said in (looks, signs, shapes, arrows))
            self._said[icon] = Picture(told["concept"], look, sign, shape, arrow, ink="", background="")
        return self._said[icon]


def families(classes: tuple[str, ...], grid: int, colour: bool) -> dict[str, Family]:
    """The questions about images of `grid` x `grid` icons of these classes, in the order in which they are asked."""
    return attributes(classes, grid, colour) | (arrangements(classes) if grid > 1 else {})


def attributes(classes: tuple[str, ...], grid: int, colour: bool) -> dict[str, Family]:
    """What can be asked of each icon by itself: its name, and what its name says of it."""
    places = list(PLACES) if grid > 1 else [""]

    def each(field: str):
        def asks(scene: list[Picture]):
            told = zip(places, (getattr(picture, field) for picture in scene), strict=True)
            return [((place,) if place else (), value) for place, value in told if value]

        return asks

    def family(kind: str, field: str, one: str, of_several: str, choices) -> Family:
        return Family(kind, one if grid == 1 else of_several, each(field), tuple(choices))

    found = {
        "name": family("naming", "concept", "What is this?", "What is in the {}?", classes),
        "look": family(
            "attribute", "look", "Is it filled or outlined?", "Is the {} picture filled or outlined?", LOOKS.values()
        ),
        "sign": family("attribute", "sign", "Which sign is on it?", "Which sign is on the {} picture?", SIGNS.values()),
        "shape": family(
            "attribute",
            "shape",
            "Which shape is around it?",
            "Which shape is around the {} picture?",
            ATTRIBUTES["enclosure"],
        ),
        "arrow": family(
            "attribute",
            "arrow",
            "Which way does the arrow point?",
            "Which way does the {} arrow point?",
            ATTRIBUTES["direction"],
        ),
    }
    if colour:
        ground = "What colour is the background?", "What colour is behind the {} picture?"
        found["ink"] = family("attribute", "ink", "What colour is it?", "What colour is the {} picture?", NAMES)
        found["background"] = family("attribute", "background", *ground, NAMES)
    return found


def arrangements(classes: tuple[str, ...]) -> dict[str, Family]:
    """What can be asked of four icons together. A picture is meant by its concept only where no other one shows it.

    None is meant by a thing that pictures of others show beside their own: a plus is on many of them.
    """
    places = list(PLACES.values())
    beside_others = {*SIGNS.values(), *ATTRIBUTES["enclosure"], "arrow"}

    def lone(scene: list[Picture]) -> dict[str, tuple[int, int]]:
        """concept -> its place, of those that one picture shows."""
        concepts = [picture.concept for picture in scene]
        return {
            c: at for c, at in zip(concepts, places, strict=True) if concepts.count(c) == 1 and c not in beside_others
        }

    def at(scene: list[Picture], y: int, x: int) -> Picture:
        return scene[2 * y + x]

    def count(scene: list[Picture]):
        concepts = [picture.concept for picture in scene]
        return [((c,), str(concepts.count(c))) for c in classes if c not in beside_others]

    def beside(scene: list[Picture]):
        return [
            ((step, concept), at(scene, y + dy, x + dx).concept)
            for concept, (y, x) in lone(scene).items()
            for step, (dy, dx) in STEPS.items()
            if (y + dy, x + dx) in places
        ]

    def is_beside(scene: list[Picture]):
        where = lone(scene)
        return [
            ((a, step, b), "yes" if (v + dy, u + dx) == (y, x) else "no")
            for a, (y, x) in where.items()
            for b, (v, u) in where.items()
            for step, (dy, dx) in STEPS.items()
            if a != b and (y == v if dx else x == u)  # in one row, or one above the other
        ]

    def row_beside(scene: list[Picture]):
        return [
            (("below" if y == 0 else "above", c), " ".join(at(scene, 1 - y, i).concept for i in (0, 1)))
            for c, (y, _) in lone(scene).items()
        ]

    def diagonal(scene: list[Picture]):
        return [((c,), at(scene, 1 - y, 1 - x).concept) for c, (y, x) in lone(scene).items()]

    def look_of(scene: list[Picture]):
        told = ((c, at(scene, y, x).look) for c, (y, x) in lone(scene).items())
        return [((c,), look) for c, look in told if look]

    everything = "Name the pictures in order."
    return {
        "names": Family("naming", everything, lambda scene: [((), " ".join(picture.concept for picture in scene))]),
        "count": Family("counting", "How many {} pictures are there?", count, ("0", "1", "2", "3", "4")),
        "where": Family(
            "relation",
            "Where is the {}?",
            lambda scene: [((c,), name) for c, spot in lone(scene).items() for name in PLACES if PLACES[name] == spot],
            tuple(PLACES),
        ),
        "beside": Family("relation", "What is {} the {}?", beside, classes),
        "is_beside": Family("relation", "Is the {} {} the {}?", is_beside, ("yes", "no")),
        "diagonal": Family("two_hops", "What is diagonal to the {}?", diagonal, classes),
        "row_beside": Family("two_hops", "Name the pictures in the row {} the {}.", row_beside),
        "look_of": Family("two_hops", "Is the {} filled or outlined?", look_of, tuple(LOOKS.values())),
    }
