"""Record files and ledgers: one flat JSON object a measurement, written atomically, merged without loss or repeat.

A worker writes `runs/<trunk_id>/records/<run_id>.json`; `<study>.jsonl` is the sorted, idempotent merge of those files and
the only thing that analyses read. A missing number is null, never 0. `exclusions.csv` (run_id, reason) beside it is the only
place where a row is left out.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import functools
import glob
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sovit import OUTPUTS, PUBLISHED, UserError
from sovit.run import Run
from sovit.text import EMBED_DIM, pair_flops

SCHEMA = 1
STATUSES = ("ok", "diverged", "failed")
ANSWERED = ("ok", "diverged")  # both are results; a failed run is tried again
# what may differ between two runs of one measurement
INCIDENTAL = set(
    [
        "seconds",
        "spent_seconds",
        "spent_flops",
        "device",
        "versions",
        "commit",
        "commit_dirty",
        "date",
        "study",
        "error",
        "micro_batch",
    ]
)
REQUIRED = ("run_id", "trunk_id", "status", "num_examples")
TEXT = ("run_id", "trunk_id", "commit")  # hexadecimal digits, which a CSV file cannot tell from 12e4


def new_row(run: Run, num_examples: int, *, status: str, num_classes: int, **more) -> dict:
    """One row of the schema: identity, shape, recipe and costs from the run; metrics and machine facts from `more`.

    `compute` is SoViT's t, forward FLOPs x images of the encoder; `train_flops` is what training on that many images
    costs, 3 x (encoder + head), of a fine-tuning what its steps really compute; `spent_flops` is this branch's own part of
    it, so that its sum over the rows of a trunk that ended well is the true bill. A fine-tuning says `base` and `trained`
    besides, a trunk of several patch sizes `patch_sizes`. Of objective siglip the head is the map to the space of the
    captions, head_flops its and that of an image's pairs; `text_flops` are those of its caption, and train_flops counts
    both. There are no classes.
    """
    shape = run.shape
    siglip = run.recipe.objective == "siglip"
    pairs = pair_flops(shape.width, run.recipe.batch_size)
    standard = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")
    extra = {
        k: v
        for k, v in shape.to_dict().items()
        if k not in standard and v != type(shape).__dataclass_fields__[k].default
    }
    return {
        "schema": SCHEMA,
        "run_id": run.run_id(num_examples),
        "trunk_id": run.trunk_id,
        "study": run.study,
        "status": status,
        "init_seed": run.init_seed,
        "data_seed": run.data_seed,
        "data": run.data,
        "preset": run.preset,
        "num_classes": None if siglip else num_classes,
        "objective": run.recipe.objective,
        **{k: getattr(shape, k) for k in standard},
        "num_heads": shape.num_heads,
        **extra,
        "num_params": shape.num_params,
        "head_params": shape.head_params(EMBED_DIM if siglip else num_classes),
        "num_examples": num_examples,
        "trunk_examples": run.trunk_examples(num_examples),
        "cooldown_examples": run.cooldown_examples(num_examples),
        "forward_flops": shape.forward_flops,
        "head_flops": pairs if siglip else shape.head_flops(num_classes),
        **({"text_flops": run.task_flops() - pairs} if siglip else {}),
        "compute": shape.forward_flops * num_examples,
        "train_flops": run.train_flops(num_examples, num_classes),
        "spent_flops": run.spent_flops(num_examples, num_classes),
        **{
            k: getattr(run.recipe, k) for k in ("batch_size", "peak_lr", "weight_decay", "parametrisation", "precision")
        },
        **({"patch_sizes": list(run.recipe.patch_sizes)} if run.recipe.patch_sizes else {}),
        **({"base": run.base, "trained": run.trained} if run.base else {}),
        **({"trained_params": shape.trained_params(num_classes, run.trained)} if run.base else {}),
        "val_loss": None,
        "val_error": None,
        **more,
    }


def is_vlm(row: dict) -> bool:
    """Whether a row is of a vision-language model: no encoder of its own, and losses of other questions."""
    return row.get("objective") == "vlm"


def provenance(device: str) -> dict:
    """Where a measurement was made: device, library versions, commit, and whether the code was as committed.

    Both are None where this file is not tracked by git: an installed copy must not take its user's commit for its own.
    """
    from importlib import metadata  # slow to import, and only training needs it

    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        # without locks: a lock of git's outlives who is killed with kill -9, and then git refuses to commit
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = dirty = None
    with contextlib.suppress(FileNotFoundError):  # a node without git can train
        if git("ls-files", "--error-unmatch", "sovit/ledger.py"):
            commit = git("rev-parse", "--short=12", "HEAD")
            dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", "sovit", "studies"))
    versions = {"python": platform.python_version()}
    for package in ("torch", "timm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"device": device, "versions": versions, "commit": commit, "commit_dirty": dirty, "date": date}


# files -------------------------------------------------------------------------------------------------------------------


class CannotWrite(UserError):
    """The disk is full, or the folder not ours. What stood at `path` before still does."""

    def __init__(self, path: Path | str, error: OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space, and run the same command again" if full else "choose a folder that can be written"
        super().__init__(f"cannot write {path}: {error.strerror}; {remedy}")


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old file or the new one and nothing between.

    Raises CannotWrite, a UserError.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CannotWrite(path, error) from error


@contextlib.contextmanager
def locked(path: Path):
    """Hold an exclusive lock on `path` (made if absent); the kernel releases it if the process dies.

    The file's date says since when it is held. Raises UserError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(file.fileno())
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on `path`; looking does not take it."""
    try:
        file = open(path)
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look at once do not see each other
        except BlockingIOError:
            return True
    return False


def dump_row(row: dict) -> str:
    """One line of JSON. Raises ValueError for a number that JSON does not have (NaN, infinity): write None instead."""
    return json.dumps(row, allow_nan=False)


def write_record(runs_dir: Path, row: dict) -> None:
    write_atomic(record_path(runs_dir, row["trunk_id"], row["run_id"]), dump_row(row) + "\n")


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
        launched = designed_ledger(json.loads((runs / f"{study}.design.json").read_text()))
        if launched.exists():
            return launched
    own, published = OUTPUTS / f"{study}.jsonl", PUBLISHED / f"{study}.jsonl"
    return published if published.exists() and not own.exists() else own


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
        row = _parse_row(path.read_text(), str(path))
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


def read_ledger(path: Path | str) -> list[dict]:
    """Rows of a ledger: JSON lines, or CSV with the same columns. Identical duplicates collapse.

    Raises UserError for a missing, empty or malformed file and for two different rows with one run_id.
    """
    return merge(read_rows(path), str(path))


def read_rows(path: Path | str, left_out: list | None = None) -> list[dict]:
    """The rows of a ledger as they stand in the file, one by one: a million of them are never held as text as well.

    left_out: None = the first malformed line raises; a list = (FILE:LINE, reason) of each is appended to it instead.
    Raises UserError for a missing, unreadable or empty file.
    """
    path, rows, num_bad = Path(path), [], 0
    lines = _csv_lines if path.suffix == ".csv" else _json_lines
    try:
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            for number, parse in lines(file, path):
                try:
                    rows.append(_checked(parse()))
                except UserError as error:
                    if left_out is None:
                        raise UserError(f"{path}:{number} {error}") from None
                    left_out.append((f"{path.name}:{number}", str(error)))
                    num_bad += 1
    except FileNotFoundError:
        raise UserError(f"no ledger at {path}; run its study first") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not rows:
        what = f"has no sound row among {num_bad}" if num_bad else "is empty; run its study first"
        raise UserError(f"the ledger {path} {what}")
    return rows


def _json_lines(file, path):
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, functools.partial(_decoded, line)


def _csv_lines(file, path):
    table = csv.DictReader(file)
    names = table.fieldnames or []
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}; rename or remove one")
    for row in table:
        yield table.line_num, functools.partial(_csv_row, row)


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


def _differ(a, b) -> bool:
    """Whether two rows say different things: null says nothing, and NaN is NaN."""
    return a is not None and b is not None and a != b and not (a != a and b != b)


def _failed_later(row: dict, other: dict) -> bool:
    return row["status"] == other["status"] == "failed" and str(row.get("date")) > str(other.get("date"))


def update_ledger(path: Path, rows: list[dict]) -> list[dict]:
    """Merge `rows` into the ledger file, atomically and under a lock; calling it again changes nothing."""
    return rewrite_rows(Path(path), read_ledger, lambda old: merge(old + rows, str(path)))


def rewrite_rows(
    path: Path, read: Callable[[Path], list[dict]], change: Callable[[list[dict]], list[dict]]
) -> list[dict]:
    """Replace the rows of a file by change(rows), atomically and under a lock; rows that stay are not written again.

    read: what reads the file, which may be absent or empty. Returns the rows that the file holds now.
    """
    with locked(path.with_suffix(".lock")):
        for stale_temp_file in path.parent.glob(f"{glob.escape(path.name)}*.tmp"):
            stale_temp_file.unlink()
        rows = change(read(path) if path.exists() and path.stat().st_size else [])
        text = "".join(dump_row(row) + "\n" for row in rows)
        if not path.exists() or path.read_text() != text:
            write_atomic(path, text)
    return rows


def read_exclusions(path: Path | str) -> dict[str, str]:
    """run_id -> reason, from a CSV file with those two columns; {} where the file is absent."""
    path = Path(path)
    if not path.exists():
        return {}
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}; save it as UTF-8") from None
    for i, row in enumerate(rows):
        if not row.get("run_id") or not row.get("reason"):
            raise UserError(f"{path}:{i + 2} needs both a run_id and a reason")
    return {row["run_id"]: row["reason"] for row in rows}


def _parse_row(text: str, where: str) -> dict:
    try:
        return _checked(_decoded(text))
    except UserError as error:
        raise UserError(f"{where} {error}") from None


def _unrepeated(pairs: list[tuple]) -> dict:
    """An object's names are interned, of which 100,000 rows have but one set. Raises UserError for a repeated one."""
    row = {sys.intern(name): value for name, value in pairs}
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"says {twice!r} twice; remove one of them")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_unrepeated).decode


def _decoded(text: str):
    try:
        return _decode(text)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise UserError(f"is not JSON ({getattr(error, 'msg', error)}); mend or remove that line") from None


def _checked(row: object) -> dict:
    if not isinstance(row, dict):
        raise UserError("is not an object; each line holds one row")
    missing = [name for name in REQUIRED if row.get(name) in (None, "")]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}; see the row schema in the README")
    wrong = [name for name in ("run_id", "trunk_id") if not isinstance(row[name], str)]
    if wrong:
        raise UserError(f"has {wrong[0]}={row[wrong[0]]!r}; it must be text in quotes")
    if row["status"] not in STATUSES:
        raise UserError(f"has status={row['status']!r}; it must be one of {', '.join(STATUSES)}")
    return row


def _csv_row(row: dict) -> dict:
    if None in row:
        raise UserError("has more fields than the header; mend or remove that line")
    return {k: (v or None) if k in TEXT else _csv_value(v) for k, v in row.items()}


@functools.lru_cache(maxsize=2**16)
def _csv_value(text: str | None):
    if text is None or text == "":
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def is_number(value) -> bool:
    """Whether a value of a row is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
