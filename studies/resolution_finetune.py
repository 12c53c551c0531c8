"""Does fine-tuning the attention alone carry a ViT to a higher resolution, and is pre-training at a low one worth it?

    python studies/resolution_finetune.py --workers 2          then
    python -m analysis.resolution.tables runs/results/resolution_finetune.jsonl

Three shapes that differ in their MLP alone, so that attention is a half, a third (MLP ratio 4, as in arXiv 2203.09795) and
a fifth of a block's weights; three paired seeds. Each is trained at 32 px on `stream:detail`, whose scenes show more at a
higher resolution, and cooled down at 2.5e10, 1e11 and 4e11 FLOPs. From 4e11 it goes to 64 and to 96 px (4 and 9 x the
tokens), with all of it trained, its attention, its MLPs or its head; from where it was cooled down earlier with all of it
or its attention. Beside them stand the same shapes trained at 64 and 96 px from scratch. Fine-tunings of one resolution see
the same images, the first that their base saw; peak rates are those of studies/finetune_rate.py.

Cost: 171 trunks, 4.6e13 FLOPs, about 40 minutes of two cores. Expected: by the paper, attention as good as full and better
than MLPs; a pilot of one seed says otherwise for networks as small as these (full 1.91, MLPs 1.96, attention 2.13).
"""

from sovit.spec.run import Recipe, Run, budgets_for, learning_rate
from sovit.spec.shape import Shape
from sovit.sweep import study_main

SHAPES = tuple(
    Shape(48, 2, mlp_dim, head_dim=8, patch_size=8, image_size=32, pool="none") for mlp_dim in (192, 96, 384)
)
SIZES = (64, 96)
SCRATCH = (1.5e11, 3e11, 6e11)  # training FLOPs
BASE = {  # training FLOPs -> what is fine-tuned from there
    2.5e10: ("full", "attention"),
    1e11: ("full", "attention"),
    4e11: ("full", "attention", "mlp", "head"),
}
TUNED = {2.5e10: (5e10, 1e11, 3e11)}  # FLOPs of a full fine-tuning; the others see the same images
USUAL = (5e10, 1e11, 2e11)
RATE = {"full": 1.0, "attention": 2.0, "mlp": 2.0, "head": 2.0}  # x the base's own
SEEDS = (0, 1, 2)


def of(shape: Shape, seed: int) -> list[Run]:
    """All runs of one shape and seed: base, from scratch, fine-tuned."""
    same = dict(preset="detail", init_seed=seed, data_seed=seed)
    rate = learning_rate(shape)
    base = Run(shape, Recipe(rate), budgets_for(shape, BASE, 16, 16), **same)
    found = [base]
    for size in SIZES:
        large = shape.replace(image_size=size)
        found.append(Run(large, Recipe(rate), budgets_for(large, SCRATCH, 16, 16), **same))
        for run_id, (before, parts) in zip(base.run_ids, BASE.items()):
            for part in parts:
                recipe = Recipe(float(f"{rate * RATE[part]:.4g}"), warmup_examples=320)
                budgets = budgets_for(large, TUNED.get(before, USUAL), 16, 16)
                found.append(Run(large, recipe, budgets, base=run_id, trained=part, **same))
    return found


def runs() -> list[Run]:
    return [run for shape in SHAPES for seed in SEEDS for run in of(shape, seed)]


if __name__ == "__main__":
    raise SystemExit(
        study_main.main(__doc__, "resolution_finetune", runs, next_command="python -m analysis.resolution.tables")
    )
