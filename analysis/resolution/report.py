"""The fine-tuning study in one dictionary, and in tables: arms, verdicts by the rule, storage, law, schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.resolution.curves import (
    AXES,
    METRICS,
    NETWORK,
    RULE,
    SCRATCH,
    Study,
    cells,
    comparisons,
    pool,
    read_study,
    seed_noise,
    storage,
)
from analysis.resolution.law import KINDS, TransferFit, cells_of, fit_cell, misfit, parameters, score
from analysis.resolution.schedule import budgets, compare_modes, measured, valley
from sovit import UserError

PAPER_STORAGE = 1 / 3  # of 2203.09795: what attention's weights are of a block at MLP ratio 4
MODES = ("full", "attention", "mlp", "head")


def summarise(paths: Sequence[Path | str], bootstrap: int = 400, train_flops: Sequence[float] = ()) -> dict:
    """All that the ledgers say. bootstrap: draws of each law; train_flops: budgets to split, () = those run from scratch.

    Raises UserError for bad rows; where no law can be fitted, `laws` is empty and `law_notes` say why.
    """
    study = read_study(paths)
    if not study.targets():
        raise UserError(f"{', '.join(study.paths)}: no fine-tuned row; run studies/resolution_finetune.py")
    found = {metric: comparisons(study, metric) for metric in METRICS}
    out: dict = {
        "ledgers": study.paths,
        "rule": RULE,
        "num_trunks": len(study.curves),
        "num_rows": sum(len(c.examples) for c in study.curves),
        "network": list(NETWORK),
        "left_out": [list(entry) for entry in study.left_out],
        "noise": {metric: seed_noise(study, metric) for metric in METRICS},
        "cells": cells(study),
        "comparisons": [entry for metric in METRICS for entry in found[metric]],
        "pooled": [
            {"metric": metric, **entry}
            for metric in METRICS
            for by in ((), ("image_size",), ("shape",))
            for end in ("largest", "smallest")
            for entry in pool(found[metric], end, by)
        ],
        "storage": storage(study),
    }
    return out | _laws(study, bootstrap, train_flops)


def _laws(study: Study, bootstrap: int, train_flops: Sequence[float]) -> dict:
    able, notes = cells_of(study)
    out: dict = {"law_notes": notes, "held_out": {}, "laws": []}
    for mode in sorted({mode for cell in able for mode in cell.modes}):
        try:
            out["held_out"][mode] = score(able, mode)
        except UserError as error:
            notes.append(str(error))
    kinds = {mode: judged["chosen"] for mode, judged in out["held_out"].items()}
    able = [cell for cell in able if set(cell.modes) <= set(kinds)]
    noise = seed_noise(study)["sd"]
    for cell in able:
        fit = fit_cell(cell, kinds, bootstrap)
        spent = list(train_flops) or budgets(cell)
        out["laws"].append(
            {
                "shape": cell.label,
                "patch_size": cell.patch_size,
                "image_size": cell.image_size,
                "base_image_size": cell.base_image_size,
                "kinds": fit.kinds,
                "floor": fit.form.floor,
                "zero_line": cell.zero_line,
                "flops_per_image": cell.flops_per_image,
                "parameters": parameters(fit),
                "misfit": misfit(fit),
                "num_rows": len(cell.y),
                "curves": _curves(fit),
                "schedules": [
                    compare_modes(fit, c, noise)
                    | {
                        "valleys": {mode: valley(fit, mode, c) for mode in cell.modes},
                        "measured": measured(study, cell, c),
                    }
                    for c in spent
                ],
            }
        )
    return out


def _curves(fit: TransferFit, num: int = 40) -> list[dict]:
    """The law's own curves over the images that were run: {mode, base_examples, total_flops, loss}."""
    cell, out = fit.cell, []
    for place, mode in ((-1, SCRATCH), *enumerate(cell.modes)):
        mine = cell.mode == place
        for n0 in sorted(set(cell.n0[mine].tolist())):
            n1 = np.geomspace(cell.n1[mine].min(), cell.n1[mine].max(), num)
            flops = n1 * cell.flops_per_image[mode] + n0 * cell.flops_per_image["base"]
            loss = fit.loss(n0, n1, mode)[0]
            out.append(dict(mode=mode, base_examples=int(n0), total_flops=flops.tolist(), loss=loss.tolist()))
    return out


# words ---------------------------------------------------------------------------------------------------------------------


def difference_text(entry: dict) -> str:
    """+3.1 % (+3.0 to +3.2)."""
    if entry["low"] is None:
        return f"{math.expm1(entry['mean']):+.1%}"
    low, high = 100 * math.expm1(entry["low"]), 100 * math.expm1(entry["high"])
    return f"{math.expm1(entry['mean']):+.1%} ({low:+.1f} to {high:+.1f})"


def verdict_table(found: dict, metric: str = "val_loss", by: str | None = None, end: str = "largest") -> str:
    """The pooled verdicts as markdown: each arm against another, at what is equal."""
    keys = {"shape", "image_size"}
    rows = [
        entry
        for entry in found["pooled"]
        if entry["metric"] == metric and entry["end"] == end and keys & set(entry) == ({by} if by else set())
    ]
    title = {"shape": "shape | ", "image_size": "px | "}.get(by or "", "")
    name = {"val_loss": "loss", "val_error": "error"}.get(metric, metric)
    lines = [
        f"| {title}{name} of | against | at | difference (90 %) | verdict | cells: better, worse, of |",
        "|---|---|---|---|---|---|" + ("---|" if by else ""),
    ]
    for entry in rows:
        head = f"{entry[by]} | " if by else ""
        lines.append(
            f"| {head}{entry['ours']} | {entry['theirs']} | {AXES[entry['axis']]} | {difference_text(entry)} |"
            f" {entry['verdict']} | {entry['better']}, {entry['worse']}, {entry['num_cells']} |"
        )
    return "\n".join(lines)


def arms_table(found: dict, metric: str = "val_loss") -> str:
    """Each shape and resolution at the largest budget of every arm from the longest pre-training: mean (s.d., n)."""
    lines = [
        "| shape, px | base at its own px | from scratch | " + " | ".join(MODES) + " | bytes stored, of full |",
        "|---|---|---|" + "---|" * (len(MODES) + 1),
    ]
    every = {(c["shape"], c["image_size"], c["patch_size"]) for c in found["cells"] if c["mode"] != SCRATCH}
    targets = sorted(every, key=lambda t: ([int(x) for x in t[0].split("x")], *t[1:]))
    for target in targets:
        mine = [c for c in found["cells"] if (c["shape"], c["image_size"], c["patch_size"]) == target]
        texts = [_base_text(found, mine, metric)]
        for mode in (SCRATCH, *MODES):
            have = [c for c in mine if c["mode"] == mode and c[metric] is not None]
            last = max(have, key=lambda c: (c["base_examples"], c["num_examples"]), default=None)
            texts.append("" if last is None else _mean_text(last, metric))
        shares = {
            s["mode"]: s["share"] for s in found["storage"] if (s["shape"], s["image_size"], s["patch_size"]) == target
        }
        stored = ", ".join(
            f"{mode} {share:.0%}" for mode, share in shares.items() if share is not None and mode != "full"
        )
        lines.append(f"| {target[0]}, {target[1]} | {' | '.join(texts)} | {stored} |")
    return "\n".join(lines)


def _base_text(found: dict, target: list[dict], metric: str) -> str:
    """What the longest pre-training of a target's fine-tunings had reached at its own resolution."""
    tuned = max((c for c in target if c["mode"] != SCRATCH), key=lambda c: c["base_examples"])
    same = ("shape", tuned["shape"]), ("image_size", tuned["base_image_size"]), ("mode", SCRATCH)
    own = [c for c in found["cells"] if all(c[k] == v for k, v in same) and c["num_examples"] == tuned["base_examples"]]
    return _mean_text(own[0], metric) if own and own[0][metric] is not None else ""


def _mean_text(cell: dict, metric: str) -> str:
    sd = cell[f"{metric}_sd"]
    spread = f" ({sd:.4f}, {cell['n']})" if sd is not None else f" (n = {cell['n']})"
    return f"{cell[metric]:.4f}{spread}"


def law_table(found: dict) -> str:
    """Parameters of each law and whether it misses by more than the noise, as markdown."""
    lines = [
        "| shape, px | mode | parameters (90 %; of worth also by seeds) | misses by, noise | F test |",
        "|---|---|---|---|---|",
    ]
    for law in found["laws"]:
        miss = law["misfit"]
        f_test = "no seeds" if miss["p"] is None else f"p = {miss['p']:.2g}" + (": it misses" if miss["misses"] else "")
        noise = "unknown" if miss["noise_sd"] is None else f"{miss['noise_sd']:.2%}"
        where, missed = f"{law['shape']}, {law['image_size']}", f"{miss['residual_rms']:.2%}, {noise}"
        scratch = {name: law["parameters"][name] for name in ("c", "E")}
        for mode, own in ((SCRATCH, scratch), *((m, law["parameters"][m]) for m in MODES if m in law["parameters"])):
            texts = [f"{name} {_ends(entry)}" for name, entry in own.items()]
            if "worth" in own and own["worth"]["status"] == "ok":
                texts.append(f"worth by seeds {_ends(own['worth'], 'seeds_')}")
            lines.append(f"| {where} | {mode} | {'; '.join(texts)} | {missed} | {f_test} |")
    return "\n".join(lines)


def _ends(entry: dict, prefix: str = "") -> str:
    if entry["status"] == "edge":
        return f"{entry['estimate']:.3g}, on its bound: not known"
    low, high = entry[f"{prefix}low"], entry[f"{prefix}high"]
    ends = "no interval" if low is None else f"{low:.3g} to {high:.3g}"
    return ends if prefix else f"{entry['estimate']:.3g} ({ends})"


def schedule_table(found: dict, shape: str = "", train_flops: float | None = None) -> str:
    """The best split of each budget as markdown, against training from scratch, and what to be warned of.

    shape, train_flops: of these alone; the budget to within 3 %, as whole batches meet it.
    """
    lines = [
        "| shape, px | FLOPs | mode | pre-training (90 %) | within noise | loss against scratch (90 %) | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for law in found["laws"]:
        for entry in law["schedules"] if shape in ("", law["shape"]) else ():
            for mode, s in entry["splits"].items():
                if train_flops is not None and abs(math.log(s["train_flops"] / train_flops)) > 0.03:
                    continue
                share = _share_text(s)
                against = {
                    "mean": s["against_scratch"],
                    "low": s["against_scratch_low"],
                    "high": s["against_scratch_high"],
                }
                where, flat = f"{law['shape']}, {law['image_size']}", f"{s['flat'][0]:.0%} to {s['flat'][1]:.0%}"
                lines.append(
                    f"| {where} | {s['train_flops']:.2g} | {mode} | {share} | {flat} | {difference_text(against)} |"
                    f" {'; '.join(s['warnings'])} |"
                )
    return "\n".join(lines)


def _share_text(split: dict) -> str:
    """A share with its interval; at the end of what was run, that end and what the law would have beyond it."""
    if split["status"] == "edge":
        most = split["share"] > sum(split["searched"]) / 2
        beyond = "" if split["beyond"] is None else f" (the law alone: {split['beyond']['share']:.0%})"
        return f"edge, {'>=' if most else '<='} {split['share']:.0%}{beyond}"
    if split["share_low"] is None:
        return f"{split['share']:.0%}"
    return f"{split['share']:.0%} ({split['share_low']:.0%} to {split['share_high']:.0%})"


def held_out_line(found: dict) -> str:
    """RMSE of every form on rows that it was not fitted to, and the form used, for each mode."""
    lines = []
    for mode, judged in found["held_out"].items():
        kinds, chosen = judged["kinds"], judged["chosen"]
        order = sorted(kinds, key=lambda k: kinds[k]["rmse"])
        scores = ", ".join(f"`{k}` {kinds[k]['rmse']:.1%} ({kinds[k]['bias']:+.1%})" for k in order)
        lines.append(
            f"{mode.capitalize()}, RMSE (bias) on held-out rows: {scores}. Used: `{chosen}`, {KINDS[chosen].formula}."
        )
    return "\n".join(lines) or "No form was judged."


def short_table(found: dict, rows: Sequence[tuple[str, str, str]] = (), metric: str = "val_loss") -> str:
    """For a first page: comparisons by resolution and pooled, at the largest common budget, with the verdict pooled.

    rows: (ours, theirs, axis) of those to be told, () = all.
    """
    entries = [e for e in found["pooled"] if e["metric"] == metric and e["end"] == "largest" and "shape" not in e]
    sizes = sorted({e["image_size"] for e in entries if "image_size" in e})
    by = {(e["ours"], e["theirs"], e["axis"], e.get("image_size")): e for e in entries}
    name = {"val_loss": "loss", "val_error": "error"}.get(metric, metric)
    lines = [
        f"| {name} of, against, at | "
        + " | ".join(f"{size} px" for size in sizes)
        + " | all (90 %) | verdict | cells |",
        "|---|" + "---|" * (len(sizes) + 3),
    ]
    for (ours, theirs, axis, size), entry in by.items():
        if size is None and (not rows or (ours, theirs, axis) in rows):
            cells_of_row = [by.get((ours, theirs, axis, s)) for s in sizes]
            texts = ["" if e is None else difference_text(e) for e in cells_of_row]
            what = f"{ours}, {theirs}, {AXES[axis]}"
            pooled = f"{difference_text(entry)} | {entry['verdict']} | {entry['num_cells']}"
            lines.append(f"| {what} | {' | '.join(texts)} | {pooled} |")
    return "\n".join(lines)


def scratch_table(found: dict, mode: str = "full", metric: str = "val_loss") -> str:
    """A mode against training from scratch at the largest common total FLOPs, by length of pre-training and resolution.

    Each cell: least and greatest difference over the shapes; the lengths are told apart, because they disagree.
    """
    chosen = {"metric": metric, "ours": mode, "theirs": SCRATCH, "axis": "total_flops"}
    entries = [e for e in found["comparisons"] if e["points"] and all(e[k] == v for k, v in chosen.items())]
    lengths: dict[str, list] = {}
    for shape in {e["shape"] for e in entries}:
        lengths[shape] = sorted({e["base_examples"] for e in entries if e["shape"] == shape})
    sizes = sorted({e["image_size"] for e in entries})
    words = ["shortest", *["middle"] * (max(map(len, lengths.values()), default=2) - 2), "longest"]
    lines = [
        f"| {mode} against scratch, pre-training | {' | '.join(f'{s} px' for s in sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    for i, word in enumerate(words):
        texts = []
        for size in sizes:
            mine = [
                e for e in entries if e["image_size"] == size and lengths[e["shape"]].index(e["base_examples"]) == i
            ]
            means = [100 * math.expm1(e["points"][-1]["mean"]) for e in mine]
            texts.append(f"{min(means):+.1f} to {max(means):+.1f}%" if means else "")
        lines.append(f"| {word} | {' | '.join(texts)} |")
    return "\n".join(lines)


def report_text(found: dict) -> str:
    """All tables, as markdown."""
    noise = found["noise"]["val_loss"]
    said = "unknown (one seed)" if noise["sd"] is None else f"{noise['sd']:.2%} ({noise['n']} degrees of freedom)"
    parts = [
        f"{found['num_rows']} rows of {found['num_trunks']} trunks, {len(found['left_out'])} left out."
        f" Noise between seeds {said}.",
        "Loss at the largest budget of each arm, the longest pre-training, mean (s.d., n):",
        arms_table(found),
        f"Pooled over shapes, resolutions and bases, at the largest common budget (stay: the base network trained on at its"
        f" own resolution). {RULE}:",
        verdict_table(found),
        verdict_table(found, by="image_size"),
        verdict_table(found, by="shape"),
        verdict_table(found, metric="val_error"),
        held_out_line(found),
    ]
    if found["laws"]:
        parts += [law_table(found), schedule_table(found)]
    parts += [f"No law: {note}" for note in found["law_notes"]]
    return "\n\n".join(parts) + "\n"
