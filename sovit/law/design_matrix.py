"""From columns of measurements to what a law form reads: checks, dimensions, arms, trunks, FLOPs geometry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.form import Form
from sovit.law.forms import LAWS, facing
from sovit.law.geometry import Geometry
from sovit.spec.shape import DIMENSIONS, POOLS

IDENTITY = (*DIMENSIONS, "head_dim", "pool", "num_registers", "num_params", "init_seed", "data_seed", "peak_lr")


@dataclass(frozen=True)
class Rows:
    """The rows a form is fitted to. `source` maps each to the row given: a star's centre stands once in every arm."""

    form: Form
    u: np.ndarray  # [K, n] centred log columns
    y: np.ndarray  # [n]
    source: np.ndarray  # [n]
    centre: np.ndarray  # [K]

    def trunks(self, index: np.ndarray) -> np.ndarray:
        """Trunk of each row as 0..G-1 [n], for `index`, the trunks of the rows given."""
        return np.unique(index[self.source], return_inverse=True)[1].ravel()


@dataclass(frozen=True)
class Prepared:
    """What a fit starts from: the columns checked, and the rows of the form with their trunks and known noise."""

    table: dict[str, np.ndarray]
    y: np.ndarray  # [N] of the rows given
    dims: tuple[str, ...]
    centre: dict[str, float]  # of the design, by dimension
    arms: np.ndarray  # [N] of the rows given
    index: np.ndarray  # [N] trunk of the rows given
    log_sd: np.ndarray | None  # [N] what is known of the noise of ln y
    rows: Rows
    own: np.ndarray  # [n] trunk of each row of the form

    @property
    def known_sd(self) -> np.ndarray | None:
        """Known noise of each row of the form [n]."""
        return None if self.log_sd is None else self.log_sd[self.rows.source]


def prepare_fit(
    form: str,
    columns: Mapping,
    y,
    *,
    clusters=None,
    dims: Sequence[str] | None = None,
    terms: Sequence[str] | None = None,
    zero_line: float | None = None,
    geometry: Mapping | None = None,
    measurement_sd=None,
    whiten: bool = True,
) -> Prepared:
    """Check columns and losses and make the rows that `form` is fitted to; arguments as in `law.fit`.

    Raises UserError for bad columns, too few rows, unknown names.
    """
    table, y = check(form, columns, y, clusters, terms, zero_line, geometry)
    log_sd = relative_sd(measurement_sd, y, whiten)
    named = varied_dims(table, dims) if LAWS[form].uses_dims and terms is None else ()
    centre, arms = star(table, named) if named else ({}, np.full(len(y), "all"))
    rows = prepare(form, table, y, named, zero_line=zero_line, terms=terms, arms=arms)
    index = trunks(table, clusters, len(y))
    return Prepared(table, y, named, centre, arms, index, log_sd, rows, rows.trunks(index))


def check(form: str, columns: Mapping, y, clusters, terms, zero_line, geometry=None) -> tuple[dict, np.ndarray]:
    """Columns as arrays and y as floats. Raises UserError (one line) naming the first bad column, row or option."""
    if form not in LAWS:
        raise UserError(f"form={form!r} is unknown; choose one of {', '.join(LAWS)}")
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
    if "num_params" in needed and "num_params" not in table and (known := geometry_of(table, geometry)):
        table["num_params"] = known.num_params({d: positive(table, d) for d in DIMENSIONS if d in table})
    if "num_patches" in needed and "num_patches" not in table and {"patch_size", "image_size"} <= set(table):
        table["num_patches"] = (positive(table, "image_size") / positive(table, "patch_size")) ** 2
    missing = [name for name in needed if name not in table]
    if missing:
        raise UserError(
            f"form={form!r} needs the column {missing[0]!r}; the columns given are {', '.join(sorted(table))}"
        )
    return table, y


def relative_sd(measurement_sd, y: np.ndarray, whiten: bool) -> np.ndarray | None:
    """S.d. of ln y [n] from that of y, None for None. Raises UserError for values that are none, or without whitening."""
    if measurement_sd is None:
        return None
    if not whiten:
        raise UserError("measurement_sd weighs rows, which needs whitening; leave out huber_delta and whiten")
    sd = np.asarray(measurement_sd, float)
    if sd.shape != y.shape:
        raise UserError(f"measurement_sd has shape {sd.shape} but y has {y.shape}; give one value a row")
    bad = np.flatnonzero(~(np.isfinite(sd) & (sd >= 0)))
    if len(bad):
        raise UserError(f"measurement_sd={sd[bad[0]]} in row {bad[0]} is no standard deviation; give 0 or more")
    if not sd.any():
        raise UserError("measurement_sd is 0 in every row; leave it out")
    return sd / y


def positive(table: Mapping, name: str) -> np.ndarray:
    """A column as floats, all above zero. Raises UserError."""
    try:
        column = np.asarray(table[name], float)
    except (TypeError, ValueError):
        raise UserError(f"column {name!r} is not numeric; give numbers") from None
    bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
    if len(bad):
        raise UserError(
            f"{name}={float(column[bad[0]])} in row {bad[0]} is not a positive number; a power law needs one"
        )
    return column


def varied_dims(table: Mapping, dims: Sequence[str] | None) -> tuple[str, ...]:
    """The dimensions of the law: those named, or those of width, depth, mlp_dim, patch and image size that vary."""
    found = tuple(d for d in dims or DIMENSIONS if d in table and len(np.unique(positive(table, d))) > 1)
    missing = [d for d in dims or () if d not in found]
    if missing:
        raise UserError(f"dimension {missing[0]!r} does not vary in the data; leave it out of dims or run more values")
    if not found:
        raise UserError(f"none of {', '.join(DIMENSIONS)} varies in the data; a shape law needs at least two shapes")
    return found


def trunks(table: Mapping, clusters, num: int) -> np.ndarray:
    """Trunk of each row as 0..G-1: `clusters`, else trunk_id, else equality of everything but the number of images."""
    if clusters is None:
        clusters = table.get("trunk_id")
    if clusters is not None:
        return np.unique(np.asarray(clusters).astype(str), return_inverse=True)[1]
    keys = [codes(table[name]) for name in IDENTITY if name in table]
    if not keys:  # no shape is known: rows that share every column but the data columns
        varying = [n for n in sorted(table) if n not in ("num_examples", "tokens", "compute", "train_flops")]
        keys = [codes(table[name]) for name in varying] or [np.arange(num)]
    return codes(np.stack(keys, 1))


def codes(column: np.ndarray) -> np.ndarray:
    """Equal values of a column [n], or equal rows [n, k], as equal numbers 0, 1, ... [n]; values in the order of text."""
    if column.ndim == 2:
        return np.unique(column, axis=0, return_inverse=True)[1].ravel()
    if column.dtype.kind not in "biuf":
        return np.unique(column.astype(str), return_inverse=True)[1].ravel()
    values, place = np.unique(column, return_inverse=True)
    return np.argsort(np.argsort(values.astype(str), kind="stable"), kind="stable")[place.ravel()]


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
    differs = values != np.array(list(centre.values()))
    count = differs.sum(1)
    arm = np.array(dims)[differs.argmax(1)]
    return centre, np.where(count == 0, "centre", np.where(count == 1, arm, "corner"))


def prepare(form_name: str, table, y, dims, *, zero_line=None, terms=None, arms=None, centre=None) -> Rows:
    """Centred logs for a form; `centre` reuses that of another fit. Raises UserError for too few rows."""
    form = LAWS[form_name].build(tuple(dims), zero_line, terms)
    if form.arms:
        picks = [np.flatnonzero((arms == d) | (arms == "centre")) for d in dims]
        source = np.concatenate(picks)
        arm = np.repeat(np.arange(len(dims)), [len(p) for p in picks])
        own = np.log(np.concatenate([positive(table, d)[p] ** s for d, p, s in zip(dims, picks, facing(dims))]))
        t = np.log(positive(table, "compute")[source])
        own_params = sum(name.endswith(f"_{dims[0]}") for name in form.names)  # of one arm
        if min(len(p) for p in picks) < own_params:
            thin = dims[int(np.argmin([len(p) for p in picks]))]
            raise UserError(
                f"the arm {thin!r} of form={form_name!r} has {min(len(p) for p in picks)} rows for {own_params}"
                " parameters; run more of it, or fit 'joint'"
            )
        if centre is None:
            centre = np.array([own[arm == g].mean() for g in range(len(dims))] + [t.mean()])
        u = np.stack([own - centre[arm], t - centre[-1], arm.astype(float)])
        rows = Rows(form, u, y[source], source, centre)
    else:
        logs = np.log(np.stack([positive(table, name) for name in form.terms]))
        for name, column in zip(form.terms, logs):
            if np.ptp(column) == 0:
                raise UserError(f"column {name!r} has one value only; form={form_name!r} needs at least two of it")
        centre = logs.mean(1) if centre is None else centre
        rows = Rows(form, logs - centre[:, None], y, np.arange(len(y)), centre)
    if len(rows.y) <= len(form.names):
        raise UserError(
            f"{len(rows.y)} rows cannot determine the {len(form.names)} parameters of form={form_name!r};"
            f" give at least {len(form.names) + 1}"
        )
    return rows


def geometry_of(table: Mapping, given: Mapping | None) -> Geometry | None:
    """FLOPs geometry: `given` over the most common value in the columns; an unsaid pool is the one that matches FLOPs.

    None where the rows do not say enough to count (no patch_size, or no width, as in language-model data).
    """
    known: dict = {}
    names = (*DIMENSIONS, "head_dim", "num_classes", "pool", "num_registers", "num_prefix_tokens")
    for name in names:
        given_here = [v for v in table[name].tolist() if v is not None] if name in table else []
        if given_here:
            values, counts = np.unique(given_here, return_counts=True)
            known[name] = values[counts.argmax()].item()
    known |= dict(given or {})
    for name in ("head_dim", "num_classes", "num_registers", "num_prefix_tokens"):  # a ledger's columns are floats
        if name in known:
            known[name] = int(known[name])
    unknown = [name for name in known if name not in (*names, "flops_scale", "params_scale")]
    if unknown:
        raise UserError(f"geometry has {unknown[0]!r}; it takes {', '.join(names)}")
    if any(known.get(name) is None for name in DIMENSIONS):
        return None
    registers = known.pop("num_registers", 0)

    def with_pool(pool: str) -> Geometry:
        return Geometry(**({"num_prefix_tokens": registers + (pool == "token")} | known | {"pool": pool}))

    dims = {d: positive(table, d) for d in DIMENSIONS if d in table}

    def scaled(geometry: Geometry, flops_scale: float) -> Geometry:
        """With what the rows' own counts are of ours, where that is not 1 to 1e-6."""
        params = np.zeros(1)
        if "num_params" in table and "params_scale" not in known:
            params = np.log(positive(table, "num_params") / geometry.num_params(dims))
        if np.abs(params).max() >= 1e-6:
            geometry = dataclasses.replace(geometry, params_scale=float(np.exp(params.mean())))
        return geometry if flops_scale == 1 else dataclasses.replace(geometry, flops_scale=flops_scale)

    if "forward_flops" not in table:
        return scaled(with_pool(known.get("pool", "avg")), 1.0)
    forward = positive(table, "forward_flops")
    spent = None  # per image, head included: what tells "none" from "avg", whose encoders cost the same
    if {"train_flops", "num_examples"} <= set(table):
        spent = positive(table, "train_flops") / positive(table, "num_examples") / 3
    tried: list[tuple] = []
    for pool in [known["pool"]] if "pool" in known else POOLS:
        candidate = with_pool(pool)
        ratio = np.log(forward / candidate.flops(dims, head=False))
        off = [np.abs(ratio).max(), 0.0 if spent is None else np.abs(np.log(spent / candidate.flops(dims, True))).max()]
        tried.append((round(sum(off), 9), len(tried), candidate, off[0], float(np.exp(ratio.mean()))))
    _, _, geometry, off, scale = min(tried, key=lambda t: t[:2])
    return scaled(geometry, 1.0 if off < 1e-6 or "flops_scale" in known else scale)


def features(form, centre, table, arms) -> tuple[np.ndarray, np.ndarray]:
    """Centred log columns of any rows and the rows they came from (a form by arm: rows on an arm or at the centre)."""
    if not form.arms:
        logs = np.log(np.stack([positive(table, n) for n in form.terms]))
        return logs - centre[:, None], np.arange(logs.shape[1])
    picks = [np.flatnonzero((arms == d) | (arms == "centre")) for d in form.terms]
    source, arm = np.concatenate(picks), np.repeat(np.arange(len(picks)), [len(p) for p in picks])
    own = np.log(np.concatenate([positive(table, d)[p] ** s for d, p, s in zip(form.terms, picks, facing(form.terms))]))
    t = np.log(positive(table, "compute")[source])
    return np.stack([own - centre[arm], t - centre[-1], arm.astype(float)]), source
