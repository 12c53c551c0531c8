"""Icons drawn once: from the pinned package to a cache folder of masks, with who drew what under which licence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.data import assets
from sovit.data.cache import build_once, content_key, say, track
from sovit.data.icons.labels import RECIPE, Icon, choose, read_set, split_families

Renderer = Callable[[str, str, int], np.ndarray]  # viewBox, body, size -> ink [size, size] uint8


def masks_folder(num_classes: int, size: int) -> Path:
    """The cache folder of `num_classes` classes at `size` pixels, rendered if it is not there yet.

    masks.npy [I or more, size, size] uint8 (rows left out stand empty at the end), classes.npy [I] int64,
    is_val.npy [I] bool, ATTRIBUTION.tsv (I rows), info.json.
    Raises UserError where the asset or resvg is missing, or where fewer classes or families than needed are found.
    """
    # the package is needed to render only: rendered masks can be carried to a machine that does not have it
    return build_once(
        "icons",
        masks_key(num_classes, size),
        lambda folder: render_all(assets.path("iconify"), num_classes, size, folder),
    )


def masks_key(num_classes: int, size: int) -> str:
    asset = assets.get("iconify")
    if os.environ.get(asset.env):  # a file of the user's own is told apart by size and date, the pinned one by its hash
        stat = assets.path("iconify").stat()
        source = f"{stat.st_size} {stat.st_mtime_ns}"
    else:
        source = asset.sha256
    return content_key(recipe=RECIPE, num_classes=num_classes, size=size, source=source)


def render_all(tarball: Path, num_classes: int, size: int, folder: Path) -> None:
    """Choose, label, split and render the icons of `tarball` into `folder` (see masks_folder); say what was done."""
    render = renderer()
    everything = read_icons(tarball)
    val_families = split_families(Counter(icon.family for icon in everything))
    icons, classes = choose(everything, num_classes)
    say(f"icons: rendering {len(icons):,} drawings of {len(classes)} classes at {size} px, once")
    # written through a memory map: a thousand classes at 224 px do not fit into memory
    masks = np.lib.format.open_memmap(folder / "masks.npy", mode="w+", dtype=np.uint8, shape=(len(icons), size, size))
    kept, left_out = _draw(icons, val_families, render, masks)
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
        "num_train": int((~is_val).sum()),
        "num_val": int(is_val.sum()),
        **left_out,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    say(
        f"icons: kept {info['num_train']:,} training and {info['num_val']:,} validation drawings; left out"
        f" {left_out['broken']} broken, {left_out['blank']} blank,"
        f" {left_out['copied']} validation drawings that training holds too"
    )


def _draw(icons: list[Icon], val_families: set[str], render: Renderer, masks: np.ndarray) -> tuple[list[Icon], Counter]:
    """Render icons into the first rows of `masks`, training first. Returns those kept, and why how many are not."""
    kept: list[Icon] = []
    train_digests, left_out = set(), Counter(broken=0, blank=0, copied=0)
    icons = sorted(icons, key=lambda icon: icon.family in val_families)
    for icon in track(icons, f"rendering at {masks.shape[1]} px", total=len(icons)):
        try:
            mask = render(icon.box, icon.body, masks.shape[1])  # [S, S]
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
    return kept, left_out


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


def renderer() -> Renderer:
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
