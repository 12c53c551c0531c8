"""Questions in plain English about images whose making is known, with exact answers.

A family of questions asks the same thing of every image, with other arguments: "How many cells are red?". Its kind says
what it takes to answer (KINDS). Every image gets one question of each family, or none where the family has no
unambiguous answer for it. Of all that a family could ask of an image one question is drawn, each with a probability
inversely proportional to how often its answer is the answer to that text: so that little can be guessed from the text.
What still can be is measured by `text_only_accuracy`.

Questions are pure functions of (seed, index); families of one image draw independently of each other. Training and
validation share neither images nor draws.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sovit import UserError
from sovit.data import NORMALISATION
from sovit.data.stream.scene import Stream
from sovit.data.stream.world import VAL_SEED, hash_uniform
from sovit.vlm.questions.stream import REFERENCE_SEED, families_of, open_scenes, read_scenes

KINDS = ("reading", "naming", "attribute", "counting", "relation", "two_hops")
SPLITS = ("train", "val")
NUM_REFERENCE = 1024  # images that tell how common an answer is
RAREST = 0.25  # of an even share: answers that are rarer count as this rare, or odd images would be asked of it alone
PRIOR = 16.0  # questions' worth of the whole family's answers that are added to those of one text


class Question(NamedTuple):
    """One question about one image. `choices` holds every answer of the family, () where answers are open."""

    family: str
    question: str
    answer: str
    choices: tuple[str, ...]


def open_questions(
    data: str, preset: str, image_size: int, data_seed: int, families: tuple[str, ...] = ()
) -> Questions:
    """Open the questions about a preset of the stream; `families` restricts them, () = all.

    Raises UserError for data without questions, for unknown families and for what the source cannot draw.
    """
    if data != "stream":
        raise UserError(f"data={data!r} has no questions; choose stream")
    return Questions(open_scenes(preset, image_size, data_seed), families)


class Questions:
    """Questions about scenes of the stream. `families` are asked in this order; `kinds`: family -> its kind (of KINDS)."""

    def __init__(self, stream: Stream, families: tuple[str, ...] = ()):
        self.stream, self.table = stream, families_of(stream)
        self.families = families or tuple(self.table)
        for name in self.families:
            if name not in self.table:
                raise UserError(f"family={name!r} is unknown; choose from {', '.join(self.table)}")
        self.kinds = {name: self.table[name].kind for name in self.families}
        self.num_val = stream.num_val

    def images(self, split: str, start: int, count: int) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1], pixel noise apart, which is not clamped."""
        self._check(split, start, count)
        mean, std = NORMALISATION["stream"]
        return getattr(self.stream, split)(start, count).images * std + mean

    def ask(self, split: str, start: int, count: int) -> list[list[Question]]:
        """The questions about images start .. start + count - 1, a list for each image."""
        self._check(split, start, count)
        seed = VAL_SEED if split == "val" else self.stream.data_seed
        scenes = read_scenes(self.stream, seed, start, count)
        index = torch.arange(start, start + count)
        asked: list[list[Question]] = [[] for _ in scenes]
        for name in self.families:
            family, usual = self.table[name], self._usual[name]
            draws = hash_uniform(seed + salt(name), index, 1)[:, 0].tolist()
            for questions, scene, u in zip(asked, scenes, draws, strict=True):
                if possible := family.asks(scene):
                    weights = [1 / usual.share(*ask) if family.choices else 1.0 for ask in possible]
                    arguments, answer = possible[pick(weights, u)]
                    questions.append(Question(name, family.text.format(*arguments), answer, family.choices))
        return asked

    @cached_property
    def _usual(self) -> dict[str, Usual]:
        """Of each family, how common its answers are, in scenes of neither training nor validation."""
        scenes = read_scenes(self.stream, REFERENCE_SEED, 0, NUM_REFERENCE)
        return {
            name: Usual([ask for scene in scenes for ask in family.asks(scene)], RAREST / max(1, len(family.choices)))
            for name, family in self.table.items()
            if name in self.families
        }

    def _check(self, split: str, start: int, count: int) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is unknown; choose train or val")
        if count < 1:
            raise UserError(f"count={count} asks about no image; give 1 or more")
        if start < 0 or (split == "val" and start + count > self.num_val):
            raise UserError(f"{split} images {start} .. {start + count - 1} do not exist; num_val={self.num_val}")


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


def text_only_accuracy(questions: Questions, n: int = 2048) -> dict[str, float]:
    """Family -> share of validation answers guessed right by a text-only baseline: the question alone, no image.

    It knows n training images' answers. A closed answer is guessed as a whole, an open one word by word: the most frequent
    one after that text, drawn towards the whole family's answers where the text is rare.
    """
    by_text: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    by_place: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for q in (q for image in questions.ask("train", 0, n) for q in image):
        for place, part in enumerate(_parts(q)):
            by_text[q.question, place][part] += 1
            by_place[q.family, place][part] += 1

    def guess(q: Question, place: int) -> str:
        usual, text = by_place[q.family, place], by_text[q.question, place]
        return max(sorted(usual), key=lambda part: text[part] + PRIOR * usual[part] / usual.total(), default="")

    right: defaultdict[str, list[bool]] = defaultdict(list)
    for q in (q for image in questions.ask("val", 0, min(n, questions.num_val)) for q in image):
        parts = _parts(q)
        right[q.family].append(parts == [guess(q, place) for place in range(len(parts))])
    return {family: sum(found) / len(found) for family, found in right.items()}


def _parts(question: Question) -> list[str]:
    return [question.answer] if question.choices else question.answer.split()
