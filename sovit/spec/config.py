"""Hold dataclasses to their annotations, read them from JSON, and override their fields by dotted keys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from sovit import UserError


class Limit(typing.NamedTuple):
    """What a number of an annotation must be."""

    holds: Callable[[float], bool]
    words: str


_NOT_NEGATIVE = Limit(lambda x: x >= 0, "at least 0")
Whole = Annotated[int, _NOT_NEGATIVE]
Count = Annotated[int, Limit(lambda x: x >= 1, "at least 1")]
Positive = Annotated[float, Limit(lambda x: x > 0, "above 0")]
AtLeast0 = Annotated[float, _NOT_NEGATIVE]
Decay = Annotated[float, Limit(lambda x: 0 <= x < 1, "at least 0 and under 1")]
Share = Annotated[float, Limit(lambda x: 0 < x < 1, "a share between 0 and 1")]
Seed = Annotated[int, Limit(lambda x: 0 <= x < 1 << 32, "a whole number from 0 to 2^32 - 1")]


def override(run: Any, assignments: Iterable[str]) -> Any:
    """Apply `key=value` strings such as `recipe.peak_lr=0.004`, `shape.width=64` or `stages.0.num_examples=80`.

    run: a Run or a VlmRun. Keys are its `keys`; values must have the field's type. Raises UserError otherwise.
    """
    d = json.loads(json.dumps(run.to_dict()))  # in which what is nested can be written
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or key not in keys(run):
            raise UserError(f"unknown key in {assignment!r}; keys are {', '.join(keys(run))}")
        *path, name = key.split(".")
        owner = d
        for part in path:
            owner = owner[int(part) if isinstance(owner, list) else part]
        value: object = text
        if not isinstance(owner[name], str):
            try:
                value = json.loads(text.lower() if text in ("True", "False") else text)
            except json.JSONDecodeError:
                raise UserError(f"{key}={text!r} is not a value; give a number, true, false or a [list]") from None
        owner[name] = value
    return type(run).from_dict(d)


def keys(run: Any) -> list[str]:
    """The fields of a run that can be overridden, those of what it is made of as `shape.width` or `stages.0.vision.mode`."""
    found = []
    for f in dataclasses.fields(run):
        value = getattr(run, f.name)
        if dataclasses.is_dataclass(value):
            found += [f"{f.name}.{key}" for key in keys(value)]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            found += [f"{f.name}.{i}.{key}" for i, part in enumerate(value) for key in keys(part)]
        else:
            found.append(f.name)
    return found


def changed(instance: Any) -> dict:
    """The fields of a dataclass that differ from their default."""
    values = {f.name: (getattr(instance, f.name), f.default) for f in dataclasses.fields(instance)}
    return {name: value for name, (value, default) in values.items() if value != default}


def digest(identity: dict) -> str:
    """10 hex digits of plain data."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def check(instance: Any) -> None:
    """Hold a dataclass to its annotations. 0 given for 0.0 becomes 0.0: equal runs must have equal ids."""
    for name, hint in _hints(instance.__class__).items():
        object.__setattr__(instance, name, _typed(hint, getattr(instance, name), name))


def from_dict(cls: Any, d: dict, where: str) -> Any:
    """Make a dataclass of its fields. Raises UserError for unknown, missing or wrongly typed ones."""
    if not isinstance(d, dict):
        raise UserError(f"{where} must be an object of fields, got {d!r}")
    unknown = set(d) - set(_hints(cls))
    if unknown:
        raise UserError(
            f"unknown key {sorted(unknown)[0]!r} in {where}; known keys are {', '.join(sorted(_hints(cls)))}"
        )
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in d and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return cls(**d)


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_dict(hint, value, where)
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        value = _typed(arguments[0], value, where)
        if not arguments[1].holds(value):
            raise UserError(f"{where}={value!r} must be {arguments[1].words}")
        return value
    if kind is Literal:
        if value not in arguments:
            raise UserError(f"{where}={value!r} is unknown; choose one of {', '.join(arguments)}")
        return value
    if kind is tuple:  # tuple[int, ...]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value!r} must be a list")
        return tuple(_typed(arguments[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r} must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value!r} must be finite")
    return value
