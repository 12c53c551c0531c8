"""What does fine-tuning attention alone give at a higher resolution?

    python -m analysis.resolution.tables results/resolution_finetune.jsonl [--out results] [--json]

Arms by mode (attention, full, mlp, head, from scratch), their comparison by paired seeds at equal FLOPs and equal images,
and the bytes stored. Writes OUT/NAME.json, and the figure and report.md into OUT/NAME, NAME being that of the first ledger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.publish import Result, markdown, run, template
from analysis.resolution.comparisons import AXES, RULE, cells, comparisons, pool, seed_noise, storage
from analysis.resolution.curves import METRICS, SCRATCH, read_study
from sovit import UserError

REPORT = template("resolution/report.md.j2")


def summarise(paths: Sequence[Path | str]) -> dict:
    """Sum up all that the ledgers say: numbers alone, as written to JSON.

    Raises:
        UserError: bad rows, or none that is fine-tuned.
    """
    study = read_study(paths)
    if not any(curve.arm.base for curve in study.curves):
        raise UserError(f"{', '.join(study.paths)}: no fine-tuned row; run studies/resolution_finetune.py")
    found = {metric: comparisons(study, metric) for metric in METRICS}
    pooled = [
        {"metric": metric, **entry}
        for metric in METRICS
        for by in ((), ("image_size",), ("shape",))
        for entry in pool(found[metric], by)
    ]
    return {
        "ledgers": study.paths,
        "rule": RULE,
        "num_trunks": len(study.curves),
        "num_rows": sum(len(c.examples) for c in study.curves),
        "left_out": [list(entry) for entry in study.left_out],
        "noise": {metric: seed_noise(study, metric) for metric in METRICS},
        "cells": cells(study),
        "comparisons": [entry for metric in METRICS for entry in found[metric]],
        "pooled": pooled,
        "storage": storage(study),
    }


def short_table(found: dict, rows: Sequence[tuple[str, str, str]]) -> str:
    """Tabulate comparisons of the loss by resolution and pooled, at the largest common budget, with the pooled verdict.

    rows: (ours, theirs, axis) of those to be told, where they were made.
    """
    entries = [e for e in found["pooled"] if e["metric"] == "val_loss" and "shape" not in e]
    by = {(e["ours"], e["theirs"], e["axis"], e.get("image_size")): e for e in entries}
    told = [key[:3] for key in by if key[3] is None and key[:3] in rows]
    sizes = sorted({key[3] for key in by if key[3] is not None})
    return REPORT.module.short_table(by, told, sizes, AXES).strip()


def scratch_table(found: dict, mode: str) -> str:
    """Tabulate a mode against training from scratch at the largest common FLOPs, by length of pre-training and resolution.

    Each cell: least and greatest difference over the shapes; the lengths are told apart, because they disagree.
    """
    chosen = {"metric": "val_loss", "ours": mode, "theirs": SCRATCH}
    entries = [e for e in found["comparisons"] if chosen.items() <= e.items()]
    lengths = {e["shape"]: sorted({o["base_examples"] for o in entries if o["shape"] == e["shape"]}) for e in entries}
    words = ["shortest", *["middle"] * (max(map(len, lengths.values()), default=2) - 2), "longest"]
    table: dict = {}
    for e in entries:
        place = lengths[e["shape"]].index(e["base_examples"])
        table.setdefault((place, e["image_size"]), []).append(e["points"][-1]["mean"])
    sizes = sorted({size for _, size in table})
    return REPORT.module.scratch_table(mode, words, sizes, table).strip()


def analyse(options: argparse.Namespace) -> Result:
    from analysis.resolution.figures import by_total_flops

    found, name = summarise(options.ledgers), options.ledgers[0].stem
    text, figures = markdown(REPORT, found=found, axes=AXES), {f"{name}/loss_by_total_flops": by_total_flops(found)}
    return Result(found, text, f"{name}.json", f"{name}/report.md", figures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    default = [Path("results/resolution_finetune.jsonl")]
    parser.add_argument("ledgers", type=Path, nargs="*", default=default, metavar="LEDGER")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
