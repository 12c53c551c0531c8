"""Is the shape that is best for the stream's own loss also the best eye for real drawings, by 10-shot error?

    sovit assets fetch iconify          once: 104 MB, checked against its hash
    python studies/stream_transfer.py --workers 2          then
    sovit fit runs/results/stream_transfer.jsonl --metric val_error_10shot/icons:single40

The star of studies/stream_star.py, trunk by trunk: what that study left in runs/ is only probed. Every branch is frozen,
the mean of its patch tokens is its feature, and a linear probe learns 40 kinds of icon from 10 examples of each.

Cost: 22 trunks, 2.4e13 FLOPs, about 45 minutes of two cores, or 3 minutes where stream_star's are in runs/. Expected:
no transfer. The error is 0.90 to 0.95 (a guess: 0.975, the pixels themselves: 0.71), falls with width, which is the number
of features, whatever was trained, and is no better than that of the same network untrained.
"""

from sovit.spec.design import star, to_runs
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import study_main

CENTRE = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
ARMS = {"width": (16, 24, 48, 64, 96), "depth": (1, 3, 4, 6), "mlp_dim": (64, 128, 512, 1024)}
BUDGETS = (3.2e10, 1e11, 3.2e11, 1e12)
SEEDS = {CENTRE: 3, CENTRE.replace(width=64): 3}
PROBE = "icons:single40"


def runs() -> list[Run]:
    found = to_runs(star(CENTRE, ARMS), BUDGETS, num_classes=16, recipe=recipe_by_rule, seeds=SEEDS, probe=PROBE)
    return sorted(found, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "stream_transfer", runs, metric=f"val_error_10shot/{PROBE}"))
