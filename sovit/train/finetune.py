"""Fine-tuning: a trained trunk goes on at another resolution or patch size, all of it or a part (arXiv 2203.09795).

A fine-tuning is a Run like any other, with `base` (where its weights start), its shape at the new size, and `trained`:

    attention  query, key, value and output projections of every block, position embedding, task head
    mlp        the MLPs in place of the projections: the paper's comparison, at twice the weights
    head       the task head alone
    full       everything

Of a MAP head `attention` trains the projections, `mlp` the MLP; the published code leaves its attention frozen. Its probe,
class token, registers, every norm and LayerScale, and the patch embedding stay frozen.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sovit.data import NORMALISATION
from sovit.encoder.from_timm import Base
from sovit.encoder.model import build
from sovit.encoder.resize import resize_method, resize_state
from sovit.spec.run import Run

NAMES = {  # trained -> the parameters that are, by name in timm
    "attention": re.compile(r"blocks\.\d+\.attn\.(qkv|proj)\.|attn_pool\.(q|kv|proj)\.|pos_embed$|head\."),
    "mlp": re.compile(r"blocks\.\d+\.mlp\.|attn_pool\.mlp\.|pos_embed$|head\."),
    "head": re.compile(r"head\."),
    "full": re.compile(""),
}


def freeze(model: Any, trained: str) -> tuple[str, ...]:
    """Leave only what `trained` names with a gradient; return the names of those parameters.

    Call it before an optimiser is made: one made before would go on to decay what is frozen.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(NAMES[trained].match(name)))
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def begin(run: Run, base: Base, num_classes: int) -> Any:
    """The model that `run` starts from: the base's weights at the new size, and nothing but `run.trained` to train.

    The base's task head goes on where the data and the objective are the base's; else it is drawn by init_seed, as from
    scratch. Where images were normalised otherwise, the patch embedding takes that up, exactly. Raises UserError where the
    shape is not the base's but for its sizes.
    """
    model = build(run.shape, num_classes, run.recipe.parametrisation, run.init_seed)
    weights = resize_state(base.weights, base.shape, run.shape, resize_method(base.run))
    if base.run is None or _task(base.run) != _task(run):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    mean, std = ((value,) * 3 for value in NORMALISATION[run.data])
    if (mean, std) != (base.mean, base.std):
        kernel, bias = _normalised_otherwise(weights, base.mean, base.std, mean, std)
        weights |= {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": bias}
    model.load_state_dict(model.state_dict() | weights)
    freeze(model, run.trained)
    return model


def _task(run: Run) -> tuple[str, str, str]:
    return run.data, run.preset, run.recipe.objective


def stored_names(model: Any, base: Base) -> tuple[str, ...]:
    """What a file of `model` has to hold beside its base: all that is trained, and what has become something else.

    That is a resized tensor, or a new task head; call it before training.
    """
    stored = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if name not in base.weights or not torch.equal(tensor.cpu(), base.weights[name]):
            stored.add(name)
    return tuple(name for name in model.state_dict() if name in stored)


def _normalised_otherwise(weights: dict, old_mean, old_std, mean, std) -> tuple[Tensor, Tensor]:
    """Patch embedding for (x - mean) / std that gives what it gave for (x - old_mean) / old_std, x an image in [0, 1]."""
    old_mean, old_std, mean, std = (torch.tensor(v, dtype=torch.float64) for v in (old_mean, old_std, mean, std))
    kernel = weights["patch_embed.proj.weight"].double()  # [D, 3, p, p]
    offset = ((mean - old_mean) / old_std).view(1, 3, 1, 1)
    bias = weights["patch_embed.proj.bias"].double() + (kernel * offset).sum((1, 2, 3))
    kernel = kernel * (std / old_std).view(1, 3, 1, 1)
    return kernel.float(), bias.float()
