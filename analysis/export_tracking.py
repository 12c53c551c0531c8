"""A ledger into Weights & Biases or into trackio, for those who compare there: one run a row, with its own curve.

    python analysis/export_tracking.py results/stream_star.jsonl --to wandb        (WANDB_MODE=offline needs no account)
    python analysis/export_tracking.py results/stream_star.jsonl --to trackio      then  trackio show

Names, params and metrics are those of `sovit track`. Neither package comes with sovit; trackio wants an older pillow than
other parts do: give it an environment of its own. Steps are images seen. Export a ledger once: both append.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from sovit import UserError
from sovit.ledger.ledger import read_exclusions, read_ledger
from sovit.report.shown_rows import curve, describe


def export(tracker, ledger: Path, runs: Path) -> int:
    """Write every row through `tracker`, the module wandb or trackio, whose init, log and finish agree; how many."""
    rows = describe(ledger.stem, read_ledger(ledger), read_exclusions(ledger.parent / "exclusions.csv"))
    for shown in rows:
        row = shown.row
        config = {name: row.get(name, text) for name, text in shown.params.items()} | shown.tags
        tracker.init(project=ledger.stem, name=shown.name, group=shown.tags["shape"], config=config)
        for examples, _, values in curve(row, runs / row["trunk_id"] / "metrics.jsonl"):
            tracker.log(values, step=examples)
        tracker.log(shown.metrics, step=row["num_examples"])
        tracker.finish()
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path, metavar="LEDGER")
    parser.add_argument("--to", choices=("wandb", "trackio"), required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    options = parser.parse_args(argv)
    try:
        tracker = importlib.import_module(options.to)
        print(f"{export(tracker, options.ledger, options.runs)} runs exported to {options.to}")
    except ImportError as error:
        print(f"sovit: {options.to} cannot be imported ({error}); pip install {options.to}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
