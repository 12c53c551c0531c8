"""The model card of an exported encoder: what it is, what it was trained on and for how much, how to load it."""

from __future__ import annotations

from pathlib import Path

from sovit.data import NORMALISATION
from sovit.data.hub.images import seen_share
from sovit.data.icons import icons
from sovit.encoder.base import Base
from sovit.encoder.flexivit import resize_method
from sovit.encoder.trained import base_of
from sovit.ledger.records import record_path, record_row
from sovit.spec.run import Run
from sovit.spec.shape import Shape

TRAINED_WORDS = {  # a value of Run.trained
    "full": "all weights trained",
    "attention": "the attention's projections, the positions and the task head trained, all else frozen",
    "mlp": "the MLPs, the positions and the task head trained, all else frozen",
    "head": "the task head trained, all else frozen",
}
LOADING = {  # format -> Python that loads the folder PATH
    "timm": """import timm

model = timm.create_model('local-dir:PATH', pretrained=True)""",
    "siglip": """from transformers import AutoImageProcessor, SiglipVisionModel

model = SiglipVisionModel.from_pretrained('PATH')
processor = AutoImageProcessor.from_pretrained('PATH')
tokens = model(**processor(images=image, return_tensors='pt')).last_hidden_state  # [B, N, D]""",
    "vit": """from transformers import AutoImageProcessor, ViTModel

model = ViTModel.from_pretrained('PATH', add_pooling_layer=False)  # it was trained without that layer
processor = AutoImageProcessor.from_pretrained('PATH')
tokens = model(**processor(images=image, return_tensors='pt')).last_hidden_state[:, 1:]  # [B, N, D], class token first""",
    "sovit": """import sovit.encoder.hf_model  # registers the model with transformers; sovit must be installed
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained('PATH')
processor = AutoImageProcessor.from_pretrained('PATH')
tokens = model(**processor(images=image, return_tensors='pt')).last_hidden_state  # [B, N, D]""",
    "nanovlm": """# in a clone of https://github.com/huggingface/nanoVLM
import json
from safetensors.torch import load_file
from models.config import VLMConfig
from models.vision_transformer import ViT

model = ViT(VLMConfig(**json.load(open('PATH/config.json'))))
model.load_state_dict(load_file('PATH/model.safetensors'))""",
}
NOTES = {
    "siglip": {
        "avg": "SigLIP has no mean pooling: pooled features are the final norm of the mean of `hidden_states[-1]`.",
        "none": "Nothing is pooled: the model was trained to be read out at every patch token.",
    },
    "nanovlm": {
        pool: "Its images are in [0, 1] as nanoVLM makes them: the normalisation is folded into the patch embedding."
        " nanoVLM computes the tanh form of GELU, the model was trained with erf's: `sovit.json` says what that moves."
        for pool in ("avg", "map", "none")
    },
}


def card(run_id: str, run: Run, shape: Shape, runs_dir: Path | str, format: str) -> str:
    """README.md of an export of `run_id` at `shape`, which differs from the run's own where it was resized."""
    chain = list(_descent(run_id, run, runs_dir))
    library = "timm" if format == "timm" else "transformers" if format != "nanovlm" else "nanovlm"
    front = f"---\nlicense: mit\nlibrary_name: {library}\ntags:\n- vision\n- vit\n- sovit\n---\n"
    parts = [
        f"# {shape.label}, patch {shape.patch_size}, {shape.image_size} px",
        *_story(run_id, run, shape, chain),
        _table(run_id, run, shape, runs_dir, chain),
        *filter(None, [_note(run, shape, format)]),
        f"```python\n{LOADING[format]}\n```",
    ]
    return front + "\n" + "\n\n".join(parts) + "\n"


def _descent(run_id: str, run: Run, runs_dir: Path | str):
    """(run_id, run, its base or None) of a run, and of all that it was fine-tuned from."""
    while run.base:
        base = base_of(run, runs_dir)
        yield run_id, run, base
        if base.run is None:
            return
        run_id, run = base.name, base.run
    yield run_id, run, None


def _story(run_id: str, run: Run, shape: Shape, chain: list[tuple[str, Run, Base | None]]) -> list[str]:
    """Paragraphs: what it is, where its weights come from, what was done to them last."""

    def at(size: Shape) -> str:
        return f"{size.image_size} px, patch {size.patch_size}"

    lines = [
        f"A Vision Transformer trained by sovit on `{run.data}:{run.preset}`: {shape.num_params:,} parameters,"
        f" {shape.forward_flops:,} FLOPs an image (2 per multiply-add), run `{run_id}`."
    ]
    if run.recipe.objective == "siglip":
        lines += [
            "It learned, without labels, to tell which caption is an image's own (SigLIP's sigmoid loss, arXiv 2303.15343);"
            " the text tower that it learned with is no part of this folder."
        ]
    if run.recipe.patch_sizes:
        sizes = ", ".join(map(str, run.recipe.patch_sizes))
        lines += [f"Its patch size was drawn by batch in training, from {sizes} pixels (FlexiViT)."]
    if shape != run.shape:
        lines += [
            f"Its weights were trained at {at(run.shape)} and resized to {at(shape)}, without any training"
            f" there: positions, and patch kernels by FlexiViT's pseudo-inverse resize ({resize_method(run)})."
        ]
    for name, tuned, base in chain:
        if base is None:
            break
        lines += [
            f"Run `{name}` is a fine-tuning of `{base.name}` ({at(base.shape)}) to {at(tuned.shape)} on"
            f" `{tuned.data}:{tuned.preset}`: {TRAINED_WORDS[tuned.trained]},"
            f" {int(name.rpartition('-')[2]):,} examples."
        ]
        if base.run is None:
            lines += [f"The weights of `{base.name}` have the SHA-256 `{base.sha256}`."]
    return lines


def _note(run: Run, shape: Shape, format: str) -> str | None:
    if shape.pool == "none" and run.recipe.objective == "siglip":
        return "Nothing is pooled: in training a linear map of the mean of these tokens was compared with captions."
    return NOTES.get(format, {}).get(shape.pool)


def _table(run_id: str, run: Run, shape: Shape, runs_dir: Path | str, chain: list) -> str:
    examples = int(run_id.rpartition("-")[2])
    row = record_row(record_path(runs_dir, run.trunk_id, run_id)) or {}
    mean, std = NORMALISATION[run.data]
    crop_pct = seen_share(run.preset) if run.data == "hub" else 1.0
    rows = {
        "shape": f"width {shape.width}, depth {shape.depth}, MLP dim {shape.mlp_dim}, {shape.num_heads} heads of"
        f" {shape.head_dim}, patch {shape.patch_size} px, image {shape.image_size} px, pool {shape.pool}"
        + (f", {shape.num_registers} registers" if shape.num_registers else "")
        + (", layer scale" if shape.layer_scale else "")
        + ("" if shape.qkv_bias else ", qkv without bias"),
        "tokens an image": f"{shape.num_patches} of patches, {shape.num_prefix_tokens} before them",
        "input": f"short side to {int(shape.image_size / crop_pct)} px (bicubic), the middle {shape.image_size} px, in"
        f" [0, 1], then (x - {mean:g}) / {std:g}",
        "training": f"{examples:,} examples, {run.train_flops(examples, row.get('num_classes') or 0):,} FLOPs"
        + (" (of the last fine-tuning alone)" if run.base else ""),
        "seeds": f"weights {run.init_seed}, order of the data {run.data_seed}",
        "validation": _score(row, run, shape),
        "data": "; ".join(dict.fromkeys(_licence(r) for _, r, _ in chain)),
        "licence": "MIT, as sovit itself"
        + (f"; the weights of `{run.base}` have their own" if any(b and b.run is None for *_, b in chain) else ""),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _score(row: dict, run: Run, shape: Shape) -> str:
    if row.get("val_loss") is None:
        return "no record of it"
    error = f", error {row['val_error']:.4f}" if row.get("val_error") is not None else ""
    blind = f" (looking at nothing: {row['zero_line']:.4f})" if row.get("zero_line") is not None else ""
    told = ", of which caption of a batch is an image's own" if run.recipe.objective == "siglip" else ""
    where = f", before it was resized from {run.shape.image_size} px" if shape != run.shape else ""
    return f"loss {row['val_loss']:.4f} nats{blind}{error} on `{run.data}:{run.preset}`{told}{where}"


def _licence(run: Run) -> str:
    """The data of a run and whose it is."""
    name = f"`{run.data}:{run.preset}`"
    if run.data == "stream":
        return f"{name}, drawn by sovit's own program: no outside data, no licence attaches"
    if run.data != "icons":
        return f"{name}, under the data set's own licence, which is not recorded here"
    sets = icons.licences(run.preset, run.shape.image_size)
    told = [f"{licence}: {', '.join(names)}" for licence, names in sets.items()]
    by_set = "; ".join(told) if told else "set by set in ATTRIBUTION.tsv of sovit's cache, which is not on this machine"
    return f"{name}, drawings of the package @iconify/json, permissive sets alone ({by_set})"
