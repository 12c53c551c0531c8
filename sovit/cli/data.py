"""`sovit data` and `assets`: what there is to train on."""

import sys
from pathlib import Path
from typing import Any, Literal

from sovit import OUTPUTS, UserError
from sovit.cli.common import Pixels, sheet


def data(
    action: Literal["show", "cache", "list"],
    source: str = "",
    /,
    *,
    image_size: Pixels | None = None,
    patch_size: Pixels = 4,
    out: Path | None = None,
) -> None:
    """Look at a data source, or build its cache.

    Args:
        action: show (a contact sheet), cache or list
        source: SOURCE[:PRESET], such as stream:cpu, icons:mosaic or hub:FOLDER
        image_size: pixels a side (default: the preset's own)
        patch_size: pixels a side
        out: PNG of the contact sheet (default runs/results/SOURCE-PRESET.png)
    """
    from sovit.data import NORMALISATION, PRESETS, baselines, named_data, open_data

    if action == "list":
        for name, presets in PRESETS.items():
            for preset, (size, what) in presets.items():
                print(f"{name}:{preset:<12} {size:>3} px  {what}")
        return
    if not source:
        raise UserError("name a source, such as stream:cpu; `sovit data list` shows them")
    named = named_data(source)
    size = named.image_size if image_size is None else image_size
    opened = open_data(named.data, named.preset, size, patch_size, data_seed=0)
    title = f"{named.data}:{named.preset}"
    print(f"{title} at {size} px: {opened.num_classes} classes, labels {opened.readout},", end=" ")
    print(f"{opened.num_val:,} validation images")
    print(baselines(opened))
    if action == "show":
        out = out or OUTPUTS / f"{named.data}-{Path(named.preset).name}.png"
        batch, (mean, std) = opened.train(0, 24), NORMALISATION[named.data]
        sheet(batch.images * std + mean, captions(batch.labels, opened), out, f"{title}, {size} px")
        print(out)


def captions(labels: Any, source: Any) -> list[str]:
    """Name an image's labels, one line for each row of cells. labels: [B], or [B, N] in raster order."""
    from sovit.train.evaluate import cells

    if labels.ndim == 1:
        return [source.class_names[i] for i in labels]
    grid = source.label_grid
    by_cell = cells(labels[..., None], grid)[:, :, 0, 0].view(-1, grid, grid)  # [B, grid, grid]
    return ["\n".join(" ".join(source.class_names[i] for i in row) for row in image) for image in by_cell.tolist()]


def assets(action: Literal["fetch", "list"], name: str = "", /) -> None:
    """Fetch pinned outside data, or list it.

    Args:
        action: fetch or list
        name: what to fetch
    """
    from sovit.data import assets as library

    if action == "list":
        for row in library.listing():
            print("  ".join(str(value) for value in row.values()))
        return
    if not name:
        raise UserError("name what to fetch; `sovit assets list` shows what there is")
    print(library.fetch(name, progress=lambda line: print(line, file=sys.stderr)))
