"""A fitted law: its parts, and its JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import LEVEL
from sovit.law.diagnostics import features
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.spec.shape import DIMENSIONS


@dataclass(frozen=True)
class Fit:
    """A fitted law. Every field is plain data, so that law.json holds all of it.

    params: raw parameters (units of the columns; an exponent whose amplitude is 0 is None). intervals: by parameter,
    {low, high, pairs_low, pairs_high}. model: dims, terms, centres and the centred theta that `predict` uses.
    data: grid (values run), centre, compute_range. draws: centred thetas, `random_effects` (headline) and `pairs`.
    """

    form: str
    params: dict
    intervals: dict
    exponents: dict
    noise: dict
    num_rows: int
    num_clusters: int
    objective: float
    extrapolation: dict
    diagnostics: dict
    model: dict
    data: dict
    geometry: dict | None
    level: float = LEVEL
    draws: dict = field(default_factory=dict)

    @property
    def shape_form(self):
        """The form object of `sovit.law.forms` that evaluates this law."""
        entry, dims = LAWS[self.form], tuple(self.model["dims"])
        terms = tuple(self.model["terms"]) if entry.takes_terms and not dims else None
        return entry.build(dims, self.model["zero_line"], terms)

    @property
    def theta(self) -> np.ndarray:
        return np.array(self.model["theta"])

    def predict(self, columns: Mapping) -> np.ndarray:
        """Losses [n] for columns name -> [n]: the law's dims and num_examples (sovit: dims and compute).

        Where a law needs num_params or num_patches and the columns lack them they are counted from the dims.
        `sovit` describes one arm at a time: a row at the centre gets the mean of its arms, a row off every arm nan.
        Raises UserError for a missing column or a value that is not positive.
        """
        form, dims = self.shape_form, self.model["dims"]
        needed = (*dims, "compute") if form.arms else form.terms
        if "num_params" in needed and "num_params" not in columns and self.geometry and set(dims) <= set(columns):
            sizes = {d: np.atleast_1d(np.asarray(columns[d], float)) for d in DIMENSIONS if d in columns}
            columns = dict(columns) | dict(num_params=Geometry(**self.geometry).num_params(sizes))
        if "num_patches" in needed and "num_patches" not in columns and self.geometry and set(dims) <= set(columns):
            sizes = {d: np.atleast_1d(np.asarray(columns[d], float)) for d in DIMENSIONS if d in columns}
            patches = Geometry(**self.geometry).num_patches(sizes) * np.ones(len(next(iter(sizes.values()))))
            columns = dict(columns) | dict(num_patches=patches)
        missing = [n for n in needed if n not in columns]
        if missing:
            raise UserError(f"predict with form={self.form!r} needs the column {missing[0]!r}; add it")
        table = {n: np.atleast_1d(columns[n]) for n in needed}
        arms = None
        if form.arms:
            differs = np.stack([table[d] != self.data["centre"][d] for d in dims])
            arms = np.where(differs.sum(0) == 1, np.array(dims)[differs.argmax(0)], "corner")
            arms = np.where(differs.any(0), arms, "centre")
        u, source = features(form, np.array(self.model["centres"]), table, arms)
        value = np.exp(form.evaluate(self.theta[None], u)[0][0])
        size = len(table[needed[0]])
        count = np.bincount(source, minlength=size)
        return np.where(count > 0, np.bincount(source, value, size) / np.maximum(count, 1), np.nan)

    def to_json(self) -> str:
        """law.json: indented, but one line a bootstrap draw. Deterministic; refuses nan and infinity."""
        body = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("draws", "data")}
        text = json.dumps(body, indent=1, allow_nan=False)
        data = json.dumps(self.data, allow_nan=False)
        draws = ",\n".join(
            f'  "{kind}": [\n   ' + ",\n   ".join(json.dumps(row, allow_nan=False) for row in rows) + "]"
            for kind, rows in self.draws.items()
        )
        return f'{text[:-2]},\n "data": {data},\n "draws": {{\n{draws}}}\n}}\n'

    @staticmethod
    def from_json(text: str) -> Fit:
        """Raises UserError for text that is not a law.json."""
        try:
            return Fit(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"not a law.json ({reason}); write one with `sovit fit LEDGER --out DIR`") from None


def read_law(path: Path | str) -> Fit:
    """Read a law.json. Raises UserError where it is missing or not a law."""
    try:
        return Fit.from_json(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the law {path}: {error.strerror}; make one with sovit fit") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a law.json (not text); make one with sovit fit") from None
