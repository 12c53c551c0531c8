"""The words of report.md: every sentence is made from the numbers of the fit; what they leave open is said to be so.

One file a section, `phrases` for how numbers are written. No clock and no figures; `sovit.report.build` writes the files.
"""

from __future__ import annotations

from pathlib import Path

from sovit.report.sections.data import data_section
from sovit.report.sections.extrapolation import extrapolation_section
from sovit.report.sections.growth_rules import growth_section
from sovit.report.sections.known_results import known_section
from sovit.report.sections.law import law_section
from sovit.report.sections.limits import not_shown_section
from sovit.report.sections.patch_tradeoff import trade_section
from sovit.report.sections.phrases import quality_section
from sovit.report.sections.recommendation import recommendation_section
from sovit.report.sections.sensitivity import sensitivity_section
from sovit.report.sections.summary import found_section


def report_text(data, fits, headline, why, refused, recommendation, no_recommendation, dependence, facts, figures):
    """report.md. facts: what `report.facts_of` found; figures: name -> caption of the files that stand beside it."""
    fit = fits[headline]

    def figure(name):
        return (
            f"![{name.replace('_', ' ')}]({name}.png)\n\n*{figures[name]}* ([SVG]({name}.svg))"
            if name in figures
            else ""
        )

    sections = {
        "What was found": (found_section(data, fits, headline, why, recommendation, no_recommendation, facts),),
        "Extrapolation": (extrapolation_section(fits, headline, refused, facts["cuts"]), figure("extrapolation")),
        "Recommendation": (
            recommendation_section(
                data, fit, recommendation, no_recommendation, dependence, facts["rules"], facts["frontier"]
            ),
            figure("frontier"),
        ),
        "Patches, images, or the rest": (trade_section(facts.get("trades", {})),)
        + tuple(figure(f"trade_{name}") for name in facts.get("trades", {})),
        "How the best shape grows": (
            growth_section(fit, facts["growth"]),
            figure("optimal_shape"),
        ),
        "What is known, and what is not": (known_section(fit, facts["inside"], facts["weakest"]),),
        "What it depends on": (sensitivity_section(fit, facts["sensitivity"]), figure("sensitivity")),
        "The law": (law_section(fit), figure("fit_by_dimension"), figure("isoflop")),
        "How good the fit is": (quality_section(fit), figure("residuals")),
        "Data": (data_section(data, fit),),
        "What was not shown": (not_shown_section(data, fits, headline, recommendation),),
    }
    names = ", ".join(f"`{Path(p).name}`" for p in data.paths)
    head = (
        f"# Shape law of {names}\n\nWhich Vision Transformer shape has the lowest `{data.metric}` at a given training"
        " budget, and how sure is that?"
    )
    bodies = {title: "\n\n".join(part for part in parts if part) for title, parts in sections.items()}
    bodies = {title: body for title, body in bodies.items() if body}
    return "\n\n".join([head, *(f"## {title}\n\n{body}" for title, body in bodies.items())]) + "\n"
