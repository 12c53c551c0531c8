"""What commands share: options, and how a result is printed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sovit import OUTPUTS, UserError


def Help(text: str) -> Parameter:
    """What an option is for, in one line."""
    return Parameter(help=text)


Flat = Parameter(name="*")  # on a dataclass: each field is an option of its own


def _pixels(_: type, tokens: Sequence) -> int:
    text = tokens[0].value
    if not text.isdecimal():
        raise UserError(f"{text!r} is not a whole number of pixels; images are square, give one side")
    return int(text)


def _whole(_: type, tokens: Sequence) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise UserError(f"{tokens[0].value!r} is not a whole number") from None


Json = Annotated[bool, Help("Print the result as JSON.")]
Whole = Annotated[int, Parameter(converter=_whole)]  # cyclopts itself would round 1.5 to 2
Pixels = Annotated[int, Parameter(converter=_pixels)]


@Flat
@dataclass(frozen=True)
class Folders:
    """Where a study is found."""

    runs: Annotated[Path, Help("Folder of trunks.")] = Path("runs")
    results: Annotated[
        Path | None, Help("Folder of ledgers (default: where it was launched, else runs/results or results).")
    ] = None


@Flat
@dataclass(frozen=True)
class Place:
    """Where to compute, and where to keep it."""

    runs: Annotated[Path, Help("Folder of trunks.")] = Path("runs")
    results: Annotated[Path, Help("Folder of the ledger.")] = OUTPUTS
    device: Annotated[str, Help("Such as cpu or cuda.")] = "cpu"


@Flat
@dataclass(frozen=True)
class Geometry:
    """What the sizes of a shape leave open."""

    head_dim: Annotated[Whole | None, Help("Width of one head.")] = None
    patch_size: Annotated[Pixels | None, Help("Pixels a side.")] = None
    image_size: Annotated[Pixels | None, Help("Pixels a side.")] = None
    pool: Annotated[str | None, Help("avg, map, token or none.")] = None


def encoder_name(name: str, runs: Path) -> str:
    """The full name of an encoder: of a trained one its run_id. Raises UserError at once where it is not in `runs`."""
    from sovit.ledger.records import find_branch

    kind, _, rest = name.rpartition(":")
    return f"random:{find_branch(rest, runs)}" if kind == "random" else name if kind else find_branch(name, runs)


def given(options: Any) -> dict:
    """Fields of an options dataclass that the user has named."""
    return {name: value for name, value in vars(options).items() if value is not None}


def show(found: Any, text: Callable[[Any], str], as_json: bool) -> None:
    """Print a result as JSON, or as `text` of it for a person."""
    print(json.dumps(found, indent=2) if as_json else text(found))


def sheet(images: Any, captions: list[str], out: Path, title: str, **how: int) -> None:
    """Write images [B, 3, H, W] with captions as one PNG. how: columns, lines of `sovit.report.figures.contact_sheet`."""
    from sovit.report.figures import contact_sheet

    contact_sheet(images.clamp(0, 1).permute(0, 2, 3, 1).numpy(), captions, out, title=title, **how)
