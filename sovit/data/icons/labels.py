"""Which icons become which classes: concepts from names, licences, and the families of the validation set.

Pure functions of the data of icon sets and of the word lists in labels.toml; sovit.data.icons.render draws what is chosen.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sovit import UserError

VAL_SHARE, VAL_FAMILY_SHARE = 0.15, 0.25  # validation's share of the icons; one family's share of validation
STYLE_PATTERN = re.compile(r"\d+(px|x\d+)?|[vx]\d+")  # 24, 24px, 2x2, v2
BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # the defaults of the iconify format


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def spellings(table: Mapping[str, str]) -> dict[str, str]:
    """Value -> other words for it, turned round: each word -> its value."""
    return {word: value for value, words in table.items() for word in words.split()}


WORDS = tomllib.loads(Path(__file__).with_name("labels.toml").read_text(encoding="utf-8"))
LICENCES, STYLE, MODIFIERS = (word_set(WORDS[name]) for name in ("licences", "style", "modifiers"))
KIN = spellings(WORDS["copies"])  # family -> the family that it redraws, continues or copies


RECIPE, NUM_WORDS = WORDS["recipe"], WORDS["num_words"]  # RECIPE is part of the key of what is rendered by these rules
NEVER, BRANDS = word_set(WORDS["never"]), word_set(WORDS["brands"])
SAME = spellings(dict(line.split(": ") for line in WORDS["same"]))  # word -> the word that it is counted as


@dataclass(frozen=True)
class Icon:
    """One drawing: `set:name`, the set's family, its concept, licence and author, its viewBox and SVG body."""

    title: str
    family: str
    licence: str
    author: str
    box: str
    body: str
    concept: str = ""


def read_set(data: dict) -> list[Icon]:
    """The icons of one set file; [] for a set that is not permissive, is in colour, or holds logos."""
    info = data.get("info", {})
    licence = info.get("license", {}).get("spdx")
    if licence not in LICENCES or info.get("palette") or info.get("category") == "Logos":
        return []
    prefix = data["prefix"]
    family = KIN.get(prefix.split("-")[0], prefix.split("-")[0])
    author = " ".join(f"{info.get('author', {}).get('name', '')} {info.get('author', {}).get('url', '')}".split())
    icons = []
    for name, icon in data["icons"].items():
        body = icon["body"]
        # text needs fonts of the machine, an image may name a file: neither is a drawing
        if icon.get("hidden") or "<text" in body or "<image" in body:
            continue
        box = " ".join(str(icon.get(key, data.get(key, default))) for key, default in BOX.items())
        icons.append(Icon(f"{prefix}:{name}", family, licence, author, box, body))
    return icons


def choose(icons: list[Icon], num_classes: int) -> tuple[list[Icon], list[str]]:
    """The icons of the `num_classes` most drawn concepts, each with its concept, and these concepts in sorted order.

    A concept is a word that is the whole name of an icon, style words apart, in many sets. Byte-identical drawings are
    kept once, and not at all where their names disagree. Raises UserError where there are fewer concepts.
    """
    content = {icon.title: content_words(icon.title.split(":")[1]) for icon in icons}
    sets: dict[str, set[str]] = {}
    for icon in icons:
        if len(content[icon.title]) == 1:
            sets.setdefault(content[icon.title][0], set()).add(icon.title.split(":")[0])
    ranked = sorted(sets.keys() - NEVER - BRANDS, key=lambda word: (-len(sets[word]), word))
    vocabulary = frozenset(ranked[: max(NUM_WORDS, num_classes)])
    drawings: dict[tuple[str, str], Icon | None] = {}
    for icon in icons:
        concept = find_concept(content[icon.title], vocabulary)
        if concept is None:
            continue
        drawing = (icon.box, icon.body)
        same = drawings.setdefault(drawing, replace(icon, concept=concept))
        if same is not None and same.concept != concept:
            drawings[drawing] = None
    labelled = [icon for icon in drawings.values() if icon is not None]
    counts = Counter(icon.concept for icon in labelled)
    if len(counts) < num_classes:
        raise UserError(
            f"num_classes={num_classes} is more than the {len(counts)} concepts found; choose another preset"
        )
    classes = sorted(sorted(counts, key=lambda word: (-counts[word], word))[:num_classes])
    chosen = frozenset(classes)
    return [icon for icon in labelled if icon.concept in chosen], classes


def content_words(name: str) -> list[str]:
    """The words of an icon's name that say what it shows, spelt one way, each once."""
    words = [SAME.get(word, word) for word in name.split("-")]
    return list(dict.fromkeys(w for w in words if w and w not in STYLE and not STYLE_PATTERN.fullmatch(w)))


def find_concept(words: list[str], vocabulary: frozenset[str]) -> str | None:
    """The one concept that a name speaks of, or None where there is none or more than one."""
    if not BRANDS.isdisjoint(words):
        return None
    nouns = [word for word in words if word not in MODIFIERS and word not in NEVER]
    # of modifiers alone, the drawing is of one of them: `plus-circle` or `search`
    known = [word for word in nouns or words if word in vocabulary]
    return known[0] if len(known) == 1 else None


def split_families(counts: Counter) -> set[str]:
    """The families of the validation set: in the order of their hashes, as many as fit into VAL_SHARE of the icons.

    `counts`: all icons read of each family, whatever their class, so that every preset has the same split. Families
    of more than VAL_FAMILY_SHARE of the set stay in training: one style of drawing must not decide the loss.
    Raises UserError where no family fits, because nothing is left to validate on.
    """
    limit = VAL_SHARE * sum(counts.values())
    chosen, total = set(), 0
    for family in sorted(counts, key=lambda family: hashlib.sha256(family.encode()).digest()):
        if counts[family] <= VAL_FAMILY_SHARE * limit and total + counts[family] <= limit:
            chosen.add(family)
            total += counts[family]
    if not chosen:
        raise UserError(f"{len(counts)} icon families cannot be split without cutting one; use a fuller icon package")
    return chosen
