"""`sovit count`, `profile`, `probe`, `finetune` and `export`: one shape, one encoder."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sovit import OUTPUTS, UserError
from sovit.cli.common import Flat, Geometry, Help, Json, Pixels, Place, Whole, encoder_name, given, show
from sovit.files import check_name
from sovit.spec.named_shapes import Named, UnknownShape, named
from sovit.spec.shape import Shape


@Flat
@dataclass(frozen=True)
class Sizes(Geometry):
    """What to override of named shapes, or to say without a name."""

    width: Annotated[Whole | None, Help("Embedding dim.")] = None
    depth: Annotated[Whole | None, Help("Blocks.")] = None
    mlp_dim: Annotated[Whole | None, Help("Hidden dim of the MLP.")] = None
    num_registers: Annotated[Whole | None, Help("Register tokens.")] = None


def count(*shapes: str, sizes: Sizes = Sizes(), num_classes: Whole = 0, json: Json = False) -> None:
    """Count parameters and FLOPs of one shape, or of several as a table.

    Args:
        shapes: such as B/16, So400m/14@378, 192x12x768, vit_base_patch16_224.augreg_in21k or open_clip's ViT-B-16
        num_classes: count a linear task head of so many classes, apart
    """
    from sovit.tables import text_table

    if num_classes < 0:
        raise UserError(f"--num-classes {num_classes} is negative; give 0 for no head")
    fields = given(sizes)
    if shapes:
        by_name = {name: _named(name, fields) for name in shapes}
    else:
        for name in ("width", "depth", "mlp_dim"):
            if name not in fields:
                raise UserError(f"name a shape, such as B/16, or give --{name.replace('_', '-')}")
        shape = Shape(**fields)
        by_name = {shape.label: Named(shape)}
    counts = {name: found.counts(num_classes) for name, found in by_name.items()}
    whole = {name: found.shape.to_dict() | counts[name] for name, found in by_name.items()}
    for name, found in by_name.items():
        whole[name] |= {"note": found.note} if found.note else {}
    if json:
        return show(whole if len(whole) > 1 else next(iter(whole.values())), str, True)
    rows = ("width", "depth", "mlp_dim", "patch_size", "image_size", "pool", *next(iter(counts.values())))
    cells = [[row, *(c[row] if row == "pool" else f"{c[row]:,}" for c in whole.values())] for row in rows]
    print(text_table(["", *whole], cells, left=[""]))
    print("\nFLOPs: matrix products of one image's forward pass, 2 per multiply-add; training is 3 x that.")
    for name, found in by_name.items():
        beside = f", so {found.more_params:+,} parameters beside a plain ViT" if found.more_params else ""
        if found.note:
            print(f"{name}: {found.note}{beside}.")


def _named(name: str, fields: dict) -> Named:
    """A name of the tables, which need neither torch nor timm, or of any other ViT of timm."""
    try:
        return named(name, **fields)
    except UnknownShape:
        if "_" in name:  # as a ViT of timm's has
            from sovit.encoder.from_timm import named_timm, timm

            if timm.is_model(name):
                return named_timm(name, **fields)
        raise


@Flat
@dataclass(frozen=True)
class ProfileShapes(Geometry):
    """What the names of shapes leave open."""

    law: Annotated[Path | None, Help("A law.json: patch, image, pool, head dim and classes are its own.")] = None


@Flat
@dataclass(frozen=True)
class ProfileOptions:
    """How to measure."""

    device: Annotated[str, Help("Such as cpu or cuda.")] = "cpu"
    dtype: Annotated[str, Help("float32, or bfloat16 by autocast.")] = "float32"
    num_classes: Annotated[Whole | None, Help("Classes of the task head (default: the law's, else 1000).")] = None
    repeats: Annotated[Whole, Help("Timings of each, of which the median counts.")] = 9
    batch_sizes: Annotated[tuple[Whole, ...], Help("1 is latency.")] = (1, 32)
    out: Annotated[Path, Help("File of profiles.")] = OUTPUTS / "hardware.jsonl"


def profile(
    *shapes: str,
    geometry: ProfileShapes = ProfileShapes(),
    options: ProfileOptions = ProfileOptions(),
    threads: Whole = 1,
    json: Json = False,
) -> None:
    """Measure seconds and memory of shapes on this device, forward and training.

    Args:
        shapes: such as B/16, a timm name, or 32x2x256[xHEAD_DIM]
        threads: of a CPU
    """
    if threads < 1:
        raise UserError(f"--threads {threads} must be at least 1")
    found, num_classes = shapes_for(shapes, **given(geometry))
    import torch

    from sovit.train.profile import profile as measure
    from sovit.train.profile import profile_text

    torch.set_num_threads(threads)
    said = {"num_classes": num_classes or 1000} | given(options)
    rows = measure(found, on_progress=lambda line: print(line, file=sys.stderr), **said)
    show(rows, profile_text, json)


def shapes_for(names: Sequence[str], law: Path | None = None, **fields: Any) -> tuple[list[Shape], int | None]:
    """The shapes that a command line names, and the classes of the law's task head (None without a law).

    names: `B/16`, a timm name, or WxDxM[xHEAD_DIM], whose other fields are those of the law or of `fields` (head_dim,
    patch_size, image_size, pool). Raises UserError.
    """
    from sovit.law.fitted_law import read_law
    from sovit.law.geometry import Geometry as LawGeometry
    from sovit.spec.named_shapes import named_shape

    geometry = (read_law(law).geometry if law else None) or LawGeometry()
    known = {n: getattr(geometry, n) for n in ("head_dim", "patch_size", "image_size", "pool")}
    known = {n: value if isinstance(value, str) else int(value) for n, value in known.items() if value}
    shapes = []
    for name in names:
        if re.fullmatch(r"\d+(x\d+){2,3}", name):
            own = dict(zip(("width", "depth", "mlp_dim", "head_dim"), map(int, name.split("x"))))
            shapes.append(Shape(**known | fields | own))
        else:
            shapes.append(named_shape(name, **fields))
    if not shapes:
        raise UserError("no shape to profile; name some, such as B/16 or 32x2x256")
    return shapes, geometry.num_classes


def probe(*encoders: str, data: str, study: str | None = None, place: Place = Place(), json: Json = False) -> None:
    """Measure the few-shot error of encoders on labelled images, by a linear probe: SoViT's metric.

    Args:
        encoders: RUN_ID, random:RUN_ID, timm:NAME, hf:NAME or pixels:SIZE
        data: SOURCE:PRESET, such as icons:single40 or hub:FOLDER
        study: probe every branch of this study instead, into its ledger
    """
    from sovit.data import named_data
    from sovit.ledger.few_shot_columns import column

    if bool(study) == bool(encoders):
        raise UserError("name encoders to probe, or one --study (not both)")
    named_data(data)
    named = [encoder_name(name, place.runs) for name in encoders]
    from sovit.encoder.probe import compare, comparison_text, probe_ledger
    from sovit.train.base import check_device

    check_device(place.device)
    if named:
        return show(compare(named, data, place.runs, place.device), comparison_text, json)
    ledger = place.results / f"{check_name(study or '')}.jsonl"
    text = (
        f"{ledger}: {{probed}} branches probed on {data}, {{probed_before}} were before,"
        f" {{without_weights}} have no weights in {place.runs}\n"
        f"next: sovit fit {ledger} --metric {column(10, data)}"
    )
    show(probe_ledger(ledger, place.runs, data, place.device), text.format_map, json)


BUDGETS = "Images to train on, a branch at each (default: a fifth of the base's)."


@Flat
@dataclass(frozen=True)
class TuneOptions:
    """What to change, and how long to train."""

    image_size: Annotated[Pixels | None, Help("Pixels a side (default: as the base).")] = None
    patch_size: Annotated[Pixels | None, Help("Pixels a side (default: as the base).")] = None
    data: Annotated[str | None, Help("SOURCE:PRESET to train on (default: as the base).")] = None
    peak_lr: Annotated[float | None, Help("Peak learning rate (default: the base's; of a part twice that).")] = None
    batch_size: Annotated[Whole | None, Help("Images a step (default: as the base).")] = None
    trained: Annotated[str, Parameter(name="--train", help="attention, full, mlp or head.")] = "attention"
    budgets: Annotated[tuple[Whole, ...], Parameter(name="--examples", help=BUDGETS)] = ()


def finetune(
    base: str,
    /,
    *,
    options: TuneOptions = TuneOptions(),
    place: Place = Place(),
    name: str = "finetune",
    dry_run: bool = False,
    json: Json = False,
) -> int:
    """Move a trained run or a timm model to another resolution or patch size, its attention alone.

    Args:
        base: RUN_ID or timm:NAME, where the weights start
        name: name of the ledger
        dry_run: say what it costs; train nothing
    """
    from sovit.ledger.records import find_branch
    from sovit.spec.shape import TRAINED

    if options.trained not in TRAINED:
        raise UserError(f"--train {options.trained} is unknown; choose one of {', '.join(TRAINED)}")
    if not base.startswith("timm:"):
        base = find_branch(base, place.runs)
    from sovit.train.finetune_command import fine_tune, result_text
    from sovit.train.loop import OutOfMemory

    ledger = place.results / f"{check_name(name)}.jsonl"
    try:
        result = fine_tune(base, place.runs, ledger, place.device, dry_run, **given(options))
    except OutOfMemory as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 1
    show(result, result_text, json)
    return int(any(row["status"] != "ok" for row in result["rows"]))


@Flat
@dataclass(frozen=True)
class ExportOptions:
    """What to write."""

    format: Annotated[str, Help("timm, siglip, vit, nanovlm, or sovit (any shape).")] = "timm"
    runs: Annotated[Path, Help("Folder of trunks.")] = Path("runs")
    image_size: Annotated[Pixels | None, Help("Resize the trained weights to read images of this side.")] = None
    patch_size: Annotated[Pixels | None, Help("Resize the trained weights to patches of this side.")] = None
    config_only: Annotated[bool, Help("The source is a law: write the config of its best shape.")] = False
    train_flops: Annotated[float | None, Help("Budget of --config-only.")] = None


def export(source: str, /, *, out: Path, options: ExportOptions = ExportOptions(), json: Json = False) -> int:
    """Write a trained run as a folder for timm, transformers or nanoVLM, or a law's best shape as a config.

    Args:
        source: RUN_ID, or a law.json with --config-only
        out: folder to write
    """
    from sovit.encoder.export import export_encoder, report_text

    if options.config_only:
        return _export_config(Path(source), out, options)
    if Path(source).suffix == ".json":
        raise UserError(f"{source} is a law, which has a config but no weights; add --config-only and --train-flops")
    sizes = options.image_size, options.patch_size
    try:
        report = export_encoder(source, options.runs, out, *sizes, options.format)
    except RuntimeError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 1
    show(report, report_text, json)
    return 0


def _export_config(law: Path, out: Path, options: ExportOptions) -> int:
    from sovit.encoder.export import write_config
    from sovit.law.fitted_law import read_law
    from sovit.predict.recommend import best_shape

    if options.train_flops is None:
        raise UserError("--config-only needs --train-flops, the budget that the shape is for")
    for flag, size in (("--image-size", options.image_size), ("--patch-size", options.patch_size)):
        if size is not None:
            raise UserError(f"{flag} resizes a trained run, a law's best shape has its own; leave {flag} out")
    shape = best_shape(read_law(law), options.train_flops).shape
    print(f"{write_config(shape, options.format, out)}: {shape.label}, {shape.num_params:,} parameters")
    return 0
