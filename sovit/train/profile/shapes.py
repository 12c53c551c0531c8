"""The shapes that `sovit profile` is asked for, and its table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sovit import UserError
from sovit.law.fitted_law import read_law
from sovit.law.geometry import Geometry
from sovit.predict.recommend import best_shape
from sovit.spec.named_shapes import named_shape
from sovit.spec.shape import Shape
from sovit.tables import text_table

MIB = 2**20


def shapes_for(
    names: Sequence[str] = (), law: Path | None = None, train_flops: float | None = None, **fields: Any
) -> tuple[list[Shape], int | None]:
    """The shapes that a command line asks for, and the classes of the law's task head (None without a law).

    names: `B/16`, a timm name, or WxDxM[xHEAD_DIM], whose other fields are those of the law or of `fields` (head_dim,
    patch_size, image_size, pool). train_flops: with a law, its best shape for that budget and ViT-B's proportions at it,
    too. Raises UserError.
    """
    shapes, geometry = [], Geometry()
    if law is not None:
        fit = read_law(law)
        geometry = fit.geometry or geometry
        if train_flops is not None:
            best = best_shape(fit, train_flops)
            shapes += [best.shape, best.proportional.shape]
    elif train_flops is not None:
        raise UserError(f"train_flops={train_flops:g} is a budget for a law; name one")
    known = {n: getattr(geometry, n) for n in ("head_dim", "patch_size", "image_size", "pool")}
    known = {n: value if isinstance(value, str) else int(value) for n, value in known.items() if value}
    for name in names:
        if re.fullmatch(r"\d+(x\d+){2,3}", name):
            own = dict(zip(("width", "depth", "mlp_dim", "head_dim"), map(int, name.split("x"))))
            shapes.append(Shape(**known | fields | own))
        else:
            shapes.append(named_shape(name, **fields))
    if not shapes:
        raise UserError("no shape to profile; name some, such as B/16 or 32x2x256, or a law with a budget")
    return list(dict.fromkeys(shapes)), geometry.num_classes


def profile_text(rows: Sequence[dict]) -> str:
    """The rows as a table."""
    columns = {  # heading -> column, scale, format; rows of trained parts have others than rows of shapes
        "forward ms": ("forward_seconds", 1e3, ".3f"),
        "images/s": ("images_per_second", 1, ",.0f"),
        "GFLOP/s": ("forward_flops_per_second", 1e-9, ".2f"),
        "train step ms": ("train_step_seconds", 1e3, ".3f"),
        "train GFLOP/s": ("train_flops_per_second", 1e-9, ".2f"),
        "GFLOPs an image": ("step_flops", 1e-9, ",.3f"),
        "forward MiB": ("forward_bytes", 1 / MIB, ".1f"),
        "train MiB": ("train_bytes", 1 / MIB, ".1f"),
        "peak MiB": ("peak_bytes", 1 / MIB, ".1f"),
        "activations MiB": ("saved_bytes", 1 / MIB, ".1f"),
        "stored MiB": ("stored_bytes", 1 / MIB, ".1f"),
        "n": ("num_repeats", 1, "d"),
    }
    columns = {heading: column for heading, column in columns.items() if column[0] in rows[0]}

    def cells(row: dict) -> list[str]:
        values = ((row[column], scale, form) for column, scale, form in columns.values())
        numbers = ["-" if value is None else format(value * scale, form) for value, scale, form in values]
        label = f"{row['width']}x{row['depth']}x{row['mlp_dim']} h{row['head_dim']}"
        label += f" {row['trained']}" if "trained" in row else ""
        why = "" if row["status"] == "ok" else f"{row['status'].replace('_', ' ')}: {row['error']}"
        return [label, str(row["batch_size"]), *numbers, why]

    first = rows[0]
    clock = "CPU time of the process" if first["clock"] == "cpu" else "wall time"
    table = text_table(["shape", "batch", *columns, ""], map(cells, rows), left=("shape", ""))
    return (
        f"{table}\n{first['device_name']}, {first['dtype']}, {first['threads']} thread{'s' * (first['threads'] > 1)};"
        f" {clock}; medians of n repeats, shapes taking turns; FLOP/s by our count (training: 3 x forward)"
    )
