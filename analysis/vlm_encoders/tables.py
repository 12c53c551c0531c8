"""Is the better classifier the better encoder for a language model?

    python -m analysis.vlm_encoders.tables results/vlm_transfer.jsonl [--family marks] [--out results] [--json]

Rows of encoders and of the vision-language models around them, paired by seed, with their controls: an untrained encoder, a
text-only baseline, and each model asked about another's image. Writes NAME.json, and report.md and the figure into OUT/NAME.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from analysis.publish import Result, markdown, run, template
from sovit import UserError
from sovit.ledger.ledger import merge, read_ledger
from sovit.ledger.schema import is_vlm
from sovit.predict.validation import paired

REPORT = template("vlm_encoders/report.md.j2")
TEXT_ONLY, UNTRAINED = "text-only baseline", "untrained"
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
OF_FAMILY = ("val_loss", "val_error", "shuffled_loss")
SETTING = (
    *(
        "language_model",
        "language_model_sha256",
        "projector",
        "layer",
        "norm",
        "stages",
        "families",
        "layout",
        "template",
    ),
    *("num_examples", "batch_size", "schedule", "final_lr", "cooldown", "precision", "data", "preset", "image_size"),
    "num_val",
)


def summarise(paths: Sequence[Path], decisive: str = "marks") -> dict:
    """Compare each pair of arms by paired seeds, on the loss of one family of questions and on that of all.

    An arm is an encoder's shape (and objective, where it is not classification), the untrained one, or the text-only
    baseline. A row that stands in several ledgers counts once.

    Args:
        paths: ledgers of encoders and of the models around them
        decisive: the family whose loss decides

    Returns:
        Arms with their means over seeds, pairs, and the verdicts; numbers alone, as written to JSON.

    Raises:
        UserError: rows of one kind are missing, rows differ in their setting, or two arms have no seed in common.
    """
    where = ", ".join(map(str, paths))
    rows = merge([row for path in paths for row in read_ledger(path)], where)
    encoders = {row["run_id"]: row for row in rows if not is_vlm(row)}
    answers = [row for row in rows if is_vlm(row) and row["status"] == "ok"]
    if not answers:
        raise UserError(f"{where}: no finished row of a vision-language model; run its study first")
    for name in SETTING:
        found = {str(row.get(name)) for row in answers}
        if len(found) > 1:
            raise UserError(f"rows differ in {name} ({', '.join(sorted(found))}); compare one setting at a time")
    families = sorted({k.partition("/")[2] for row in answers for k in row if k.startswith("val_loss/")})
    trained = answers[0]["families"] or families  # none named: all were trained
    if decisive not in trained:
        raise UserError(f"{decisive!r} was not trained; choose one of {', '.join(trained)}")
    families.sort(key=lambda f: (f not in trained, f != decisive))
    arms = _arms(answers, encoders)
    table = {name: _means(ours, encoders, families) for name, ours in arms.items()}
    order = sorted(arms, key=lambda name: (*_place(table[name]), name == TEXT_ONLY))
    columns = {"decisive": f"val_loss/{decisive}", "all": "val_loss"}
    pairs = {name: _pairs(order, arms, column) for name, column in columns.items()}
    return {
        "decisive": decisive,
        "setting": {name: answers[0].get(name) for name in SETTING},
        "seeds": sorted({row["init_seed"] for row in answers}),
        "families": {family: family in trained for family in families},
        "arms": {name: table[name] for name in order},
        "pairs": pairs,
        "verdict": {name: _verdict(order, table, found) for name, found in pairs.items()},
    }


def _arms(answers: list[dict], encoders: dict[str, dict]) -> dict[str, list[dict]]:
    """Name -> rows by seed. Raises UserError where two arms cannot be paired, or the baseline was not trained."""
    arms: dict[str, list[dict]] = {}
    for row in sorted(answers, key=_seeds):
        arms.setdefault(_arm(row, encoders), []).append(row)
    if TEXT_ONLY not in arms:
        raise UserError("no arm is text alone, against which encoders are judged; train one with encoder=blind:16")
    for (a, ours), (b, theirs) in itertools.combinations(arms.items(), 2):
        if not _common(ours, theirs):
            raise UserError(f"{a} and {b} have no seed in common; run the study to its end")
    return arms


def _arm(row: dict, encoders: dict[str, dict]) -> str:
    if row["control"] == "blind":
        return TEXT_ONLY
    run_id = row["encoder"].rpartition(":")[2]
    if run_id not in encoders:
        raise UserError(f"{row['run_id']} reads the encoder {run_id}, of which there is no row; name its ledger, too")
    encoder = encoders[run_id]
    words = ["x".join(str(encoder[name]) for name in ("width", "depth", "mlp_dim"))]
    words += [] if encoder["objective"] == CLASSIFICATION else [encoder["objective"]]
    return " ".join([*words, UNTRAINED] if row["control"] == "random" else words)


def _seeds(row: dict) -> tuple[int, int]:
    return row["init_seed"], row.get("data_seed", 0)


def _common(ours: list[dict], theirs: list[dict]) -> list[tuple[dict, dict]]:
    """Rows of two arms side by side, of each seed that both have."""
    by_seeds = {_seeds(row): row for row in theirs}
    return [(row, by_seeds[_seeds(row)]) for row in ours if _seeds(row) in by_seeds]


def _place(arm: dict) -> tuple[bool, float]:
    """Classifiers first, by their loss: what another objective calls loss says nothing beside it."""
    return arm["encoder_objective"] != CLASSIFICATION, math.inf if arm["encoder_loss"] is None else arm["encoder_loss"]


def _means(rows: list[dict], encoders: dict[str, dict], families: list[str]) -> dict:
    """Means over the seeds of an arm: of its encoders (None without any that was trained), and of what it answers."""
    read = [encoders[row["encoder"]] for row in rows if row["control"] == "none"]
    found: dict = {
        "n": len(rows),
        "seeds": [row["init_seed"] for row in rows],
        "run_ids": [row["run_id"] for row in rows],
        "encoder_loss": fmean(row["val_loss"] for row in read) if read else None,
        "encoder_error": fmean(row["val_error"] for row in read) if read else None,
        "encoder_objective": read[0]["objective"] if read else None,
        "encoder_losses": [row["val_loss"] for row in read],
        "image_tokens": rows[0]["num_image_tokens"],
    }
    for name in (*METRICS, *(f"{metric}/{family}" for family in families for metric in OF_FAMILY)):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            sd = stdev(values) if len(values) > 1 else None
            found[name] = {"mean": fmean(values), "sd": sd, "values": values}
    return found


def _pairs(order: list[str], arms: dict[str, list[dict]], metric: str) -> dict[str, dict]:
    """The decision rule on each two arms, the better classifier first."""
    return {
        f"{a} / {b}": paired([math.log(x[metric] / y[metric]) for x, y in _common(arms[a], arms[b])])
        for a, b in itertools.combinations(order, 2)
    }


def _verdict(order: list[str], table: dict, pairs: dict) -> dict:
    """Does the best classifier make the best encoder? Judged against each other trained one by the paired intervals.

    order: arms, classifiers first. `yes` if better than all, `no` if worse than one, else `not distinguishable`.
    """
    read = [name for name in order if table[name]["encoder_loss"] is not None]
    classifiers = [name for name in read if table[name]["encoder_objective"] == CLASSIFICATION]
    if not classifiers or len(read) < 2:
        return {"best_classifier": classifiers[0] if classifiers else None, "answer": "not asked"}
    first, *others = read
    verdicts = [pairs[f"{first} / {other}"]["verdict"] for other in others]
    answer = "no" if "worse" in verdicts else "yes" if set(verdicts) == {"better"} else "not distinguishable"
    return {"best_classifier": first, "against": dict(zip(others, verdicts)), "answer": answer}


def short_text(found: dict) -> str:
    """Write what was asked of whom, a line an arm, and the verdict; as markdown."""
    return REPORT.module.short_text(found, CLASSIFICATION).strip() + "\n"


def report_text(found: dict) -> str:
    """Write the verdict, the arms, each pair of them, and the loss on each family; as markdown."""
    return markdown(REPORT, found=found, classification=CLASSIFICATION)


def analyse(options: argparse.Namespace) -> Result:
    from analysis.vlm_encoders.figures import vlm_vs_encoder

    found, name = summarise(options.ledgers, options.family), options.ledgers[0].stem
    figures = {f"{name}/vlm_vs_encoder": vlm_vs_encoder(found)}
    return Result(found, report_text(found), f"{name}.json", f"{name}/report.md", figures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ledgers", type=Path, nargs="*", default=[Path("results/vlm_transfer.jsonl")], metavar="LEDGER")
    parser.add_argument("--family", default="marks", help="of questions, whose loss decides (default marks)")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
