"""Which icons become which classes: concepts from names, licences, and the families of the validation set.

Tables and pure functions of the data of icon sets; sovit.data.icons renders what is chosen here. Whatever changes the
choice needs a higher icons.RECIPE.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace

from sovit import UserError

NUM_CONCEPTS = 200  # words that compete for a label, or the number of classes where that is more
VAL_SHARE, VAL_FAMILY_SHARE = 0.15, 0.25  # validation's share of the icons; one family's share of validation


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


LICENCES = word_set("MIT Apache-2.0 ISC CC0-1.0 OFL-1.1 BSD-2-Clause BSD-3-Clause Unlicense CC-BY-3.0 CC-BY-4.0")

# Words that say how an icon is drawn, not what it shows
STYLE = word_set(
    """outline outlined outlines filled fill solid line linear bold light thin regular duotone twotone two tone broken
    rounded round sharp alt alternate variant baseline glyph icon icons color mono small large medium big mini micro
    tiny s m l xs xl xxl sm lg md px o v stroke curved"""
)
STYLE_PATTERN = re.compile(r"\d+(px|x\d+)?|[vx]\d+")  # 24, 24px, 2x2, v2

# Words that lose against another concept: `calendar-plus` is a calendar
MODIFIERS = word_set(
    """circle square arrow arrows off on up down left right plus minus add remove check checkmark x cross close slash
    alert warning info question help text one two three double multiple simple dots bar number letter open top bottom
    center start end horizontal vertical forward back backward in out box dashed stop play pause edit search lock unlock
    share settings download upload refresh sync heart star sparkle sparkles badge cancel delete done
    dollar error exclamation"""
)
# Concept -> other words for it: two classes of one drawing would be noise in the labels
SYNONYMS = {
    "home": "house",
    "file": "document doc files documents",
    "folder": "folders",
    "image": "photo picture images photos",
    "chat": "message comment messages comments",
    "phone": "mobile smartphone cellphone telephone",
    "user": "person users people",
    "pin": "location marker",
    "mail": "envelope email",
    "microphone": "mic",
    "search": "magnifier magnify",
    "settings": "cog gear",
    "trash": "bin",
    "plus": "add",
}
SAME = {word: concept for concept, others in SYNONYMS.items() for word in others.split()}

# Never a label: frames around other drawings, words without a drawing of their own, and trademarks
NOT_A_CLASS = word_set(
    "circle square triangle hexagon rectangle text forward back reply in out on off at x logo brand symbol"
)
BRANDS = word_set(
    """android apple behance bing bitbucket bitcoin blogger chrome codepen css3 delicious deviantart digg discord
    docker dribbble dropbox ebay edge ethereum evernote facebook figma firefox flickr foursquare github gitlab google
    html5 instagram javascript jsfiddle kickstarter lastfm linkedin linux mastercard messenger microsoft
    netflix npm opera paypal pinterest python qq quora react reddit safari shopify skype slack snapchat soundcloud
    spotify stackoverflow steam stripe stumbleupon telegram tencent threads tiktok trello tumblr twitch twitter ubuntu
    viber vimeo vine visa vk vue wechat weibo whatsapp wikipedia windows wordpress xbox xing yahoo yelp youtube
    amazon amex angular aws azure bluesky bootstrap baidu alipay airbnb adobe airpods chromecast
    drupal gameboy laravel mastodon nextjs nodejs notion patreon playstation slideshare unsplash vuejs"""
)
BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # the defaults of the iconify format

# Family -> other families that redraw, continue or copy it (found by comparing their pixels)
COPIES = {
    "material": "ic mdi zmdi line",
    "fa": "fa6 fa7",
    "boxicons": "bx bxs",
    "uil": "uim uis uit",
    "feather": "lucide",
    "ion": "famicons",
    "streamline": "guidance",
    "solar": "reicon",
    "icons8": "la",
}
KIN = {other: family for family, others in COPIES.items() for other in others.split()}


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
    ranked = sorted(sets.keys() - NOT_A_CLASS - BRANDS, key=lambda word: (-len(sets[word]), word))
    vocabulary = frozenset(ranked[: max(NUM_CONCEPTS, num_classes)])
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
    return [icon for icon in labelled if icon.concept in classes], classes


def content_words(name: str) -> list[str]:
    """The words of an icon's name that say what it shows, spelt one way, each once."""
    words = [SAME.get(word, word) for word in name.split("-")]
    return list(dict.fromkeys(w for w in words if w and w not in STYLE and not STYLE_PATTERN.fullmatch(w)))


def find_concept(words: list[str], vocabulary: frozenset[str]) -> str | None:
    """The one concept that a name speaks of, or None where there is none or more than one."""
    if not BRANDS.isdisjoint(words):
        return None
    nouns = [word for word in words if word not in MODIFIERS and word not in NOT_A_CLASS]
    if nouns:
        known = [word for word in nouns if word in vocabulary]
        return known[0] if len(known) == 1 else None
    # only modifiers: the drawing is of one of them, `plus-circle` or `search`
    known = [word for word in words if word in vocabulary]
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
