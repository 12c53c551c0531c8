"""Questions in words about the scenes of the stream, with exact answers in words.

Every image is asked the same questions, in FAMILIES. `marks` are the stream's own questions, which its encoders were
trained to answer; the others are plain facts of the scene that they were never asked about. Nothing asks for one
cell by its place: at small budgets a model learns to point in one sudden step, or not at all, and a list of all cells in
order needs no pointing.

    legend: B images, Q questions an image, T words of a question and its answer, C cells
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sovit.data.stream import NUM_ANSWERS, VAL_SEED, Stream

FAMILIES = {
    "marks": "answer all marks :",
    "colours": "name all colours :",
    "counts": "count each colour :",
    "most": "which colour is the most frequent ?",
}
NO_LABEL = -100  # what cross_entropy passes over


class Questions(NamedTuple):
    """images [B, 3, H, W]; words [B, Q, T] int64: question, answer, padding; labels [B, Q, T].

    labels[..., t] is the word that follows words[..., t] where that is a word of the answer, NO_LABEL elsewhere.
    """

    images: Tensor
    words: Tensor
    labels: Tensor


class StreamQuestions:
    """Questions about an opened stream: sample i asks about training, or validation, image i of the stream."""

    def __init__(self, stream: Stream):
        self.stream = stream
        numbers = [str(i) for i in range(stream.world.grid**2 + 1)]
        symbols = [f"answer-{i}" for i in range(NUM_ANSWERS)]
        plain = dict.fromkeys(word for text in FAMILIES.values() for word in text.split())
        self.words: tuple[str, ...] = ("<pad>", *plain, *numbers, *stream.colour_names, *symbols)
        self._number = {word: i for i, word in enumerate(self.words)}

    def train(self, start: int, count: int) -> Questions:
        return self._ask(self.stream.data_seed, self.stream.train(start, count).images, start)

    def val(self, start: int, count: int) -> Questions:
        return self._ask(VAL_SEED, self.stream.val(start, count).images, start)

    def _ask(self, seed: int, images: Tensor, start: int) -> Questions:
        stream, number = self.stream, self._number
        scene = stream.latents(seed, torch.arange(start, start + len(images), device=images.device))
        facts = stream.facts(scene)
        counts = torch.nn.functional.one_hot(facts["colour"], stream.world.num_colours).sum(1)  # [B, colours]
        colour = number[stream.colour_names[0]]
        answers = {
            "marks": number["answer-0"] + stream.answers(scene, seed),  # [B, C]
            "colours": colour + facts["colour"],  # [B, C]
            "counts": number["0"] + counts,
            "most": colour + facts["major_colour"][:, :1],  # [B, 1]
        }
        asked = {family: [number[word] for word in text.split()] for family, text in FAMILIES.items()}
        length = max(len(asked[family]) + answers[family].shape[1] for family in FAMILIES)  # T
        words = torch.zeros(len(images), len(FAMILIES), length, dtype=torch.int64, device=images.device)
        labels = torch.full_like(words, NO_LABEL)
        for q, (family, question) in enumerate(asked.items()):
            first, last = len(question), len(question) + answers[family].shape[1]
            words[:, q, :first] = torch.tensor(question, device=images.device)
            words[:, q, first:last] = answers[family]
            labels[:, q, first - 1 : last - 1] = answers[family]
        return Questions(images, words, labels)

    def text(self, words: Tensor) -> str:
        """Words [T] as text, padding left out."""
        return " ".join(self.words[i] for i in words if i)
