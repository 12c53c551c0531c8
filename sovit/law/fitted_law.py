"""A fitted law: its parts, and its JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from sovit import UserError, reason
from sovit.files import write_atomic
from sovit.law.bootstrap import LEVEL
from sovit.law.compute_optimum import Family
from sovit.law.design_matrix import arms_of, predicted
from sovit.law.diagnostics import Diagnostics, Noise
from sovit.law.exponents import Growth, Interval, Range
from sovit.law.extrapolation import Extrapolation
from sovit.law.form import Form
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.ledger.trained_on import TrainedOn
from sovit.spec.shape import DIMENSIONS


@dataclass(frozen=True, kw_only=True)
class Model:
    """What evaluates the law: its columns, their centres in ln x, the centred parameters, and how they were fitted."""

    dims: list[str]
    terms: list[str]
    names: list[str]
    theta: list[float]
    centres: list[float]
    zero_line: float | None
    loss: str
    huber_delta: float | None
    whitened: bool


@dataclass(frozen=True, kw_only=True)
class Data:
    """What was run: the values and the centre of each dimension, and the ranges of the budgets."""

    grid: dict[str, list[float]]
    centre: dict[str, float]
    compute_range: Range | None = None
    num_examples_range: Range | None = None
    train_flops_range: Range | None = None
    grid_sides: list[int] | None = None
    metric: str | None = None
    left_out: list[dict[str, str]] | None = None
    notes: list[str] | None = None
    warnings: list[str] | None = None
    trained_on: TrainedOn | None = None
    best_run: str | None = None


@dataclass(frozen=True)
class Fit:
    """A fitted law, as law.json holds it.

    params: raw parameters (units of the columns; an exponent whose amplitude is 0 is None). draws: centred thetas,
    `random_effects` (headline) and `pairs`. num_clusters: trunks.
    """

    form: str
    params: dict[str, float | None]
    intervals: dict[str, Interval]
    exponents: dict[str, Growth]
    noise: Noise
    num_rows: int
    num_clusters: int
    objective: float
    extrapolation: Extrapolation
    diagnostics: Diagnostics
    model: Model
    data: Data
    geometry: Geometry | None
    level: float = LEVEL
    draws: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in LAWS:
            raise UserError(f"form={self.form!r} is unknown; choose one of {', '.join(LAWS)}")
        num, model = len(self.model.theta), self.model
        lengths = [len(model.names), *(len(row) for rows in self.draws.values() for row in rows)]
        if {num} != {*lengths}:
            raise UserError(f"its {num} parameters, their names and draws differ in number")
        if not self.data.grid.keys() >= {*model.dims} or any(min(x, default=0) <= 0 for x in self.data.grid.values()):
            raise UserError("data.grid lacks values above 0 for a dimension of the law")
        if not (0 < self.level < 1 and self.noise.sd >= 0 and self.num_rows > 0):
            raise UserError(f"level={self.level}, noise.sd={self.noise.sd} or num_rows={self.num_rows} cannot be")

    @property
    def shape_form(self) -> Form:
        """The form object of `sovit.law.forms` that evaluates this law."""
        entry, dims = LAWS[self.form], tuple(self.model.dims)
        terms = tuple(self.model.terms) if entry.takes_terms and not dims else None
        return entry.build(dims, self.model.zero_line, terms)

    @property
    def theta(self) -> np.ndarray:
        return np.array(self.model.theta)

    @property
    def centre(self) -> np.ndarray:
        """Of the form's columns in ln x, about which `theta` stands."""
        return np.array(self.model.centres)

    @property
    def family(self) -> Family:
        """The laws of this form on this design, for `optimum_of`."""
        return Family(self.shape_form, self.centre, self.geometry, self.data.grid)

    def predict(self, columns: Mapping) -> np.ndarray:
        """Losses [n] for columns name -> [n]: the law's dims and num_examples (sovit: dims and compute).

        Where a law needs num_params or num_patches and the columns lack them they are counted from the dims.
        `sovit` describes one arm at a time: a row at the centre gets the mean of its arms, a row off every arm nan.
        Raises UserError for a missing column or a value that is not positive.
        """
        form, dims = self.shape_form, self.model.dims
        needed = (*dims, "compute") if form.arms else form.terms
        table = {n: np.atleast_1d(column) for n, column in columns.items()}
        if self.geometry and set(dims) <= set(table):
            sizes = {d: table[d].astype(float) for d in DIMENSIONS if d in table}
            counted = dict(num_params=self.geometry.num_params(sizes), num_patches=self.geometry.num_patches(sizes))
            table = {n: count + 0 * sizes[dims[0]] for n, count in counted.items()} | table
        missing = [n for n in needed if n not in table]
        if missing:
            raise UserError(f"predict with form={self.form!r} needs the column {missing[0]!r}; add it")
        table = {n: table[n] for n in needed}
        return predicted(form, self.theta, self.centre, table, arms_of(table, self.data.centre) if form.arms else None)

    def to_json(self) -> str:
        """law.json: indented, but one line a bootstrap draw. Deterministic; refuses nan and infinity."""
        body = plain(self)
        data, many = json.dumps(body.pop("data"), allow_nan=False), body.pop("draws")
        draws = ",\n".join(
            f'  "{kind}": [\n   ' + ",\n   ".join(json.dumps(row, allow_nan=False) for row in rows) + "]"
            for kind, rows in many.items()
        )
        text = json.dumps(body | dict(level=body.pop("level")), indent=1, allow_nan=False)
        return f'{text[:-2]},\n "data": {data},\n "draws": {{\n{draws}}}\n}}\n'

    @staticmethod
    def from_json(text: str) -> Fit:
        """Raises UserError for text that is not a law.json. Keys that no part knows are left out."""
        try:
            fit = part_of(Fit, json.loads(text), "")
        except (ValueError, RecursionError) as error:  # a UserError is one
            raise UserError(f"not a law.json ({reason(error)}); write one with `sovit fit LEDGER --out DIR`") from None
        return fit

    def best_shape(self, train_flops: float, **rules: Any) -> Any:
        """The best integer shape for a budget: `sovit.best_shape` of this law, with its rules."""
        import sovit

        return sovit.best_shape(self, train_flops, **rules)

    def save(self, path: Path | str) -> None:
        """Write law.json, atomically."""
        write_atomic(Path(path), self.to_json())


def plain(part: Any) -> Any:
    """A law or a part of it as plain data; fields that are None by default are left out where they are None."""
    if dataclasses.is_dataclass(part):
        values = {f.name: (getattr(part, f.name), f.default) for f in dataclasses.fields(part)}
        return {name: plain(value) for name, (value, default) in values.items() if value is not None or default}
    if isinstance(part, dict):
        return {name: plain(value) for name, value in part.items()}
    return part


LARGEST = 1e300  # of any number of a law


def part_of(hint: Any, value: Any, where: str) -> Any:
    """Plain data as what a law's part is annotated to be; keys that no part knows are left out.

    Raises UserError for what is missing, of another type, not finite, or beyond LARGEST.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return None if value is None else part_of(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass_of(hint, value, where)
    expected: Any = {tuple: list, Sequence: list, float: (int, float)}.get(kind or hint, kind or hint)
    if hint is Any or kind is Literal:
        return value
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {json.dumps(value)[:40]}, not of type {getattr(hint, '__name__', hint)}")
    if hint is float and not abs(value) < LARGEST:  # nan is not below it either
        raise UserError(f"{where} is {value}, no finite number")
    if expected is list:
        return [part_of(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    if kind is dict:
        return {name: part_of(arguments[1], x, f"{where}.{name}") for name, x in value.items()}
    return value


def _dataclass_of(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where or 'it'} is {json.dumps(value)[:40]}, not an object")
    hints, found = get_type_hints(hint), {}
    for f in dataclasses.fields(hint):
        if f.name in value:
            found[f.name] = part_of(hints[f.name], value[f.name], f"{where}.{f.name}".lstrip("."))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"it lacks {f'{where}.{f.name}'.lstrip('.')}")
    return hint(**found)


def read_law(path: Path | str) -> Fit:
    """Read a law.json. Raises UserError where it is missing or not a law.

    >>> sovit.read_law("results/stream_star_law/law.json").form
    'bounded'
    """
    try:
        return Fit.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the law {path}: {error.strerror}; make one with sovit fit") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a law.json (not text); make one with sovit fit") from None


def read_siblings(path: Path, forms: Sequence[str]) -> dict[str, Fit]:
    """Read the laws of other `forms` that `sovit fit` kept of the same rows, as far as they stand beside `path`."""
    folder = path.parent if path.parent.name == "forms" else path.parent / "forms"
    return {form: read_law(folder / f"{form}.json") for form in forms if (folder / f"{form}.json").is_file()}
