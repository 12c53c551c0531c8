"""What does fine-tuning attention alone save? Measured ratios beside the claim of arXiv 2203.09795.

    sovit profile S/16@384 B/16@384 So150m/16@384 --trained attention full mlp head --batch-sizes 2
    python -m analysis.finetune_cost.tables [results/finetune_cost.jsonl] [--out results] [--json]

Time (paired over rounds), peak memory, activations kept for the backward pass, bytes stored and FLOPs of a step, each as a
ratio to training everything. Writes OUT/finetune_cost/savings.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.publish import Result, run
from sovit.ledger.profiles import read_profiles
from sovit.report.finetune_savings import PAPER, savings, savings_text
from sovit.spec.named_shapes import VARIANTS
from sovit.spec.shape import Shape

COLUMNS = {  # heading -> cost
    "step time": "train_step_seconds",
    "step FLOPs": "step_flops",
    "peak memory": "peak_bytes",
    "activations": "saved_bytes",
    "the same, attention written out": "saved_bytes_materialised",
    "stored": "stored_bytes",
}


def summary(rows: Sequence[dict]) -> dict:
    """Sum up the savings of each shape and batch under its name, and those claimed."""
    groups = [dict(group, name=name_of(Shape(**group["shape"]))) for group in savings(rows)]
    return {"claimed": PAPER, "groups": groups}


def name_of(shape: Shape) -> str:
    """Name a shape: S/16@384 where it is a named one, else its dimensions."""
    named = {dimensions[:3]: name for name, dimensions in VARIANTS.items()}
    name = named.get((shape.width, shape.depth, shape.mlp_dim), shape.label)
    return f"{name}/{shape.patch_size}@{shape.image_size}"


def table(found: dict) -> str:
    """Write attention's ratios as a Markdown table, the claim in its first row; shapes without are left out."""
    lines = [f"| attention ÷ full | batch | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    claimed = [f"{1 - PAPER[cost]:.2f}" if cost in PAPER else "" for cost in COLUMNS.values()]
    lines.append(f"| *claimed* | | {' | '.join(claimed)} |")
    for group in found["groups"]:
        if "attention" not in group["parts"]:
            continue
        ratio = group["parts"]["attention"]["ratio"]
        cells = [f"{ratio[cost]:.2f}" if cost in ratio else "" for cost in COLUMNS.values()]
        if ratio.get("low") is not None:
            cells[0] += f" ({ratio['low']:.2f} to {ratio['high']:.2f}, n={ratio['num_rounds']})"
        lines.append(f"| {group['name']} | {group['batch_size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def analyse(options: argparse.Namespace) -> Result:
    found = summary(read_profiles(options.rows))
    text = table(found) + "\n\n" + savings_text(found["groups"])
    return Result(found, text, "finetune_cost/savings.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="?", default=Path("results/finetune_cost.jsonl"), metavar="ROWS.jsonl")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
