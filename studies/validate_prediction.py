"""Is the shape that a law recommends better than ViT-B proportions at the same training FLOPs?

    python studies/validate_prediction.py results/stream_star_law/law.json --train-flops 3.2e12 --workers 2

Data, preset and recipe are those of the law's rows. The prediction is written to RESULTS/<name>_prediction.json before
anything is trained. Then both shapes are trained with three paired seeds, and the verdict follows the rule in
sovit/predict/validation.py. The seeds are not among those of the star.

Cost: 6 trunks of --train-flops each; at 3.2e12 about 10 minutes of two cores. Expected: the recommended shape a few per
cent lower in loss; the interval says whether three seeds can tell.
"""

import json
import sys
from pathlib import Path

from sovit import OUTPUTS, UserError
from sovit.data import open_data
from sovit.files import check_name
from sovit.ledger.ledger import read_ledger
from sovit.ledger.trained_on import TrainedOn
from sovit.predict.validation import check_same_data, make_prediction, runs_of, verdict_text, write_prediction
from sovit.report.validation import validation_report
from sovit.spec.run import Run
from sovit.spec.shape import Shape
from sovit.sweep import study_main

SEEDS = [10, 11, 12]


def main(argv: list[str] | None = None) -> int:
    parser = study_main.OneLineParser(prog="studies/validate_prediction.py", description=__doc__)
    parser.add_argument("law", type=Path, metavar="LAW.json")
    parser.add_argument("--train-flops", type=float, required=True)
    parser.add_argument("--name", default="validate_prediction")
    parser.add_argument("--results", type=Path, default=OUTPUTS)
    options, rest = parser.parse_known_args(argv)
    try:
        path = options.results / f"{check_name(options.name)}_prediction.json"
        arguments, dry = (options.law, options.train_flops, SEEDS), "--dry-run" in rest
        prediction = make_prediction(*arguments) if dry else write_prediction(*arguments, path)
        print(json.dumps(prediction["arms"], indent=2))

        def runs() -> list[Run]:
            found = runs_of(prediction, options.name)
            shape = found[0].shape
            place = (found[0].data, found[0].preset, shape.image_size, shape.patch_size)
            check_same_data(prediction, open_data(*place, 0).content_key)
            return found

        options_of_sweep = [*rest, "--name", options.name, "--results", str(options.results)]
        metric = prediction["metric"] or "val_loss"
        status = study_main.main(__doc__, options.name, runs, options_of_sweep, metric)
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
    on = TrainedOn(data="stream", preset="cpu", data_keys=[], recipe={}, base_lr=0.008)
    return runs_of(dict(train_flops=1e11, seeds=SEEDS, arms=arms, num_classes=16, trained_on=vars(on)))


if __name__ == "__main__":
    raise SystemExit(main())
