"""sovit: which Vision Transformer shape to train for a compute budget, and how sure that is."""

__version__ = "0.1.0"


class UserError(ValueError):
    """Bad input. The message is one line that names the value and the remedy; the command line exits with status 2."""
