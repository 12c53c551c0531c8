"""Which shape for my own images? A star on any classification set that Hugging Face `datasets` can open.

    python studies/image_star.py preset=path/to/folder --name my_images --workers 2
    sovit fit runs/results/my_images.jsonl

`preset` is a folder with one sub-folder of images a class, parquet files, or a hub name such as uoft-cs/cifar10. Images
are decoded once, at `shape.image_size` pixels. The recipe is the stream's: check the learning rate first, by running
with recipe.peak_lr=0.004 and so on under other names.

Cost: 18 trunks of at most 1e13 training FLOPs, about three hours of two cores. Expected: nothing yet; it is your question.
"""

from sovit.spec.design import star, to_runs
from sovit.spec.run import Recipe, Run, learning_rate
from sovit.spec.shape import Shape
from sovit.sweep import study_main

CENTRE = Shape(64, 4, 256, head_dim=16, patch_size=4, image_size=32, pool="avg")
ARMS = {"width": (32, 48, 96, 128), "depth": (2, 3, 6), "mlp_dim": (64, 128, 512, 1024)}
BUDGETS = (1e12, 3.2e12, 1e13)
NUM_CLASSES = 100  # nominal: budgets are rounded for a head of this size, the rows carry the cost of the real one


def recipe(shape: Shape) -> Recipe:
    return Recipe(peak_lr=learning_rate(shape), batch_size=32, warmup_examples=3200)


def runs() -> list[Run]:
    found = to_runs(star(CENTRE, ARMS), BUDGETS, NUM_CLASSES, recipe, {CENTRE: 3}, data="hub", preset="FOLDER")
    return sorted(found, key=lambda run: -run.total_examples)


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "image_star", runs))
