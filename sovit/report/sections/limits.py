"""What was not shown."""

from __future__ import annotations

import numpy as np

from sovit.law.forms import WHOLE_SHAPE
from sovit.ledger.measurements import LEVEL_WIDTH
from sovit.report.sections.phrases import NAMES, flops, listed, short, span
from sovit.spec.named_shapes import named_shape
from sovit.spec.shape import DIMENSIONS

SOURCES = {
    "stream": "The data are the procedural scenes of the stream: small synthetic pictures with a long tail of"
    " questions.",
    "icons": "The data are drawings (icons), rendered from vector files.",
    "hub": "The data are a public data set read with `datasets`, at the size and preset named above.",
}


def not_shown_section(data, fits, headline, recommendation) -> str:
    fit = fits[headline]
    source = data.rows[0].get("data")
    said = f"The data are “{source}”." if source else "The rows do not say what data they are of."
    lines = [
        f"- {SOURCES.get(source, said)} Nothing here shows that the exponents or the"
        " recommended proportions carry"
        " over to other images, labels or objectives."
    ]
    if fit.data.train_flops_range:
        low, high = fit.data.train_flops_range
        usual = 3e8 * named_shape("B/16").train_flops_per_image()
        lines.append(
            f"- Budgets span {np.log10(high / low):.1f} decades, up to {flops(high)} training FLOPs a run. A"
            " ViT-B/16 that sees 300"
            f" million images takes {flops(usual)}: {abs(np.log10(usual / high)):.1f} decades"
            f" {'more' if usual > high else 'less'}."
        )
    if recommendation is not None:
        run = [row for row in data.rows if all(getattr(recommendation.shape, n) == row.get(n) for n in DIMENSIONS)]
        spent = np.array([row["train_flops"] for row in run if row.get("train_flops")])
        there = np.abs(np.log(spent / recommendation.train_flops)) < LEVEL_WIDTH
        lines.append(
            "- The recommendation is a prediction; "
            + (
                "that shape was never run."
                if not run
                else "that shape was run at that budget, and the law was fitted to it."
                if there.any()
                else "that shape was run, but not at that budget."
            )
            + " Train it and the usual proportions with paired seeds before relying on it."
        )
    open_ = [n for n, e in fit.exponents.items() if e.status != "ok"]
    if open_:
        lines.append(f"- The law is not determined in {listed([NAMES.get(n, n) for n in open_])}.")
    floors = [term.amplitude for term in fit.shape_form.formula if not term.factors]
    floor = floors[0] if fit.form in WHOLE_SHAPE or fit.form == "chinchilla" else None
    ends = fit.intervals.get(floor or "")
    if floor and (not fit.params[floor] or (ends and ends.low < 0.1 * ends.high)):
        lines.append(
            f"- The irreducible loss `{floor}` is not identified ({short(fit.params[floor])},"
            f" {span(ends.low, ends.high) if ends else span(None, None)}):"
            " these budgets do not come near it."
        )
    lines.append(
        "- How the best shape moves with the recipe (learning rate, batch, schedule) cannot be read from these rows."
    )
    return "\n".join(lines)
