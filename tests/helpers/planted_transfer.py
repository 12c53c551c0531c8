"""Ledgers of a fine-tuning study from a planted law of transfer, and of Flexi trunks. No model is trained."""

import numpy as np
from planted_ledger import write_ledger  # noqa: F401

from sovit.ledger.schema import new_row
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape

SHAPES = (
    Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=32, pool="none"),
    Shape(48, 3, 96, head_dim=8, patch_size=4, image_size=32, pool="none"),
)
NUM_CLASSES, ZERO_LINE = 16, 2.767
SCRATCH_BUDGETS = (3200, 9600, 28800, 96000)
BASE_BUDGETS = (4800, 14400, 48000)
TUNED_BUDGETS = (1600, 4800, 14400)
# n_eff = m n1 + k n0^g n1^h, and + J n0^-j
TRUTH = {
    "full": dict(k=1.5, g=0.85, m=1.0, h=0.0, J=0.0, j=0.0),
    "attention": dict(k=1.2, g=0.85, m=0.7, h=0.0, J=0.0, j=0.0),
    "mlp": dict(k=1.0, g=0.85, m=0.6, h=0.0, J=0.0, j=0.0),
    "head": dict(k=0.5, g=0.8, m=0.1, h=0.0, J=0.0, j=0.0),
}
STEP = {"full": 3.0, "attention": 2.5, "mlp": 2.7, "head": 1.1}  # FLOPs of a step over those of a forward pass


def scratch_loss(shape, n, size=None):
    """E + B n^-c under the zero line; lower with resolution and width."""
    size = size or shape.image_size
    raw = 0.5 + 12.0 * (32 / size) ** 0.2 * (32 / shape.width) ** 0.2 * np.asarray(n, float) ** -0.24
    return (ZERO_LINE**-4 + raw**-4) ** -0.25


def tuned_loss(shape, n0, n1, truth):
    """The planted law of transfer at shape's resolution; truth: one entry of TRUTH."""
    t, n0, n1 = truth, np.asarray(n0, float), np.asarray(n1, float)
    effective = t["m"] * n1 + t["k"] * n0 ** t["g"] * n1 ** t["h"]
    free = (scratch_loss(shape, effective) ** -4 - ZERO_LINE**-4) ** -0.25 + t["J"] * n0 ** -t["j"]
    return (ZERO_LINE**-4 + free**-4) ** -0.25


def study_rows(shapes=SHAPES, sizes=(48, 64), seeds=3, noise=0.004, truth=TRUTH, seed=0, bases=BASE_BUDGETS):
    """Base trunks at 32 px, scratch and fine-tuned trunks at each size, seeds in pairs; log-normal trunk and row noise."""
    rng = np.random.default_rng(seed)
    rows = []

    def add(run, examples, loss, more=(), flops=None):
        row = new_row(run, examples, status="ok", num_classes=NUM_CLASSES)
        row |= dict(val_loss=float(loss), val_error=float(loss / 4), zero_line=ZERO_LINE) | dict(more)
        row["train_flops"] = row["train_flops"] if flops is None else flops
        rows.append(row)
        return row

    def trunk(shape, budgets, s):
        return Run(shape, Recipe(0.008), budgets, preset="detail", init_seed=s, data_seed=s, study="planted")

    for shape in shapes:
        for s in range(seeds):
            run, effect = trunk(shape, bases, s), rng.normal(0, noise / 2)
            base_rows = [
                add(run, n, scratch_loss(shape, n) * np.exp(effect + rng.normal(0, noise))) for n in run.budgets
            ]
            for size in sizes:
                big = shape.replace(image_size=size)
                run, effect = trunk(big, SCRATCH_BUDGETS, s), rng.normal(0, noise / 2)
                for n in run.budgets:
                    add(run, n, scratch_loss(big, n) * np.exp(effect + rng.normal(0, noise)))
                for base in base_rows:
                    for mode, t in truth.items():
                        run, effect = trunk(big, TUNED_BUDGETS, s), rng.normal(0, noise / 2)
                        step = int(STEP[mode] * (big.forward_flops + big.head_flops(NUM_CLASSES)))
                        for n in run.budgets:
                            loss = tuned_loss(big, base["num_examples"], n, t) * np.exp(effect + rng.normal(0, noise))
                            trunk_id = f"{base['trunk_id'][:4]}{base['num_examples']}{size}{mode}"
                            add(
                                run,
                                n,
                                loss,
                                dict(
                                    trunk_id=trunk_id,
                                    run_id=f"{trunk_id}-{n}",
                                    base=base["run_id"],
                                    trained=mode,
                                    trained_params=1000,
                                    base_image_size=32,
                                    base_patch_size=4,
                                    base_examples=base["num_examples"],
                                    base_train_flops=base["train_flops"],
                                    stored_bytes=int(
                                        4 * big.num_params * dict(full=1, attention=0.4, mlp=0.5, head=0.05)[mode]
                                    ),
                                ),
                                step * n,
                            )
    return rows


def flexi_rows(worse=0.05, seeds=3, noise=0.003, sizes=(2, 4, 8), budgets=(3200, 9600, 28800, 96000), seed=0):
    """Flexi trunks and trunks of one size, of one shape; at equal images a Flexi trunk is worse by `worse` (of ln loss)."""
    rng = np.random.default_rng(seed)
    rows = []
    shape = SHAPES[0].replace(image_size=16)

    def loss(n, size):
        return 0.4 + 9.0 * (size / 4) ** 0.15 * n**-0.22

    for s in range(seeds):
        for size in sizes:
            run = Run(shape.replace(patch_size=size), Recipe(0.008), budgets, init_seed=s, data_seed=s, study="flexi")
            for n in budgets:
                row = new_row(run, n, status="ok", num_classes=NUM_CLASSES)
                value = float(loss(n, size) * np.exp(rng.normal(0, noise)))
                rows.append(row | dict(val_loss=value, val_error=value / 4))
        run = Run(shape, Recipe(0.0081), budgets, init_seed=s, data_seed=s, study="flexi")
        each = [shape.replace(patch_size=p).train_flops_per_image(NUM_CLASSES) for p in sizes]
        for n in budgets:
            row = new_row(run, n, status="ok", num_classes=NUM_CLASSES)
            at = {p: float(loss(n, p) * np.exp(worse + rng.normal(0, noise))) for p in sizes}
            more = {f"val_loss@p{p}": v for p, v in at.items()} | {f"val_error@p{p}": v / 4 for p, v in at.items()}
            more |= dict(val_loss=at[4], val_error=at[4] / 4, patch_sizes=list(sizes), train_flops=n * sum(each) // 3)
            rows.append(row | more)
    return rows
