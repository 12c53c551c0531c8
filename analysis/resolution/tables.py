"""What does fine-tuning attention alone give at a higher resolution, and how is a budget best split?

    python -m analysis.resolution.tables results/resolution_finetune.jsonl [--train-flops X ...] [--out results] [--json]

Arms by mode (attention, full, mlp, head, from scratch), their comparison by paired seeds at equal FLOPs and equal images,
bytes stored, a law of transfer chosen by held-out rows, and the best split of a budget between low-resolution pre-training
and fine-tuning. Writes OUT/NAME.json, and the figures and report.md into OUT/NAME, NAME being that of the first ledger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.publish import Result, run
from analysis.resolution.report import report_text, summarise
from sovit import UserError

LEDGER = Path("results/resolution_finetune.jsonl")


def analyse(options: argparse.Namespace) -> Result:
    from analysis.resolution.figures import transfer_figures

    if options.bootstrap < 0:
        raise UserError(f"--bootstrap {options.bootstrap}: give the number of draws, 0 for none")
    found, name = summarise(options.ledgers, options.bootstrap, options.train_flops), options.ledgers[0].stem
    figures = {f"{name}/{figure}": drawn for figure, drawn in transfer_figures(found).items()}
    return Result(found, report_text(found), f"{name}.json", f"{name}/report.md", figures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", type=Path, nargs="*", default=[LEDGER], metavar="LEDGER")
    parser.add_argument("--train-flops", type=float, nargs="*", default=(), metavar="X", help="budgets to split")
    parser.add_argument("--bootstrap", type=int, default=400, help="draws of each law (default 400)")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
