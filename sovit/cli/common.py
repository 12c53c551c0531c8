"""What commands share: options, and how a result is printed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sovit import OUTPUTS, UserError

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


Whole = Annotated[int, Parameter(converter=_whole)]  # cyclopts itself would round 1.5 to 2
Pixels = Annotated[int, Parameter(converter=_pixels)]


@Flat
@dataclass(frozen=True)
class Folders:
    """Where a study is found."""

    runs: Path = Path("runs")
    """Folder of trunks."""
    results: Path | None = None
    """Folder of ledgers (default: as launched, else runs/results, else results)."""


@Flat
@dataclass(frozen=True)
class Place:
    """Where to compute, and where to keep it."""

    runs: Path = Path("runs")
    """Folder of trunks."""
    results: Path = OUTPUTS
    """Folder of the ledger."""
    device: str = "cpu"
    """Such as cpu or cuda."""


@Flat
@dataclass(frozen=True)
class Geometry:
    """What the sizes of a shape leave open."""

    head_dim: Whole | None = None
    """Width of one head."""
    patch_size: Pixels | None = None
    """Pixels a side."""
    image_size: Pixels | None = None
    """Pixels a side."""
    pool: str | None = None
    """avg, map, token or none."""


def given(options: Any) -> dict:
    """Fields of an options dataclass that the user has named."""
    return {name: value for name, value in vars(options).items() if value is not None}


def show(found: Any, text: Callable[[Any], str], as_json: bool) -> None:
    """Print a result as JSON, or as `text` of it for a person."""
    print(json.dumps(found, indent=2) if as_json else text(found))
