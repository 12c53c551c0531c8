"""What a study may hold: a Run trains an encoder, a VlmRun a vision-language model. Sweeps treat both alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, Self

from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun


class AnyRun(Protocol):
    """One trunk to train, as queue, workers, ledger and displays see it. Durations are in images."""

    @property
    def kind(self) -> Literal["encoder", "vlm"]: ...
    @property
    def trunk_id(self) -> str: ...
    @property
    def budgets(self) -> tuple[int, ...]: ...
    @property
    def run_ids(self) -> tuple[str, ...]: ...
    @property
    def base(self) -> str:
        """The branch that must be trained first, "" where there is none."""

    @property
    def probe(self) -> str: ...
    @property
    def study(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def preset(self) -> str: ...
    @property
    def init_seed(self) -> int: ...
    @property
    def data_seed(self) -> int: ...
    @property
    def label(self) -> str: ...
    @property
    def numbers(self) -> dict[str, int | float | str]:
        """What tables and plots of a study show of the run."""

    @property
    def parts(self) -> dict[str, str]:
        """The models that it is made of, {} for an encoder."""

    @property
    def total_examples(self) -> int: ...
    def new_examples(self, num_examples: int) -> int: ...
    def run_id(self, num_examples: int) -> str: ...
    def on_base(self, run_id: str) -> Self:
        """The same run on another branch."""

    def with_budgets(self, budgets: Sequence[int]) -> Self:
        """The same trunk with some of its branches; a run that has one budget only is left as it is."""

    def replace(self, **changes: object) -> Self: ...
    def to_dict(self) -> dict: ...


def run_from_dict(d: dict) -> Run | VlmRun:
    """Read what `to_dict` of either kind wrote (or its JSON). Raises UserError as its `from_dict`."""
    return VlmRun.from_dict(d) if isinstance(d, dict) and d.get("kind") == "vlm" else Run.from_dict(d)


def encoder_runs(runs: Sequence[AnyRun]) -> list[Run]:
    """The runs that train an encoder."""
    return [run for run in runs if isinstance(run, Run)]


def vlm_runs(runs: Sequence[AnyRun]) -> list[VlmRun]:
    """The runs that train a vision-language model."""
    return [run for run in runs if isinstance(run, VlmRun)]
