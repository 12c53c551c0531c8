"""Record files and ledgers: one flat JSON object a measurement, written atomically, merged without loss or repeat.

A worker writes `runs/<trunk_id>/records/<run_id>.json`; `<study>.jsonl` is the sorted, idempotent merge of those files and
the only thing that analyses read. A missing number is null, never 0. `exclusions.csv` (run_id, reason) beside it is the only
place where a row is left out.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sovit import OUTPUTS, PUBLISHED, UserError, reason
from sovit.files import locked, write_atomic
from sovit.ledger.records import checked, decoded, dump_row
from sovit.ledger.schema import INCIDENTAL, TEXT, LedgerRow
from sovit.ledger.tables import Reading, delimiter_of, open_table, suffix_of


def designed_ledger(design: dict) -> Path:
    """The ledger that runs/<study>.design.json names, from where that study was launched. Raises KeyError, TypeError."""
    folder, ledger = Path(design["folder"]), Path(design["ledger"])
    return ledger if folder == Path.cwd() else folder / ledger


def study_ledger(study: str, results: Path | None = None, runs: Path = Path("runs")) -> Path:
    """Find the ledger of a study, to be read.

    Args:
        study: its name, or the path of a ledger.
        results: the folder of the ledger; None = as launched by RUNS/<study>.design.json, else OUTPUTS, else PUBLISHED.
        runs: where trunks are kept.
    Returns the path, of a file that may be absent.
    """
    if Path(study).suffix in (".jsonl", ".csv"):
        return Path(study)
    if results is not None:
        return results / f"{study}.jsonl"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no design, or a damaged one
        launched = designed_ledger(json.loads((runs / f"{study}.design.json").read_text(encoding="utf-8")))
        if launched.exists():
            return launched
    own, published = OUTPUTS / f"{study}.jsonl", PUBLISHED / f"{study}.jsonl"
    return published if published.exists() and not own.exists() else own


def read_ledger(path: Path | str) -> list[LedgerRow]:
    """Rows of a ledger: JSON lines, or CSV with the same columns. Identical duplicates collapse.

    Raises UserError for a missing, empty or malformed file and for two different rows with one run_id.

    >>> rows = sovit.read_ledger("results/stream_star.jsonl")
    >>> len(rows), rows[0]["status"]
    (87, 'ok')
    """
    return cast(list[LedgerRow], merge(read_rows(path), str(path)))


def read_rows(path: Path | str, left_out: list | None = None, reading: Reading | None = None) -> list[dict]:
    """The rows of a ledger as they stand in the file, one by one: a million of them are never held as text as well.

    left_out: None = the first malformed line raises; a list = (FILE:LINE, reason) of each is appended to it instead.
    reading: how a table that others wrote is read; None: a ledger, and nothing else.
    Raises UserError for a missing, unreadable or empty file.
    """
    path, rows, num_bad, ledger = Path(path), [], 0, None
    try:
        with open_table(path) as file:
            for number, parse in _json_lines(file) if suffix_of(path) == ".jsonl" else _csv_lines(file, path):
                try:
                    row = parse()
                    ledger = isinstance(row, dict) and "run_id" in row if ledger is None else ledger  # by the first row
                    rows.append(checked(reading.row(row, f"{path.name}:{number}", ledger) if reading else row))
                except UserError as error:
                    if left_out is None:
                        raise UserError(f"{path}:{number} {error}") from None
                    left_out.append((f"{path.name}:{number}", str(error)))
                    num_bad += 1
    except FileNotFoundError:
        raise UserError(f"no ledger at {path}; run its study first") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a ledger in it, a file of JSON lines or CSV") from None
    except (OSError, EOFError, UnicodeError, csv.Error) as error:
        remedy = "save it as UTF-8" if isinstance(error, UnicodeError) else "mend it"
        raise UserError(f"cannot read {path}: {reason(error)}; {remedy}") from None
    if not rows:
        what = f"has no sound row among {num_bad}" if num_bad else "is empty; run its study first"
        raise UserError(f"the ledger {path} {what}")
    return rows


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
    return ((number, functools.partial(decoded, line)) for number, line in enumerate(file, 1) if line.strip())


def _csv_lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    lines = iter(file)
    skipped, header = next(
        ((i, line) for i, line in enumerate(lines) if line.strip() and not line.startswith("sep=")), (0, "")
    )  # "sep=;" is Excel's own first line
    table = csv.DictReader(itertools.chain([header], lines), delimiter=delimiter_of(header, path))
    table.fieldnames = [name.strip() for name in table.fieldnames or []]
    if twice := [name for name, count in Counter(table.fieldnames or []).items() if count > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}; rename or remove one")
    return ((table.line_num + skipped, functools.partial(_csv_row, row)) for row in table)


def merge(rows: list[dict], where: str = "the ledger", left_out: list | None = None) -> list[dict]:
    """Sort rows by run_id and make one of those that agree; a failed row gives way to an answer, or to a later failure.

    Rows agree when all that was measured does, as far as both say it: two runs of one measurement differ in date, speed
    and commit, of which the first row's stay. A measurement that only one of them holds (a probe made later) is kept;
    null says nothing, so that a number takes its place.
    Conflicting rows with one run_id raise UserError; where a list `left_out` is given, none of them is kept, and
    (run_id, reason) is appended to it.
    """
    by_id: dict[str, dict] = {}
    conflicts: dict[str, str] = {}
    for row in rows:
        run_id, other = row["run_id"], by_id.get(row["run_id"])
        if other is None or (other["status"] == "failed" and (row["status"] != "failed" or _later(row, other))):
            by_id[run_id] = row
        elif row["status"] != "failed":
            measured = {k: v for k, v in row.items() if k not in INCIDENTAL}
            if differing := sorted(k for k, v in measured.items() if _differ(v, other.get(k))):
                k = differing[0]
                reason = f"disagree on {k} ({other.get(k)} and {row.get(k)})"
                if left_out is None:
                    raise UserError(f"{where}: two rows of run_id {run_id} {reason}; remove one of them")
                conflicts.setdefault(run_id, f"two rows of this run_id {reason}")
                continue
            by_id[run_id] = other | {k: v for k, v in measured.items() if other.get(k) is None}
    if left_out is not None:
        left_out += sorted(conflicts.items())
    return [by_id[k] for k in sorted(by_id) if k not in conflicts]


def _differ(a: object, b: object) -> bool:
    """Whether two rows say different things: null says nothing, and NaN is NaN."""
    return a is not None and b is not None and a != b and not (a != a and b != b)


def _later(row: dict, other: dict) -> bool:
    return str(row.get("date")) > str(other.get("date"))


def update_ledger(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[LedgerRow]:
    """Merge `rows` into the ledger file, atomically and under a lock; calling it again changes nothing."""
    return rewrite_rows(Path(path), read_ledger, lambda old: merge([*old, *map(dict, rows)], str(path)))


def rewrite_rows(path: Path, read: Callable[[Path], list[Any]], change: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Replace the rows of a file by change(rows), atomically and under a lock; rows that stay are not written again.

    read: what reads the file, which may be absent or empty. Returns the rows that the file holds now.
    """
    with locked(path.with_suffix(".lock")):
        for stale_temp_file in path.parent.glob(f"{glob.escape(path.name)}*.tmp"):
            stale_temp_file.unlink()
        rows = change(read(path) if path.exists() and path.stat().st_size else [])
        text = "".join(dump_row(row) + "\n" for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
    return rows


def read_exclusions(path: Path | str) -> dict[str, str]:
    """run_id -> reason, from a CSV file with those two columns; {} where the file is absent."""
    path = Path(path)
    if not path.exists():
        return {}
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}; save it as UTF-8") from None
    for i, row in enumerate(rows):
        if not row.get("run_id") or not row.get("reason"):
            raise UserError(f"{path}:{i + 2} needs both a run_id and a reason")
    return {row["run_id"]: row["reason"] for row in rows}


def _csv_row(row: dict) -> dict:
    if None in row:
        raise UserError("has more fields than the header; mend or remove that line")
    return {k: (v or None) if k in TEXT else _csv_value(v) for k, v in row.items()}


@functools.lru_cache(maxsize=2**16)
def _csv_value(text: str | None) -> Any:
    if text is None or text == "":
        return None
    if text in ("True", "False", "TRUE", "FALSE"):  # as pandas and spreadsheets write them
        return text[0] == "T"
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text
