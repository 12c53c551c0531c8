"""What a study may hold: a Run trains an encoder, a VlmRun a vision-language model. Sweeps treat both alike."""

from __future__ import annotations

from collections.abc import Sequence

from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun

AnyRun = Run | VlmRun  # queue, workers, ledger and displays use what both have


def run_from_dict(d: dict) -> AnyRun:
    """Read what `to_dict` of either kind wrote (or its JSON). Raises UserError as its `from_dict`."""
    return VlmRun.from_dict(d) if isinstance(d, dict) and d.get("kind") == "vlm" else Run.from_dict(d)


def encoder_runs(runs: Sequence[AnyRun]) -> list[Run]:
    """The runs that train an encoder."""
    return [run for run in runs if isinstance(run, Run)]


def vlm_runs(runs: Sequence[AnyRun]) -> list[VlmRun]:
    """The runs that train a vision-language model."""
    return [run for run in runs if isinstance(run, VlmRun)]
