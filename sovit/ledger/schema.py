"""The columns of a ledger row."""

from __future__ import annotations

import math

from sovit.spec.run import Run
from sovit.spec.siglip_costs import EMBED_DIM, pair_flops

SCHEMA = 1


STATUSES = ("ok", "diverged", "failed")


ANSWERED = ("ok", "diverged")  # both are results; a failed run is tried again


# what may differ between two runs of one measurement
INCIDENTAL = set(
    [
        "seconds",
        "spent_seconds",
        "spent_flops",
        "device",
        "versions",
        "commit",
        "commit_dirty",
        "date",
        "study",
        "error",
        "micro_batch",
    ]
)


REQUIRED = ("run_id", "trunk_id", "status", "num_examples")


TEXT = ("run_id", "trunk_id", "commit")  # hexadecimal digits, which a CSV file cannot tell from 12e4


def new_row(run: Run, num_examples: int, *, status: str, num_classes: int, **more) -> dict:
    """One row of the schema: identity, shape, recipe and costs from the run; metrics and machine facts from `more`.

    `compute` is SoViT's t, forward FLOPs x images of the encoder; `train_flops` is what training on that many images
    costs, 3 x (encoder + head), of a fine-tuning what its steps really compute; `spent_flops` is this branch's own part of
    it, so that its sum over the rows of a trunk that ended well is the true bill. A fine-tuning says `base` and `trained`
    besides, a trunk of several patch sizes `patch_sizes`. Of objective siglip the head is the map to the space of the
    captions, head_flops its and that of an image's pairs; `text_flops` are those of its caption, and train_flops counts
    both. There are no classes.
    """
    shape = run.shape
    siglip = run.recipe.objective == "siglip"
    pairs = pair_flops(shape.width, run.recipe.batch_size)
    standard = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")
    extra = {
        k: v
        for k, v in shape.to_dict().items()
        if k not in standard and v != type(shape).__dataclass_fields__[k].default
    }
    return {
        "schema": SCHEMA,
        "run_id": run.run_id(num_examples),
        "trunk_id": run.trunk_id,
        "study": run.study,
        "status": status,
        "init_seed": run.init_seed,
        "data_seed": run.data_seed,
        "data": run.data,
        "preset": run.preset,
        "num_classes": None if siglip else num_classes,
        "objective": run.recipe.objective,
        **{k: getattr(shape, k) for k in standard},
        "num_heads": shape.num_heads,
        **extra,
        "num_params": shape.num_params,
        "head_params": shape.head_params(EMBED_DIM if siglip else num_classes),
        "num_examples": num_examples,
        "trunk_examples": run.trunk_examples(num_examples),
        "cooldown_examples": run.cooldown_examples(num_examples),
        "forward_flops": shape.forward_flops,
        "head_flops": pairs if siglip else shape.head_flops(num_classes),
        **({"text_flops": run.task_flops() - pairs} if siglip else {}),
        "compute": shape.forward_flops * num_examples,
        "train_flops": run.train_flops(num_examples, num_classes),
        "spent_flops": run.spent_flops(num_examples, num_classes),
        **{
            k: getattr(run.recipe, k) for k in ("batch_size", "peak_lr", "weight_decay", "parametrisation", "precision")
        },
        **({"patch_sizes": list(run.recipe.patch_sizes)} if run.recipe.patch_sizes else {}),
        **({"base": run.base, "trained": run.trained} if run.base else {}),
        **({"trained_params": shape.trained_params(num_classes, run.trained)} if run.base else {}),
        "val_loss": None,
        "val_error": None,
        **more,
    }


def is_vlm(row: dict) -> bool:
    """Whether a row is of a vision-language model: no encoder of its own, and losses of other questions."""
    return row.get("objective") == "vlm"


def is_number(value) -> bool:
    """Whether a value of a row is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
