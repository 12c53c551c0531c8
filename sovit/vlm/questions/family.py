"""A family of questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """`asks(scene)` lists what can be asked of an image: (arguments of `text`, answer)."""

    kind: str
    text: str  # with places for arguments, as of str.format
    asks: Callable[[Any], list[tuple[tuple, str]]]
    choices: tuple[str, ...] = ()
