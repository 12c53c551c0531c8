"""The row of a branch that gave no measurement."""

from __future__ import annotations

from sovit.ledger.schema import SCHEMA, new_row
from sovit.spec.any_run import AnyRun
from sovit.spec.run import Run


def failed_row(run: AnyRun, num_examples: int, error: str, **more) -> dict:
    """The row of a branch that was not measured: what was asked for, and why there is no number."""
    if isinstance(run, Run):
        row = new_row(run, num_examples, status="failed", num_classes=0, error=error, seconds=None, **more)
        return row | dict.fromkeys(("num_classes", "head_params", "head_flops", "train_flops", "spent_flops"))
    return {
        "schema": SCHEMA,
        "run_id": run.run_id(num_examples),
        "trunk_id": run.trunk_id,
        "status": "failed",
        "objective": "vlm",
        "control": run.control,
        **run.columns,
        "num_examples": num_examples,
        "error": error,
        **dict.fromkeys(("train_flops", "spent_flops", "val_loss", "val_error", "seconds")),
        **more,
    }
