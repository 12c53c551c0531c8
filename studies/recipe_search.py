"""Which learning rate is fair to every shape of the stream's star?

    python studies/recipe_search.py --workers 2

Each shape at the ends of the star is trained at learning rates a factor sqrt(2) to 2 apart, and cooled down at two
budgets. The rule base x (32 / width)^p x (2 / depth)^q was fitted to the best rate of each shape by code that
stands at commit 0838003 (analysis/recipe_rule.py). Every other study uses that rule, and its rows carry the rate.

Cost: 40 trunks, about 15 minutes of two cores. Expected: 0.009 at width 32 and depth 2,
falling about as width^-0.65 and depth^-0.75.
"""

from sovit.spec.design import to_runs
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import study_main

CENTRE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
SHAPES = (
    CENTRE,
    CENTRE.replace(width=16),
    CENTRE.replace(width=64),
    CENTRE.replace(depth=1),
    CENTRE.replace(depth=6),
    CENTRE.replace(mlp_dim=32),
    CENTRE.replace(mlp_dim=512),
    Shape(64, 4, 512, head_dim=8, patch_size=4, image_size=16, pool="none"),
)
RATES = (0.002, 0.004, 0.008, 0.016, 0.032)


def runs() -> list[Run]:
    return [
        run
        for rate in RATES
        for run in to_runs(SHAPES, (3.2e10, 1e11), 16, lambda shape, rate=rate: Recipe(peak_lr=rate))
    ]


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "recipe_search", runs))
