"""What the analyses' commands share: templates of reports, and the files that a command writes."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from sovit import OUTPUTS, UserError
from sovit.files import write_atomic


@dataclass(frozen=True)
class Result:
    """What an analysis found: numbers to `data`, words to `report` (printed alone where None), figures by their path.

    Paths are relative to --out.
    """

    found: dict
    text: str
    data: str
    report: str | None = None
    figures: dict = field(default_factory=dict)


def run(analyse: Callable, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Run an analysis as a command: `analyse(options)` returns a Result, whose files are written into --out.

    Returns:
        The exit status: 2 for a UserError, which is told in one line.
    """
    parser.add_argument("--out", type=Path, default=OUTPUTS, help=f"folder (default {OUTPUTS})")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the report")
    options = parser.parse_args(argv)
    try:
        result = analyse(options)
        write_atomic(options.out / result.data, json.dumps(result.found, indent=1, allow_nan=False) + "\n")
        if result.report:
            write_atomic(options.out / result.report, result.text)
        from sovit.report.figures import save

        for path, figure in result.figures.items():
            save(figure, options.out / path)
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result.found, indent=1) if options.json else result.text.rstrip("\n"))
    return 0


def templates() -> jinja2.Environment:
    """Open the templates of analysis/.

    Filters: `f(spec)` formats a value, `ratio(spec)` a difference of logarithms as a percentage, `change` such a
    difference with its interval.
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    found = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    found.filters |= {"f": format, "ratio": ratio, "change": change}
    return found


def template(name: str) -> jinja2.Template:
    """Load a report's template, analysis/NAME. Its macros are functions of `.module`."""
    return templates().get_template(name)


def markdown(report: jinja2.Template, **values) -> str:
    """Fill a report's template; no two empty lines follow each other."""
    return re.sub(r"\n{3,}", "\n\n", report.render(values)).strip() + "\n"


def ratio(log: float, spec: str = "+.1%") -> str:
    return format(math.expm1(log), spec)


def change(difference: dict) -> str:
    """Say a difference of logarithms {mean, low, high} as +3.1% (+3.0 to +3.2)."""
    if difference["low"] is None:
        return ratio(difference["mean"])
    low, high = (100 * math.expm1(difference[end]) for end in ("low", "high"))
    return f"{ratio(difference['mean'])} ({low:+.1f} to {high:+.1f})"
