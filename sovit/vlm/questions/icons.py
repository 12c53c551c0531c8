"""Questions about icons: one, or two by two, each of a concept that its name says.

What is true of an icon is what its name says (sovit.data.icons.text). What a name does not say is not asked: no question
takes the absence of a word for the absence of a thing, and an icon that says to be filled and outlined is asked neither.
Training and validation show drawings of disjoint families of sets, so a right answer is never one about a drawing that
training has shown.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import numpy as np

from sovit.data.icons import icons
from sovit.data.icons.text import ATTRIBUTES
from sovit.data.stream.world import VAL_SEED
from sovit.vlm.questions.questions import STEPS, Asks, Family, Pictures

PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}  # (row, column)
LOOKS = {"filled": "filled", "outline": "outlined"}
SIGNS = {state: "slash" if state == "off" else state for state in ATTRIBUTES["state"]}  # how it is drawn
BESIDE_OTHERS = {*SIGNS.values(), *ATTRIBUTES["enclosure"], "arrow"}  # what pictures of other things show as well
REFERENCE_SEED = VAL_SEED + 2


class Picture(NamedTuple):
    """One icon; "" where its name does not say."""

    concept: str
    look: str  # of LOOKS
    sign: str  # of SIGNS
    shape: str  # around it
    arrow: str  # where the arrow in it points


Scene = list[Picture]  # in raster order


def open_pictures(preset: str, image_size: int, data_seed: int) -> Pictures:
    """Open a preset of the icons, "" its first; scenes are lists of Pictures. Raises UserError as the icons do."""
    preset = preset or next(iter(icons.PRESETS))
    grid = icons.PRESETS[preset].grid if preset in icons.PRESETS else 1
    opened = partial(icons.open_source, preset, image_size, max(1, image_size // grid))
    source = opened(data_seed)

    @cache
    def says(icon: int) -> Picture:
        return _picture(source.texts[icon])

    def scenes(shown: np.ndarray) -> list[Scene]:
        return [[says(icon) for icon in image] for image in shown.tolist()]

    def reference(split: str, count: int) -> list[Scene]:
        if split == "val":  # whose drawings are of other sets, and the same for every data_seed
            return scenes(source.shown(0, min(count, source.num_val), val=True))
        return scenes(opened(REFERENCE_SEED).shown(0, count))

    return Pictures(
        data="icons",
        data_seed=data_seed,
        source=source,
        table=families(source.class_names, source.preset.grid),
        scenes=lambda split, start, count: scenes(source.shown(start, count, val=split == "val")),
        reference=reference,
    )


def _picture(told: dict) -> Picture:
    """The icon of which sovit.data.icons.text tells this."""
    looks = [LOOKS[style] for style in told["style"] if style in LOOKS]
    signs = [SIGNS[state] for state in told["state"]]
    # a bubble may have that shape, with nothing around it, and "hand-left" may be a left hand
    shapes = told["enclosure"] if told["concept"] != "chat" else []
    arrows = told["direction"] if "arrow" in told["caption"].split() else []
    if "duotone" in told["style"]:  # filled, in part
        looks = []
    return Picture(told["concept"], *(said[0] if len(said) == 1 else "" for said in (looks, signs, shapes, arrows)))


def families(classes: tuple[str, ...], grid: int) -> dict[str, Family]:
    """The questions about images of `grid` x `grid` icons of these classes, in the order in which they are asked."""
    return attributes(classes, grid) | (arrangements(classes) if grid > 1 else {})


def attributes(classes: tuple[str, ...], grid: int) -> dict[str, Family]:
    """What can be asked of each icon by itself: its name, and what its name says of it."""
    table = {  # field of a Picture -> question about the only one, about one of several, answers
        "concept": ("What is this?", "What is in the {}?", classes),
        "look": ("Is it filled or outlined?", "Is the {} picture filled or outlined?", LOOKS.values()),
        "sign": ("Which sign is on it?", "Which sign is on the {} picture?", SIGNS.values()),
        "shape": ("Which shape is around it?", "Which shape is around the {} picture?", ATTRIBUTES["enclosure"]),
        "arrow": ("Which way does the arrow point?", "Which way does the {} arrow point?", ATTRIBUTES["direction"]),
    }
    found = {}
    for field, (one, of_several, choices) in table.items():
        name, kind = ("name", "naming") if field == "concept" else (field, "attribute")
        found[name] = Family(kind, one if grid == 1 else of_several, partial(_each, field), tuple(choices))
    return found


def _each(field: str, scene: Scene) -> Asks:
    arguments = [(place,) for place in PLACES] if len(scene) > 1 else [()]
    told = zip(arguments, (getattr(picture, field) for picture in scene), strict=True)
    return [(place, value) for place, value in told if value]


def arrangements(classes: tuple[str, ...]) -> dict[str, Family]:
    """What can be asked of four icons together. A picture is meant by its concept only where no other one shows it.

    None is meant by a thing that pictures of others show beside their own: a plus is on many of them.
    """
    countable, looks = [c for c in classes if c not in BESIDE_OTHERS], tuple(LOOKS.values())
    return {
        "names": Family("naming", "Name the pictures in order.", lambda scene: [((), " ".join(_concepts(scene)))]),
        "count": Family("counting", "How many {} pictures are there?", partial(_count, countable), tuple("01234")),
        "where": Family("relation", "Where is the {}?", _where, tuple(PLACES)),
        "beside": Family("relation", "What is {} the {}?", _beside, classes),
        "is_beside": Family("relation", "Is the {} {} the {}?", _is_beside, ("yes", "no")),
        "diagonal": Family("two_hops", "What is diagonal to the {}?", _diagonal, classes),
        "row_beside": Family("two_hops", "Name the pictures in the row {} the {}.", _row_beside),
        "look_of": Family("two_hops", "Is the {} filled or outlined?", _look_of, looks),
    }


def _concepts(scene: Scene) -> list[str]:
    return [picture.concept for picture in scene]


def _lone(scene: Scene) -> list[tuple[str, int, int]]:
    """(concept, row, column) of the concepts that one picture shows."""
    concepts = _concepts(scene)
    told = zip(concepts, PLACES.values(), strict=True)
    return [(c, y, x) for c, (y, x) in told if concepts.count(c) == 1 and c not in BESIDE_OTHERS]


def _at(scene: Scene, y: int, x: int) -> Picture:
    return scene[2 * y + x]


def _count(countable: list[str], scene: Scene) -> Asks:
    return [((c,), str(_concepts(scene).count(c))) for c in countable]


def _where(scene: Scene) -> Asks:
    names = {place: name for name, place in PLACES.items()}
    return [((c,), names[y, x]) for c, y, x in _lone(scene)]


def _beside(scene: Scene) -> Asks:
    return [
        ((step, concept), _at(scene, y + dy, x + dx).concept)
        for concept, y, x in _lone(scene)
        for step, (dy, dx) in STEPS.items()
        if (y + dy, x + dx) in PLACES.values()
    ]


def _is_beside(scene: Scene) -> Asks:
    return [
        ((a, step, b), "yes" if (v + dy, u + dx) == (y, x) else "no")
        for a, y, x in _lone(scene)
        for b, v, u in _lone(scene)
        for step, (dy, dx) in STEPS.items()
        if a != b and (y == v if dx else x == u)  # in one row, or one above the other
    ]


def _diagonal(scene: Scene) -> Asks:
    return [((c,), _at(scene, 1 - y, 1 - x).concept) for c, y, x in _lone(scene)]


def _row_beside(scene: Scene) -> Asks:
    rows = [" ".join(_concepts(scene)[:2]), " ".join(_concepts(scene)[2:])]
    return [(("above" if y else "below", c), rows[1 - y]) for c, y, _ in _lone(scene)]


def _look_of(scene: Scene) -> Asks:
    return [((c,), look) for c, y, x in _lone(scene) if (look := _at(scene, y, x).look)]
