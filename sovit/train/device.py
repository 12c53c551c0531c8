"""The device that is trained on: whether torch has it, and its name."""

from __future__ import annotations

import torch

from sovit import UserError


def check_device(device: str) -> None:
    """Raise UserError for a device that torch does not have here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used ({reason}); use cpu, or a device that torch has") from None


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu x{torch.get_num_threads()}"
