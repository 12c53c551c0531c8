"""Weights on disk: save, load, check by digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from sovit.files import CannotWrite, as_umask


class Unusable(ValueError):
    """A checkpoint, or weights, that cannot be gone on from; the message says why."""


def save(state: dict, path: Path, previous: Path | None = None) -> None:
    """Write `state` to `path`, and keep what stood there as `previous`. Raises CannotWrite; nothing is lost by it."""
    with _replacing(path, previous) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # a network disk says here, at the latest, that it is full


def load(path: Path) -> dict:
    """What `save` wrote, on the CPU. Raises Unusable for a file that is damaged in any way.

    The checksums of the file (a zip archive) are looked at here: torch.load takes a flipped bit of a weight for the weight.
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
        as_umask(temporary)


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights that `save_weights` wrote, on the CPU, and what it said of them.

    Raises Unusable for a damaged file: safetensors does not look for it.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get("sovit", "{}"))
            if not isinstance(said, dict):
                raise Unusable("what it says of itself is no object")
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
