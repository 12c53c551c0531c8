"""Do the 90 % intervals hold the truth in 90 % of cases? A simulation over planted laws, designs and noise.

    python -m analysis.coverage.tables [--workers N] [--quick] [--out results/coverage.jsonl] [--json]

Each condition draws random laws (exponents, amplitudes, floor), measures them on a design with noise by trunk and by
row, fits, and counts how often each of the two intervals holds the true growth exponents and the true best shape at
10 and 100 times the largest compute. One JSON line a finished condition: a stopped run goes on where it was. Prints a
table in markdown, and draws OUT's folder/coverage/coverage.png and .svg. --quick: 20 sets a condition, a look only.

Cost: .2 to .3 s a set for `joint`, .9 for `joint_n`, 1.4 for `sovit`: about 25 minutes of one core.
Expected: 85 to 95 % for the headline and the pairs where the form is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from analysis.coverage import study
from sovit import OUTPUTS, UserError
from sovit.law.checks import coverage


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    parser.add_argument("--quick", action="store_true", help="20 sets a condition")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "coverage.jsonl")
    parser.add_argument("--json", action="store_true", help="print the lines as one JSON list")
    options = parser.parse_args(argv)
    conditions = study.CONDITIONS
    if options.quick:
        conditions = tuple(dataclasses.replace(c, sets=20) for c in conditions)
    try:
        lines = study.study(options.out, conditions, workers=options.workers)
        print(json.dumps(lines, indent=1) if options.json else coverage.table(lines))
        from analysis.coverage import figures as coverage_figures
        from sovit.report import figures as plot

        plot.save(coverage_figures.coverage(lines), options.out.parent / options.out.stem / "coverage")
    except UserError as error:
        print(f"coverage: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
