"""Merge rows of one ledger; refuse rows that contradict each other."""

from __future__ import annotations

from sovit import UserError
from sovit.ledger.schema import INCIDENTAL


def merge(rows: list[dict], where: str = "the ledger", left_out: list | None = None) -> list[dict]:
    """Sort rows by run_id and make one of those that agree; a failed row gives way to an answer, or to a later
    failure.

    Rows agree when all that was measured does, as far as both say it: two runs of one measurement differ in date, speed
    and commit, of which the first row's stay. A measurement that only one of them holds (a probe made later) is kept;
    null says nothing, so that a number takes its place.
    Conflicting rows with one run_id raise UserError; where a list `left_out` is given, none of them is kept, and
    (run_id, reason) is appended to it.
    """
    by_id: dict[str, dict] = {}
    conflicts: dict[str, str] = {}
    for row in rows:
        other = by_id.get(row["run_id"])
        if other is None or (other["status"] == "failed" and row["status"] != "failed") or _failed_later(row, other):
            by_id[row["run_id"]] = row
        elif row["status"] != "failed":
            measured = {k: v for k, v in row.items() if k not in INCIDENTAL}
            differing = sorted(k for k, v in measured.items() if _differ(v, other.get(k)))
            if differing:
                k = differing[0]
                reason = f"disagree on {k} ({other.get(k)} and {row.get(k)})"
                if left_out is None:
                    raise UserError(f"{where}: two rows of run_id {row['run_id']} {reason}; remove one of them")
                conflicts.setdefault(row["run_id"], f"two rows of this run_id {reason}")
                continue
            by_id[row["run_id"]] = other | {k: v for k, v in measured.items() if other.get(k) is None}
    if left_out is not None:
        left_out += sorted(conflicts.items())
    return [by_id[k] for k in sorted(by_id) if k not in conflicts]


def _differ(a: object, b: object) -> bool:
    """Whether two rows say different things: null says nothing, and NaN is NaN."""
    return a is not None and b is not None and a != b and not (a != a and b != b)


def _failed_later(row: dict, other: dict) -> bool:
    return row["status"] == other["status"] == "failed" and str(row.get("date")) > str(other.get("date"))
