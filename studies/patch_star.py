"""Smaller patches, a larger image, or more width? A star over width, MLP dim, patch and image size on detailed scenes.

    python studies/patch_star.py --workers 2         then  sovit fit runs/results/patch_star.jsonl
    sovit predict results/patch_star_law/law.json --train-flops 1e12 --by patch_size

Centre 48 x 2 x 192 in patches of 8 on images of 32 pixels, arms of each dimension, corners, and pairs of patch and image
size off the axes, of which several have as many tokens (16: 8@32, 4@16, 16@64; 64: 8@64, 4@32, 2@16), so that patch, image
and tokens can be told apart. Three seeds at two shapes; each trunk cooled down at four budgets, 4e10 to 3.2e11 training
FLOPs. Small shapes stand where an image costs most. Learning rate by the rule of studies/recipe_search.py, which knows
nothing of tokens: at 4@32 and 2@32 twice the rate was within .4 %, half of it 1 to 3 % worse. Batches are of 16 images
throughout, and of up to 16 times more tokens.

Which loss compares patch sizes? Each token answers the question of its cell alone: a patch of 8 on 32 pixels is a whole
cell, of a patch of 2 sixteen tokens answer, each of which sees a sixteenth and has to fetch the rest by attention. val_loss
is the mean over tokens, the same labels for all, but a harder task for small patches; val_cell_loss is of the mean logits
of a cell, one answer a cell at any patch size, and the fairer comparison (`sovit fit --metric val_cell_loss`). Images of
another size show the same scenes and ask the same questions.

Cost: 29 trunks, 1.1e13 FLOPs, about 20 minutes of two cores. Expected: at these budgets a patch as large as a cell wins, for
each further token of a cell makes an image dearer and slower to learn from; a larger image pays where it is cut into as few
tokens (16@64 before 8@32 before 4@16); MLP dim and width have their valleys.
"""

from sovit.spec.design import star, to_runs
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import study_main

CENTRE = Shape(48, 2, 192, head_dim=8, patch_size=8, image_size=32, pool="none")
ARMS = {"width": (16, 32, 64, 96), "mlp_dim": (48, 96, 384, 768), "patch_size": (2, 4), "image_size": (64, 96)}
SMALL = CENTRE.replace(width=24, mlp_dim=96)
OFF_AXIS = (  # patch and image size together
    *(CENTRE.replace(patch_size=p, image_size=r) for p, r in ((4, 16), (16, 64), (2, 16))),
    *(SMALL.replace(patch_size=p, image_size=r) for p, r in ((4, 32), (4, 48), (4, 64))),
    CENTRE.replace(width=16, mlp_dim=64, patch_size=2),
)
BUDGETS = (4e10, 8e10, 1.6e11, 3.2e11)
SEEDS = {CENTRE: 3, CENTRE.replace(patch_size=4): 3}


def fits(shape: Shape) -> bool:
    """A patch lies within one of the 4 x 4 cells whose question it answers, and no image has more than 256 tokens."""
    return shape.image_size // 4 % shape.patch_size == 0 and shape.num_patches <= 256


def runs() -> list[Run]:
    shapes = list(dict.fromkeys([*filter(fits, star(CENTRE, ARMS)), *OFF_AXIS]))
    found = to_runs(shapes, BUDGETS, num_classes=16, recipe=recipe_by_rule, seeds=SEEDS, preset="detail")
    return sorted(found, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "patch_star", runs))
