"""The kinds of run that a study may hold: a Run trains an encoder, a VlmRun a vision-language model. Told apart here."""

from __future__ import annotations

from collections.abc import Sequence

from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun

AnyRun = Run | VlmRun


def run_from_dict(d: dict) -> AnyRun:
    """Read what `to_dict` of either kind wrote (or its JSON). Raises UserError as its `from_dict`."""
    return VlmRun.from_dict(d) if isinstance(d, dict) and d.get("kind") == "vlm" else Run.from_dict(d)


def vlm_runs(runs: Sequence[AnyRun]) -> list[VlmRun]:
    return [run for run in runs if isinstance(run, VlmRun)]


def on_base(run: AnyRun, run_id: str) -> AnyRun:
    """The run as it is on another branch: fine-tuned from it, or with it, trained or not, for an encoder."""
    if isinstance(run, Run):
        return run.replace(base=run_id)
    return run.replace(encoder=run.encoder.removesuffix(run.base) + run_id)
