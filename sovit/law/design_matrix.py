"""From columns of measurements to what a law form reads: checks, dimensions, arms, trunks, FLOPs geometry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import strata_of
from sovit.law.form import Form
from sovit.law.forms import LAWS, facing
from sovit.law.geometry import geometry_of, positive
from sovit.law.options import LawOptions
from sovit.law.solver.fitter import Rows
from sovit.spec.shape import DIMENSIONS

IDENTITY = (*DIMENSIONS, "head_dim", "pool", "num_registers", "num_params", "init_seed", "data_seed", "peak_lr")


@dataclass(frozen=True)
class Prepared:
    """What a fit starts from: the columns checked, and the rows of the form with their trunks."""

    name: str
    form: Form
    table: dict[str, np.ndarray]
    y: np.ndarray  # [N] of the rows given
    dims: tuple[str, ...]
    centre: dict[str, float]  # of the design, by dimension
    arms: np.ndarray  # [N]
    index: np.ndarray  # [N] trunk

    @cached_property
    def rows(self) -> Rows:
        """The rows of the form, columns centred. Raises UserError for too few."""
        logs, source = _logs(self.form, self.table, self.arms)
        if self.form.arms:
            _check_arms(self, np.bincount(logs[2].astype(int), minlength=len(self.dims)))
            own = [logs[0, logs[2] == g].mean() for g in range(len(self.dims))]
            centre = np.array([*own, logs[1].mean()])
        else:
            for name, column in zip(self.form.terms, logs):
                if np.ptp(column) == 0:
                    raise UserError(f"column {name!r} has one value only; form={self.name!r} needs at least two of it")
            centre = logs.mean(1)
        num = len(self.form.names)
        if len(source) <= num:
            raise UserError(
                f"{len(source)} rows cannot determine the {num} parameters of form={self.name!r};"
                f" give at least {num + 1}"
            )
        trunk = np.unique(self.index[source], return_inverse=True)[1].ravel()
        return Rows(self.form, _centred(self.form, logs, centre), self.y[source], trunk, source, centre)

    @property
    def strata(self) -> np.ndarray:
        """Stratum of each trunk of the form's rows, from its arm [G]."""
        first = np.unique(self.rows.trunk, return_index=True)[1]
        return strata_of(self.arms[self.rows.source][first].tolist())

    def take(self, which: np.ndarray) -> Prepared:
        """Those of the rows given that a mask or index names; centre and arms of the design stay."""
        table = {name: column[which] for name, column in self.table.items()}
        y, arms, index = self.y[which], self.arms[which], self.index[which]
        return dataclasses.replace(self, table=table, y=y, arms=arms, index=index)

    def named(self, name: str, terms: Sequence[str] | None = None) -> Prepared:
        """The same rows for another form."""
        form = LAWS[name].build(self.dims, self.form.zero_line, tuple(terms) if terms else None)
        return dataclasses.replace(self, name=name, form=form)


def prepare_fit(form: str, columns: Mapping, y: Any, options: LawOptions = LawOptions()) -> Prepared:
    """Check columns and losses and say which rows `form` is fitted to.

    Raises UserError for bad columns, too few rows, unknown names.
    """
    table, y = check(form, columns, y, options)
    terms = tuple(options.terms) if options.terms is not None else None
    named = varied_dims(table, options.dims) if LAWS[form].uses_dims and terms is None else ()
    centre, arms = star(table, named) if named else ({}, np.full(len(y), "all"))
    built = LAWS[form].build(named, options.zero_line, terms)
    return Prepared(form, built, table, y, named, centre, arms, trunks(table, options.clusters, len(y)))


def _logs(form: Form, table: Mapping, arms: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """ln of a form's columns [K, n], and the rows that they came from [n].

    Of a form by arm: ln x of the row's own arm, ln compute, the arm; rows on an arm or at the centre.
    """
    if not form.arms:
        logs = np.log(np.stack([positive(table, n) for n in form.terms]))
        return logs, np.arange(logs.shape[1])
    picks = [np.flatnonzero((arms == d) | (arms == "centre")) for d in form.terms]
    source, arm = np.concatenate(picks), np.repeat(np.arange(len(picks)), [len(p) for p in picks])
    own = np.log(np.concatenate([positive(table, d)[p] ** s for d, p, s in zip(form.terms, picks, facing(form.terms))]))
    return np.stack([own, np.log(positive(table, "compute")[source]), arm.astype(float)]), source


def _centred(form: Form, logs: np.ndarray, centre: np.ndarray) -> np.ndarray:
    if form.arms:
        return np.stack([logs[0] - centre[logs[2].astype(int)], logs[1] - centre[-1], logs[2]])
    return logs - centre[:, None]


def predicted(form: Form, theta: np.ndarray, centre: np.ndarray, table: Mapping, arms: np.ndarray | None) -> np.ndarray:
    """Losses [n] of any rows by theta [P]. Of a form by arm the mean of a row's arms, nan for a row off every arm."""
    logs, source = _logs(form, table, arms)
    value = np.exp(form.evaluate(theta[None], _centred(form, logs, centre))[0][0])
    num = len(next(iter(table.values())))
    count = np.bincount(source, minlength=num)
    return np.where(count > 0, np.bincount(source, value, num) / np.maximum(count, 1), np.nan)


def _check_arms(ready: Prepared, counts: np.ndarray) -> None:
    num = sum(name.endswith(f"_{ready.dims[0]}") for name in ready.form.names)  # parameters of one arm
    if counts.min() < num:
        thin = ready.dims[int(np.argmin(counts))]
        raise UserError(
            f"the arm {thin!r} of form={ready.name!r} has {counts.min()} rows for {num} parameters; run more of it, or"
            " fit 'joint'"
        )


def check(form: str, columns: Mapping, y: Any, options: LawOptions) -> tuple[dict, np.ndarray]:
    """Columns as arrays and y as floats. Raises UserError (one line) naming the first bad column, row or option."""
    if form not in LAWS:
        raise UserError(f"form={form!r} is unknown; choose one of {', '.join(LAWS)}")
    terms, zero_line, clusters = options.terms, options.zero_line, options.clusters
    able = [name for name, entry in LAWS.items() if entry.takes_terms]
    if (terms is not None and form not in able) or (terms is None and LAWS[form].needs_terms):
        raise UserError(
            f"form={form!r} with terms={terms!r}; 'additive' needs terms=(columns), of the others {', '.join(able[:-1])}"
            " takes them"
        )
    if LAWS[form].bounded and not (zero_line and np.isfinite(zero_line) and zero_line > 0):
        raise UserError(
            f"form={form!r} with zero_line={zero_line!r}; give the loss of knowing nothing, such as log(num_classes)"
        )
    y = np.asarray(y, float)
    table = {name: np.asarray(column) for name, column in columns.items()}
    for name, column in [*table.items(), ("clusters", y if clusters is None else np.asarray(clusters))]:
        if column.shape != y.shape:
            raise UserError(f"column {name!r} has shape {column.shape} but y has {y.shape}; give one value a row")
    bad = np.flatnonzero(~(np.isfinite(y) & (y > 0)))
    if len(bad):
        raise UserError(
            f"y={float(y[bad[0]])} in row {bad[0]} is not a positive number; leave that row out, with a reason"
        )
    if "compute" not in table and {"forward_flops", "num_examples"} <= set(table):
        table["compute"] = table["forward_flops"].astype(float) * table["num_examples"].astype(float)
    needed = terms or LAWS[form].needs
    if "num_params" in needed and "num_params" not in table and (known := geometry_of(table, options.geometry)):
        table["num_params"] = known.num_params({d: positive(table, d) for d in DIMENSIONS if d in table})
    if "num_patches" in needed and "num_patches" not in table and {"patch_size", "image_size"} <= set(table):
        table["num_patches"] = (positive(table, "image_size") / positive(table, "patch_size")) ** 2
    missing = [name for name in needed if name not in table]
    if missing:
        raise UserError(
            f"form={form!r} needs the column {missing[0]!r}; the columns given are {', '.join(sorted(table))}"
        )
    return table, y


def varied_dims(table: Mapping, dims: Sequence[str] | None) -> tuple[str, ...]:
    """The dimensions of the law: those named, or those of width, depth, mlp_dim, patch and image size that vary."""
    found = tuple(d for d in dims or DIMENSIONS if d in table and len(np.unique(positive(table, d))) > 1)
    missing = [d for d in dims or () if d not in found]
    if missing:
        raise UserError(f"dimension {missing[0]!r} does not vary in the data; leave it out of dims or run more values")
    if not found:
        raise UserError(f"none of {', '.join(DIMENSIONS)} varies in the data; a shape law needs at least two shapes")
    return found


def trunks(table: Mapping, clusters: Any, num: int) -> np.ndarray:
    """Trunk of each row as 0..G-1: `clusters`, else trunk_id, else equality of everything but the number of images."""
    if clusters is None:
        clusters = table.get("trunk_id")
    if clusters is not None:
        return np.unique(np.asarray(clusters).astype(str), return_inverse=True)[1]
    same = [table[name] for name in IDENTITY if name in table]
    if not same:  # no shape is known: rows that share every column but the data columns
        same = [table[n] for n in sorted(table) if n not in ("num_examples", "tokens", "compute", "train_flops")]
    return groups_of(same or [np.arange(num)], num)


def groups_of(columns: Sequence[np.ndarray], num: int) -> np.ndarray:
    """Which rows [num] agree in all columns, as 0..G-1."""
    group = np.zeros(num, np.int64)
    for column in columns:
        values = column if column.dtype.kind in "biuf" else column.astype(str)
        place = np.unique(values, return_inverse=True)[1].ravel()
        group = np.unique(group * (int(place.max()) + 1) + place, return_inverse=True)[1].ravel()
    return group


def star(table: Mapping, dims: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
    """Centre of the design and each row's arm: the one dimension that differs, `centre`, or `corner` for two or more.

    The centre is the mode of each dimension over the distinct shapes (in a star it holds even where the centre itself
    was never run, as in SoViT); ties go to the value nearest the middle on a log scale.
    """
    values = np.stack([positive(table, d) for d in dims], 1)
    shapes = np.unique(values, axis=0)
    centre = {}
    for k, d in enumerate(dims):
        options, counts = np.unique(shapes[:, k], return_counts=True)
        options = options[counts == counts.max()]
        centre[d] = float(options[np.abs(np.log(options) - np.log(shapes[:, k]).mean()).argmin()])
    return centre, arms_of(table, centre)


def arms_of(table: Mapping, centre: Mapping[str, float]) -> np.ndarray:
    """Each row's arm [n]: the one dimension that differs from the centre, `centre`, or `corner` for two or more."""
    differs = np.stack([np.asarray(table[d], float) != x for d, x in centre.items()])
    count, arm = differs.sum(0), np.array(list(centre))[differs.argmax(0)]
    return np.where(count == 0, "centre", np.where(count == 1, arm, "corner"))
