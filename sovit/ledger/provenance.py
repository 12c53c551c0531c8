"""Where a measurement was made: device, versions, commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path


def provenance(device: str) -> dict:
    """Where a measurement was made: device, library versions, commit, and whether the code was as committed.

    Both are None where this file is not tracked by git: an installed copy must not take its user's commit for its own.
    """
    from importlib import metadata  # slow to import, and only training needs it

    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        # without locks: a lock of git's outlives who is killed with kill -9, and then git refuses to commit
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = dirty = None
    with contextlib.suppress(FileNotFoundError):  # a node without git can train
        if git("ls-files", "--error-unmatch", "sovit/ledger/ledger.py"):
            commit = git("rev-parse", "--short=12", "HEAD")
            dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", "sovit", "studies"))
    versions = {"python": platform.python_version()}
    for package in ("torch", "timm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"device": device, "versions": versions, "commit": commit, "commit_dirty": dirty, "date": date}
