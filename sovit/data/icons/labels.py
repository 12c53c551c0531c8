"""Which icons become which classes: concepts from names, licences, and the families of the validation set.

Tables and pure functions of the data of icon sets; sovit.data.icons.icons renders what is chosen here. There are two sets of
rules, NARROW and WIDE (see Rules); whatever changes a choice needs a higher `recipe` of the rules that make it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sovit import UserError

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


def spellings(synonyms: dict[str, str]) -> dict[str, str]:
    return {word: concept for concept, others in synonyms.items() for word in others.split()}


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
# What a thousand classes need besides, found by looking at sheets of them and at drawings that several words share.
# Words of one drawing, or of one kind of thing
WIDE_SYNONYMS = {
    "airplane": "plane",
    "arrow": "arrows",
    "award": "badge",
    "bathtub": "bath",
    "bell": "notification notifications",
    "bicycle": "bike cycling",
    "binoculars": "binocular",
    "bolt": "lightning flash zap thunderbolt",
    "book": "books",
    "bookmark": "bookmarks",
    "box": "boxes",
    "bubble": "bubbles",
    "building": "buildings",
    "burger": "hamburger",
    "calendar": "calender",
    "camcorder": "videocam",
    "canoe": "kayak kayaking",
    "car": "automobile",
    "card": "creditcard",
    "certificate": "license diploma",
    "chart": "graph analytics poll",
    "chat": "conversation sms feedback",
    "check": "checkmark success",
    "checklist": "task tasks",
    "cherry": "cherries",
    "chip": "cpu microchip",
    "clipboard": "paste",
    "clock": "time",
    "close": "times cancel multiply xmark",
    "cloud": "clouds cloudy",
    "collapse": "minimize",
    "column": "columns",
    "contacts": "contact",
    "copy": "duplicate clone",
    "crosshair": "crosshairs",
    "cube": "cubes",
    "diamond": "diamonds gem",
    "divide": "division",
    "donut": "doughnut",
    "drop": "droplet droplets",
    "dumbbell": "barbell",
    "equal": "equals",
    "expand": "maximize fullscreen",
    "eye": "eyes",
    "eyedropper": "dropper pipette",
    "factory": "industry",
    "fan": "pinwheel",
    "fire": "flame burn",
    "footprints": "footsteps",
    "fridge": "refrigerator",
    "gauge": "tachometer speedometer",
    "gift": "gifts",
    "glasses": "eyeglasses",
    "globe": "earth world web",
    "hand": "hands",
    "heading": "header",
    "headphones": "headphone",
    "heart": "hearts",
    "hierarchy": "organization sitemap",
    "home": "houses",
    "infinity": "infinite",
    "info": "information",
    "layers": "layer",
    "lightbulb": "bulb",
    "link": "chain",
    "lock": "padlock locked",
    "mask": "masks",
    "medal": "medals",
    "menu": "bars",
    "minus": "subtract",
    "money": "cash banknote",
    "monitor": "desktop",
    "more": "ellipsis",
    "motorcycle": "motorbike",
    "mountain": "mountains",
    "notebook": "notepad",
    "number": "numbers",
    "paperclip": "attachment attach",
    "percent": "percentage",
    "phone": "call",
    "pill": "pills capsule",
    "pin": "thumbtack pushpin",
    "plant": "seedling sprout",
    "printer": "print",
    "qrcode": "qr",
    "question": "help",
    "quote": "quotes",
    "recycle": "recycling",
    "refresh": "reload sync",
    "restaurant": "cutlery utensils",
    "ring": "rings",
    "robot": "bot",
    "rss": "feed",
    "run": "running",
    "sad": "frown",
    "sailboat": "sailing",
    "save": "floppy",
    "scissors": "cut scissor",
    "search": "zoom loupe",
    "server": "servers",
    "settings": "setting cogs gears",
    "shirt": "tshirt",
    "shrink": "compress contract",
    "shuffle": "random",
    "skateboard": "skateboarding",
    "slider": "sliders",
    "smile": "happy smiley",
    "snowboarding": "snowboard",
    "sofa": "couch",
    "sparkle": "sparkles flare",
    "spinner": "loader loading",
    "star": "stars",
    "store": "shop storefront",
    "storm": "thunderstorm",
    "subtitles": "subtitle captions",
    "subway": "metro",
    "suitcase": "luggage",
    "sun": "sunny",
    "table": "th",
    "tag": "tags",
    "target": "bullseye",
    "tent": "camping campground",
    "thermometer": "temperature",
    "ticket": "tickets",
    "tie": "necktie",
    "tools": "tool",
    "tooth": "teeth",
    "tree": "trees",
    "tv": "television",
    "user": "account profile",
    "virus": "coronavirus",
    "volume": "sound",
    "walk": "walking",
    "warning": "alert danger exclamation error caution",
    "watch": "smartwatch",
    "wave": "waves",
    "wheelchair": "accessible",
    "woman": "women",
}
# Words that many different drawings share, words of two meanings, and letters
WIDE_NOT_A_CLASS = word_set(
    """a b c d e f g h i j k l m n p q r s t u w y z left right up down next previous direction directions data sign view
    style open letter report select format shape form transfer option options application apps app background
    support category block balance scale seal bar steps clear favorite remove delete cross computer screen display
    loop button component content control currency bill details device explore erase function analysis collection
    event fort functions horizontal idea input join level pc process progress segment strategy system tablets topic
    update item mode nut bat ram club fork crane object page paper reset rule service shift space start state status
    template theme trigger type variable work go end external subject global hours discover project enterprise
    community disabled clockwise one two three four five six mp pod id office token policy plan post hot cool fold
    rock product prompt order size media applications anticlockwise unknown abstract sip"""
)
WIDE_BRANDS = word_set(
    """claude gemini intercom iphone java meta pacman php pocket retweet sketch swift typescript unity fedora flutter
    kubernetes odnoklassniki ruby vscode svelte redhat jenkins joomla firebase eclipse ember hive graphql grunt framer
    openai periscope centos bilibili atlassian angellist algolia blackberry cloudflare copilot cpanel disqus flipboard
    gulp imdb ios jira jquery js magento meetup modx opencart openid pagelines perplexity picasa polymer sass pokeball
    chatgpt grok deepseek anthropic gmail mix pix debian freebsd gatsby gitter goodreads houzz invision ipad imac
    facetime kotlin lego mongodb netlify optimize salesforce scribd codesandbox contao connectdevelop discourse dyalog
    etsy maxcdn skyatlas waze yandex yuan zhihu"""
)
# Names that mean something else than their words
WIDE_PHRASES = {
    "paper-plane": "send",
    "light-bulb": "lightbulb",
    "thumbs-up": "like",
    "thumb-up": "like",
    "thumbs-down": "dislike",
    "thumb-down": "dislike",
    "ice-cream": "icecream",
    "qr-code": "qrcode",
    "finger-print": "fingerprint",
    "full-screen": "expand",
    "x-mark": "close",
    "speech-bubble": "chat",
}


@dataclass(frozen=True)
class Rules:
    """How names become classes. `recipe` is part of the cache key of what is rendered by these rules.

    The `num_words` most drawn words compete for a label (or as many as there are classes, where that is more); a class
    has at least `min_train` training and `min_val` validation icons, drawings that turn out to be copies among them.
    """

    recipe: int
    num_words: int
    same: Mapping[str, str]  # word -> the word that it is counted as
    phrases: Mapping[str, str]  # part of a name -> the word that it is read as
    never: frozenset[str]
    brands: frozenset[str]
    min_train: int
    min_val: int


NARROW = Rules(1, 200, spellings(SYNONYMS), {}, NOT_A_CLASS, BRANDS, min_train=0, min_val=0)
WIDE = Rules(
    recipe=2,
    num_words=1500,
    same=spellings(SYNONYMS) | spellings(WIDE_SYNONYMS),
    phrases=WIDE_PHRASES,
    never=NOT_A_CLASS | WIDE_NOT_A_CLASS,
    brands=BRANDS | WIDE_BRANDS,
    min_train=8,
    min_val=2,
)


def rules(num_classes: int) -> Rules:
    """Up to 200 classes keep the rules, and the icons, that committed results were measured with."""
    return NARROW if num_classes <= NARROW.num_words else WIDE


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
    by = rules(num_classes)
    content = {icon.title: content_words(icon.title.split(":")[1], by) for icon in icons}
    sets: dict[str, set[str]] = {}
    for icon in icons:
        if len(content[icon.title]) == 1:
            sets.setdefault(content[icon.title][0], set()).add(icon.title.split(":")[0])
    ranked = sorted(sets.keys() - by.never - by.brands, key=lambda word: (-len(sets[word]), word))
    vocabulary = frozenset(ranked[: max(by.num_words, num_classes)])
    drawings: dict[tuple[str, str], Icon | None] = {}
    for icon in icons:
        concept = find_concept(content[icon.title], vocabulary, by)
        if concept is None:
            continue
        drawing = (icon.box, icon.body)
        same = drawings.setdefault(drawing, replace(icon, concept=concept))
        if same is not None and same.concept != concept:
            drawings[drawing] = None
    labelled = [icon for icon in drawings.values() if icon is not None]
    counts = Counter(icon.concept for icon in labelled)
    if by.min_val:
        val_families = split_families(Counter(icon.family for icon in icons))
        val = Counter(icon.concept for icon in labelled if icon.family in val_families)
        counts = Counter({w: n for w, n in counts.items() if val[w] >= by.min_val and n - val[w] >= by.min_train})
    if len(counts) < num_classes:
        enough = f" with {by.min_train} training and {by.min_val} validation icons" if by.min_val else ""
        raise UserError(
            f"num_classes={num_classes} is more than the {len(counts)} concepts found{enough}; choose another preset"
        )
    classes = sorted(sorted(counts, key=lambda word: (-counts[word], word))[:num_classes])
    chosen = frozenset(classes)
    return [icon for icon in labelled if icon.concept in chosen], classes


def content_words(name: str, by: Rules = NARROW) -> list[str]:
    """The words of an icon's name that say what it shows, spelt one way, each once."""
    for phrase, word in by.phrases.items():
        if phrase in name:
            name = re.sub(rf"(?<![^-]){phrase}(?![^-])", word, name)
    words = [by.same.get(word, word) for word in name.split("-")]
    return list(dict.fromkeys(w for w in words if w and w not in STYLE and not STYLE_PATTERN.fullmatch(w)))


def find_concept(words: list[str], vocabulary: frozenset[str], by: Rules = NARROW) -> str | None:
    """The one concept that a name speaks of, or None where there is none or more than one."""
    if not by.brands.isdisjoint(words):
        return None
    nouns = [word for word in words if word not in MODIFIERS and word not in by.never]
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
