"""How well a vision-language model answers questions with exact answers: loss, error, controls, what cannot be parsed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sovit.vlm.model import VisionLanguageModel
from sovit.vlm.packing import NO_LABEL

BATCH = 16  # images
DRAWS = 1000  # of the bootstrap
LEVEL = 0.90
NUM_GENERATED = 32  # images whose questions are answered freely, to see what does not parse


def validate(
    model: VisionLanguageModel, questions: Any, num_images: int, max_length: int, trained: tuple[str, ...] = ()
) -> dict:
    """The metrics of a row, over the questions about validation images 0 .. num_images - 1.

    trained: the families that the model was trained on (() = all), of which val_... and shuffled_... are; held_out_loss
    and held_out_error are of the others.

    val_loss: mean cross-entropy (nats) of an answer's tokens, the end token included. val_error: share of questions
    whose greedy answer is not exactly the right one. That is told without generating: the greedy answer is right if and only
    if each of its tokens is the likeliest given the right ones before it. val_error_low, val_error_high: 90 % bootstrap
    interval over images. Both by family as `val_loss/<family>`, `val_error/<family>`, and `shuffled_...` with the image of
    another sample in place of one's own. val_unparsed: share of freely generated answers, of questions with a closed set
    of answers, that are none of it.
    """
    own = asked(model, questions, num_images, max_length)
    other = asked(model, questions, num_images, max_length, shift=1)
    known = np.isin(
        own["family"], [f for f, family in enumerate(questions.families) if not trained or family in trained]
    )
    metrics: dict[str, float | int | None] = {"num_questions": int(known.sum())}
    for name, found in (("val", own), ("shuffled", other)):
        metrics |= _means(found, known, name)
        for f, family in enumerate(questions.families):
            ours = _means(found, found["family"] == f, name) if (found["family"] == f).any() else {}
            metrics |= {f"{metric}/{family}": value for metric, value in ours.items()}
    if not known.all():
        metrics |= _means(own, ~known, "held_out")
    metrics["val_error_low"], metrics["val_error_high"] = cluster_interval(own["wrong"][known], own["image"][known])
    metrics["val_unparsed"] = unparsed(model, questions, min(num_images, NUM_GENERATED), trained)
    return metrics


def _means(found: dict[str, np.ndarray], chosen: np.ndarray, name: str) -> dict[str, float]:
    loss = found["loss"][chosen].sum() / found["tokens"][chosen].sum()
    return {f"{name}_loss": float(loss), f"{name}_error": float(found["wrong"][chosen].mean())}


@torch.no_grad()
def asked(
    model: VisionLanguageModel, questions: Any, num_images: int, max_length: int, shift: int = 0
) -> dict[str, np.ndarray]:
    """One entry a question: loss (nats, summed over its answer), tokens, wrong (0 or 1), image, family (numbers).

    shift: each image's questions are asked about the image so many places further on.
    """
    places = {family: f for f, family in enumerate(questions.families)}
    found: dict[str, list] = {name: [] for name in ("loss", "tokens", "wrong", "image", "family")}
    for start in range(0, num_images, BATCH):
        count = min(BATCH, num_images - start)
        sample = questions.ask("val", start, count)
        images = questions.images("val", start, count)
        if shift:
            rest = [(start + i + shift) % num_images for i in range(count)]
            images = torch.cat([questions.images("val", i, 1) for i in rest])
        documents = [model.document_of(asked) for asked in sample]
        batch = model.batch(documents, images, max_length)
        told = batch.labels != NO_LABEL
        logits, labels, source = model(batch).float(), batch.labels[told], batch.source[told]
        zero = torch.zeros(sum(map(len, sample)), device=logits.device)
        of_token = {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "tokens": torch.ones_like(source, dtype=torch.float32),
            "wrong": (logits.argmax(-1) != labels).float(),
        }
        for name, values in of_token.items():
            found[name].append(zero.index_add(0, source, values).cpu())
        found["image"].append(torch.tensor([start + i for i, asked in enumerate(sample) for _ in asked]))
        found["family"].append(torch.tensor([places[q.family] for asked in sample for q in asked]))
    joined = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    joined |= {name: joined[name].astype(np.float64) for name in ("loss", "tokens")}
    return joined | {"wrong": (joined["wrong"] > 0).astype(np.float64)}


def unparsed(
    model: VisionLanguageModel, questions: Any, num_images: int, trained: tuple[str, ...] = ()
) -> float | None:
    """Share of generated answers to questions with a closed set of answers that are not in it; None without any."""
    strange = []
    for start in range(0, num_images, BATCH):
        count = min(BATCH, num_images - start)
        sample, images = questions.ask("val", start, count), questions.images("val", start, count)
        closed = [(i, q) for i, asked in enumerate(sample) for q in asked]
        closed = [(i, q) for i, q in closed if q.choices and (not trained or q.family in trained)]
        if closed:
            longest = max(len(model.encode(choice)) for _, q in closed for choice in q.choices)
            said = model.generate(images[[i for i, _ in closed]], [q.question for _, q in closed], longest + 2)
            strange += [text not in q.choices for text, (_, q) in zip(said, closed, strict=True)]
    return float(np.mean(strange)) if strange else None


def cluster_interval(values: np.ndarray, clusters: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, drawn by cluster: an image's questions stay together."""
    _, member = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
