"""Is attention enough to carry a ViT to a higher resolution on real drawings, and is it attention, or the number of weights?

    sovit assets fetch iconify          once: 104 MB, checked against its hash
    python studies/resolution_icons.py --workers 2          then
    python -m analysis.resolution.tables runs/results/resolution_icons.jsonl

Three shapes of studies/icons_star.py that differ in their MLP alone, so that attention is a third (MLP ratio 4), a fifth and
a half of a block's weights, trained at 32 px to 1.8e12 FLOPs, when icons are known; three paired seeds. Each goes to 48 and
to 64 px, where the icons are drawn anew from their outlines, on as many images as a full fine-tuning of 1e11 FLOPs sees:
all of it, its attention, or its MLPs. Peak rates by the rule of studies/finetune_rate.py; nothing was tuned here.

Cost: 63 trunks, 2.2e13 FLOPs, or 5e12 where those of icons_star are in runs/; about 20 minutes of two cores then. Expected:
MLPs nearly as good as the whole and far better than attention (a pilot of one seed and one shape: at 48 px 1.60, 1.57 and
1.76 nats after 4e11 FLOPs).
"""

from sovit.spec.run import Recipe, Run, budgets_for, learning_rate
from sovit.spec.shape import Shape
from sovit.sweep import study_main

SHAPES = tuple(
    Shape(32, 2, mlp_dim, head_dim=8, patch_size=4, image_size=32, pool="none") for mlp_dim in (128, 256, 64)
)
SIZES = (48, 64)
BASE, TUNED = 1.8e12, 1e11  # training FLOPs; TUNED as if all were trained
RATE = {"full": 1.0, "attention": 2.0, "mlp": 2.0}  # x the base's own
SEEDS = (0, 1, 2)


def of(shape: Shape, seed: int) -> list[Run]:
    """The base of one shape and seed, and what is fine-tuned from it."""
    same = dict(data="icons", preset="mosaic", init_seed=seed, data_seed=seed)
    rate = learning_rate(shape)
    found = [Run(shape, Recipe(rate), budgets_for(shape, [BASE], 40, 16), **same)]
    for size in SIZES:
        large = shape.replace(image_size=size)
        for part, times in RATE.items():
            recipe = Recipe(float(f"{rate * times:.4g}"), warmup_examples=320)
            budgets = budgets_for(large, [TUNED], 40, 16)
            found.append(Run(large, recipe, budgets, base=found[0].run_ids[0], trained=part, **same))
    return found


def runs() -> list[Run]:
    return [run for shape in SHAPES for seed in SEEDS for run in of(shape, seed)]


if __name__ == "__main__":
    raise SystemExit(
        study_main.main(__doc__, "resolution_icons", runs, next_command="python -m analysis.resolution.tables")
    )
