"""The trunks of a study as they stand: what is trained of each, what a living worker says of it, what is left to do."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sovit.encoder.few_shot import lacks_probe
from sovit.files import is_locked
from sovit.ledger.records import record_path
from sovit.ledger.schema import ANSWERED, is_number
from sovit.spec.any_run import AnyRun
from sovit.spec.run import Run


@dataclass(frozen=True)
class Trunk:
    """A run as it stands.

    state: done, running, waiting or failed. said: what the worker that trains it has said of itself. images: still to be
    trained after what is on record; left: and after what its worker has done since.
    """

    run: AnyRun
    state: str
    missing: list[int]
    said: dict
    images: float
    left: float


def read_trunk(run: AnyRun, rows: Mapping[str, Any], runs_dir: Path, since: float) -> Trunk:
    """A launch, the first of which began at `since`, tries earlier failures again."""
    folder = runs_dir / run.trunk_id
    own = {n: rows.get(run.run_id(n)) for n in run.budgets}
    records = {n: record_path(runs_dir, run.trunk_id, run.run_id(n)) for n in run.budgets}
    missing = [n for n, row in own.items() if not is_answered(row)]
    failed = [n for n, row in own.items() if row and row["status"] == "failed" and date_of(records[n]) >= since]
    state, said = "done", {}
    if missing or any(lacks_probe(run, row) for row in own.values() if row):
        state = "failed" if failed else "waiting"
        if is_locked(folder / "lock"):
            state, said = "running", _live_progress(folder)
    # as a worker trains it: branches that only the ledger knows have left no trunk here to go on from
    todo = run.with_budgets([n for n in run.budgets if n in missing or records[n].exists()] or run.budgets)
    images = sum(todo.new_examples(n) for n in missing)
    left = min(images, (1 - said.get("share", 0.0)) * todo.total_examples)
    return Trunk(run, state, missing, said, images, left)


def _live_progress(folder: Path) -> dict:
    """What the worker that holds a trunk's lock has said of itself; nothing yet but `date`: when, or when it began."""
    path = folder / "progress.json"
    since, said = date_of(folder / "lock"), date_of(path)
    return ((read_json(path) or {}) if said >= since else {}) | {"date": max(since, said)}


def read_json(path: Path) -> dict | None:
    """The object in a file; None where there is none, or a damaged one: it tells nothing, and is no reason to be silent."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_answered(row: dict | None) -> bool:
    return row is not None and row["status"] in ANSWERED


def date_of(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


class Costs:
    """Training FLOPs of an image of each trunk, and FLOP/s of one worker, as rows and live workers tell them.

    The FLOPs of an encoder are counted, its task head as soon as it is known how many classes there are. Of a
    vision-language model they are what its row or its worker says, else another on the same language model; 0: unknown.
    """

    def __init__(self, trunks: Sequence[Trunk], rows: Mapping[str, Any]):
        found = []  # (trunk_id, language model, FLOPs of an image, FLOP/s)
        for row in rows.values():
            if row.get("train_flops"):
                seconds = row.get("spent_seconds") or row.get("seconds")
                pace = (row.get("spent_flops") or 0) / seconds if seconds else 0
                each = row["train_flops"] / row["num_examples"]
                found.append((row["trunk_id"], row.get("language_model", ""), each, pace))
        for trunk in trunks:
            if trunk.said.get("images_per_second"):
                pace = trunk.said["flops_per_second"]
                found.append(
                    (
                        trunk.run.trunk_id,
                        trunk.run.parts.get("language_model", ""),
                        pace / trunk.said["images_per_second"],
                        pace,
                    )
                )
        self.each = {key: each for trunk_id, words, each, _ in found for key in (words, trunk_id)}
        self.paces = {(words, each): pace for _, words, each, pace in found if pace}
        self.num_classes: dict[tuple, int] = {
            (t.run.data, t.run.preset): t.said["num_classes"] for t in trunks if t.said.get("num_classes")
        }
        for row in rows.values():
            if row.get("num_classes"):
                self.num_classes[row.get("data"), row.get("preset")] = row["num_classes"]

    def per_image(self, run: AnyRun) -> float:
        if not isinstance(run, Run):
            return self.each.get(run.trunk_id, self.each.get(run.parts.get("language_model", ""), 0.0))
        return run.train_flops(run.budgets[-1], self.num_classes.get((run.data, run.preset), 0)) // run.budgets[-1]

    def flops(self, trunk: Trunk, images: float) -> float:
        return float(self.per_image(trunk.run) * images)

    def seconds_left(self, trunk: Trunk) -> float | None:
        """Of one worker: what it says itself, else at the pace of the nearest FLOPs of an image. None: nothing like it."""
        if trunk.said.get("seconds_left") is not None:
            return trunk.said["seconds_left"]
        each = self.per_image(trunk.run)
        near = [
            (abs(math.log(known / each)), pace)
            for (words, known), pace in self.paces.items()
            if each and words == trunk.run.parts.get("language_model", "")
        ]
        return self.flops(trunk, trunk.left) / min(near)[1] if near else None if trunk.left else 0.0

    def totals(self, trunks: Sequence[Trunk], rows: Mapping[str, Any]) -> dict[str, float]:
        billed = sum(row["spent_flops"] for row in rows.values() if is_number(row.get("spent_flops")))
        done = billed + sum(self.flops(trunk, trunk.images - trunk.left) for trunk in trunks)
        left = sum(self.flops(trunk, trunk.left) for trunk in trunks)
        heads = [t.run for t in trunks if isinstance(t.run, Run) and t.run.recipe.objective == "classification"]
        return {
            "done": done,
            "left": left,
            "total": done + left,
            "head_counted": all((run.data, run.preset) in self.num_classes for run in heads),
            "uncounted": sum(not self.per_image(trunk.run) for trunk in trunks if trunk.missing),
        }
