"""What the names of icons say, as text: captions and attributes, for questions about images of them.

`streamline:interface-cloud-arrow-up-solid` shows an "interface cloud arrow up", filled, that points up. All of it
follows from names alone, by the words of labels.toml. What a name does not say is not said: an icon without a style word
may well be filled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from sovit.data.icons.labels import WORDS, spellings, word_set

ATTRIBUTES: dict[str, dict[str, str]] = WORDS["attributes"]  # attribute -> value -> the words of a name that say so
STYLES = ATTRIBUTES["style"]
VALUE = {kind: spellings(table) for kind, table in ATTRIBUTES.items()}

TOLD = {name: word_set(words) for name, words in WORDS["told"].items()}
STYLE_SHARE = 0.02  # of a set's names that begin or end with a style word or a number: the set means its drawing by it
SIZE = re.compile(r"\d+(px)?")


def describe(rows: Iterable[tuple[str, str, str]]) -> list[dict]:
    """What is told of each icon of `rows` (title, concept, split): set, name, caption, concept, split, and these.

    style, state, enclosure, direction (ATTRIBUTES): lists, [] where the name says nothing of it; a word that is the
    concept itself is no attribute. A word is one of style where it cannot be anything else, where the set's own name
    has it, or where the set begins or ends many names with it: `traffic-light` is not a light style.
    """
    rows = list(rows)
    marks = style_marks(title for title, _, _ in rows)
    return [describe_one(title, concept, split, marks[title.split(":")[0]]) for title, concept, split in rows]


def describe_one(title: str, concept: str, split: str, marks: frozenset[str]) -> dict:
    prefix, name = title.split(":")
    words = [word for word in name.split("-") if word]
    ends = {0, *range(len(words))[-3:]}  # a size may stand behind the style: bell-filled-24
    said = [  # that it is a word of style
        word in TOLD["always_style"] or (word in marks and i in ends and len(words) > 1) for i, word in enumerate(words)
    ]
    numbered = "#" in marks
    caption = [
        word
        for i, word in enumerate(words)
        if not said[i]
        and (word not in TOLD["no_caption"] or len(words) == 1)
        and not (numbered and SIZE.fullmatch(word) and i and words[i - 1] not in TOLD["counted"])
    ]
    told: dict = {"set": prefix, "name": name, "caption": " ".join(caption), "concept": concept, "split": split}
    style = [word for word, is_style in zip(words, said, strict=True) if is_style]
    style += [word for word in prefix.split("-") if word in VALUE["style"]]
    told["style"] = list(dict.fromkeys(VALUE["style"][word] for word in style))
    for kind in ("state", "enclosure", "direction"):
        values = [VALUE[kind][word] for word in caption if word in VALUE[kind] and word != concept]
        told[kind] = [value for value in dict.fromkeys(values) if value != concept]
    return told


def style_marks(titles: Iterable[str]) -> dict[str, frozenset[str]]:
    """set -> the style words that begin or end STYLE_SHARE of its names; and "#" where numbers end as many."""
    icons: Counter[str] = Counter()
    marks: Counter[tuple[str, str]] = Counter()
    for title in titles:
        prefix, name = title.split(":")
        words = [word for word in name.split("-") if word]
        icons[prefix] += 1
        marks[prefix, "#"] += bool(words[1:] and SIZE.fullmatch(words[-1])) or any(map(SIZE.fullmatch, words[-2:-1]))
        ends = {*words[:1], *words[-3:]} if len(words) > 1 else ()
        marks.update((prefix, word) for word in ends if word in VALUE["style"])
    found: dict[str, set[str]] = {prefix: set() for prefix in icons}
    for (prefix, word), count in marks.items():
        if count >= max(3, STYLE_SHARE * icons[prefix]):
            found[prefix].add(word)
    return {prefix: frozenset(words) for prefix, words in found.items()}
