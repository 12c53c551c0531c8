"""Is the better classifier the better encoder for a language model?

    python -m analysis.vlm_encoders.tables results/vlm_transfer.jsonl [--family marks] [--out results] [--json]

Rows of encoders and of the vision-language models around them, paired by seed, with their controls: an untrained encoder, a
text-only baseline, and each model asked about another's image. Writes NAME.json, and report.md and the figure into OUT/NAME.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.publish import Result, run
from analysis.vlm_encoders.report import report_text, summarise


def analyse(options: argparse.Namespace) -> Result:
    from analysis.vlm_encoders.figures import vlm_vs_encoder

    found, name = summarise(options.ledgers, options.family), options.ledgers[0].stem
    figures = {f"{name}/vlm_vs_encoder": vlm_vs_encoder(found)}
    return Result(found, report_text(found), f"{name}.json", f"{name}/report.md", figures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", type=Path, nargs="*", default=[Path("results/vlm_transfer.jsonl")], metavar="LEDGER")
    parser.add_argument("--family", default="marks", help="of questions, whose loss decides (default marks)")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
