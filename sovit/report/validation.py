"""The page of a validation."""

from __future__ import annotations

import json
from pathlib import Path

from sovit.files import write_atomic
from sovit.predict.validation import verdict


def validation_report(prediction: dict, rows: list[dict], out: Path, metric: str = "val_loss") -> dict:
    """Apply the rule and write `validation.json` and the figure into the folder `out`; return the result."""
    from sovit.report.figures import validation_figure

    result = verdict(prediction, rows, metric)
    write_atomic(Path(out) / "validation.json", json.dumps(result, indent=2) + "\n")
    validation_figure(result, Path(out) / "validation.png")
    return result
