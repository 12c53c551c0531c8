"""A polite stop: SIGINT or SIGTERM asks for it, and whoever is at work ends it where it can go on later."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator


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


def this_command() -> str:
    """The command line of this process, to be typed again."""
    return shlex.join(sys.orig_argv)
