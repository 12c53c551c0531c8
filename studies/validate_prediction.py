"""Is the shape that a law recommends better than ViT-B proportions at the same training FLOPs?

    python studies/validate_prediction.py results/stream_star_law/law.json --train-flops 3.2e12 --workers 2

Writes the prediction down (RESULTS/<name>_prediction.json) before anything is trained, then trains both shapes with
three paired seeds, and states the verdict by the rule in sovit/predict/validation.py. The seeds are not among those of
the star.

Cost: 6 trunks of --train-flops each; at 3.2e12 about 10 minutes of two cores. Expected: the recommended shape a few per
cent lower in loss; the interval says whether three seeds can tell.
"""

import argparse
import json
import sys
from pathlib import Path

from sovit import OUTPUTS, UserError
from sovit.data import named_data
from sovit.ledger.ledger import read_ledger
from sovit.predict.validation import make_prediction, runs_of, verdict_text, write_prediction
from sovit.report.validation import validation_report
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import study_main

SEEDS = [10, 11, 12]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("law", type=Path, metavar="LAW.json")
    parser.add_argument("--train-flops", type=float, required=True)
    parser.add_argument("--name", default="validate_prediction")
    parser.add_argument("--data", default="stream:cpu", help="source:preset that the law was fitted on")
    parser.add_argument("--results", type=Path, default=OUTPUTS)
    options, rest = parser.parse_known_args(argv)
    data, preset, _ = named_data(options.data)
    try:
        path = options.results / f"{options.name}_prediction.json"
        arguments, dry = (options.law, options.train_flops, SEEDS), "--dry-run" in rest
        prediction = make_prediction(*arguments) if dry else write_prediction(*arguments, path)
        print(json.dumps(prediction["arms"], indent=2))

        def runs() -> list[Run]:
            return runs_of(prediction, prediction["num_classes"], recipe_by_rule, data=data, preset=preset)

        options_of_sweep = [*rest, "--name", options.name, "--results", str(options.results)]
        status = study_main.main(__doc__, options.name, runs, options_of_sweep)
        if status or dry:
            return status
        rows = read_ledger(options.results / f"{options.name}.jsonl")
        print(verdict_text(validation_report(prediction, rows, options.results / options.name)))
        return 0
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2


def runs() -> list[Run]:
    """What a small law would ask for; shows the study's form where no law is at hand."""
    shape = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    usual = Shape(64, 1, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
    arms = {"recommended": {"shape": shape.to_dict()}, "usual": {"shape": usual.to_dict()}}
    return runs_of({"train_flops": 1e11, "seeds": SEEDS, "arms": arms}, 16, recipe_by_rule)


if __name__ == "__main__":
    raise SystemExit(main())
