"""Ledgers made from a planted law, so that what an analysis must find is known. No model is trained."""

import numpy as np

from sovit.ledger.records import dump_row
from sovit.ledger.schema import new_row
from sovit.spec.design import star, to_runs
from sovit.spec.run import Recipe, learning_rate
from sovit.spec.shape import Shape

CENTRE = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
ARMS = {"width": (16, 24, 48, 64, 96), "depth": (1, 3, 4, 6), "mlp_dim": (64, 128, 512, 1024)}
BUDGETS = (3.2e10, 1e11, 3.2e11, 1e12)
NUM_CLASSES = 16
ZERO_LINE = 2.767


def planted_loss(shape, images, amplitudes=None, power=2.0):
    """A stream-like bounded law: K = sum A x^-a and D = B n^-c in a power mean, under the zero line."""
    size = dict(width=(18.0, 1.3), depth=(0.55, 1.3), mlp_dim=(9.0, 0.55)) | (amplitudes or {})
    capacity = sum(A * getattr(shape, name) ** -a for name, (A, a) in size.items()) + 0.2
    data = 42.0 * images**-0.3
    loss = (capacity**power + data**power) ** (1 / power)
    return (ZERO_LINE**-4 + loss**-4) ** -0.25


def planted_rows(arms=ARMS, budgets=BUDGETS, seeds=3, noise=0.004, amplitudes=None, seed=0):
    """Rows of a star, `seeds` seeds at the centre and at two more shapes, log-normal noise by trunk and by row."""
    rng = np.random.default_rng(seed)
    seeded = (CENTRE, CENTRE.replace(width=64), CENTRE.replace(depth=4))
    runs = to_runs(
        star(CENTRE, arms),
        budgets,
        NUM_CLASSES,
        lambda s: Recipe(peak_lr=learning_rate(s, 0.008, 0.5, 0.0)),
        dict.fromkeys(seeded, seeds),
        study="planted",
    )
    rows = []
    for run in runs:
        trunk = rng.normal(0, noise / 2)
        for n in run.budgets:
            loss = planted_loss(run.shape, n, amplitudes) * np.exp(trunk + rng.normal(0, noise))
            rows.append(new_row(run, n, status="ok", num_classes=NUM_CLASSES, val_loss=float(loss), val_error=0.5))
    return rows


def write_ledger(path, rows):
    path.write_text("".join(dump_row(row) + "\n" for row in rows))
    return path


def write_csv(path, rows, columns):
    lines = [",".join("" if row.get(c) is None else str(row[c]) for c in columns) for row in rows]
    path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    return path
