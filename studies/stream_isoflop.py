"""How large should a ViT of usual proportions be on the stream? IsoFLOP curves of one proportion at two budgets.

    python studies/stream_isoflop.py --workers 2          then  sovit fit runs/results/stream_isoflop.jsonl

Five sizes with width : depth : MLP as 32 : 2 : 128, each cooled down at the same training FLOPs: the N-D (Chinchilla)
side of the question, for comparison with the shape law.

Cost: 5 trunks, 1.8e12 FLOPs, about 4 minutes of two cores. Expected: the best width moves from 32 at 1e11 to 48 at
3.2e11.
"""

from sovit.spec.design import isoflop, to_runs
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import study_main

BASE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
WIDTHS = (24, 32, 48, 64, 80)
BUDGETS = (1e11, 3.2e11)


def runs() -> list[Run]:
    return to_runs(isoflop(BASE, WIDTHS), BUDGETS, num_classes=16, recipe=recipe_by_rule)


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "stream_isoflop", runs))
