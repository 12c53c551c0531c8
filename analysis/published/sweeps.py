"""Sweeps that other people published, as columns for a law: no copy of them is kept here, a folder of them is read.

FOLDER/gemstones           width x depth x tokens -> loss of 22 language models (arXiv 2502.06857, MIT;
                           github mcleish7/gemstone-scaling-laws, wandb_dfs)
FOLDER/scalebench          families of laws, a cheap pool and an expensive region each (arXiv 2604.22753, MIT;
                           github PlanarG/active-sl, benchmark/dataset)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError

GEMSTONES = ("hot_100b+", "cool_end")
# family -> the columns of a sum of power laws, the model's size first, and the measured loss
POWER_SUMS = dict(
    farseer=(("N", "D"), "loss"),
    data_constrained=(("params", "tokens", "unique_tokens"), "loss"),
    parallel=(("num_params", "parallel_size"), "loss"),
    moe=(("dense_parameter_count", "num_experts"), "loss_validation"),
    sparsity=(("N_active", "P"), "loss"),
)


@dataclass(frozen=True)
class Sweep:
    """columns: name -> [n]; y [n] > 0; clusters [n]: the model of each row; held_out [n]: the expensive region."""

    columns: dict
    y: np.ndarray
    clusters: np.ndarray
    held_out: np.ndarray

    def part(self, rows: np.ndarray) -> Sweep:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Sweep(columns, self.y[rows], self.clusters[rows], self.held_out[rows])


def gemstones(folder: Path | str, file: str) -> Sweep:
    """Columns width, depth, tokens, num_params of `GEMSTONES` file. Raises UserError where it is missing."""
    path = Path(folder) / "gemstones" / f"wandb_df_for_fitting_{file}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder that holds gemstones") from None
    names = dict(width="width", depth="depth", tokens="tokens", num_params="params_active_precise")
    columns = {name: np.array([row[source] for row in rows], float) for name, source in names.items()}
    models = np.array([row["run_name"] for row in rows])
    return Sweep(columns, np.array([row["final_loss"] for row in rows], float), models, np.zeros(len(rows), bool))


def scalebench(folder: Path | str, family: str) -> dict[str, Sweep]:
    """Group -> its rows, for a family of POWER_SUMS. Needs pyarrow. Raises UserError where a file is missing."""
    import pyarrow.parquet as parquet

    columns, target = POWER_SUMS[family]
    base = Path(folder) / "scalebench" / "benchmark" / "dataset" / f"{family}_scaling_law"
    parts = []
    for split in ("train", "test"):
        path = base / f"{split}-00000-of-00001.parquet"
        if not path.exists():
            raise UserError(f"no file {path}; give the folder that holds scalebench")
        table = parquet.read_table(path).to_pydict()
        parts.append({name: np.array(table[name]) for name in (*columns, target, "group")})
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    held_out = np.arange(len(table["group"])) >= len(parts[0]["group"])
    out = {}
    for group in dict.fromkeys(table["group"].tolist()):
        rows = table["group"] == group
        numbers = {name: table[name][rows].astype(float) for name in columns}
        out[group] = Sweep(numbers, table[target][rows], np.arange(rows.sum()).astype(str), held_out[rows])
    return out
