"""Tables that others wrote: CSV in any dialect, TSV, JSON lines, packed or not; their columns renamed, scaled, completed.

Nothing is guessed: what a column means is said by `--map THEIRS=OURS`, in which unit by `--units OURS=FACTOR`.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_type_hints

from sovit import UserError
from sovit.ledger.schema import LedgerRow, is_number
from sovit.spec.shape import DIMENSIONS

SUFFIXES = (".jsonl", ".csv", ".tsv")
# what the field calls a column -> ours: proposed in messages, and never applied unasked
SYNONYMS = {
    **dict.fromkeys(("loss", "eval_loss", "test_loss", "valid_loss", "final_loss", "validation_loss"), "val_loss"),
    **dict.fromkeys(("error", "eval_error", "test_error"), "val_error"),
    **dict.fromkeys(("n", "params", "n_params", "parameters", "model_size", "non_embedding_params"), "num_params"),
    **dict.fromkeys(("d", "tokens", "num_tokens", "samples", "samples_seen", "images", "examples"), "num_examples"),
    **dict.fromkeys(("c", "flops", "total_flops", "training_flops"), "train_flops"),
    **dict.fromkeys(("gflops", "gmacs", "macs", "flops_per_image"), "forward_flops"),
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "dim"), "width"),
    **dict.fromkeys(("num_layers", "n_layer", "n_layers", "layers", "num_hidden_layers"), "depth"),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "mlp_width", "mlp_size"), "mlp_dim"),
    **dict.fromkeys(("img_size", "resolution"), "image_size"),
    **dict.fromkeys(("lr", "learning_rate"), "peak_lr"),
    "patch": "patch_size",
    "seed": "init_seed",
    **dict.fromkeys(("run", "run_name", "model", "name"), "trunk_id"),
}
IDENTITY = (*DIMENSIONS, "head_dim", "pool", "num_params", "init_seed", "data_seed", "peak_lr")  # of a trunk


@dataclass(frozen=True)
class Reading:
    """How the tables of others are read. names: theirs -> ours. units: ours -> factor. metric: the column to be fitted."""

    names: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    metric: str = "val_loss"

    @classmethod
    def of(cls, names: Sequence[str] = (), units: Sequence[str] = (), metric: str = "val_loss") -> Reading:
        """From THEIRS=OURS and OURS=FACTOR, each word one or several with commas. Raises UserError for any other."""
        known = get_type_hints(LedgerRow)
        found, factors = _pairs("map", names), {}
        for theirs, ours in found.items():
            if ours not in known and not ours.startswith("val_"):
                raise UserError(f"--map {theirs}={ours}: {ours!r} is no column of a ledger; see docs/ledger-schema.md")
        for ours, text in _pairs("units", units).items():
            try:
                factors[ours] = float(text)
            except ValueError:
                factors[ours] = 0.0
            if not 0 < factors[ours] < float("inf"):
                raise UserError(f"--units {ours}={text} is no factor above 0; give such as num_examples=1e6")
        return cls(found, factors, metric)

    def row(self, row: Any, place: str, ledger: bool) -> Any:
        """A row with our names and units; one of a table, not of a ledger, gets what it lacks. place: FILE:LINE."""
        if not isinstance(row, dict) or (ledger and not self.names and not self.units):
            return row
        for theirs, ours in self.names.items():
            if theirs not in row:
                raise UserError(
                    f"has no column {theirs!r} for --map {theirs}={ours}; it has {', '.join(map(str, row))}"
                )
            if ours in row and ours not in self.names:
                raise UserError(f"has a column {ours!r} besides {theirs!r} of --map {theirs}={ours}; leave one out")
        row = {self.names.get(name, name): value for name, value in row.items()}
        for name, factor in self.units.items():
            if name not in row:
                raise UserError(f"has no column {name!r} for --units {name}={factor:g}; it has {', '.join(row)}")
            row[name] = _scaled(row[name], factor)
        return row if ledger else self._completed(row, place)

    def _completed(self, row: dict, place: str) -> dict:
        lacking = [name for name in ("num_examples", self.metric) if name not in row]
        if lacking:
            taken = set(row) | set(self.names)
            proposed = {n: ours for n in row if (ours := SYNONYMS.get(n.lower())) and ours not in taken}
            pairs = ",".join([*(f"{a}={b}" for a, b in self.names.items()), *(f"{a}={b}" for a, b in proposed.items())])
            remedy = (
                f"say what they are, such as --map {pairs}" if proposed else "say what they are with --map THEIRS=OURS"
            )
            raise UserError(f"lacks {', '.join(lacking)}; it has {', '.join(row)}: {remedy}")
        own = {name: row[name] for name in IDENTITY if row.get(name) is not None}
        trunk = hashlib.sha256(json.dumps(own or place, sort_keys=True, default=str).encode()).hexdigest()[:10]
        made = {"run_id": place, "trunk_id": str(row["trunk_id"]) if row.get("trunk_id") else trunk, "status": "ok"}
        return made | {name: value for name, value in row.items() if name not in ("run_id", "trunk_id")}


def _pairs(flag: str, words: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for word in words for text in word.split(",")]
    for left, equals, right in pairs:
        if not (left and equals and right):
            raise UserError(f"--{flag} {left}{equals}{right} is no pair; give such as loss=val_loss,N=num_params")
    found = {left.strip(): right.strip() for left, _, right in pairs}
    if len(found) < len(pairs) or (flag == "map" and len({*found.values()}) < len(found)):
        raise UserError(f"--{flag} {','.join(words)} names one column twice; give each once")
    return found


def _scaled(value: Any, factor: float) -> Any:
    if not is_number(value):
        return value  # who checks numbers says so
    scaled = value * factor
    return round(scaled) if scaled == round(scaled) else scaled


def open_table(path: Path) -> IO[str]:
    """The text of a file: packed by gzip or not, UTF-8 or UTF-16, as its first bytes say.

    Raises UserError for a suffix of no known kind, and for bytes that are no such text.
    """
    if suffix_of(path) not in SUFFIXES and not path.is_dir():
        raise UserError(f"{path} is of no known kind; give .jsonl, .csv or .tsv, each also as .gz")
    raw: Any = open(path, "rb")
    if raw.read(2) == b"\x1f\x8b":
        raw.close()
        raw = gzip.open(path)
    raw.seek(0)
    mark = raw.read(200)
    raw.seek(0)
    wide = mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in mark and (not wide or mark[2:4] == b"\0\0"):
        raise UserError(f"cannot read {path}: it has zero bytes and no mark of UTF-16; save it as UTF-8")
    return io.TextIOWrapper(raw, encoding="utf-16" if wide else "utf-8-sig", newline="")


def suffix_of(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def delimiter_of(header: str, path: Path) -> str:
    """What parts the columns of a header: of a .tsv the tab, else the commonest of , ; tab |. Raises UserError for none."""
    counts = {mark: header.count(mark) for mark in ("\t" if suffix_of(path) == ".tsv" else ",;\t|")}
    best = max(counts, key=lambda mark: counts[mark])
    if not counts[best]:
        raise UserError(
            f"{path} has one column only, {header.strip()[:80]!r}; part columns by commas, semicolons or tabs"
        )
    return best
