"""The source `stream`: opens a preset."""

from __future__ import annotations

from sovit.data.stream.detail import DetailStream
from sovit.data.stream.scene import Stream
from sovit.data.stream.world import PRESETS, Detail


def open_source(preset: str, image_size: int, patch_size: int, data_seed: int, device: str = "cpu") -> Stream:
    """Open a preset of PRESETS ("" = cpu). Raises UserError for a size that it cannot draw."""
    world = PRESETS[preset or "cpu"]
    kind = DetailStream if isinstance(world, Detail) else Stream
    return kind(world, image_size, patch_size, data_seed, device)
