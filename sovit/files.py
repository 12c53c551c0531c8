"""Files that survive a kill: atomic writes and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from pathlib import Path

from sovit import UserError


class CannotWrite(UserError):
    """The disk is full, or the folder not ours. What stood at `path` before still does."""

    def __init__(self, path: Path | str, error: OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, and run the same command again" if full else "choose a folder that can be written"
        super().__init__(f"cannot write {path}: {error.strerror}; {remedy}")


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old file or the new one and nothing between.

    Raises CannotWrite, a UserError.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CannotWrite(path, error) from error


@contextlib.contextmanager
def locked(path: Path):
    """Hold an exclusive lock on `path` (made if absent); the kernel releases it if the process dies.

    The file's date says since when it is held. Raises CannotWrite where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise CannotWrite(path, error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(file.fileno())
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on `path`; looking does not take it."""
    try:
        file = open(path)
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look at once do not see each other
        except BlockingIOError:
            return True
    return False
