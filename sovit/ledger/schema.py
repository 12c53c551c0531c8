"""The columns of a ledger row: `LedgerRow` is the one place where a column is named and explained.

`docs/ledger-schema.md` is written from it: python -m sovit.ledger.schema > docs/ledger-schema.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypedDict, cast, get_type_hints

from sovit.spec.any_run import AnyRun
from sovit.spec.config import changed
from sovit.spec.run import Run, task_flops
from sovit.spec.siglip_costs import EMBED_DIM, pair_flops
from sovit.spec.vlm_run import VlmRun

SCHEMA = 1
STATUSES = ("ok", "diverged", "failed")
ANSWERED = ("ok", "diverged")  # both are results; a failed run is tried again
REQUIRED = ("run_id", "trunk_id", "status", "num_examples")
TEXT = ("run_id", "trunk_id", "commit")  # hexadecimal digits, which a CSV file cannot tell from 12e4


class LedgerRow(TypedDict, total=False):
    """One measurement: one branch of one trunk. A missing number is None, never 0."""

    schema: Annotated[int, "version of this table, 1"]
    run_id: Annotated[str, "`<trunk_id>-<num_examples>`: the branch, its record and its checkpoint"]
    trunk_id: Annotated[str, "hash of shape, recipe, data and seeds; budgets have no part in it"]
    study: Annotated[str, "the study that asked for the run"]
    status: Annotated[str, "ok, diverged (its loss was not finite) or failed (never measured; `error` says why)"]
    error: Annotated[str | None, "why a run failed or diverged, in one line"]
    objective: Annotated[str, "classification, siglip (images and captions) or vlm"]
    init_seed: Annotated[int, "seed of the initial weights"]
    data_seed: Annotated[int, "seed of the order of the training data"]
    data: Annotated[str, "source: stream, icons or hub"]
    preset: Annotated[str, "preset of the source; for hub its folder or name"]
    data_key: Annotated[str, "digest of the samples: rows of different keys saw different data"]
    num_classes: Annotated[int | None, "classes of the task; None for captions"]
    width: Annotated[int, "tokens' width"]
    depth: Annotated[int, "transformer blocks"]
    mlp_dim: Annotated[int, "hidden width of the MLPs"]
    head_dim: Annotated[int, "width of an attention head"]
    num_heads: Annotated[int, "width / head_dim"]
    patch_size: Annotated[int, "pixels a side"]
    image_size: Annotated[int, "pixels a side"]
    pool: Annotated[str, "how tokens become features: avg, map, token, or none (one label a token)"]
    num_registers: Annotated[int, "register tokens, where there are any"]
    qkv_bias: Annotated[bool, "whether attention's projections have biases, where they have none"]
    layer_scale: Annotated[bool, "whether blocks have layer scale, where they do"]
    num_params: Annotated[int, "parameters of the encoder, task head apart"]
    head_params: Annotated[int | None, "parameters of the task head"]
    num_examples: Annotated[int, "images trained on at the end of this branch, cooldown included"]
    trunk_examples: Annotated[int, "images before the cooldown began"]
    cooldown_examples: Annotated[int, "images of the cooldown"]
    forward_flops: Annotated[int, "of the encoder, an image: matrix products, one multiply-add = 2"]
    head_flops: Annotated[int | None, "of the task head, an image"]
    text_flops: Annotated[int, "of a caption's text tower; siglip only"]
    compute: Annotated[int, "SoViT's t: forward_flops x num_examples"]
    train_flops: Annotated[int | float | None, "training on num_examples images: 3 x (encoder + head); less in a part"]
    spent_flops: Annotated[int | float | None, "this branch's own part of train_flops; sums to the bill of the trunk"]
    batch_size: Annotated[int, "images a step"]
    micro_batch: Annotated[int | None, "images taken through the network at once"]
    peak_lr: Annotated[float, "peak learning rate"]
    weight_decay: Annotated[float, "AdamW's, on matrices"]
    parametrisation: Annotated[str, "initialisation: fan_in or timm"]
    precision: Annotated[str, "of matrix products: float32 or bfloat16"]
    warmup_examples: Annotated[int, "images of the warm-up, where not the default"]
    schedule: Annotated[str, "learning-rate schedule; of an encoder where not the default"]
    rsqrt_examples: Annotated[int, "timescale of the rsqrt trunk in images, where not the default"]
    cooldown: Annotated[
        float, "share of a budget (of a VLM: of a stage) in its cooldown; of an encoder where not the default"
    ]
    beta1: Annotated[float, "AdamW's; of an encoder where not the default"]
    beta2: Annotated[float, "AdamW's; of an encoder where not the default"]
    clip_norm: Annotated[float, "gradient norm at which it is clipped; of an encoder where not the default"]
    patch_sizes: Annotated[list[int], "patch sizes drawn by batch (FlexiViT)"]
    base: Annotated[str, "branch or timm model that a fine-tuning starts from"]
    trained: Annotated[str, "what a fine-tuning trains: attention, mlp, head or full"]
    trained_params: Annotated[int, "parameters that a fine-tuning trains"]
    stored_bytes: Annotated[int, "size of the file of a fine-tuning"]
    base_image_size: Annotated[int, "image_size of the base"]
    base_patch_size: Annotated[int, "patch_size of the base"]
    base_examples: Annotated[int, "images that the base was trained on"]
    base_train_flops: Annotated[int, "training FLOPs of the base"]
    val_loss: Annotated[float | None, "mean validation loss in nats"]
    val_error: Annotated[float | None, "share of wrong validation answers"]
    val_cell_loss: Annotated[float, "where several patches answer one cell: loss of their mean logits"]
    val_cell_error: Annotated[float, "where several patches answer one cell: error of their summed logits"]
    zero_line: Annotated[float | None, "chance loss: nats of the best answer that sees no image"]
    val_zero_shot_error: Annotated[float, "error of naming an image by the nearest caption; siglip only"]
    val_batch: Annotated[int, "image-text pairs that are told apart at validation; siglip only"]
    captions_key: Annotated[str, "digest of the captions; siglip only"]
    text_params: Annotated[int, "parameters of the text tower; siglip only"]
    seconds: Annotated[float | None, "training time of the trunk up to this branch"]
    spent_seconds: Annotated[float | None, "training time of this branch's own part"]
    device: Annotated[str, "device and number of threads"]
    versions: Annotated[dict, "versions of Python and libraries"]
    commit: Annotated[str | None, "commit of the code, where it is tracked"]
    commit_dirty: Annotated[bool | None, "whether the code differed from the commit"]
    date: Annotated[str, "when it was measured, UTC"]
    kind: Annotated[str, "vlm for a vision-language model"]
    control: Annotated[str, "of a VLM: none, random (untrained encoder) or blind (text-only baseline)"]
    encoder: Annotated[str, "of a VLM: the encoder's name"]
    encoder_width: Annotated[int | None, "of a VLM: width of its encoder"]
    encoder_depth: Annotated[int | None, "of a VLM: depth of its encoder"]
    language_model: Annotated[str, "of a VLM: the language model's name"]
    language_model_sha256: Annotated[str, "of a VLM: digest of the language model's weights"]
    projector: Annotated[str, "of a VLM: the projector's name and options"]
    layer: Annotated[int, "of a VLM: the encoder's block that is read"]
    norm: Annotated[bool, "of a VLM: whether through the encoder's final norm"]
    families: Annotated[list[str], "of a VLM: question families trained on, [] for all"]
    template: Annotated[str, "of a VLM: how a question becomes text"]
    layout: Annotated[str, "of a VLM: how image tokens are laid out"]
    max_length: Annotated[int, "of a VLM: tokens of a packed row"]
    num_val: Annotated[int, "of a VLM: validation images"]
    final_lr: Annotated[float, "of a VLM: share of the peak at which cosine ends"]
    lora_rank: Annotated[int, "of a VLM: rank of LoRA"]
    lora_alpha: Annotated[int, "of a VLM: LoRA's alpha"]
    stages: Annotated[str, "of a VLM: its stages in words"]
    vision_mode: Annotated[str, "of a VLM of older rows: frozen, full or lora"]
    projector_mode: Annotated[str, "of a VLM of older rows: frozen or full"]
    language_model_mode: Annotated[str, "of a VLM of older rows: frozen, full or lora"]
    num_image_tokens: Annotated[int, "of a VLM: tokens that an image becomes"]
    vision_params: Annotated[int, "of a VLM: parameters of the encoder"]
    projector_params: Annotated[int, "of a VLM: parameters of the projector"]
    language_model_params: Annotated[int, "of a VLM: parameters of the language model"]
    num_questions: Annotated[int, "of a VLM: validation questions"]
    val_error_low: Annotated[float, "of a VLM: lower end of val_error's 90 % interval by image"]
    val_error_high: Annotated[float, "of a VLM: upper end of it"]
    val_unparsed: Annotated[float, "of a VLM: share of answers that could not be read"]
    shuffled_loss: Annotated[float, "of a VLM: val_loss with another image beside each question"]
    shuffled_error: Annotated[float, "of a VLM: val_error with another image beside each question"]
    held_out_loss: Annotated[float, "of a VLM: val_loss on families that were not trained on"]
    held_out_error: Annotated[float, "of a VLM: val_error on families that were not trained on"]


# columns that come in families, by the part of the name that varies
FAMILIES = {
    "val_loss/FAMILY, val_error/FAMILY": "the same, of one label or question family",
    "val_loss@pN, val_error@pN": "the same, at patch size N of a trunk of several",
    "val_zero_shot_error/TASK": "zero-shot error of one task; siglip only",
    "zero_shot_chance/TASK, zero_shot_majority/TASK": "errors of guessing and of the commonest answer; siglip only",
    "shuffled_loss/FAMILY, shuffled_error/FAMILY": "of a VLM: with another image, of one question family",
    "val_error_Kshot/DATA": "few-shot error of a linear probe with K images a class, mean over support sets",
    "val_error_Kshot_sd/DATA, val_error_Kshot_seeds/DATA": "its standard deviation, and its values",
    "probe_data_key/DATA, probe_zero_line/DATA": "digest of the probe's data, and its chance error",
    "stages.I.num_examples, stages.I.PART.FIELD": "of a VLM: how stage I treats a part that is not frozen",
}

# what may differ between two runs of one measurement
INCIDENTAL = {
    *("seconds", "spent_seconds", "spent_flops", "device", "versions", "commit", "commit_dirty", "date"),
    *("study", "error", "micro_batch"),
}


def new_row(run: Run, num_examples: int, *, status: str, num_classes: int, **more: Any) -> LedgerRow:
    """One row of the schema: identity, shape, recipe and costs from the run; metrics and machine facts from `more`.

    The columns say what each is. `spent_flops` sums over the rows of a trunk that ended well to the true bill. Of objective
    siglip the head is the map to the space of the captions, head_flops its and that of an image's pairs; `text_flops` are
    those of its caption, and train_flops counts both. There are no classes.
    """
    shape = run.shape
    siglip = run.recipe.objective == "siglip"
    pairs = pair_flops(shape.width, run.recipe.batch_size)
    standard = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")
    usual = {f.name: f.default for f in fields(shape)}
    extra = {k: v for k, v in shape.to_dict().items() if k not in standard and v != usual[k]}
    recipe = ("batch_size", "peak_lr", "weight_decay", "parametrisation", "precision")
    row: dict[str, Any] = {
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
        **({"text_flops": task_flops(shape, run.recipe, run.data) - pairs} if siglip else {}),
        "compute": shape.forward_flops * num_examples,
        "train_flops": run.train_flops(num_examples, num_classes),
        "spent_flops": run.spent_flops(num_examples, num_classes),
        **{k: getattr(run.recipe, k) for k in recipe},
        **{k: list(v) if isinstance(v, tuple) else v for k, v in changed(run.recipe).items()},
        **({"base": run.base, "trained": run.trained} if run.base else {}),
        **({"trained_params": shape.trained_params(num_classes, run.trained)} if run.base else {}),
        "val_loss": None,
        "val_error": None,
        **more,
    }
    return cast(LedgerRow, row)


def failed_row(run: AnyRun, num_examples: int, error: str, **more: Any) -> LedgerRow:
    """The row of a branch that was not measured: what was asked for, and why there is no number."""
    if isinstance(run, VlmRun):
        unknown = ("train_flops", "spent_flops", "val_loss", "val_error", "seconds")
        said = dict(schema=SCHEMA, run_id=run.run_id(num_examples), trunk_id=run.trunk_id, status="failed")
        said |= dict(objective="vlm", control=run.control) | run.columns | dict(num_examples=num_examples, error=error)
    else:
        unknown = ("num_classes", "head_params", "head_flops", "train_flops", "spent_flops")
        said = dict(new_row(cast(Run, run), num_examples, status="failed", num_classes=0, error=error, seconds=None))
    return cast(LedgerRow, said | dict.fromkeys(unknown) | more)


def is_vlm(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a vision-language model: no encoder of its own, and losses of other questions."""
    return row.get("objective") == "vlm"


def row_label(row: Mapping[str, Any]) -> str:
    """The shape of a row, or of a vision-language model its encoder and its language model."""
    if row.get("kind") == "vlm":
        return f"{row.get('encoder')} {row.get('language_model')}"
    return "x".join(str(row.get(name, "?")) for name in ("width", "depth", "mlp_dim"))


def is_number(value: object) -> bool:
    """Whether a value of a row is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def schema_text() -> str:
    """docs/ledger-schema.md: every column with its type and meaning."""
    hints = get_type_hints(LedgerRow, include_extras=True).items()
    columns = [(f"`{name}`", _type_name(hint.__origin__), hint.__metadata__[0]) for name, hint in hints]
    lines = ["# The columns of a ledger", ""]
    lines += ["A ledger has one flat JSON object a line: one measurement. A missing number is `null`, never 0."]
    lines += ["This page is written from `sovit/ledger/schema.py`.", "", "| column | type | meaning |", "|---|---|---|"]
    lines += [f"| {name} | {kind} | {meaning} |" for name, kind, meaning in columns]
    lines += ["", "Columns that come in families:", "", "| columns | meaning |", "|---|---|"]
    lines += [f"| `{name.replace(', ', '`, `')}` | {meaning} |" for name, meaning in FAMILIES.items()]
    return "\n".join(lines) + "\n"


def _type_name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace(" | None", " or null").replace(" | ", " or ")


if __name__ == "__main__":
    print(schema_text(), end="")
