"""The contrastive objective: an encoder learns to tell which of a batch's captions is an image's own.

The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343, algorithm 1): with L2-normalised embeddings x_i of the images
and y_j of the captions, z_ij = 1 where i = j and -1 elsewhere, and learned t' and b,

    loss = -1/B sum_ij log sigmoid(z_ij (exp(t') x_i . y_j + b)),     t' = log 10 and b = -10 at the start

a sum over the B captions, a mean over the B images. Whoever sees nothing answers each pair with b = -log(B - 1), at
B H(1/B) = log B + (B - 1) log(B / (B - 1)) nats: the chance loss, 5.15 at B = 64.

    legend: B images, T words of a caption, E = EMBED_DIM, K values of an attribute
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sovit.data import Source
from sovit.data.captions import Captions
from sovit.encoder.model import build
from sovit.spec.run import Recipe
from sovit.spec.shape import Shape
from sovit.spec.siglip_costs import DEPTH, EMBED_DIM, HEAD_DIM, MLP_DIM, WIDTH, text_params
from sovit.train.evaluate import validation

VAL_BATCH = 64  # of validation, whatever a run trains with: the loss depends on it


class Pairs(NamedTuple):
    """images [B, 3, H, W]; words [B, T], 0 fills up."""

    images: Tensor
    words: Tensor


class TextTower(nn.Module):
    """Words [B, T] -> embeddings [B, E], not normalised: a small Transformer, the mean of its words, a linear map.

    `temperature` is t' of the loss and `bias` its b: they are learned, and stored, with the tower.
    """

    def __init__(self, num_words: int, vocabulary: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Parameter(torch.zeros(num_words, WIDTH))
        self.blocks = nn.ModuleList(
            Block(WIDTH, WIDTH // HEAD_DIM, MLP_DIM / WIDTH, qkv_bias=True) for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, EMBED_DIM)
        self.temperature = nn.Parameter(torch.tensor(math.log(10)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, words: Tensor) -> Tensor:
        there = words != 0  # [B, T]
        x = self.words(words) + self.positions  # [B, T, W]
        for block in self.blocks:
            x = block(x, attn_mask=there[:, None, None])
        there = there[..., None].to(x.dtype)
        x = (self.norm(x) * there).sum(1) / there.sum(1).clamp_min(1)  # [B, W]
        return self.head(x)


def build_pair(shape: Shape, recipe: Recipe, captions: Captions, seed: int) -> Any:
    """The encoder, whose task head is the map to E, with a text tower as its module `text`; a function of `seed` alone."""
    model: Any = build(shape, EMBED_DIM, recipe.parametrisation, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + (1 << 32))  # no encoder is drawn by a seed as large
        tower = TextTower(captions.num_words, len(captions.words))
        for name, module in tower.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith((".attn.proj", ".mlp.fc2")):
                    std *= (2 * DEPTH) ** -0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(tower.words.weight, std=0.5)
        nn.init.normal_(tower.positions, std=0.1)
    model.text = tower
    return model


def embed_images(model: Any, images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, E], normalised: the pooled features (of tokens their mean) through the task head."""
    x = model.forward_head(model.forward_features(images), pre_logits=True)  # [B, D], or [B, N, D] unpooled
    if x.ndim == 3:
        x = x[:, model.num_prefix_tokens :].mean(1)
    return F.normalize(model.head(x).float(), dim=-1)


def embed_words(tower: TextTower, words: Tensor) -> Tensor:
    """[B, T] -> [B, E], normalised."""
    return F.normalize(tower(words).float(), dim=-1)


def sigmoid_loss(x: Tensor, y: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
    """The B rows [B] whose mean is the loss (see above), of normalised x and y [B, E]."""
    logits = temperature.exp() * x @ y.T + bias  # [B, B]
    z = 2 * torch.eye(len(x), device=x.device) - 1
    return -F.logsigmoid(z * logits).sum(1)


def pair_loss(
    model: Any, batch: Pairs, rows: int, precision: Callable[[], Any] = contextlib.nullcontext
) -> tuple[Tensor, int]:
    """Sum over the images of a batch, and their number. Images are embedded `rows` at a time, under `precision()`.

    All pairs of the batch enter however few images fit into memory: of parts, activations are computed again for the
    gradient, which is the same but for rounding.
    """
    with precision():
        if rows >= len(batch.images):
            x = embed_images(model, batch.images)
        else:
            parts = batch.images.split(rows)
            x = torch.cat([checkpoint(embed_images, model, part, use_reentrant=False) for part in parts])  # type: ignore[misc]
        y = embed_words(model.text, batch.words)
    return sigmoid_loss(x, y, model.text.temperature, model.text.bias).sum(), len(x)


def zero_line(batch_size: int) -> float:
    """Nats: the loss of whoever sees nothing, log B + (B - 1) log(B / (B - 1))."""
    return math.log(batch_size) + (batch_size - 1) * math.log(batch_size / (batch_size - 1))


# judging -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate_pairs(model: Any, source: Source, captions: Captions) -> dict[str, float | None]:
    """The metrics of a row: val_loss, val_error and val_zero_shot_error.

    val_loss and val_error are of batches of VAL_BATCH consecutive validation images (the rest at the end is left out).
    val_error: the share of images to which another caption of their batch, in other words, is more similar than their own.
    val_zero_shot_error/<attribute>: of all validation images, the share to which a prompt is the most similar that is not
    true of them; without the attribute, the mean over attributes. `row_columns` has what a guess gives.
    """
    model.eval()
    batch = val_batch(source)
    whole = source.num_val - source.num_val % batch
    x = torch.cat([found for _, found in validation(source, partial(embed_images, model))])  # [num_val, E]
    losses, wrong = [], []
    for start in range(0, whole, batch):
        words = captions.val(start, batch)
        ours, y = x[start : start + batch], embed_words(model.text, words)
        losses.append(sigmoid_loss(ours, y, model.text.temperature, model.text.bias).double())
        nearest = words[(ours @ y.T).argmax(1)]  # [B, T]
        wrong.append((nearest != words).any(1).double())
    metrics: dict[str, float | None] = {
        "val_loss": torch.cat(losses).mean().item(),
        "val_error": torch.cat(wrong).mean().item(),
    }
    errors = {}
    for name, (prompts, true) in captions.zero_shot().items():
        chosen = (x @ embed_words(model.text, prompts).T).argmax(1)  # [num_val]
        errors[name] = (~true.gather(1, chosen[:, None])).double().mean().item()
    metrics["val_zero_shot_error"] = sum(errors.values()) / len(errors)
    model.train()
    return metrics | {f"val_zero_shot_error/{name}": error for name, error in errors.items()}


def val_batch(source: Source) -> int:
    """Images of a batch of validation: VAL_BATCH, or all where a set has fewer."""
    return min(VAL_BATCH, source.num_val)


def pair_baselines(source: Source) -> str:
    """What can be had without looking, as `sovit.data.baselines` says it of labels."""
    batch = val_batch(source)
    chance = f"chance loss {zero_line(batch):.4f} nats in batches of {batch}"
    return f"captions, {chance}; a guess is wrong in {1 - 1 / batch:.1%}"


def row_columns(source: Source, captions: Captions) -> dict:
    """What a row says of the objective: the chance loss of val_loss, the text tower, and what zero-shot guesses come to:
    the error of a prompt drawn at random (chance), and of the one which is true of most validation images (majority)."""
    found: dict = {
        "zero_line": zero_line(val_batch(source)),
        "val_batch": val_batch(source),
        "captions_key": captions.content_key,
        "text_params": text_params(captions.num_words, len(captions.words)),
    }
    for name, (_, true) in captions.zero_shot().items():
        share = true.double().mean(0)  # [K]
        found[f"zero_shot_chance/{name}"] = 1 - share.mean().item()
        found[f"zero_shot_majority/{name}"] = 1 - share.max().item()
    return found
