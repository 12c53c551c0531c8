"""One record file a branch: write, read, check."""

from __future__ import annotations

import functools
import json
import re
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


def find_branch(name: str, runs_dir: Path | str, vlm: bool = False) -> str:
    """The run_id of an encoder whose weights are in `runs_dir`, or of a vision-language model.

    name: its run_id, or a trunk_id: its branch of most images. Raises UserError where there is none: what is there
    instead, and where else it is.
    """
    runs_dir = Path(runs_dir)
    trunk_id, dash, _ = name.partition("-")
    plain = bool(re.fullmatch(r"\w+(-\d+)?", name))
    known = sorted((p.stem for p in runs_dir.glob("*/*-*.safetensors")), key=lambda n: (n.partition("-")[0], len(n), n))
    if plain and not dash and (own := [n for n in known if n.startswith(f"{name}-")]):
        return _of_kind(own[-1], runs_dir, vlm)
    if plain and dash and (runs_dir / trunk_id / f"{name}.safetensors").exists():
        return _of_kind(name, runs_dir, vlm)
    row = record_row(record_path(runs_dir, trunk_id, name)) if plain and dash else None
    if row and row["status"] == "diverged":
        raise UserError(f"{name} diverged ({row.get('error')}) and has no weights; name another run")
    wanted = f"{name}.safetensors" if dash else f"{name}-*.safetensors"
    if plain and (found := next(Path().glob(f"*/runs/{trunk_id}/{wanted}"), None)):
        there = found.parents[1]
        raise UserError(f"no run {name!r} in {runs_dir}/, but in {there}/; name that folder of runs")
    held = f"{len(known)} runs, such as {known[0]}); name one" if known else "no runs); train a study first"
    raise UserError(f"no run {name!r} in {runs_dir}/ (it holds {held}")


def _of_kind(run_id: str, runs_dir: Path, vlm: bool) -> str:
    """The run_id itself. Raises UserError where its trunk is of the other kind."""
    try:
        config = json.loads((runs_dir / run_id.partition("-")[0] / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # who opens it says so
        return run_id
    if vlm and config.get("kind") != "vlm":
        raise UserError(f"{run_id} is an encoder, not a vision-language model; train one: sovit vlm train {run_id}")
    if not vlm and config.get("kind") == "vlm":
        raise UserError(f"{run_id} is a vision-language model; name the encoder that it was trained on")
    return run_id


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
        row = checked(decoded(path.read_text(encoding="utf-8")))
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
