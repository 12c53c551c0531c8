"""What does one trunk for several patch sizes cost against a trunk for each?

    python -m analysis.flexivit.tables results/flexivit.jsonl [--out results] [--json]

Rows of a Flexi trunk (`patch_sizes`, val_loss@p2 ...) and of single-size trunks of the same shape, in paired seeds, at equal
images, and at equal FLOPs with one single-size trunk or with all of them together. Writes flexivit.json, and report.md
and the figure into OUT/flexivit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.flexivit.cost import sizes_text, summarise_sizes
from analysis.publish import Result, run


def analyse(options: argparse.Namespace) -> Result:
    from analysis.flexivit.figures import flexi_cost

    found = summarise_sizes(options.ledgers)
    figures = {"flexivit/loss_by_flops": flexi_cost(found)}
    return Result(found, sizes_text(found), "flexivit.json", "flexivit/report.md", figures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", type=Path, nargs="*", default=[Path("results/flexivit.jsonl")], metavar="LEDGER")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
