"""A polite stop: SIGINT or SIGTERM asks for it, and whoever is at work ends it where it can go on later."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator

from sovit import reason


@contextlib.contextmanager
def stop_on_signal(second_interrupt=signal.SIG_DFL) -> Iterator[Callable[[], bool]]:
    """Within it the first SIGINT or SIGTERM does nothing but make the yielded function true.

    From then on `second_interrupt` handles SIGINT; by default it ends the process at once. A second SIGTERM still does
    nothing: a cluster sends one to every process, and the launcher passes on its own.
    """
    asked = []

    def ask(number, frame) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, second_interrupt)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_anywhere() -> None:
    """Print what a terminal's encoding lacks as a question mark, in place of a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def out_of_memory(error: MemoryError) -> str:
    """What is said, in one line, of a process that had too little memory."""
    return f"sovit: out of memory ({reason(error)}); close other programs or use a larger machine, then run it again"


def this_command() -> str:
    """The command line of this process, to be typed again, without a password."""
    return shlex.join(map(without_password, sys.orig_argv))


def without_password(text: str) -> str:
    """A URL, or words that hold one, with *** in the place of its password."""
    return re.sub(r"(://[^/:@\s]*):[^/\s]*@", r"\1:***@", text)
