"""sovit: which Vision Transformer shape to train for a compute budget, and how sure that is.

The names in `__all__` are the public face. They load when they are first used, so that `import sovit` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sovit.data import open_data
    from sovit.encoder.export import export_encoder
    from sovit.encoder.open import load_encoder
    from sovit.encoder.probe import probe
    from sovit.law.fit import fit_law
    from sovit.law.fitted_law import read_law
    from sovit.ledger.ledger import read_ledger
    from sovit.predict.recommend import best_shape
    from sovit.spec.design import grid, isoflop, star
    from sovit.spec.named_shapes import named_shape
    from sovit.spec.run import Recipe, Run
    from sovit.spec.shape import Shape
    from sovit.sweep.study_main import run_study

__all__ = [
    "Recipe",
    "Run",
    "Shape",
    "best_shape",
    "export_encoder",
    "fit_law",
    "grid",
    "isoflop",
    "load_encoder",
    "named_shape",
    "open_data",
    "probe",
    "read_law",
    "read_ledger",
    "run_study",
    "star",
]
__version__ = "0.1.0"
OUTPUTS = Path("runs/results")  # where commands write ledgers, laws and figures unless told otherwise; git ignores it
PUBLISHED = Path("results")  # what this repository publishes: no command writes there unless it is told to

_HOME = {
    "Recipe": "spec.run",
    "Run": "spec.run",
    "Shape": "spec.shape",
    "best_shape": "predict.recommend",
    "export_encoder": "encoder.export",
    "fit_law": "law.fit",
    "grid": "spec.design",
    "isoflop": "spec.design",
    "load_encoder": "encoder.open",
    "named_shape": "spec.named_shapes",
    "open_data": "data",
    "probe": "encoder.probe",
    "read_law": "law.fitted_law",
    "read_ledger": "ledger.ledger",
    "run_study": "sweep.study_main",
    "star": "spec.design",
}


class UserError(ValueError):
    """Bad input. The message is one line that names the value and the remedy; the command line exits with status 2."""


def reason(error: Exception) -> str:
    """Say what an exception of another library says, in one line of at most 200 characters; its class if it is silent.

    Of the operating system's errors the words and the file, without the number.
    """
    said = ": ".join(map(str, filter(None, (error.strerror, error.filename)))) if isinstance(error, OSError) else ""
    return " ".join((said or str(error)).split())[:200] or type(error).__name__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sovit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sovit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
