"""What does one trunk that serves several patch sizes cost against a trunk for each?

    python studies/flexivit.py --workers 2          then  python -m analysis.flexivit.tables runs/results/flexivit.jsonl

48 x 2 x 192 at 32 px (`stream:detail`), trained on patches of 8 px, on patches of 4 px, and on both, drawn by batch
(FlexiViT, arXiv 2212.08013); three paired seeds, each cooled down at 12,000 and 24,000 images, patches of 8 px also at
60,000, for which they cost what both do on 24,000.

Cost: 9 trunks, 5e12 FLOPs, about 6 minutes of two cores. Expected: worse at each size than a trunk of that size on as many
images, of which it saw half at that size; the question is by how much, and whether it is worse than two trunks at its cost.
"""

from sovit.spec.run import Recipe, Run, learning_rate
from sovit.spec.shape import Shape
from sovit.sweep import study_main

SHAPE = Shape(48, 2, 192, head_dim=8, patch_size=8, image_size=32, pool="none")
SIZES = (4, 8)
BUDGETS = (12_000, 24_000)
LONG = {8: (60_000,)}  # as many FLOPs as the trunk of both sizes spends on 24,000
SEEDS = (0, 1, 2)


def runs() -> list[Run]:
    rate = learning_rate(SHAPE)
    found = []
    for seed in SEEDS:
        same = dict(preset="detail", init_seed=seed, data_seed=seed)
        found += [Run(SHAPE.replace(patch_size=p), Recipe(rate), BUDGETS + LONG.get(p, ()), **same) for p in SIZES]
        found.append(Run(SHAPE, Recipe(rate, patch_sizes=SIZES), BUDGETS, **same))
    return found


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "flexivit", runs, next_command="python -m analysis.flexivit.tables"))
