"""Read dataclasses from JSON and override their fields by dotted keys."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing

from sovit import UserError


def override(run: typing.Any, assignments: typing.Iterable[str]) -> typing.Any:
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


def keys(run: typing.Any) -> list[str]:
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


def _non_default(instance: typing.Any) -> dict:
    values = {f.name: (getattr(instance, f.name), f.default) for f in dataclasses.fields(instance)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _check_types(instance: typing.Any) -> None:
    """Hold a dataclass to its annotations. 0 given for 0.0 becomes 0.0: equal runs must have equal ids."""
    for name, hint in typing.get_type_hints(type(instance)).items():
        object.__setattr__(instance, name, _typed(hint, getattr(instance, name), name))


def _from_dict(cls: typing.Any, d: dict, where: str) -> typing.Any:
    if not isinstance(d, dict):
        raise UserError(f"{where} must be an object of fields, got {d!r}")
    hints = typing.get_type_hints(cls)
    unknown = set(d) - set(hints)
    if unknown:
        raise UserError(f"unknown key {sorted(unknown)[0]!r} in {where}; known keys are {', '.join(sorted(hints))}")
    values = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in d.items()}
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return cls(**values)


def _typed(hint: typing.Any, value: typing.Any, where: str) -> typing.Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _from_dict(hint, value, where)
    if isinstance(hint, types.GenericAlias):  # tuple[int, ...]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value!r} must be a list")
        return tuple(_typed(typing.get_args(hint)[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r} must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value!r} must be finite")
    return value
