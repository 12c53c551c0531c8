"""Validation: loss and error of a model on a source, as a whole and by skill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sovit.data import Source

BATCH = 256


@torch.no_grad()
def validate(model: nn.Module, source: Source) -> dict[str, float]:
    """Mean cross-entropy (nats) and error over all validation labels, and by skill as `val_loss/<skill>`."""
    model.eval()
    losses, wrong, skills = [], [], []
    for start in range(0, source.num_val, BATCH):
        batch = source.val(start, min(BATCH, source.num_val - start))
        logits = model(batch.images)  # [B, C] or [B, N, C]
        flat, labels = logits.flatten(0, -2), batch.labels.flatten()
        losses.append(F.cross_entropy(flat, labels, reduction="none"))
        wrong.append((flat.argmax(-1) != labels).double())
        if batch.skills is not None:
            skills.append(batch.skills.flatten())
    model.train()
    loss, error = torch.cat(losses).double(), torch.cat(wrong)
    metrics = {"val_loss": loss.mean().item(), "val_error": error.mean().item()}
    if skills:
        skill = torch.cat(skills)
        for i, name in enumerate(source.skills):
            ours = skill == i
            metrics[f"val_loss/{name}"] = loss[ours].mean().item() if ours.any() else None
            metrics[f"val_error/{name}"] = error[ours].mean().item() if ours.any() else None
    return metrics
