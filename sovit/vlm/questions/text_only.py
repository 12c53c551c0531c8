"""What can be guessed from the text of a question alone: the baseline that a model with an encoder has to beat."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import NamedTuple

from sovit.vlm.questions.questions import PRIOR, SPLITS, Question, Questions


class TextOnly(NamedTuple):
    """What a text-only baseline gets, which knows the question and not the image, in one family.

    accuracy: share of answers that are right as a whole; word_accuracy: of the words of open answers; nats: mean surprise
    at an answer; constant: accuracy of the one answer that hindsight chooses among all, which is the line to beat where
    validation has other answers than training. num_train, num_val: questions that it was estimated from, and scored on.
    """

    accuracy: float
    word_accuracy: float
    nats: float
    constant: float
    num_train: int
    num_val: int


def text_only_baseline(questions: Questions, n: int = 2048) -> dict[str, TextOnly]:
    """Family -> TextOnly, from the questions of n training images, scored on n validation images (or all there are).

    An answer of a closed set is guessed as a whole, an open one word by word. What a text's answers are is estimated from
    that text where it repeats, and drawn towards the whole family's answers where it does not.
    """
    asked = {
        split: [q for image in questions.ask(split, 0, count) for q in image]
        for split, count in (("train", n), ("val", min(n, questions.num_val)))
    }
    found = {}
    for family in questions.families:
        train, val = ([q for q in asked[split] if q.family == family] for split in SPLITS)
        if train and val:
            found[family] = _text_only(train, val)
    return found


def _text_only(train: list[Question], val: list[Question]) -> TextOnly:
    by_text: defaultdict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    by_place: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for q in train:
        for place, part in enumerate(_parts(q)):
            by_text[q.question, place][part] += 1
            by_place[place][part] += 1
    right = words_right = words = nats = 0.0
    for q in val:
        parts, guess = _parts(q), []
        for place, part in enumerate(parts):
            family, text = by_place[place], by_text[q.question, place]
            vocabulary = sorted(set(q.choices) | set(family) | {part})
            total, prior = text.total() + PRIOR, family.total() + len(vocabulary)
            p = {w: (text[w] + PRIOR * (family[w] + 1) / prior) / total for w in vocabulary}
            guess.append(max(p, key=p.__getitem__))
            nats -= math.log(p[part])
        right += guess == parts
        words_right += sum(a == b for a, b in zip(guess, parts, strict=True))
        words += len(parts)
    constant = Counter(q.answer for q in val).most_common(1)[0][1] / len(val)
    return TextOnly(right / len(val), words_right / words, nats / len(val), constant, len(train), len(val))


def _parts(question: Question) -> list[str]:
    return [question.answer] if question.choices else question.answer.split()
