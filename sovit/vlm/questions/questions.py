"""Questions in plain English about images whose making is known, with exact answers.

A family of questions asks the same thing of every image, with other arguments: "How many cells are red?". Its kind says
what it takes to answer (KINDS). Every image gets one question of each family, or none where the family has no
unambiguous answer for it. Of all that a family could ask of an image one question is drawn, each with a probability
inversely proportional to how often its answer is the answer to that text: so that little can be guessed from the text.
What still can be is measured: sovit.vlm.questions.text_only.

Questions are pure functions of (seed, index), families of one image draw independently of each other, and training
and validation share neither images nor draws. A model that is shown several questions of one image in one text can read
hints in them that this does not count.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sovit import UserError
from sovit.data import NORMALISATION
from sovit.data.stream.world import VAL_SEED, hash_uniform

KINDS = ("reading", "naming", "attribute", "counting", "relation", "two_hops")
SPLITS = ("train", "val")
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)
NUM_REFERENCE = 1024  # images that tell how common an answer is
RAREST = 0.25  # of an even share: answers that are rarer count as this rare, or odd images would be asked of it alone
PRIOR = 16.0  # questions' worth of the whole family's answers that are added to those of one text

Asks = list[tuple[tuple, str]]  # what a family can ask of an image: (arguments of its text, answer)


@dataclass(frozen=True)
class Family:
    """A family of questions; `asks(scene)` lists what it can ask of an image."""

    kind: str
    text: str  # with places for arguments, as of str.format
    asks: Callable[[Any], Asks]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """What questions are asked about. A scene is what one image shows, in plain Python values.

    source: draws images, as sovit.data opens it. scenes(split, start, count): of images start .. start + count - 1.
    reference(split, count): like those of a split, the same for every data_seed; they tell how common an answer is.
    """

    data: str
    data_seed: int
    source: Any
    table: dict[str, Family]
    scenes: Callable[[str, int, int], list]
    reference: Callable[[str, int], list]


class Question(NamedTuple):
    """One question about one image. `choices` holds every answer of the family, () where answers are open."""

    family: str
    question: str
    answer: str
    choices: tuple[str, ...]


def open_questions(
    data: str, preset: str, image_size: int, data_seed: int, families: tuple[str, ...] = ()
) -> Questions:
    """Open the questions about a preset of the stream or of the icons; `families` restricts them, () = all.

    Raises UserError for data without questions, for unknown families and for what the source cannot draw.
    """
    if data not in ("stream", "icons"):
        raise UserError(f"data={data!r} has no questions; choose stream or icons")
    if data == "stream":
        from sovit.vlm.questions.stream import open_pictures
    else:
        from sovit.vlm.questions.icons import open_pictures
    return Questions(open_pictures(preset, image_size, data_seed), families)


class Questions:
    """Questions about one source. `families` are asked in this order; `kinds`: family -> its kind (of KINDS)."""

    def __init__(self, pictures: Pictures, families: Iterable[str] = ()):
        self.pictures = pictures
        chosen = tuple(families) or tuple(pictures.table)
        for name in chosen:
            if name not in pictures.table:
                raise UserError(f"family={name!r} is unknown; choose from {', '.join(pictures.table)}")
        self.families = chosen
        self.kinds = {name: pictures.table[name].kind for name in chosen}
        self.num_val: int = pictures.source.num_val
        self._usual: dict[tuple[str, str], Usual] = {}  # (split, family) ->
        self._references: dict[str, list] = {}

    def images(self, split: str, start: int, count: int) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1], pixel noise apart, which is not clamped."""
        self._check(split, start, count)
        mean, std = NORMALISATION[self.pictures.data]
        return getattr(self.pictures.source, split)(start, count).images * std + mean

    def ask(self, split: str, start: int, count: int) -> list[list[Question]]:
        """The questions about images start .. start + count - 1, a list for each image."""
        self._check(split, start, count)
        scenes = self.pictures.scenes(split, start, count)
        seed = VAL_SEED if split == "val" else self.pictures.data_seed
        index = torch.arange(start, start + count)
        asked: list[list[Question]] = [[] for _ in scenes]
        for name in self.families:
            family, usual = self.pictures.table[name], self._usual_answers(split, name)
            draws = hash_uniform(seed + salt(name), index, 1)[:, 0].tolist()
            for questions, scene, u in zip(asked, scenes, draws, strict=True):
                if possible := family.asks(scene):
                    weights = [1 / usual.share(*ask) if usual else 1.0 for ask in possible]
                    arguments, answer = possible[pick(weights, u)]
                    questions.append(Question(name, family.text.format(*arguments), answer, family.choices))
        return asked

    def _check(self, split: str, start: int, count: int) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; choose train or val")
        if count < 1:
            raise UserError(f"count={count} asks about no image; give 1 or more")
        if start < 0 or (split == "val" and start + count > self.num_val):
            raise UserError(f"{split} images {start} .. {start + count - 1} do not exist; num_val={self.num_val}")

    def _usual_answers(self, split: str, name: str) -> Usual | None:
        """None of open answers."""
        family = self.pictures.table[name]
        if not family.choices:
            return None
        if (split, name) not in self._usual:
            if split not in self._references:
                self._references[split] = self.pictures.reference(split, NUM_REFERENCE)
            asks = [ask for scene in self._references[split] for ask in family.asks(scene)]
            self._usual[split, name] = Usual(asks, RAREST / len(family.choices))
        return self._usual[split, name]


class Usual:
    """How often an answer is the answer to a text, counted over asks: (arguments, answer)."""

    def __init__(self, asks: list[tuple[tuple, str]], least: float):
        self.both, self.least, self.total = Counter(asks), least, max(1, len(asks))
        self.texts, self.answers = Counter(ask[0] for ask in asks), Counter(ask[1] for ask in asks)
        self._shares: dict[tuple, float] = {}

    def share(self, arguments: tuple, answer: str) -> float:
        ask = arguments, answer
        if ask not in self._shares:
            prior = PRIOR * self.answers[answer] / self.total
            self._shares[ask] = max(self.least, (self.both[ask] + prior) / (self.texts[arguments] + PRIOR))
        return self._shares[ask]


def salt(family: str) -> int:
    """What sets the draws of a family apart from others' and from those that make images: a multiple of 2^42."""
    return (1 + zlib.crc32(family.encode()) % (1 << 21)) << 42


def pick(weights: list[float], u: float) -> int:
    """The place at which the uniform number u stands in the cumulative weights."""
    rest = u * sum(weights)
    for i, weight in enumerate(weights):
        rest -= weight
        if rest < 0:
            return i
    return len(weights) - 1
