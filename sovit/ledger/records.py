"""One record file a branch: write, read, check."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sovit import UserError
from sovit.files import write_atomic
from sovit.ledger.schema import ANSWERED, REQUIRED, STATUSES


def dump_row(row: Mapping[str, Any]) -> str:
    """One line of JSON. Raises ValueError for a number that JSON does not have (NaN, infinity): write None instead."""
    return json.dumps(row, allow_nan=False)


def write_record(runs_dir: Path, row: Mapping[str, Any]) -> None:
    write_atomic(record_path(runs_dir, row["trunk_id"], row["run_id"]), dump_row(row) + "\n")


def record_path(runs_dir: Path | str, trunk_id: str, run_id: str) -> Path:
    return Path(runs_dir) / trunk_id / "records" / f"{run_id}.json"


def read_record(runs_dir: Path | str, trunk_id: str, run_id: str) -> dict | None:
    """The record of one branch, or None where there is none that answers the question.

    That is where it failed, and where the file is damaged or another branch's (which is said).
    """
    row = record_row(record_path(runs_dir, trunk_id, run_id))
    return row if row and row["status"] in ANSWERED else None


def record_row(path: Path) -> dict | None:
    """The row in a record file, or None where there is none or a damaged one, which is said once.

    Raises UserError for one that may not be read.
    """
    try:
        row = checked(decoded(path.read_text()))
        if row["run_id"] != path.stem:
            raise UserError(f"{path} holds {row['run_id']}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend or delete it") from None
    except ValueError as error:  # a UserError is one, and what is no UTF-8
        _say_once(f"sovit: the record {path} is damaged and counts as missing ({error})")
        return None
    return row


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interned(pairs: list[tuple]) -> dict:
    """An object's names are interned, of which 100,000 rows have but one set. Raises UserError for a repeated one."""
    row = {sys.intern(name): value for name, value in pairs}
    if len(row) < len(pairs):
        raise UserError("says a name twice; remove one of them")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_interned).decode


def decoded(text: str) -> Any:
    try:
        return _decode(text)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise UserError(f"is not JSON ({getattr(error, 'msg', error)}); mend or remove that line") from None


def checked(row: object) -> dict:
    if not isinstance(row, dict):
        raise UserError("is not an object; each line holds one row")
    missing = [name for name in REQUIRED if row.get(name) in (None, "")]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}; see docs/ledger-schema.md")
    wrong = [name for name in ("run_id", "trunk_id") if not isinstance(row[name], str)]
    if wrong:
        raise UserError(f"has {wrong[0]}={row[wrong[0]]!r}; it must be text in quotes")
    if row["status"] not in STATUSES:
        raise UserError(f"has status={row['status']!r}; it must be one of {', '.join(STATUSES)}")
    return row
