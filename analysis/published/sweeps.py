"""Sweeps that other people published, as columns for a law: no copy of them is kept here, a folder of them is read.

FOLDER/gemstones           width x depth x tokens -> loss of 22 language models (arXiv 2502.06857, MIT;
                           github mcleish7/gemstone-scaling-laws, wandb_dfs)
FOLDER/revisiting-vision   72 few-shot error curves of vision models (arXiv 2209.06640, Apache-2.0;
                           github google-research/google-research, revisiting_neural_scaling_laws/data)
FOLDER/scalebench          8 families of laws, a cheap pool and an expensive region each (arXiv 2604.22753, MIT;
                           github PlanarG/active-sl, benchmark/dataset)
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError

GEMSTONES = ("hot_100b+", "cool_end")
LARGE = 1.8e9  # Gemstones models above this many parameters are held out
NUM_CLASSES = dict(inet=1000, c=100, cal=102, bird=200)  # ImageNet, CIFAR-100, Caltech-101 with its background, CUB-200
# family -> the columns of a sum of power laws, the model's size first, and the measured loss
POWER_SUMS = dict(
    farseer=(("N", "D"), "loss"),
    data_constrained=(("params", "tokens", "unique_tokens"), "loss"),
    parallel=(("num_params", "parallel_size"), "loss"),
    moe=(("dense_parameter_count", "num_experts"), "loss_validation"),
    sparsity=(("N_active", "P"), "loss"),
)
NOT_POWER_SUMS = dict(
    lr_bsz="the loss has an interior optimum in learning rate and batch size; a sum of power laws is monotone in each",
    domain_mixture="five losses of mixture shares that are 0 in many rows and add up to 1; a power law needs x > 0",
    vocab="the loss is normalised by that of unigrams and negative; residuals here are of ln(loss)",
)


@dataclass(frozen=True)
class Sweep:
    """columns: name -> [n]; y [n] > 0; clusters [n]: the model of each row; held_out [n]: rows the publishers score on.

    zero_line: the loss of a guess, where known.
    """

    columns: dict
    y: np.ndarray
    clusters: np.ndarray
    held_out: np.ndarray
    zero_line: float | None = None

    def part(self, rows: np.ndarray) -> Sweep:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Sweep(columns, self.y[rows], self.clusters[rows], self.held_out[rows], self.zero_line)


def gemstones(folder: Path | str, file: str) -> Sweep:
    """Columns width, depth, tokens, num_params of `GEMSTONES` file. Raises UserError where it is missing or bad."""
    path = Path(folder) / "gemstones" / f"wandb_df_for_fitting_{file}.jsonl"
    rows = [json.loads(line) for line in _lines(path)]
    names = dict(width="width", depth="depth", tokens="tokens", num_params="params_active_precise")
    columns = {name: np.array([row[source] for row in rows], float) for name, source in names.items()}
    y = np.array([row["final_loss"] for row in rows], float)
    return Sweep(columns, y, np.array([row["run_name"] for row in rows]), columns["num_params"] > LARGE)


def vision(folder: Path | str) -> dict[tuple[str, str], Sweep]:
    """(model, task) -> its learning curve, in the order of the file: column num_examples, y the few-shot error."""
    path = Path(folder) / "revisiting-vision" / "benchmark.vision.csv"
    curves: dict = {}
    for row in csv.DictReader(_lines(path)):
        point = float(row["Seen Examples"]), float(row["Loss"]), row["Training"] == "0"
        curves.setdefault((row["Model"], row["Task"]), []).append(point)
    out = {}
    for (model, task), points in curves.items():
        examples, y, held_out = (np.array(column) for column in zip(*points))
        zero_line = 1 - 1 / NUM_CLASSES[task.rsplit("_", 1)[0]]
        out[model, task] = Sweep(dict(num_examples=examples), y, np.full(len(y), model), held_out, zero_line)
    return out


def scalebench(folder: Path | str, family: str) -> dict[str, Sweep]:
    """Group -> its rows, for a family of POWER_SUMS; held_out marks the expensive region. Needs pyarrow."""
    import pyarrow.parquet as parquet

    columns, target = POWER_SUMS[family]
    base = Path(folder) / "scalebench" / "benchmark" / "dataset" / f"{family}_scaling_law"
    parts = []
    for split in ("train", "test"):
        path = base / f"{split}-00000-of-00001.parquet"
        if not path.exists():
            raise UserError(f"no file {path}; give the folder that holds {base.relative_to(folder).parts[0]}")
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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the folder that holds {path.parent.name}"
        ) from None
