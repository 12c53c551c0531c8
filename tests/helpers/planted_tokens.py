"""A star over all five dimensions of a shape, its losses from a law planted with terms in patch and image size."""

import warnings

import numpy as np

from sovit.ledger.schema import new_row
from sovit.spec.design import star, to_runs
from sovit.spec.run import Recipe, learning_rate
from sovit.spec.shape import Shape

CENTRE = Shape(48, 2, 192, head_dim=8, patch_size=4, image_size=32, pool="none")
ARMS = {
    "width": (16, 32, 64, 96),
    "depth": (1, 3, 4),
    "mlp_dim": (64, 128, 384, 768),
    "patch_size": (2, 8),
    "image_size": (16, 48, 64),
}
BUDGETS = (3.2e11, 1e12, 3.2e12, 1e13)
NUM_CLASSES = 16
# (amplitude, exponent) of each dimension; the loss rises with the patch
TRUTH = {
    "width": (9.0, -1.2),
    "depth": (0.3, -1.3),
    "mlp_dim": (4.0, -0.6),
    "patch_size": (0.12, 0.7),
    "image_size": (6.0, -1.1),
}
B, C, EPS = 30.0, 0.35, 0.05
CELLS = 4  # a side: a patch must divide a cell


def fits(shape):
    return shape.image_size // CELLS % shape.patch_size == 0


def planted_loss(shape, images, truth=TRUTH):
    return sum(A * getattr(shape, name) ** a for name, (A, a) in truth.items()) + B * images**-C + EPS


def planted_rows(truth=TRUTH, noise=0.003, seed=0, budgets=BUDGETS):
    """Rows of the star, corners included, three seeds at two shapes, log-normal noise by trunk and by row."""
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():  # what cannot be built is left out, and said
        warnings.simplefilter("ignore")
        shapes = list(filter(fits, star(CENTRE, ARMS)))
    seeds = {CENTRE: 3, CENTRE.replace(width=64): 3}
    runs = to_runs(
        shapes, budgets, NUM_CLASSES, lambda s: Recipe(peak_lr=learning_rate(s)), seeds, study="planted_tokens"
    )
    rows = []
    for run in runs:
        trunk = rng.normal(0, noise / 2)
        for n in run.budgets:
            loss = planted_loss(run.shape, n, truth) * np.exp(trunk + rng.normal(0, noise))
            rows.append(new_row(run, n, status="ok", num_classes=NUM_CLASSES, val_loss=float(loss), val_error=0.5))
    return rows
