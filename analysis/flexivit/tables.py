"""What does one trunk for several patch sizes cost against a trunk for each?

    python -m analysis.flexivit.tables results/flexivit.jsonl [--out results] [--json]

Rows of a Flexi trunk (`patch_sizes`, val_loss@p2 ...) and of single-size trunks of the same shape, in paired seeds, at equal
images, and at equal FLOPs with one single-size trunk or with all of them together. Writes flexivit.json, and report.md
and the figure into OUT/flexivit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.flexivit.cost import sizes_text, summarise_sizes
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic

NAME = "flexivit"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", type=Path, nargs="*", default=[Path(f"results/{NAME}.jsonl")], metavar="LEDGER")
    parser.add_argument("--out", type=Path, default=OUTPUTS, help=f"folder (default {OUTPUTS})")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    options = parser.parse_args(argv)
    try:
        found = summarise_sizes(options.ledgers)
        text = sizes_text(found)
        write_atomic(options.out / f"{NAME}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_atomic(options.out / NAME / "report.md", text)
        from analysis.resolution import figures as resolution_figures
        from sovit.report import figures as plot

        plot.save(resolution_figures.flexi_cost(found), options.out / NAME / "loss_by_flops")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
