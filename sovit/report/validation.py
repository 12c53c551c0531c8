"""The page of a validation."""

from __future__ import annotations

import json
from pathlib import Path

from sovit.files import write_atomic
from sovit.predict.validation import verdict
from sovit.report.text import render


def validation_report(prediction: dict, rows: list[dict], out: Path) -> dict:
    """Apply the rule and write `validation.json`, `report.md` and the figure into the folder `out`; return the result."""
    from sovit.report import figures

    result = verdict(prediction, rows)
    write_atomic(Path(out) / "validation.json", json.dumps(result, indent=2) + "\n")
    write_atomic(Path(out) / "report.md", validation_page(result))
    figures.save(figures.validation(result), Path(out) / "validation.png")
    return result


def validation_page(result: dict) -> str:
    """The verdict, both differences and both arms as Markdown."""
    difference = result["difference"]
    return render("validation.md.j2", v=result | dict(difference=difference | dict(estimate=difference["mean"])))
