"""Captions of images, as word numbers: what a sample shows, said in words of a small closed vocabulary.

A caption is a pure function of (seed, index), like the image that it belongs to, and is true of it. Which of several
topics it tells is drawn anew for every image, so that an image embedding that is to match it must hold all of them.

    legend: B captions, T words of the longest one, V words of the vocabulary; word 0 fills up
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sovit import UserError
from sovit.data import Source
from sovit.data.cache import content_key
from sovit.data.icons.icons import Icons
from sovit.data.icons.text import STYLES
from sovit.data.stream.scene import Stream
from sovit.data.stream.world import NUM_ANSWERS, VAL_SEED, hash_uniform
from sovit.spec.siglip_costs import NUM_WORDS

RECIPE = 1  # part of the captions' key: raise it when anything here changes what is told
TOPIC_SEED = 0xCA97


class Captions(Protocol):
    """Captions of an opened source, whose sample i they tell of, in training and in validation."""

    content_key: str  # changes when the captions of the same images do
    words: tuple[str, ...]  # [V], each once; words[0] fills up
    num_words: int  # T

    def train(self, start: int, count: int) -> Tensor:
        """Word numbers [B, T] int64."""

    def val(self, start: int, count: int) -> Tensor:
        """Word numbers [B, T] int64."""

    def zero_shot(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Attribute -> prompts [K, T], one a value, and [num_val, K] bool: of which validation images each is true."""


class StreamCaptions:
    """Captions of the stream. One topic a caption: colours, kinds of glyph, or the answers of the marks.

    "most cells are red : red blue red grey ..." names the most frequent value (of several the first of the vocabulary) and
    then the value of every cell, row by row; of a large scene, of its first cells.
    """

    num_words = NUM_WORDS["stream"]
    TOPICS = {"colour": "most cells are", "kind": "most glyphs are", "answer": "most answers are"}

    def __init__(self, stream: Stream):
        self.stream = stream
        self.values = {
            "colour": stream.colour_names,
            "kind": tuple(f"kind-{i}" for i in range(8)),
            "answer": tuple(f"answer-{i}" for i in range(NUM_ANSWERS)),
        }
        plain = dict.fromkeys(word for text in self.TOPICS.values() for word in text.split())
        self.words = ("<pad>", *plain, ":", *(value for values in self.values.values() for value in values))
        self.content_key = content_key(recipe=RECIPE, images=stream.content_key, words=self.words)

    def train(self, start: int, count: int) -> Tensor:
        return self._tell(self.stream.data_seed, start, count)

    def val(self, start: int, count: int) -> Tensor:
        return self._tell(VAL_SEED, start, count)

    def zero_shot(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for topic, value in self._read(VAL_SEED, 0, self.stream.num_val).items():
            counts = self._counts(topic, value)
            prompts = torch.stack([encode(self, f"{self.TOPICS[topic]} {value}") for value in self.values[topic]])
            found[topic] = prompts.to(counts.device), counts == counts.amax(1, keepdim=True)  # ties: each is right
        return found

    def _read(self, seed: int, start: int, count: int) -> dict[str, Tensor]:
        """Topic -> the value of every cell, [B, C]."""
        scene = self.stream.latents(seed, torch.arange(start, start + count, device=self.stream.device))
        facts = self.stream.facts(scene)
        return {"colour": facts["colour"], "kind": facts["kind"], "answer": self.stream.answers(scene, seed)}

    def _counts(self, topic: str, value: Tensor) -> Tensor:
        """How many cells of each image have each value, [B, C] -> [B, values]."""
        return torch.nn.functional.one_hot(value, len(self.values[topic])).sum(1)

    def _tell(self, seed: int, start: int, count: int) -> Tensor:
        told = []
        for topic, value in self._read(seed, start, count).items():
            first = self.words.index(self.values[topic][0])
            begin = encode(self, f"{self.TOPICS[topic]} {self.values[topic][0]} :").to(value.device).repeat(count, 1)
            begin[:, 3] = first + self._counts(topic, value).argmax(1)
            listed = value[:, : self.num_words - 5]
            begin[:, 5 : 5 + listed.shape[1]] = first + listed
            told.append(begin)
        index = torch.arange(start, start + count, device=self.stream.device)
        topic_of = (hash_uniform(seed ^ TOPIC_SEED, index, 1)[:, 0] * len(told)).long()  # [B]
        return torch.stack(told, 1)[torch.arange(count, device=index.device), topic_of]  # [B, T]


class IconCaptions:
    """Captions of icons: of every drawing its style, its concept and the other words of its name, as far as they are known.

    "outline calendar check". A mosaic is told drawing by drawing, row by row. Words of the vocabulary are the concepts,
    what sovit.data.icons.text tells apart, and what the names of MIN_ICONS training icons have.
    """

    num_words = NUM_WORDS["icons"]
    MIN_ICONS = 20

    def __init__(self, icons: Icons):
        self.icons = icons
        common = Counter(word for icon in icons.texts if icon["split"] == "train" for word in icon["caption"].split())
        plain = [*icons.class_names, *STYLES, *sorted(word for word, n in common.items() if n >= self.MIN_ICONS)]
        self.words = ("<pad>", *dict.fromkeys(plain))
        self.content_key = content_key(recipe=RECIPE, images=icons.content_key, words=self.words)
        number = {word: i for i, word in enumerate(self.words)}
        slots = self.num_words // icons.preset.grid**2
        self._name = torch.zeros(len(icons.texts), slots, dtype=torch.int64)  # [I, slots]
        for i, icon in enumerate(icons.texts):
            said = [*icon["style"][:1], icon["concept"], *(w for w in icon["caption"].split() if w != icon["concept"])]
            known = [number[word] for word in dict.fromkeys(said) if word in number][:slots]
            self._name[i, : len(known)] = torch.tensor(known)

    def train(self, start: int, count: int) -> Tensor:
        return self._tell(False, start, count)

    def val(self, start: int, count: int) -> Tensor:
        return self._tell(True, start, count)

    def zero_shot(self) -> dict[str, tuple[Tensor, Tensor]]:
        names, device = self.icons.class_names, self.icons.device
        prompts = torch.stack([encode(self, name) for name in names])
        labels = torch.from_numpy(self.icons.classes[self.icons.shown(0, self.icons.num_val, val=True)])  # [V, cells]
        true = torch.nn.functional.one_hot(labels, len(names)).amax(1) > 0
        return {"concept": (prompts.to(device), true.to(device))}

    def _tell(self, val: bool, start: int, count: int) -> Tensor:
        name = self._name[torch.from_numpy(self.icons.shown(start, count, val))]  # [B, cells, slots]
        words = torch.zeros(count, self.num_words, dtype=torch.int64)
        words[:, : name[0].numel()] = name.flatten(1)
        return words.to(self.icons.device)


def encode(captions: Captions, text: str) -> Tensor:
    """Word numbers [T] of a text in words of the vocabulary. Raises UserError for another word, or too many."""
    words = text.split()
    unknown = [word for word in words if word not in captions.words]
    if unknown or len(words) > captions.num_words:
        what = f"{unknown[0]!r} is no word of these captions" if unknown else f"{len(words)} words are too many"
        raise UserError(f"{what}; they have up to {captions.num_words} of {', '.join(captions.words[1:9])} ...")
    ids = torch.zeros(captions.num_words, dtype=torch.int64)
    ids[: len(words)] = torch.tensor([captions.words.index(word) for word in words], dtype=torch.int64)
    return ids


CAPTIONS: dict[str, Callable[[Any], Captions]] = {"stream": StreamCaptions, "icons": IconCaptions}


def open_captions(data: str, source: Source) -> Captions:
    """Captions of an opened source. Raises UserError for one that has none."""
    if data not in CAPTIONS:
        raise UserError(f"data={data!r} has no captions; objective=siglip needs {' or '.join(CAPTIONS)}")
    return CAPTIONS[data](source)
