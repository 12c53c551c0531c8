"""Ledgers -> law.json, report.md and figures: `fit_ledgers` is what `sovit fit` and `analysis/fit_laws.py` do.

No clock and no torch: the same ledgers give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law.checks.sensitivity import sensitivity
from sovit.law.fit import choose_headline, fit_forms
from sovit.law.fitted_law import Fit, plain
from sovit.law.forms import LAWS
from sovit.law.solver.fitter import Loss
from sovit.ledger.measurements import Measurements, measurements
from sovit.ledger.tables import Reading
from sovit.report.facts import budget_facts, data_facts, held_out, law_facts
from sovit.report.text import render

MIN_DRAWS = 100  # fewer do not give a 90 % interval
SENSITIVITY, FACTS = "sensitivity.json", "report.json"  # beside law.json: what report.md shows that law.json lacks
INPUTS = "inputs.json"  # beside law.json: what it was made of, written last


@dataclass(frozen=True)
class FitOptions:
    """How to fit. Raises UserError for a value that cannot be."""

    metric: str = "val_loss"
    """Column to fit."""
    form: str | None = None
    """The headline law; None = the one that extrapolates best among those that rank whole shapes."""
    out: Path | str | None = None
    """Folder to write; None = `<stem of the first ledger>_law` in OUTPUTS."""
    bootstrap: int = 1000
    """Draws of each interval, at least MIN_DRAWS; 0 = none."""
    train_flops: float | None = None
    """Budget of the recommendation; None = 3.16 x the largest budget run."""
    seed: int = 0
    figures: bool = True
    refits: bool = True
    """False = without the hundred refits that say what the law depends on, and without the further cuts."""
    skip_bad: bool = False
    """Leave bad rows out, each with its reason, where otherwise the first is refused."""
    map: Sequence[str] = ()
    """THEIRS=OURS: names of columns in a table that others wrote."""
    units: Sequence[str] = ()
    """OURS=FACTOR: a column is multiplied by it."""
    loss: str = "huber_log"
    """huber_log or log_squares, of ln(predicted / measured)."""
    huber_delta: float | None = None
    """As in a paper, such as 1e-3, rows as they are; None = from the data, whitened by trunk."""

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in LAWS:
            raise UserError(f"form={self.form!r} is unknown; choose one of {', '.join(LAWS)}")
        if self.train_flops is not None and not (np.isfinite(self.train_flops) and self.train_flops > 0):
            raise UserError(f"train_flops={self.train_flops!r} is not a positive number; give FLOPs, such as 1e15")
        Loss(self.loss, self.huber_delta)
        if self.bootstrap < 0 or 0 < self.bootstrap < MIN_DRAWS:
            raise UserError(
                f"bootstrap={self.bootstrap} draws give no interval; give at least {MIN_DRAWS}, or 0 for none"
            )


def fit_ledgers(paths: Sequence[Path | str], **options: Any) -> dict:
    """Fit every law form that the rows of `paths` allow; write law.json, forms/, the report and its figures.

    options: the fields of `FitOptions`. Returns a summary of plain data; its `text` says it in words. Raises UserError
    for bad input, before writing anything.
    """
    chosen = FitOptions(**options)
    data = read_ledgers(paths, chosen)
    how = dict(bootstrap=chosen.bootstrap, seed=chosen.seed, loss=chosen.loss, huber_delta=chosen.huber_delta)
    fits, refused = fit_forms(data, chosen.form, **how)
    headline, why = choose_headline(fits, chosen.form)
    at_budget = budget_facts(data, fits, headline, chosen.train_flops)
    scores = held_out(fits, headline, data)
    best = at_budget["recommendation"]
    found = _sensitivity(data, fits, headline, best, chosen)
    facts = dict(why=why, refused=refused, **law_facts(data, fits, headline, chosen.refits))
    facts |= at_budget | dict(data=data_facts(data, fits[headline].model.dims))
    folder = Path(chosen.out) if chosen.out is not None else law_folder(data.paths)
    _write_laws(folder, data, fits, headline)
    drawn = (
        draw(fits[headline], data, facts | dict(held_out=scores, sensitivity=found), folder) if chosen.figures else []
    )
    facts |= dict(recommendation=best.to_dict() if best else None, figures=drawn)
    facts["frontier"] = [row.to_dict() for row in at_budget["frontier"]]
    write_atomic(folder / SENSITIVITY, _json(found))
    write_atomic(folder / FACTS, _json(facts))
    write_atomic(folder / "report.md", report_text(folder))
    if chosen.figures:
        write_atomic(folder / INPUTS, json.dumps(data.identity, indent=1) + "\n")
    summary = _summary(folder, data, fits, headline, facts)
    return summary | dict(text=render("fit.txt.j2", s=summary, why_none=facts["why_none"]).rstrip("\n"))


def read_ledgers(paths: Sequence[Path | str], chosen: FitOptions) -> Measurements:
    """The measurements of ledgers, or of tables that others wrote. Raises UserError as `measurements`."""
    reading = Reading.of(chosen.map, chosen.units, chosen.metric)
    return measurements(paths, chosen.metric, skip_bad=chosen.skip_bad, reading=reading)


def report_text(folder: Path) -> str:
    """Render report.md from the law.json, report.json and sensitivity.json of `folder`."""
    files = [(folder / name).read_text(encoding="utf-8") for name in ("law.json", FACTS, SENSITIVITY)]
    body, facts, found = map(json.loads, files)
    return re.sub(r"\n{3,}", "\n\n", render("report.md.j2", law=body, facts=facts, found=found)).rstrip() + "\n"


def _sensitivity(data: Measurements, fits: dict, headline: str, best, options: FitOptions) -> dict:
    if not options.refits:
        return dict(note="no refits were asked for")
    return sensitivity(data, fits[headline], best.train_flops if best else None, fits=fits)


def law_folder(paths: Sequence[Path | str]) -> Path:
    """Where the law of these ledgers is kept unless another folder is named."""
    return OUTPUTS / f"{Path(paths[0]).stem}_law"


def _write_laws(folder: Path, data: Measurements, fits: Mapping, headline: str) -> None:
    with contextlib.suppress(NotADirectoryError):  # the next line says it better
        (folder / INPUTS).unlink(missing_ok=True)
    for name, fitted in fits.items():
        write_atomic(folder / ("law.json" if name == headline else f"forms/{name}.json"), fitted.to_json())


def _json(value) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False, default=asdict) + "\n"


def draw(fit: Fit, data: Measurements, facts: Mapping, folder: Path) -> list[str]:
    """Write every figure that this law allows; returns their names in the order of the report."""
    from sovit.report import figures as plot

    made = dict(
        fit_by_dimension=plot.fit_by_dimension(fit, data) if facts["data"]["design"] else None,
        isoflop=plot.isoflop(fit, data),
        residuals=plot.residuals(fit, data),
        extrapolation=plot.extrapolation(facts["held_out"], data.metric),
        frontier=plot.frontier(fit, facts["frontier"]) if facts["frontier"] else None,
        sensitivity=plot.sensitivity(facts["sensitivity"]),
        optimal_shape=plot.optimal_shape(fit, facts["recommendation"]),
    )
    for name, figure in made.items():
        if figure is not None:
            plot.save(figure, folder / name)
    return [name for name, figure in made.items() if figure is not None]


def _summary(folder: Path, data: Measurements, fits: Mapping, headline: str, facts: Mapping) -> dict:
    """What `sovit fit --json` prints."""
    fit = fits[headline]
    return dict(
        out=str(folder),
        law=str(folder / "law.json"),
        report=str(folder / "report.md"),
        form=headline,
        why=facts["why"],
        forms=list(fits),
        refused=facts["refused"],
        metric=data.metric,
        num_rows=len(data.y),
        left_out=len(data.left_out),
        notes=[*(fit.data.warnings or ()), *data.notes],
        num_trunks=fit.num_clusters,
        params=fit.params,
        exponents=plain(fit.exponents),
        noise=plain(fit.noise),
        extrapolation=facts["scores"],
        recommendation=facts["recommendation"],
        figures=[f"{name}.png" for name in facts["figures"]],
    )
