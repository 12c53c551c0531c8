"""Is the better classifier the better eye of a language model?

    python -m analysis.vlm_encoders.tables results/vlm_transfer.jsonl [--family marks] [--out results] [--json]

Rows of encoders and of the vision-language models around them, paired by seed, with their controls: an untrained encoder, no
eye, and each model asked about another's image. Writes NAME.json, and report.md and the figure into OUT/NAME.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.vlm_encoders.report import report_text, summarise
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic

NAME = "vlm_transfer"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", type=Path, nargs="*", default=[Path(f"results/{NAME}.jsonl")], metavar="LEDGER")
    parser.add_argument("--family", default="marks", help="of questions, whose loss decides (default marks)")
    parser.add_argument("--out", type=Path, default=OUTPUTS, help=f"folder (default {OUTPUTS})")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    options = parser.parse_args(argv)
    name = options.ledgers[0].stem
    try:
        found = summarise(options.ledgers, options.family)
        text = report_text(found)
        write_atomic(options.out / f"{name}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_atomic(options.out / name / "report.md", text)
        from analysis.vlm_encoders import figures as vlm_encoders_figures
        from sovit.report import figures as plot

        plot.save(vlm_encoders_figures.vlm_vs_encoder(found), options.out / name / "vlm_vs_encoder")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
