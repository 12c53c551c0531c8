"""What was found: the first section of a report, and the summary that a command prints."""

from __future__ import annotations

from sovit.law.exponents import Growth
from sovit.report.sections.data import cautions
from sovit.report.sections.extrapolation import held_out_words
from sovit.report.sections.phrases import NAMES, flops, grows, listed, misfits, sentence, shape_words, with_interval
from sovit.report.sections.sensitivity import movers
from sovit.report.text import flat_words
from sovit.spec.shape import Shape


def found_section(data, fits, headline, why, recommendation, no_recommendation, facts) -> str:
    fit = fits[headline]
    lines = [f"- **Extrapolation**: {held_out_words(fits, headline, facts['cuts'])}"]
    lines.append(f"- The headline law is `{headline}`: {why}.")
    lines += [f"- {sentence(exponent_words(name, e))}" for name, e in fit.exponents.items()]
    if recommendation is None:
        lines.append(f"- No shape is recommended: {no_recommendation}.")
    else:
        r = recommendation
        lines.append(
            f"- For {flops(r.train_flops)} training FLOPs: {shape_words(r.shape)}, trained on {r.num_examples:,}"
            " images;"
            f" predicted {data.metric} {with_interval(r.loss, r.loss_low, r.loss_high)}."
            f" Within one noise s.d. of it: {flat_words(r.flat_region)}."
        )
    fragile = movers(facts["sensitivity"])
    if fragile:
        lines.append(f"- **Hangs on choices**: {sentence(fragile)}")
    lines += [f"- **Caution**: {caution}" for caution in cautions(data)]
    if misfits(fit):
        lines.append(
            f"- **The law misses more than noise**: its residuals are {misfits(fit):.2g} times the noise between seeds."
        )
    open_ = [NAMES[n] for n, e in fit.exponents.items() if e.status != "ok"]
    if open_:
        lines.append(f"- **Not determined by these runs**: {listed(open_)}; see below.")
    return "\n".join(lines)


def exponent_words(name: str, exponent: Growth) -> str:
    """One dimension's growth in a sentence without its full stop; the status is part of it."""
    label = NAMES.get(name, name)
    if exponent.estimate is None:
        return f"{label}: unidentified ({exponent.note})"
    growth = with_interval(exponent.estimate, exponent.low, exponent.high, 3)
    text = f"best {label} {grows(exponent.estimate)} as compute^{growth}"
    if exponent.status == "edge":
        text += f"; edge: {exponent.note}"
    return text


def summary_text(summary: dict, no_recommendation: str) -> str:
    lines = [
        f"{summary['num_rows']} rows of {summary['num_trunks']} trunks ({summary['left_out']} left out); law:"
        f" {summary['form']},"
        f" because {summary['why']}"
    ]
    lines += [f"  {exponent_words(name, Growth(**e))}" for name, e in summary["exponents"].items()]
    lines += [f"  note: {note}" for note in summary["notes"]]
    r = summary["recommendation"]
    if r is None:
        lines.append(f"no recommendation: {no_recommendation}")
    else:
        lines.append(
            f"for {flops(r['train_flops'])} training FLOPs: {shape_words(Shape(**r['shape']))}, {r['num_examples']:,}"
            " images, predicted"
            f" {summary['metric']} {r['loss']:.4g}"
        )
        lines += [f"  note: {warning}" for warning in r["warnings"]]
    return "\n".join(lines + [summary["report"]])
