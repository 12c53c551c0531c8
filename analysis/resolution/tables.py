"""What does fine-tuning attention alone give at a higher resolution, and how is a budget best split?

    python -m analysis.resolution.tables results/resolution_finetune.jsonl [--train-flops X ...] [--out results] [--json]

Arms by mode (attention, full, mlp, head, from scratch), their comparison by paired seeds at equal FLOPs and equal images,
bytes stored, a law of transfer chosen by held-out rows, and the best split of a budget between low-resolution pre-training
and fine-tuning. Writes OUT/NAME.json, and the figures and report.md into OUT/NAME, NAME being that of the first ledger.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.resolution.report import report_text, summarise
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "ledgers", type=Path, nargs="*", default=[Path("results/resolution_finetune.jsonl")], metavar="LEDGER"
    )
    parser.add_argument("--train-flops", type=float, nargs="*", default=(), metavar="X", help="budgets to split")
    parser.add_argument("--bootstrap", type=int, default=400, help="draws of each law (default 400)")
    parser.add_argument("--out", type=Path, default=OUTPUTS, help=f"folder (default {OUTPUTS})")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    options = parser.parse_args(argv)
    name = options.ledgers[0].stem
    try:
        if options.bootstrap < 0:
            raise UserError(f"--bootstrap {options.bootstrap}: give the number of draws, 0 for none")
        found = summarise(options.ledgers, options.bootstrap, options.train_flops)
        text = report_text(found)
        write_atomic(options.out / f"{name}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_atomic(options.out / name / "report.md", text)
        from analysis.resolution import figures as resolution_figures
        from sovit.report import figures as plot

        for drawn, figure in resolution_figures.transfer_figures(found).items():
            plot.save(figure, options.out / name / drawn)
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
