"""Which learning rate is fair to each part of a network that is fine-tuned?

    python studies/finetune_rate.py --workers 2

A base of 48 x 2 x 192 at 32 px (`stream:detail`, 3e11 FLOPs), and each of full, attention, mlp and head fine-tuned at
64 px on as many images as a full fine-tuning of 1e11 FLOPs sees, at 1/4, 1/2, 1, 2 and 4 x the peak rate that the base
had; one seed, which is not among those of studies/resolution_finetune.py.

Cost: 21 trunks, 1.7e12 FLOPs, 3 minutes of two cores. Expected: each part has its best rate inside the five, a small
part a higher one than the whole.
"""

from sovit.spec.run import Recipe, Run, budgets_for, learning_rate
from sovit.spec.shape import TRAINED, Shape
from sovit.sweep import study_main

SHAPE = Shape(48, 2, 192, head_dim=8, patch_size=8, image_size=32, pool="none")
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
SEED = 10


def runs() -> list[Run]:
    same = dict(preset="detail", init_seed=SEED, data_seed=SEED)
    rate, large = learning_rate(SHAPE), SHAPE.replace(image_size=64)
    base = Run(SHAPE, Recipe(rate), budgets_for(SHAPE, [3e11], 16, 16), **same)
    budgets = budgets_for(large, [1e11], 16, 16)
    return [base] + [
        Run(large, Recipe(float(f"{rate * r:.4g}")), budgets, base=base.run_ids[0], trained=part, **same)
        for part in TRAINED
        for r in RATES
    ]


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "finetune_rate", runs, next_command="sovit ui"))
