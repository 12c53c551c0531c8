"""What does fine-tuning attention alone save? Measured ratios beside the claim of arXiv 2203.09795.

    sovit profile S/16@384 B/16@384 So150m/16@384 --trained attention full mlp head --batch-sizes 2
    python -m analysis.finetune_cost.tables [results/finetune_cost.jsonl] [--out results/finetune_cost]

Time (paired over rounds), peak memory, activations kept for the backward pass, bytes stored and FLOPs of a step, each as a
ratio to training everything; and, in closed form, what the named shapes store and compute. Writes savings.json,
savings.png and savings.svg into OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.finetune_cost.savings import PAPER, closed_forms, savings, savings_text
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.ledger.profiles import read_profiles
from sovit.spec.named_shapes import VARIANTS
from sovit.spec.shape import Shape

COLUMNS = {  # of the table in docs: heading -> cost
    "step time": "train_step_seconds",
    "step FLOPs": "step_flops",
    "peak memory": "peak_bytes",
    "activations": "saved_bytes",
    "the same, attention written out": "saved_bytes_materialised",
    "stored": "stored_bytes",
}


def summary(rows: Sequence[dict]) -> dict:
    groups = [dict(group, name=name_of(Shape(**group["shape"]))) for group in savings(rows)]
    return dict(claimed=PAPER, groups=groups, closed_forms=closed_forms())


def name_of(shape: Shape) -> str:
    """S/16@384 where the shape is a named one, else its dimensions."""
    for name, (width, depth, mlp_dim, *_) in VARIANTS.items():
        if (shape.width, shape.depth, shape.mlp_dim) == (width, depth, mlp_dim):
            return f"{name}/{shape.patch_size}@{shape.image_size}"
    return f"{shape.label}/{shape.patch_size}@{shape.image_size}"


def table(found: dict) -> str:
    """Attention's ratios as a Markdown table, the claim in its first row; shapes without are left out."""
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


def closed_form_text(found: dict) -> str:
    lines = [
        "in closed form, attention / full, patch 16 at 384 px, 1000 classes:",
        f"{'shape':<8}{'MLP ratio':>10}{'of blocks':>11}{'stored':>9}{'activations':>13}{'step FLOPs':>12}",
    ]
    for row in found["closed_forms"]:
        lines.append(
            f"{row['name']:<8}{row['mlp_ratio']:>10.2f}{row['share_of_blocks']:>11.3f}{row['stored_bytes']:>9.3f}"
            f"{row['saved_bytes']:>13.3f}{row['step_flops']:>12.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="?", default=Path("results/finetune_cost.jsonl"), metavar="ROWS.jsonl")
    parser.add_argument(
        "--out", type=Path, default=OUTPUTS / "finetune_cost", help=f"(default {OUTPUTS}/finetune_cost)"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    try:
        found = summary(read_profiles(options.rows))
        write_atomic(options.out / "savings.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        from analysis.finetune_cost import figures as finetune_cost_figures
        from sovit.report import figures as plot

        names = [f"{group['name']}\nbatch {group['batch_size']}" for group in found["groups"]]
        plot.save(finetune_cost_figures.savings_bars(found["groups"], names, PAPER), options.out / "savings")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    text = "\n\n".join([savings_text(found["groups"]), table(found), closed_form_text(found)])
    print(json.dumps(found, indent=1) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
