"""Smaller patches, a larger image, or more of everything else: what to spend FLOPs on."""

from __future__ import annotations

from collections.abc import Mapping

from sovit.report.sections.phrases import NAMES, flops, percent, sentence, with_interval
from sovit.report.text import label, spend_lines, turn_words
from sovit.spec.shape import Shape


def trade_section(trades: Mapping) -> str:
    """trades: of `report._trades`, by patch_size or image_size; "" where the law has a term of neither."""
    return "\n\n".join(_one(found) for found in trades.values())


def _one(found: Mapping) -> str:
    name = NAMES[found["by"]]
    head = (
        f"**By {name}**, at {flops(found['train_flops'])} training FLOPs, all else chosen anew for each value that was run"
        " (excess over the best of them: both shapes as they stand, draw by draw):\n\n"
        f"| {name} | best shape with it | images | {found['metric']} | excess |\n|---|---|---|---|---|\n"
    )
    rows = []
    for row in found["values"]:
        e = row["excess"]
        excess = "best" if e["estimate"] == 0 else percent(e["estimate"], True)
        if e["estimate"] and e["low"] is not None:
            excess += f" ({percent(e['low'], True)} to {percent(e['high'], True)})"
        loss = with_interval(row["loss"], row["loss_low"], row["loss_high"])
        rows.append(
            f"| {row['value']} | {label(Shape(**row['shape']), [found['by']])} | {row['num_examples']:,} |"
            f" {loss} | {excess} |"
        )
    turns = [f"- {sentence(turn_words(turn, name, found['level']))}" for turn in found["turns"]]
    spent = [f"- {sentence(line)}" for line in spend_lines(found)]
    return head + "\n".join(rows) + "\n\n" + "\n".join(turns + spent)
