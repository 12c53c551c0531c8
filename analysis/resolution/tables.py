"""What does fine-tuning attention alone give at a higher resolution, and how is a budget best split?

    python -m analysis.resolution.tables results/resolution_finetune.jsonl [--train-flops X ...] [--out results] [--json]

Arms by mode (attention, full, mlp, head, from scratch), their comparison by paired seeds at equal FLOPs and equal images,
bytes stored, a law of transfer chosen by held-out rows, and the best split of a budget between low-resolution pre-training
and fine-tuning. Writes OUT/NAME.json, and the figures and report.md into OUT/NAME, NAME being that of the first ledger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.publish import Result, markdown, run, template
from analysis.resolution.comparisons import AXES, RULE, cells, comparisons, pool, seed_noise, storage
from analysis.resolution.curves import METRICS, SCRATCH, Study, read_study
from analysis.resolution.held_out import score
from analysis.resolution.law import KINDS, TransferFit, fit_cell, misfit
from analysis.resolution.law_rows import cells_of
from analysis.resolution.schedule import LEVEL, budgets, splits, valley
from sovit import UserError

REPORT = template("resolution/report.md.j2")
MODES = ("full", "attention", "mlp", "head")


def summarise(paths: Sequence[Path | str], bootstrap: int = 400, train_flops: Sequence[float] = ()) -> dict:
    """Sum up all that the ledgers say.

    Args:
        paths: ledgers
        bootstrap: draws of each law
        train_flops: budgets to split, () for those run from scratch

    Returns:
        Numbers alone, as written to JSON. Where no law can be fitted, `laws` is empty and `law_notes` say why.

    Raises:
        UserError: bad rows, or none that is fine-tuned.
    """
    study = read_study(paths)
    if not study.targets():
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
    } | _laws(study, bootstrap, train_flops)


def _laws(study: Study, bootstrap: int, train_flops: Sequence[float]) -> dict:
    able, notes = cells_of(study)
    judged = {}
    for mode in sorted({mode for cell in able for mode in cell.modes}):
        try:
            judged[mode] = score(able, mode)
        except UserError as error:
            notes.append(str(error))
    kinds = {mode: scores["chosen"] for mode, scores in judged.items()}
    noise = seed_noise(study)["sd"]
    fits = [fit_cell(cell, kinds, bootstrap) for cell in able if set(cell.modes) <= set(kinds)]
    return {"law_notes": notes, "held_out": judged, "laws": [_law(fit, noise, train_flops) for fit in fits]}


def _law(fit: TransferFit, noise: float | None, train_flops: Sequence[float]) -> dict:
    cell = fit.cell
    schedules = [
        {
            "train_flops": float(spent),
            "splits": splits(fit, spent, noise),
            "valleys": {mode: valley(fit, mode, spent) for mode in cell.modes},
        }
        for spent in train_flops or budgets(cell)
    ]
    named = {"shape": cell.shape.label, "patch_size": cell.shape.patch_size, "image_size": cell.shape.image_size}
    of_fit = {"base_image_size": cell.base_image_size, "kinds": fit.kinds, "floor": fit.form.floor}
    of_rows = {"zero_line": cell.zero_line, "flops_per_image": cell.flops_per_image, "num_rows": len(cell.y)}
    said = {"misfit": misfit(fit), "curves": _curves(fit), "schedules": schedules}
    return named | of_fit | of_rows | said


def _curves(fit: TransferFit, num: int = 40) -> list[dict]:
    """The law's own curves over the images that were run: {mode, base_examples, total_flops, loss}."""
    cell, out = fit.cell, []
    for place, mode in ((-1, SCRATCH), *enumerate(cell.modes)):
        mine = cell.mode == place
        for n0 in sorted(set(cell.n0[mine].tolist())):
            n1 = np.geomspace(cell.n1[mine].min(), cell.n1[mine].max(), num)
            flops = n1 * cell.flops_per_image[mode] + n0 * cell.flops_per_image["base"]
            line = {"total_flops": flops.tolist(), "loss": fit.loss(n0, n1, mode)[0].tolist()}
            out.append({"mode": mode, "base_examples": int(n0)} | line)
    return out


# words, by the macros of the template ----------------------------------------------------------------------------------


def report_text(found: dict) -> str:
    """Write the whole report as Markdown; found: of `summarise`, or its JSON."""
    words = {"modes": MODES, "axes": AXES, "kinds": KINDS}
    return markdown(REPORT, found=found, arms=_arms(found), splits=_splits(found), **words)


def _arms(found: dict) -> list[dict]:
    """Of each shape and resolution the cells at the largest budget from the longest pre-training: by mode, and its base."""
    tuned = [c for c in found["cells"] if c["mode"] != SCRATCH]
    targets = dict.fromkeys((c["shape"], c["image_size"], c["patch_size"]) for c in tuned)
    out = []
    for target in targets:
        mine = [c for c in found["cells"] if (c["shape"], c["image_size"], c["patch_size"]) == target]
        by_mode: dict = {}
        for cell in sorted(mine, key=lambda c: (c["base_examples"], c["num_examples"])):
            by_mode[cell["mode"]] = cell
        last = max(by_mode.values(), key=lambda c: c["base_examples"])
        wanted = {"shape": target[0], "image_size": last["base_image_size"], "mode": SCRATCH}
        wanted |= {"num_examples": last["base_examples"]}
        base = next((c for c in found["cells"] if wanted.items() <= c.items()), None)
        stored = [s for s in found["storage"] if (s["shape"], s["image_size"], s["patch_size"]) == target]
        out.append({"shape": target[0], "image_size": target[1], "base": base, "cells": by_mode, "stored": stored})
    return out


def short_table(found: dict, rows: Sequence[tuple[str, str, str]] = (), metric: str = "val_loss") -> str:
    """Tabulate comparisons by resolution and pooled, at the largest common budget, with the pooled verdict.

    rows: (ours, theirs, axis) of those to be told, () = all.
    """
    entries = [e for e in found["pooled"] if e["metric"] == metric and "shape" not in e]
    by = {(e["ours"], e["theirs"], e["axis"], e.get("image_size")): e for e in entries}
    told = [key[:3] for key in by if key[3] is None and (not rows or key[:3] in rows)]
    sizes = sorted({key[3] for key in by if key[3] is not None})
    return REPORT.module.short_table(by, told, sizes, metric.removeprefix("val_"), AXES).strip()


def scratch_table(found: dict, mode: str = "full", metric: str = "val_loss") -> str:
    """Tabulate a mode against training from scratch at the largest common FLOPs, by length of pre-training and resolution.

    Each cell: least and greatest difference over the shapes; the lengths are told apart, because they disagree.
    """
    chosen = {"metric": metric, "ours": mode, "theirs": SCRATCH}
    entries = [e for e in found["comparisons"] if chosen.items() <= e.items()]
    lengths = {e["shape"]: sorted({o["base_examples"] for o in entries if o["shape"] == e["shape"]}) for e in entries}
    words = ["shortest", *["middle"] * (max(map(len, lengths.values()), default=2) - 2), "longest"]
    table: dict = {}
    for e in entries:
        place = lengths[e["shape"]].index(e["base_examples"])
        table.setdefault((place, e["image_size"]), []).append(e["points"][-1]["mean"])
    sizes = sorted({size for _, size in table})
    return REPORT.module.scratch_table(mode, words, sizes, table).strip()


def schedule_table(found: dict, shape: str = "", train_flops: float | None = None) -> str:
    """Tabulate the best split of each budget as Markdown, against training from scratch, and what to be warned of.

    shape, train_flops: of these alone; the budget to within 3 %, as whole batches meet it.
    """
    told = [
        (law, split)
        for law, split in _splits(found)
        if shape in ("", law["shape"])
        and (train_flops is None or abs(np.log(split["train_flops"] / train_flops)) <= LEVEL)
    ]
    return REPORT.module.schedule_table(told).strip()


def _splits(found: dict) -> list[tuple[dict, dict]]:
    return [(law, s) for law in found["laws"] for entry in law["schedules"] for s in entry["splits"].values()]


def analyse(options: argparse.Namespace) -> Result:
    from analysis.resolution.figures import transfer_figures

    if options.bootstrap < 0:
        raise UserError(f"--bootstrap {options.bootstrap}: give the number of draws, 0 for none")
    found, name = summarise(options.ledgers, options.bootstrap, options.train_flops), options.ledgers[0].stem
    figures = {f"{name}/{figure}": drawn for figure, drawn in transfer_figures(found).items()}
    return Result(found, report_text(found), f"{name}.json", f"{name}/report.md", figures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "ledgers", type=Path, nargs="*", default=[Path("results/resolution_finetune.jsonl")], metavar="LEDGER"
    )
    parser.add_argument("--train-flops", type=float, nargs="*", default=(), metavar="X", help="budgets to split")
    parser.add_argument("--bootstrap", type=int, default=400, help="draws of each law (default 400)")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
