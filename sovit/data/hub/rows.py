"""Rows of a split, read in order and from any position on: an image file and its label each."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

NUM_FETCHED = 16  # files of a streamed folder that are asked for at the same time
LOOKED_AT = 256  # rows in which a split that has labels has one; of a stream it is the first


class Part:
    """The rows of one split, from a position on: `take(count)` gives (file, label) pairs, [] at the end.

    `file` is a dict of bytes or path; `position` is a JSON value to go on from. Labels are names where the column has
    some, None where a row has none. `is_val`: whether the rows are validation, None if that is decided row by row;
    `limit`: images wanted; `num_rows`: of the split, or infinity where nobody knows. Only rows that `datasets` made of a
    folder of images may name a file: what stands in a parquet file could name any file of this machine.
    """

    def __init__(self, split, columns: tuple[str, str], is_val: bool | None, limit: float):
        from datasets import Dataset, Image

        self.image_column, self.label_column = columns
        self.of_folder = split.info.builder_name == "imagefolder"
        self.names = class_names(split, self.label_column)
        whole = isinstance(split, Dataset)
        if not whole:
            split = split.decode(False)  # of a hub's stream `datasets` decodes by itself, and one broken file ends it
        split = split.select_columns([*columns]).cast_column(self.image_column, Image(decode=False))
        self.num_rows = len(split) if whole else math.inf
        self.split = split.to_iterable_dataset() if whole else split
        self.is_val, self.limit = is_val, limit
        self.rows: Iterator | None = None
        self.position: Any = None

    def take(self, count: int) -> list[tuple[dict | None, Any]]:
        rows = self._next(count)
        files = self._files([row[self.image_column] for row in rows])
        return [(file, self._label(row[self.label_column])) for file, row in zip(files, rows, strict=True)]

    def any_label(self) -> bool:
        """Whether one of the first rows has a label."""
        rows = self._next(LOOKED_AT if math.isfinite(self.num_rows) else 1)
        return any(self._label(row[self.label_column]) is not None for row in rows)

    def _next(self, count: int) -> list[dict]:
        if self.rows is None:
            if self.position is not None:
                self.split.load_state_dict(self.position)
            self.rows = iter(self.split)
        rows = list(itertools.islice(self.rows, count))
        self.position = copy.deepcopy(self.split.state_dict())
        return rows

    def _files(self, files: list[dict | None]) -> list[dict | None]:
        if not self.of_folder:
            return [file and {**file, "path": None} for file in files]
        with ThreadPoolExecutor(NUM_FETCHED) as pool:  # of a stream each file is a request of its own
            return list(pool.map(fetched, files))

    def _label(self, value):
        if self.names is None or value is None:
            return value
        return self.names[value] if value >= 0 else None


def fetched(file: dict | None) -> dict | None:
    """A file that lies elsewhere (hf://, https://) with its bytes, others as they are. Raises what the network does."""
    if file is None or file["bytes"] is not None or "://" not in (file["path"] or ""):
        return file
    from datasets.utils.file_utils import xopen

    with xopen(file["path"], "rb") as stream:
        return {"bytes": stream.read(), "path": None}


def class_names(split, column: str) -> list[str] | None:
    """The names of a column of type ClassLabel; None for columns of other types."""
    from datasets import ClassLabel

    feature = split.features[column]
    return list(feature.names) if isinstance(feature, ClassLabel) else None
