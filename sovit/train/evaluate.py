"""Validation: loss and error of a model on a source, as a whole and by skill."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from sovit.data import Batch, Source
from sovit.train.loop import within_memory

BATCH = 256  # images at a time, or half as many ... where memory runs out


def validation(source: Source, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The validation images of a source in batches, and what `forward` makes of each."""

    def attempt(rows: int) -> tuple[Batch, torch.Tensor]:
        batch = source.val(start, min(rows, source.num_val - start))
        return batch, forward(batch.images)

    start, rows = 0, BATCH
    while start < source.num_val:
        found, rows = within_memory(attempt, rows)
        start += len(found[1])
        yield found


@torch.no_grad()
def validate(
    model: nn.Module, source: Source, forward: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, float | None]:
    """Mean cross-entropy (nats) and error over all validation labels, and by skill as `val_loss/<skill>`.

    forward: images -> logits, where it is not the model's own (`sovit.encoder.resize`).

    Where several patches carry the label of one cell, also `val_cell_error`, the error of the cell's summed logits, and
    `val_cell_loss`, the cross-entropy of its mean logits: one answer a cell, however many patches it has.
    """
    model.eval()
    losses, wrong, skills, wrong_cells, cell_losses = [], [], [], [], []
    for batch, logits in validation(source, forward or model):  # [B, C] or [B, N, C]
        flat, labels = logits.flatten(0, -2), batch.labels.flatten()
        losses.append(F.cross_entropy(flat, labels, reduction="none"))
        wrong.append((flat.argmax(-1) != labels).double())
        if logits.ndim == 3 and logits.shape[1] > source.label_grid**2:
            summed = cells(logits, source.label_grid)  # [B, cells, patches, C]
            asked = cells(batch.labels[..., None], source.label_grid)[:, :, 0, 0]  # [B, cells]
            wrong_cells.append((summed.sum(2).argmax(-1) != asked).double())
            cell_losses.append(
                F.cross_entropy(summed.mean(2).flatten(0, 1), asked.flatten(), reduction="none").double()
            )
        if batch.skills is not None:
            skills.append(batch.skills.flatten())
    model.train()
    loss, error = torch.cat(losses).double(), torch.cat(wrong)
    metrics: dict[str, float | None] = {"val_loss": loss.mean().item(), "val_error": error.mean().item()}
    if wrong_cells:
        metrics["val_cell_error"] = torch.cat(wrong_cells).mean().item()
        metrics["val_cell_loss"] = torch.cat(cell_losses).mean().item()
    if skills:
        skill = torch.cat(skills)
        for i, name in enumerate(source.skills):
            ours = skill == i
            metrics[f"val_loss/{name}"] = loss[ours].mean().item() if ours.any() else None
            metrics[f"val_error/{name}"] = error[ours].mean().item() if ours.any() else None
    return metrics


def cells(tokens: torch.Tensor, grid: int) -> torch.Tensor:
    """Group patch tokens by cell, [B, N, C] -> [B, grid^2, N / grid^2, C], both in raster order."""
    batch, num_tokens, channels = tokens.shape
    k = round(num_tokens**0.5) // grid  # patches a side of a cell
    square = tokens.view(batch, grid, k, grid, k, channels).transpose(2, 3)  # [B, grid, grid, k, k, C]
    return square.reshape(batch, grid * grid, k * k, channels)
