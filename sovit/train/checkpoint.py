"""Checkpoint files: written whole or not at all, and read only where every byte is as it was written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sovit.encoder.weights import Unusable, load, save


class Checkpoints:
    """The states of one trunk in its folder, each a dict with at least `trunk_id`, `branch`, `step` and `spent`.

    trunk-<examples>.pt where a branch leaves the trunk, latest.pt between two of them, and previous.pt, which was
    latest.pt before.
    """

    def __init__(self, folder: Path, trunk_id: str, batch_size: int):
        self.folder, self.trunk_id, self.batch_size = folder, trunk_id, batch_size
        self.latest, self.previous = folder / "latest.pt", folder / "previous.pt"
        for left_by_a_kill in folder.glob("*.tmp"):
            left_by_a_kill.unlink()

    def save_latest(self, state: dict) -> None:
        save(state, self.latest, self.previous)

    def drop_latest(self) -> None:
        self.latest.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)

    def save_point(self, state: dict, examples: int) -> None:
        save(state, self.folder / f"trunk-{examples}.pt")

    def furthest(self, branch: int, leaves: int, check: Callable[[dict], None]) -> dict | None:
        """The furthest sound state towards the branch to `branch` examples, which leaves the trunk at `leaves`.

        None where there is none. What is damaged, of another trunk, or refused by `check` with Unusable is said on
        standard error, and the one before it taken.
        """
        found = []  # (on the branch, examples), path
        for path in self.folder.glob("trunk-*.pt"):
            point = path.stem.removeprefix("trunk-")
            if point.isdecimal() and int(point) <= leaves:
                found.append(((False, int(point)), path))
        for path in (self.latest, self.previous):
            if path.exists() and (state := self._sound(path, check)):
                on_branch, examples = state["branch"] == branch, state["step"] * self.batch_size
                if leaves <= examples <= branch if on_branch else state["branch"] is None and examples <= leaves:
                    found.append(((on_branch, examples), path))
        for (_, examples), path in sorted(found, reverse=True):
            if state := self._sound(path, check, examples):
                if path not in (self.latest, self.previous) and examples < leaves:
                    state["spent"] = 0.0  # what led to the point where an earlier branch left is billed to that one
                return state
        return None

    def _sound(self, path: Path, check: Callable[[dict], None], examples: int | None = None) -> dict | None:
        try:
            state = load(path)
            if state.get("trunk_id", self.trunk_id) != self.trunk_id:  # older files do not say
                raise Unusable(f"it belongs to the trunk {state['trunk_id']}")
            check(state)
            if examples not in (None, state["step"] * self.batch_size):
                raise Unusable(f"it holds step {state['step']}")
        except Unusable as error:
            print(f"sovit: {path} is not used ({error}); going on from what was saved before it", file=sys.stderr)
            return None
        return state


def check_fits(
    state: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer, base_sha256: str | None = None
) -> None:
    """Raise Unusable where a state is none of training, or was of another model: other names, shapes or groups.

    base_sha256: of the weights that a fine-tuning began with; what is frozen in the state must be theirs.
    """
    wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
    groups = [len(group["params"]) for group in optimizer.param_groups]
    try:
        found = {name: list(t.shape) for name, t in state["model"].items()}
        found_groups = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
        missing = {"branch", "step", "seconds", "spent"} - set(state)
    except (KeyError, TypeError, AttributeError):
        missing = {"weights"}
    if missing:
        raise Unusable(f"it is no state of training, it lacks {sorted(missing)[0]}")
    if name := next((name for name in wanted | found if wanted.get(name) != found.get(name)), None):
        raise Unusable(f"{name} has shape {found.get(name)} there and {wanted.get(name)} here")
    if state.get("base_sha256", base_sha256) != base_sha256:  # older files do not say
        raise Unusable("it was fine-tuned from a base with other weights")
    if groups != found_groups:
        raise Unusable(f"its optimiser has groups of {found_groups} tensors, here they are of {groups}")
