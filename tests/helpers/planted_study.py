"""A small study as a worker leaves it, trained by nobody: ledger, metrics files with trunk and cooldown lines, journal."""

import json

from planted_ledger import CENTRE, write_ledger

from sovit.ledger.schema import new_row
from sovit.spec.run import Recipe, Run, budgets_for

BATCH, WINDOW = 16, 50
SHAPES = [CENTRE.replace(width=width) for width in (16, 32, 48)]


def planted_runs(budgets=(8e9, 2e10), shapes=SHAPES, study="planted"):
    return [Run(s, Recipe(peak_lr=0.008), budgets_for(s, budgets, 16, BATCH), study=study) for s in shapes]


def planted_row(run, n, **more):
    """The row of one branch, with numbers that no other row has."""
    loss = 2.0 - run.shape.width / 1000 - n / 1e6
    measured = {"val_loss": loss, "val_error": loss / 4, "val_loss/attr": loss / 2, "val_error/attr": loss / 8}
    facts = dict(zero_line=2.767, seconds=n / 1000, date="2026-11-21T20:00:00Z", device="cpu x1", commit="0123456789ab")
    return new_row(run, n, **{"status": "ok", "num_classes": 16, **measured, **facts, **more})


def lines(run):
    """The lines of metrics.jsonl, in the order of training: up to each branch, the branch, and on from where it left."""
    at = 0
    for n in run.budgets:
        for branch, start, stop in ((None, at, run.trunk_examples(n)), (n, run.trunk_examples(n), n)):
            steps = [s for s in range(start // BATCH + 1, stop // BATCH + 1) if s % WINDOW == 0 or s == stop // BATCH]
            for step in steps:
                examples = step * BATCH
                yield dict(
                    step=step,
                    examples=examples,
                    branch=branch,
                    train_loss=loss_at(branch, step),
                    seconds=examples / 1000,
                )
        at = run.trunk_examples(n)


def loss_at(branch, step):
    """Told apart by branch and step, so that a point shows where it comes from."""
    return 2.5 - step / 1e5 - (branch or 0) / 1e8


def write_metrics(runs_dir, run, keep=None):
    path = runs_dir / run.trunk_id / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in list(lines(run))[:keep]))
    return path


def plant(folder, runs=None, name="planted"):
    """RESULTS and RUNS of a study under `folder`; returns (results, runs folder, rows)."""
    runs = planted_runs(study=name) if runs is None else runs
    rows = [planted_row(run, n) for run in runs for n in run.budgets]
    (folder / "results").mkdir(parents=True, exist_ok=True)
    write_ledger(folder / "results" / f"{name}.jsonl", rows)
    for run in runs:
        write_metrics(folder / "runs", run)
    return folder / "results", folder / "runs", rows
