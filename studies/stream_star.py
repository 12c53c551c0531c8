"""How does the best ViT shape move with compute on the stream? A star in width, depth and MLP dim, with corners.

    python studies/stream_star.py --workers 2          then  sovit fit runs/results/stream_star.jsonl

Centre 32 x 2 x 256 and 13 shapes off it in one dimension, 4 off-axis corners, 3 seeds at two shapes; each trunk cooled
down at four budgets, 3.2e10 to 1e12 training FLOPs. Learning rate by the rule of studies/recipe_search.py.

Cost: 22 trunks, 2.4e13 FLOPs, about 45 minutes of two cores. Expected: valleys inside the grid in all three dimensions
from 1e11 on, the MLP dimension growing fastest; loss near 1.4 at 1e12.
"""

from sovit.spec.design import star, to_runs
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import study_main

CENTRE = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
ARMS = {"width": (16, 24, 48, 64, 96), "depth": (1, 3, 4, 6), "mlp_dim": (64, 128, 512, 1024)}
BUDGETS = (3.2e10, 1e11, 3.2e11, 1e12)
SEEDS = {CENTRE: 3, CENTRE.replace(width=64): 3}


def runs() -> list[Run]:
    found = to_runs(star(CENTRE, ARMS), BUDGETS, num_classes=16, recipe=recipe_by_rule, seeds=SEEDS)
    return sorted(found, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "stream_star", runs))
