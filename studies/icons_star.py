"""Does a shape law hold on real drawings? A star on mosaics of human-drawn icons (40 classes, a label a patch).

    sovit assets fetch iconify          once: 104 MB, checked against its hash
    python studies/icons_star.py --workers 2          then  sovit fit runs/results/icons_star.jsonl

Every shape's loss has one drop, when the patches of an icon are first put together; budgets before it bend any smooth
law, so the budgets start where the small shapes are past it. They end at 1.8e12 because there the small shapes have seen
each of the 43,275 training icons 16 times and begin to learn them by heart. The rate follows the rule tuned on the stream.

Cost: 17 trunks, 3.7e13 FLOPs, about 40 minutes of two cores. Expected: the best shape grows from 32 x 1 at 3e11 to
32 x 2 or larger at 2e12; whether a law can be fitted across the drop is the question.
"""

from sovit.spec.design import star, to_runs
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import study_main

CENTRE = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=32, pool="none")
ARMS = {"width": (16, 24, 48), "depth": (1, 3), "mlp_dim": (64, 128, 512)}
BUDGETS = (3.2e11, 5.6e11, 1e12, 1.8e12)
SEEDS = {CENTRE: 3, CENTRE.replace(mlp_dim=128): 3}


def runs() -> list[Run]:
    shapes = star(CENTRE, ARMS, corners=True)
    found = to_runs(shapes, BUDGETS, num_classes=40, recipe=recipe_by_rule, seeds=SEEDS, data="icons", preset="mosaic")
    return sorted(found, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "icons_star", runs))
