"""sovit: which Vision Transformer shape to train for a compute budget, and how sure that is."""

from pathlib import Path

__version__ = "0.1.0"
OUTPUTS = Path("runs/results")  # where commands write ledgers, laws and figures unless told otherwise; git ignores it
PUBLISHED = Path("results")  # what this repository publishes: no command writes there unless it is told to


class UserError(ValueError):
    """Bad input. The message is one line that names the value and the remedy; the command line exits with status 2."""


def reason(error: Exception) -> str:
    """What an exception of another library says, on one line of at most 200 characters; its class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
