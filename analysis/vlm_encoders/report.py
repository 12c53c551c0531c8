"""Encoders and the vision-language models around them, paired by seed: is the better classifier the better eye?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from sovit import UserError
from sovit.ledger.ledger import read_ledger
from sovit.ledger.merge import merge
from sovit.predict.paired_test import paired

BLIND, UNTRAINED = "no eye", "untrained"
CLASSIFICATION = "classification"
METRICS = (
    "val_loss",
    "val_error",
    "shuffled_loss",
    "shuffled_error",
    "held_out_loss",
    "held_out_error",
    "val_unparsed",
)
SETTING = (
    "language_model",
    "language_model_sha256",
    "projector",
    "layer",
    "norm",
    "stages",
    "families",
    "layout",
    "template",
    "num_examples",
    "batch_size",
    "schedule",
    "final_lr",
    "cooldown",
    "precision",
    "data",
    "preset",
    "image_size",
    "num_val",
)


def summarise(paths: Sequence[Path], decisive: str = "marks") -> dict:
    """Arms, their means over seeds, and each pair of arms, by paired seeds: on the loss of the family `decisive`, which
    decides, and beside it on that of all families trained.

    An arm is an encoder's shape (and objective, where it is not classification), the untrained one, or no eye. Raises
    UserError without rows of both kinds, for rows of different settings, and where two arms have no seed in common: a
    pair is compared in those that it has. A row that stands in several ledgers counts once.
    """
    rows = merge([row for path in paths for row in read_ledger(path)], ", ".join(map(str, paths)))
    encoders = {row["run_id"]: row for row in rows if row.get("kind") != "vlm"}
    answers = [row for row in rows if row.get("kind") == "vlm" and row["status"] == "ok"]
    if not answers:
        raise UserError(
            f"{', '.join(map(str, paths))}: no finished row of a vision-language model; run its study first"
        )
    for name in SETTING:
        found = {str(row.get(name)) for row in answers}
        if len(found) > 1:
            raise UserError(f"rows differ in {name} ({', '.join(sorted(found))}); compare one setting at a time")
    families = sorted({k.partition("/")[2] for row in answers for k in row if k.startswith("val_loss/")})
    trained = answers[0]["families"] or families  # none named: all were trained
    if decisive not in trained:
        raise UserError(f"{decisive!r} was not trained; choose one of {', '.join(trained)}")
    arms: dict[str, list[dict]] = {}
    for row in sorted(answers, key=_seeds):
        arms.setdefault(_arm(row, encoders), []).append(row)
    if BLIND not in arms:
        raise UserError("no arm is blind, against which eyes are judged; train one with encoder=blind:16")
    for (a, ours), (b, theirs) in itertools.combinations(arms.items(), 2):
        if not _common(ours, theirs):
            raise UserError(f"{a} and {b} have no seed in common; run the study to its end")
    families.sort(key=lambda f: (f not in trained, f != decisive))
    table = {name: _means(ours, encoders, families) for name, ours in arms.items()}
    order = sorted(arms, key=lambda name: (*_place(table[name]), name == BLIND))
    eyes = [name for name in order if table[name]["encoder_loss"] is not None]
    columns = {"decisive": f"val_loss/{decisive}", "all": "val_loss"}
    pairs = {name: _pairs(order, arms, column) for name, column in columns.items()}
    return {
        "decisive": decisive,
        "setting": {name: answers[0].get(name) for name in SETTING},
        "seeds": sorted({row["init_seed"] for row in answers}),
        "families": {family: family in trained for family in families},
        "arms": {name: table[name] for name in order},
        "pairs": pairs,
        "sees": {name: _sees(arms[name], arms[BLIND], decisive) for name in order if name != BLIND},
        "verdict": {name: _verdict(eyes, table, found) for name, found in pairs.items()},
    }


def _seeds(row: dict) -> tuple[int, int]:
    return row["init_seed"], row.get("data_seed", 0)


def _common(ours: list[dict], theirs: list[dict]) -> list[tuple[dict, dict]]:
    """Rows of two arms side by side, of each seed that both have."""
    by_seeds = {_seeds(row): row for row in theirs}
    return [(row, by_seeds[_seeds(row)]) for row in ours if _seeds(row) in by_seeds]


def _place(arm: dict) -> tuple[bool, float]:
    """Classifiers first, by their loss: what another objective calls loss says nothing beside it."""
    is_classifier = arm["encoder_objective"] == CLASSIFICATION
    return not is_classifier, math.inf if arm["encoder_loss"] is None else arm["encoder_loss"]


def _arm(row: dict, encoders: dict[str, dict]) -> str:
    if row["control"] == "blind":
        return BLIND
    run_id = row["encoder"].rpartition(":")[2]
    if run_id not in encoders:
        raise UserError(f"{row['run_id']} reads the encoder {run_id}, of which there is no row; name its ledger, too")
    encoder = encoders[run_id]
    shape = f"{encoder['width']}x{encoder['depth']}x{encoder['mlp_dim']}"
    if encoder["objective"] != CLASSIFICATION:
        shape += f" {encoder['objective']}"
    return f"{shape} {UNTRAINED}" if row["control"] == "random" else shape


def _means(rows: list[dict], encoders: dict[str, dict], families: list[str]) -> dict:
    eyes = [encoders[row["encoder"]] for row in rows if row["control"] == "none"]
    columns = [*METRICS, *(f"{m}/{family}" for family in families for m in ("val_loss", "val_error", "shuffled_loss"))]
    found: dict = {
        "n": len(rows),
        "seeds": [row["init_seed"] for row in rows],
        "run_ids": [row["run_id"] for row in rows],
    }
    found["encoder_loss"] = fmean(row["val_loss"] for row in eyes) if eyes else None
    found["encoder_error"] = fmean(row["val_error"] for row in eyes) if eyes else None
    found["encoder_objective"] = eyes[0]["objective"] if eyes else None
    found["encoder_losses"] = [row["val_loss"] for row in eyes]
    found["image_tokens"] = rows[0]["num_image_tokens"]
    for name in columns:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            sd = stdev(values) if len(values) > 1 else None
            found[name] = {"mean": fmean(values), "sd": sd, "values": values}
    return found


def _pairs(order: list[str], arms: dict[str, list[dict]], metric: str) -> dict[str, dict]:
    """The decision rule on each two arms, the better classifier first."""
    found = {}
    for a, b in itertools.combinations(order, 2):
        found[f"{a} / {b}"] = paired([math.log(x[metric] / y[metric]) for x, y in _common(arms[a], arms[b])])
    return found


def _sees(ours: list[dict], blind: list[dict], decisive: str) -> dict:
    """In how many seeds the loss is below the blind model's, and below its own with another image."""
    key = f"val_loss/{decisive}"
    return {
        "below_blind": sum(a[key] < b[key] for a, b in _common(ours, blind)),
        "below_shuffled": sum(row[key] < row[f"shuffled_loss/{decisive}"] for row in ours),
        "n_blind": len(_common(ours, blind)),
        "n": len(ours),
    }


def _verdict(eyes: list[str], table: dict, pairs: dict) -> dict:
    """Does the best classifier make the best eye? Judged against each other trained encoder by the paired intervals.

    eyes: trained encoders, classifiers first. `yes` if better than all, `no` if worse than one, else `not distinguishable`.
    """
    classifiers = [name for name in eyes if table[name]["encoder_objective"] == CLASSIFICATION]
    if not classifiers or len(eyes) < 2:
        return {"best_classifier": classifiers[0] if classifiers else None, "answer": "not asked"}
    first, *others = eyes
    verdicts = [pairs[f"{first} / {other}"]["verdict"] for other in others]
    answer = "no" if "worse" in verdicts else "yes" if set(verdicts) == {"better"} else "not distinguishable"
    return {"best_classifier": first, "against": dict(zip(others, verdicts)), "answer": answer}


def short_text(found: dict) -> str:
    """What was asked of whom, a line an arm, and the verdict; as markdown."""
    decisive, setting = found["decisive"], found["setting"]
    trained = f"{sum(found['families'].values())} of {len(found['families'])} families of questions trained"
    lines = [
        f"`{setting['language_model']}` ({setting['stages']}), {trained}, {len(found['seeds'])} paired seeds;"
        " nats a token, mean (s.d.).",
        "",
        f"| eye | own loss as classifier | {decisive} | {decisive}, another's image | all questions | wrong"
        " | wrong, another's image | unparsed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in found["arms"].items():
        own = f"{arm['encoder_loss']:.3f}" if arm["encoder_objective"] == CLASSIFICATION else ""
        losses = (f"val_loss/{decisive}", f"shuffled_loss/{decisive}", "val_loss")
        cells = [_cell(arm[m], "{:.3f}") for m in losses]
        cells += [_cell(arm[m], "{:.1%}") if m in arm else "" for m in ("val_error", "shuffled_error", "val_unparsed")]
        missing = f" (n = {arm['n']})" if arm["n"] < len(found["seeds"]) else ""
        lines.append(f"| {name}{missing} | {own} | " + " | ".join(cells) + " |")
    lines += ["", *(_verdict_text(found, name) for name in found["verdict"])]
    return "\n".join(lines) + "\n"


def report_text(found: dict) -> str:
    """`short_text`, each pair of arms, who sees, and the loss on each family."""
    lines = [short_text(found), "| family | " + " | ".join(found["arms"]) + " |", "|---|" + "---|" * len(found["arms"])]
    for family, trained in found["families"].items():
        cells = [_cell(arm[f"val_loss/{family}"], "{:.3f}") for arm in found["arms"].values()]
        lines.append(f"| {family}{'' if trained else ' (not trained)'} | " + " | ".join(cells) + " |")
    for name, title in (("decisive", found["decisive"]), ("all", "all questions that were trained")):
        lines += ["", f"Ratios of losses on {title}:", ""]
        lines += [f"- {pair}: {_ratio(p)}, {p['verdict']}" for pair, p in found["pairs"][name].items()]
    lines.append("")
    for name, sees in found["sees"].items():
        blind = (
            ""
            if sees["below_blind"] is None
            else f" below the blind model in {sees['below_blind']} of {sees['n']} seeds,"
        )
        lines.append(f"- {name}:{blind} below itself with another's image in {sees['below_shuffled']} of {sees['n']}")
    return "\n".join(lines) + "\n"


def _verdict_text(found: dict, name: str) -> str:
    verdict, on = found["verdict"][name], found["decisive"] if name == "decisive" else "all questions"
    first = verdict["best_classifier"]
    told = [f"{_ratio(found['pairs'][name][f'{first} / {other}'])} to {other}" for other in verdict.get("against", ())]
    return f"Is the best classifier, {first}, the best eye, by {on}? **{verdict['answer']}** ({'; '.join(told)})."


def _cell(value: dict, form: str) -> str:
    spread = f" ({form.format(value['sd'])})" if value["sd"] is not None else ""
    return form.format(value["mean"]) + spread


def _ratio(pair: dict) -> str:
    def percent(log: float) -> str:
        return f"{math.expm1(log):+.1%}"

    if pair["low"] is None:
        return f"{percent(pair['mean'])} (n = {pair['n']})"
    return f"{percent(pair['mean'])} (90 %: {percent(pair['low'])} to {percent(pair['high'])})"
