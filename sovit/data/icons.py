"""Real drawings: single-colour icons of many open-source sets, labelled by the concept in their names.

The drawings are those of the pinned asset `iconify`. They are rendered once, at the size that is asked for, into a
memory-mapped cache with a table of who drew what under which licence (ATTRIBUTION.tsv beside the masks).

An icon's label is the one concept word in its name (`calendar-off-outline` -> calendar). Training and validation icons
come from disjoint families of sets, never from one family, because families repeat a design in many weights.

These are drawings, not photographs, and families copy each other's ideas: a loss here says nothing of natural images.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sovit import UserError, assets
from sovit.data import Batch
from sovit.data.cache import build_once, content_key, prior_cross_entropy, say, track


@dataclass(frozen=True)
class Preset:
    """What an image is. `grid` x `grid` icons; labels one a patch token (grid > 1) or one an image (grid = 1).

    `noise` is the standard deviation of the Gaussian added to a pixel's ink, which runs from 0 to 1.
    """

    num_classes: int
    grid: int
    noise: float


# `mosaic` is the one to study with on a CPU (32 pixels, patch 4). An image of it is never an upsample: a larger
# image_size renders the same drawings with more detail
PRESETS = {
    "mosaic": Preset(num_classes=40, grid=2, noise=0.1),
    "single40": Preset(num_classes=40, grid=1, noise=0.1),
    "single200": Preset(num_classes=200, grid=1, noise=0.1),
    "single1000": Preset(num_classes=1000, grid=1, noise=0.1),
}

RECIPE = 1  # part of the cache key: raise it when anything below changes which icons are kept or how they look
NUM_CONCEPTS = 200  # words that compete for a label, or the number of classes where that is more
CHUNK = 256  # samples drawn from one random stream, so that a batch's size and start cannot change a sample
NUM_VAL = 4096  # validation images at most
VAL_SHARE, VAL_FAMILY_SHARE = 0.15, 0.25  # validation's share of the icons; one family's share of validation
CENTRE, GAIN = 0.4, 2.0  # x = GAIN * (ink + noise - CENTRE): mean -0.2, standard deviation 0.8 at 16 px
VAL_KEY = 0x56414C  # validation does not depend on data_seed


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


class Icons:
    """An opened preset. masks [I, S, S] uint8 (255 = ink), memory-mapped; see sovit.data.Source for the rest."""

    def __init__(self, preset: Preset, folder: Path, image_size: int, patch_size: int, data_seed: int, device: str):
        self.preset, self.image_size, self.patch_size = preset, image_size, patch_size
        self.data_seed, self.device = data_seed, device
        self.info = json.loads((folder / "info.json").read_text())
        self.class_names: tuple[str, ...] = tuple(self.info["classes"])
        self.label_grid = preset.grid
        self.num_classes = len(self.class_names)
        self.skills: tuple[str, ...] = ()
        self.blind: dict[str, float] = {}
        self.readout = "tokens" if preset.grid > 1 else "pooled"
        self._classes = np.load(folder / "classes.npy")  # [I]
        self._masks = np.load(folder / "masks.npy", mmap_mode="r")[: len(self._classes)]
        is_val = np.load(folder / "is_val.npy")  # [I]
        self._train_icons, val_icons = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        # every validation icon comes up equally often, in a fixed order
        self._val_icons = np.random.Generator(np.random.Philox(key=VAL_KEY)).permutation(val_icons)
        self.num_val = NUM_VAL if preset.grid > 1 else min(NUM_VAL, len(val_icons))
        self.zero_line = prior_cross_entropy(
            self._classes[self._train_icons], self._classes[self._val_icons], self.num_classes
        )
        self._chunks: dict[tuple[bool, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, start: int, count: int) -> Batch:
        """Samples start .. start + count - 1: images [B, 3, H, W], labels [B] or [B, N]. Icons are drawn uniformly."""
        return self._batch(False, start, count)

    def val(self, start: int, count: int) -> Batch:
        """Validation images start .. start + count - 1, made of validation icons; the same for every data_seed."""
        if start < 0 or start + count > self.num_val:
            raise UserError(f"validation images {start} .. {start + count - 1} do not exist; num_val={self.num_val}")
        return self._batch(True, start, count)

    def _batch(self, is_val: bool, start: int, count: int) -> Batch:
        images, labels = [], []
        while count > 0:
            chunk, offset = divmod(start, CHUNK)
            pixels, classes = self._chunk(is_val, chunk)
            stop = min(CHUNK, offset + count)
            images.append(pixels[offset:stop])
            labels.append(classes[offset:stop])
            start, count = start + stop - offset, count - (stop - offset)
        pixels = torch.cat(images).to(self.device)  # [B, H, W]
        return Batch(pixels[:, None].repeat(1, 3, 1, 1), torch.cat(labels).to(self.device), None)

    def _chunk(self, is_val: bool, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [256, H, W] float32 and labels [256] or [256, N] int64 of one chunk; the last one of each is kept."""
        if (is_val, chunk) in self._chunks:
            return self._chunks[is_val, chunk]
        g, tile = self.preset.grid, self.image_size // self.preset.grid
        # Philox is a counter-based generator: (key, counter) names a stream, and no state is carried between chunks
        key = VAL_KEY if is_val else self.data_seed
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, chunk, int(is_val)]))
        slots = CHUNK * g * g
        if is_val:
            chosen = self._val_icons[np.arange(chunk * slots, (chunk + 1) * slots) % len(self._val_icons)]
        else:
            chosen = self._train_icons[random.integers(len(self._train_icons), size=slots)]
        order = np.argsort(chosen)  # rising reads of a memory map are several times faster than random ones
        ink = np.empty((slots, tile, tile), np.uint8)
        ink[order] = self._masks[chosen[order]]
        ink = ink.reshape(CHUNK, g, g, tile, tile).swapaxes(2, 3).reshape(CHUNK, self.image_size, self.image_size)
        pixels = random.standard_normal(ink.shape, dtype=np.float32)  # [256, H, W]
        pixels *= GAIN * self.preset.noise
        pixels += ink * np.float32(GAIN / 255) - np.float32(GAIN * CENTRE)
        labels = self._classes[chosen]
        if g > 1:
            side = tile // self.patch_size
            labels = labels.reshape(CHUNK, g, g).repeat(side, axis=1).repeat(side, axis=2).reshape(CHUNK, -1)
        self._chunks = {k: v for k, v in self._chunks.items() if k[0] != is_val}
        self._chunks[is_val, chunk] = torch.from_numpy(pixels), torch.from_numpy(labels)
        return self._chunks[is_val, chunk]


def open_source(preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Icons:
    """Open a preset of PRESETS ("" = mosaic) at `image_size` pixels; the first opening of a size renders its masks.

    Raises UserError for an unknown preset, sizes that do not divide, or where the asset or the renderer is missing.
    """
    preset = preset or "mosaic"
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is unknown to icons; choose one of {', '.join(PRESETS)}")
    grid = PRESETS[preset].grid
    if image_size < grid or image_size % grid:
        raise UserError(f"image_size={image_size} cannot hold {grid} x {grid} icons; give a multiple of {grid}")
    if patch_size < 1 or (image_size // grid) % patch_size:
        raise UserError(
            f"patch_size={patch_size} does not divide the {image_size // grid} pixels of an icon in preset {preset!r};"
            " give one that does"
        )
    if data_seed < 0:
        raise UserError(f"data_seed={data_seed} is negative; give 0 or more")
    folder = masks_folder(PRESETS[preset].num_classes, image_size // grid)
    return Icons(PRESETS[preset], folder, image_size, patch_size, data_seed, device)


def masks_folder(num_classes: int, size: int) -> Path:
    """The cache folder of `num_classes` classes at `size` pixels, rendered if it is not there yet.

    masks.npy [I or more, size, size] uint8 (rows left out stand empty at the end), classes.npy [I] int64,
    is_val.npy [I] bool, ATTRIBUTION.tsv (I rows), info.json.
    Raises UserError where the asset or resvg is missing, or where fewer classes or families than needed are found.
    """
    asset = assets.get("iconify")
    if os.environ.get(asset.env):  # a file of the user's own is told apart by size and date, the pinned one by its hash
        stat = assets.path("iconify").stat()
        source = f"{stat.st_size} {stat.st_mtime_ns}"
    else:
        source = asset.sha256
    key = content_key(recipe=RECIPE, num_classes=num_classes, size=size, source=source)
    # the package is needed to render only: rendered masks can be carried to a machine that does not have it
    return build_once("icons", key, lambda folder: render_all(assets.path("iconify"), num_classes, size, folder))


def render_all(tarball: Path, num_classes: int, size: int, folder: Path) -> None:
    """Choose, label, split and render the icons of `tarball` into `folder` (see masks_folder); say what was done."""
    render = renderer()
    everything = read_icons(tarball)
    val_families = split_families(Counter(icon.family for icon in everything))
    icons, classes = choose(everything, num_classes)
    say(f"icons: rendering {len(icons):,} drawings of {len(classes)} classes at {size} px, once")
    # written through a memory map: a thousand classes at 224 px do not fit into memory. Training icons come first
    icons = sorted(icons, key=lambda icon: icon.family in val_families)
    masks = np.lib.format.open_memmap(folder / "masks.npy", mode="w+", dtype=np.uint8, shape=(len(icons), size, size))
    kept: list[Icon] = []
    train_digests, left_out = set(), Counter(broken=0, blank=0, copied=0)
    for icon in track(icons, f"rendering at {size} px", total=len(icons)):
        try:
            mask = render(icon.box, icon.body, size)  # [S, S]
        except ValueError:  # what resvg raises for a drawing that it cannot read
            left_out["broken"] += 1
            continue
        if mask.min() == mask.max():  # an animation that starts from nothing
            left_out["blank"] += 1
            continue
        digest = hashlib.sha256(mask.tobytes()).digest()
        if icon.family not in val_families:
            train_digests.add(digest)
        elif digest in train_digests:  # sets borrow from each other: validation must not hold what training showed
            left_out["copied"] += 1
            continue
        masks[len(kept)] = mask
        kept.append(icon)
    masks.flush()
    number = {concept: i for i, concept in enumerate(classes)}
    is_val = np.array([icon.family in val_families for icon in kept])
    np.save(folder / "classes.npy", np.array([number[icon.concept] for icon in kept], dtype=np.int64))
    np.save(folder / "is_val.npy", is_val)
    columns = ("title", "concept", "licence", "author", "family")
    with open(folder / "ATTRIBUTION.tsv", "w", encoding="utf-8") as stream:
        print("\t".join(columns), "split", sep="\t", file=stream)
        for icon, val in zip(kept, is_val, strict=True):
            print(*(getattr(icon, c) for c in columns), "val" if val else "train", sep="\t", file=stream)
    info = {
        "classes": classes,
        "size": size,
        "num_train": int((~is_val).sum()),
        "num_val": int(is_val.sum()),
        **left_out,
        "val_families": sorted(val_families),
        "licences": dict(Counter(icon.licence for icon in kept).most_common()),
        "per_class": dict(Counter(icon.concept for icon in kept).most_common()),
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1))
    say(
        f"icons: kept {info['num_train']:,} training and {info['num_val']:,} validation drawings; left out"
        f" {left_out['broken']} broken, {left_out['blank']} blank,"
        f" {left_out['copied']} validation drawings that training holds too"
    )


def read_icons(tarball: Path) -> list[Icon]:
    """Every single-colour icon of a permissive, non-logo set in the package; the concept is filled in by `choose`."""
    icons = []
    try:
        # a stream of members, read one by one in memory: no path from the archive touches the disk
        with tarfile.open(tarball, "r|gz") as archive:
            for member in archive:
                file = archive.extractfile(member)  # None for what is not a plain file
                if file is not None and re.fullmatch(r"package/json/[\w-]+\.json", member.name):
                    icons += read_set(json.load(file))
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{tarball} is not an @iconify/json package ({error}); run: sovit assets fetch iconify"
        ) from None
    return icons


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


def renderer() -> Callable[[str, str, int], np.ndarray]:
    """A function (viewBox, body, size) -> ink [size, size] uint8, 255 where black. Raises UserError without resvg."""
    try:
        import resvg_py
    except ImportError:
        raise UserError("data='icons' needs resvg_py to render; run: pip install 'sovit[icons]'") from None
    from PIL import Image

    def render(box: str, body: str, size: int) -> np.ndarray:
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" viewBox="{box}">{body}</svg>'
        # on white, so that white strokes inside a black shape are not ink; system fonts would differ between machines
        png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
        return 255 - np.asarray(Image.open(io.BytesIO(bytes(png))).convert("L"))  # [S, S]

    return render
