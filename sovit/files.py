"""Files that survive a kill: atomic writes and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from pathlib import Path

from sovit import UserError


class CannotWrite(UserError):
    """The disk is full, or the folder not ours. What stood at `path` before still does."""

    def __init__(self, path: Path | str, error: OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, and run the same command again" if full else "choose a folder that can be written"
        super().__init__(f"cannot write {path}: {error.strerror}; {remedy}")


class CannotLock(UserError):
    """The file system has no locks, without which two processes would write one file."""

    def __init__(self, path: Path | str, error: OSError):
        super().__init__(f"cannot lock {path}: {error.strerror}; choose a folder on a disk with file locks (flock)")


def check_name(name: str) -> str:
    """A name that files may be called after, such as a study's. Raises UserError for any other: none leads elsewhere."""
    if not re.fullmatch(r"\w[\w .,+=@-]*", name) or len(os.fsencode(name)) > 150:
        raise UserError(
            f"name {name[:80]!r} cannot name files; use letters, digits, spaces and . , _ - + = @, 150 at most"
        )
    return name


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old file or the new one and nothing between.

    Raises CannotWrite, a UserError.
    """
    temporary = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:  # not of tempfile, which does not ask the umask
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CannotWrite(path, error) from error


def beside(path: Path) -> Path:
    """A name beside `path` that nothing bears, for what is to take its place when it is whole."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")


def as_umask(path: Path) -> None:
    """Give a file that a library made 0600 the mode that a new file has."""
    new = beside(path)
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()


@contextlib.contextmanager
def locked(path: Path):
    """Hold an exclusive lock on `path` (made if absent); the kernel releases it if the process dies.

    The file's date says since when it is held. Raises CannotWrite where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")
    except OSError as error:
        raise CannotWrite(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise CannotLock(path, error) from None
        os.utime(file.fileno())
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on `path`; looking does not take it."""
    try:
        file = open(path, encoding="utf-8")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look at once do not see each other
        except BlockingIOError:
            return True
        except OSError as error:
            raise CannotLock(path, error) from None
    return False
