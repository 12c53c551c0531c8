"""Checkpoint files: written whole or not at all, and read only where every byte is as it was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from sovit.ledger import CannotWrite


class Unusable(ValueError):
    """A checkpoint, or weights, that cannot be gone on from; the message says why."""


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
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise Unusable(f"{name} has shape {found.get(name)} there and {wanted.get(name)} here")
    if state.get("base_sha256", base_sha256) != base_sha256:  # older files do not say
        raise Unusable("it was fine-tuned from a base with other weights")
    if groups != found_groups:
        raise Unusable(f"its optimiser has groups of {found_groups} tensors, here they are of {groups}")


def save(state: dict, path: Path, previous: Path | None = None) -> None:
    """Write `state` to `path`, and keep what stood there as `previous`. Raises CannotWrite; nothing is lost by it."""
    with _replacing(path, previous) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # a network disk says here, at the latest, that it is full


def load(path: Path) -> dict:
    """What `save` wrote, on the CPU. Raises Unusable for a file that is damaged in any way.

    The checksums of the file (a zip archive) are looked at here, because torch.load does not: it takes a flipped bit of
    a weight for the weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True) if spoilt is None else None
    except Exception as error:  # damage shows in many ways
        first_line = str(error).partition("\n")[0]
        raise Unusable(f"damaged: {type(error).__name__}: {first_line}") from None
    if spoilt is not None:
        raise Unusable(f"damaged: the checksum of {spoilt} is wrong")
    if not isinstance(state, dict):
        raise Unusable("it holds no state of training")
    return state


def save_weights(
    model: torch.nn.Module, path: Path, run_id: str, names: Collection[str] | None = None, **more: str
) -> None:
    """The weights alone (of `names`, where given), as safetensors, with their checksum and `more`. Raises CannotWrite."""
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if names is None or k in names}
    facts = {"run_id": run_id, "sha256": weights_digest(weights), **more}
    said = json.dumps(facts)  # in one field: several come in a random order
    with _replacing(path) as temporary:
        safetensors.torch.save_file(weights, temporary, {"sovit": said})


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights that `save_weights` wrote, on the CPU, and what it said of them.

    Raises Unusable for a damaged file: safetensors does not look for it.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get("sovit", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise Unusable(str(error)) from None
    if said.get("sha256") not in (None, weights_digest(weights)):  # older files have none
        raise Unusable("its checksum is wrong")
    return weights, said


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """A file to write to; where that went well it takes the place of `path`, which is untouched until then."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = _disk_error(error)
        if reason is None:
            raise
        raise CannotWrite(path, reason) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system under torch's or safetensors' own."""
    if isinstance(error, safetensors.SafetensorError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
        return OSError(number, os.strerror(number))
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
