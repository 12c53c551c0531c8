"""What a trained encoder is worth to a language model, beside its controls: the arms of a VLM ledger as a table.

python analysis/vlm_arms.py results/vlm_thread.jsonl

The rule: the trained encoder has the lower `val_loss/marks` than each control with the same seeds, in every seed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev

from sovit import UserError
from sovit.ledger import read_ledger

ARMS = {  # name -> what its rows have in the columns control and layer
    "trained": ("none", -1),
    "trained, one block earlier": ("none", -2),
    "random": ("random", -1),
    "blind": ("blind", -1),
}
FAMILIES = ("marks", "colours", "counts", "most")


def arms(path: Path) -> dict[str, list[dict]]:
    """Arm -> its rows, in the order of their seeds. Raises UserError where arms do not have the same seeds."""
    rows = [row for row in read_ledger(path) if row.get("objective") == "vlm" and row["status"] == "ok"]
    found = {
        name: sorted((r for r in rows if (r["control"], r["layer"]) == arm), key=lambda row: row["init_seed"])
        for name, arm in ARMS.items()
    }
    seeds = {tuple(row["init_seed"] for row in ours) for ours in found.values()}
    if len(seeds) != 1 or not min(seeds):
        raise UserError(f"{path}: the arms have different seeds, or none; run studies/vlm_thread.py to the end")
    return found


def table(path: Path) -> str:
    """Loss and error of each arm and family, mean (s.d.) over seeds, and the verdict, as markdown."""
    found = arms(path)
    lines = [
        "| arm (n seeds) | " + " | ".join(f"{family}: loss, error" for family in FAMILIES) + " |",
        "|---|" + "---|" * len(FAMILIES),
    ]
    for name, rows in found.items():
        cells = []
        for family in FAMILIES:
            losses, errors = ([row[f"val_{what}/{family}"] for row in rows] for what in ("loss", "error"))
            spread = f" ({stdev(losses):.3f})" if len(losses) > 1 else ""
            cells.append(f"{mean(losses):.3f}{spread}, {mean(errors):.1%}")
        lines.append(f"| {name} ({len(rows)}) | " + " | ".join(cells) + " |")
    key = "val_loss/marks"
    for control in ("random", "blind"):
        wins = sum(ours[key] < theirs[key] for ours, theirs in zip(found["trained"], found[control], strict=True))
        gap = mean(theirs[key] - ours[key] for ours, theirs in zip(found["trained"], found[control], strict=True))
        lines += [
            "",
            f"trained against {control} on marks: lower in {wins} of {len(found[control])} seeds, by {gap:.3f}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "results/vlm_thread.jsonl")))
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        raise SystemExit(2) from None
