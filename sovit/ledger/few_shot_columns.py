"""Names of the few-shot columns of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

SHOTS = (1, 5, 10, 25)
SUPPORT_SEEDS = (0, 1, 2)
SD_FLOOR = 1e-5  # added to the standard deviation of a feature, which may not move at all


def column(shots: int, data: str, kind: str = "") -> str:
    """Name of a column; kind: "" the mean over the support sets, "sd", or "seeds"."""
    return f"val_error_{shots}shot{'_' + kind if kind else ''}/{data}"


def probe_of(metric: str) -> str:
    """The data that a metric is a few-shot error on; "" for another metric."""
    found = re.fullmatch(r"val_error_\d+shot/(.+)", metric)
    return found[1] if found else ""


def columns(data: str, errors: dict[int, list[float]]) -> dict:
    """The columns of a row, from what `few_shot_errors` gives."""
    out: dict = {}
    for shots, found in errors.items():
        out[column(shots, data)] = float(np.mean(found))
        out[column(shots, data, "sd")] = float(np.std(found, ddof=1))
        out[column(shots, data, "seeds")] = found
    return out


def columns_of(row: Mapping[str, Any], data: str) -> dict:
    """The columns of a row that a probe on `data` gave it."""
    return {
        k: v
        for k, v in row.items()
        if probe_of(re.sub(r"^(val_error_\d+shot)_(sd|seeds)/", r"\1/", k)) == data or k in about(data)
    }


def about(data: str) -> tuple[str, str]:
    """Names of the columns that say what was probed on: the key of the samples, and the error of a guess."""
    return f"probe_data_key/{data}", f"probe_zero_line/{data}"


def is_spread(name: str) -> bool:
    """Whether a column tells of the spread of a few-shot error, and is no metric."""
    return bool(re.match(r"val_error_\d+shot_(sd|seeds)/", name))


def is_probed(row: Mapping[str, Any], data: str) -> bool:
    """Whether the row holds every column of a probe on `data`."""
    return all(row.get(column(shots, data, kind)) is not None for shots in SHOTS for kind in ("", "sd", "seeds"))
