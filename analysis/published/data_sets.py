"""The studies and published sweeps that the extrapolation test runs on, and where each is cut by compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.published import sweeps as public
from sovit import UserError
from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.law.forms import LAWS
from sovit.ledger.measurements import measurements

METRICS = ("val_loss", "val_error")
TRIED = ("joint", "joint_n", "bounded", "power_mean", "sovit")
HALF_DECADE = 0.5 * np.log(10)
LEVEL_GAP = 0.2  # runs on budgets lie closer than this in ln compute within one, and wider apart between two
MIN_FITTED, MIN_SCORED = 16, 4


@dataclass(frozen=True)
class Data:
    """columns (with `compute`), y and clusters [n]. dims: of the law where the rows tell no shape; None = what varies."""

    name: str
    metric: str
    columns: dict
    y: np.ndarray
    clusters: np.ndarray
    zero_line: float | None = None
    dims: tuple[str, ...] | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of TRIED that mean something here: without shapes no star and no interaction of theirs."""
        return tuple(form for form in TRIED if self.dims is None or form not in ("joint_n", "sovit"))

    def fit(self, form: str, rows=None, **options) -> fitted_law.Fit:
        """The law `form` of the rows given (all of them for None). Raises UserError where it cannot be fitted."""
        rows = np.arange(len(self.y)) if rows is None else rows
        if form == "bounded":
            options["zero_line"] = self.zero_line
        if LAWS[form].uses_dims:
            options["dims"] = self.dims
        columns = {name: column[rows] for name, column in self.columns.items()}
        return law.fit(form, columns, self.y[rows], clusters=self.clusters[rows], **options)


def of_ledger(path: Path) -> list[Data]:
    """Each metric of METRICS that the rows have."""
    out = []
    for metric in METRICS:
        try:
            data = measurements([path], metric)
        except UserError:
            if metric == METRICS[0]:
                raise
            continue
        columns = {n: c for n, c in data.columns.items() if n != "trunk_id"}
        if "compute" not in columns:
            raise UserError(f"{path}: the rows say neither compute nor a shape to count it from; nothing orders them")
        trunk = data.columns.get("trunk_id", np.arange(len(data.y)).astype(str))
        out.append(Data(path.stem, metric, columns, data.y, trunk, data.zero_line))
    return out


def of_public(folder: Path) -> list[Data]:
    """The published sweeps that an order by compute makes sense for; compute = 2 N x tokens."""
    out = []
    for file in public.GEMSTONES:
        sweep = public.gemstones(folder, file)
        columns = {name: sweep.columns[name] for name in ("width", "depth", "num_params")}
        out.append(_language(f"gemstones {file}", columns, sweep.columns["tokens"], sweep))
    for family, own in (("farseer", ()), ("data_constrained", ("unique_tokens",))):
        for sweep in public.scalebench(folder, family).values():
            size, tokens = (sweep.columns[name] for name in public.POWER_SUMS[family][0][:2])
            columns = dict(num_params=size) | {name: sweep.columns[name] for name in own}
            out.append(_language(family, columns, tokens, sweep, ("num_params", *own)))
    return out


def _language(name: str, columns: dict, tokens: np.ndarray, sweep: public.Sweep, dims=None) -> Data:
    columns = columns | dict(num_examples=tokens, compute=2 * columns["num_params"] * tokens)
    return Data(name, "loss", columns, sweep.y, sweep.clusters, dims=dims)


def cuts_of(compute: np.ndarray) -> list[float]:
    """Computes to cut at: between budgets where runs stand on budgets, else every half decade down from the dearest."""
    logs = np.sort(np.log(compute))
    ends = np.flatnonzero(np.diff(logs) > LEVEL_GAP) + 1
    spans = [np.ptp(level) for level in np.split(logs, ends)]
    if len(spans) > 1 and max(spans) < LEVEL_GAP:
        between = (logs[ends] + logs[ends - 1]) / 2
    else:
        between = np.arange(logs[-1] - HALF_DECADE, logs[0], -HALF_DECADE)[::-1]
    fitted = np.searchsorted(logs, between)
    enough = (fitted >= MIN_FITTED) & (len(logs) - fitted >= MIN_SCORED)
    return np.exp(between[enough]).tolist()
