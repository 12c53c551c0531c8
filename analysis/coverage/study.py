"""How often intervals hold the truth, on simulated studies."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.files import write_atomic
from sovit.law.bootstrap import LEVEL
from sovit.law.checks import simulate as planted
from sovit.law.checks.coverage import BAD, REACHES, Setup, one_set, setup, summary

DESIGNS = {
    "star": lambda: planted.sovit_star(),
    "star+8": lambda: planted.sovit_star(corners=True),
    "star x4": lambda: planted.sovit_star(images=(32e6, 64e6, 128e6, 256e6)),
    "stream": planted.stream_star,
    "4 an arm": lambda: planted.sovit_star(per_arm=4),
    "3 an arm": lambda: planted.sovit_star(per_arm=3),
    "1-4 branches": lambda: _unbalanced(),
}


def _unbalanced() -> planted.Design:
    whole = DESIGNS["star x4"]()
    branch = np.arange(len(whole.trunk)) % 4
    return whole.rows(np.flatnonzero(branch <= whole.trunk % 4))


@dataclass(frozen=True)
class Condition:
    """One line of the study. right: the fitted form holds the truth."""

    truth: str = "joint"
    form: str = "joint"
    design: str = "star"
    sd: float = 0.005
    rho: float = 0.5
    noise: str = "normal"  # or t3, arms, bad rows, bad trunk
    frac: float = 0.0
    sets: int = 200

    @property
    def name(self) -> str:
        truth = f"{self.truth} {self.frac:g}" if self.frac else self.truth
        return f"{truth} | {self.form} | {self.design} | {self.sd:.1%} {self.rho:g} | {self.noise}"

    @property
    def right(self) -> bool:
        holds = dict(joint=("joint", "weak"), joint_n=("joint", "weak", "inter"), sovit=("eq3",))
        return self.truth in (holds | dict(bounded=("bounded", "stream"))).get(self.form, ())


CONDITIONS = (  # a run stopped early has seen most
    Condition(),
    Condition(truth="weak"),
    Condition(design="3 an arm"),
    Condition(noise="bad trunk"),
    Condition(design="1-4 branches"),
    Condition(truth="stream", form="bounded", design="stream"),
    Condition(rho=0.9),
    Condition(sd=0.01),
    Condition(truth="eq3", form="sovit"),
    Condition(truth="inter", frac=0.8, sets=100),
    Condition(truth="eq3", sets=100),
    Condition(truth="bounded", form="bounded"),
    Condition(design="4 an arm"),
    Condition(noise="bad rows"),
    Condition(noise="t3"),
    Condition(noise="arms"),
    Condition(design="star+8"),
    Condition(design="star x4"),
    Condition(sd=0.003),
    Condition(truth="inter", frac=0.4, form="joint_n", design="star+8"),
    Condition(truth="inter", frac=0.4, sets=100),
    Condition(truth="bounded", sets=100),
    Condition(form="chinchilla", sets=100),
    Condition(form="sovit", sets=60),
)


def draw_set(condition: Condition, design: planted.Design, i: int) -> tuple[planted.Truth, np.ndarray]:
    """The i-th random truth of a condition and its measured losses [n]; the same whenever and wherever it is asked."""
    rng = np.random.default_rng([zlib.crc32(condition.name.encode()), i])
    law = planted.truth(condition.truth, rng, condition.frac)
    kind = condition.noise if condition.noise in ("t3", "arms") else "normal"
    y = design.losses(law) * planted.noise(design, condition.sd, condition.rho, rng, kind)
    if condition.noise == "bad rows":
        y[rng.choice(len(y), 2, replace=False)] *= BAD
    if condition.noise == "bad trunk":
        y[design.trunk == rng.integers(design.trunk.max() + 1)] *= BAD
    return law, y


def true_quantities(s: Setup, law: planted.Truth) -> np.ndarray:
    """What `Setup.quantities` should have been, by the planted law itself."""
    if not s.family.grid:
        ends = np.stack([law.optimum(c) for c in s.ends])
        size = np.diff(np.log(planted.num_params(ends, law.geometry)))
        seen = np.diff(np.log(np.array(s.ends) / law.flops(ends)))
        return np.log(size / (size + seen))
    best = [np.log(law.optimum(c)) for c in (*s.ends, *(r * s.ends[1] for r in REACHES))]
    return np.concatenate([np.log((best[1] - best[0]) / np.log(s.ends[1] / s.ends[0])), *best[2:]])


def run_condition(condition: Condition, draws: int = 99) -> dict:
    """Simulate one condition: a line of the study, plain data."""
    began = time.perf_counter()
    design = DESIGNS[condition.design]()
    s, sets, true, failed = None, [], [], 0
    for i in range(condition.sets):
        law, y = draw_set(condition, design, i)
        s = s or setup(condition.form, design, planted.truth(condition.truth).zero_line or 1.2)
        rng = np.random.default_rng(i)
        try:
            one = one_set(s, np.log(y)[s.rows.source], draws, rng)
        except np.linalg.LinAlgError:
            failed += 1
            continue
        sets.append(one)
        true.append(true_quantities(s, law))
    assert s is not None
    return dict(
        name=condition.name, right=condition.right, **dataclasses.asdict(condition), draws=draws, failed=failed,
        num_rows=len(s.rows.trunk), num_trunks=int(s.rows.trunk.max()) + 1, level=LEVEL, reaches=list(REACHES),
        **summary(s.labels, np.array(true), sets), seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip


def study(path: Path, conditions: Sequence[Condition] = CONDITIONS, draws: int = 99, workers: int = 1) -> list[dict]:
    """Run what of `conditions` is not yet in `path`, one JSON line a finished one; returns the lines, in their order.

    A line belongs to a condition if all its settings do, so that a longer run is not taken for a shorter one. Progress
    goes to stderr. Raises UserError for a file that is not of this study.
    """
    wanted = {json.dumps(dataclasses.asdict(c) | dict(draws=draws)): c for c in conditions}
    have = {}
    whole = path.read_text() if path.exists() else ""
    if whole and not whole.endswith("\n"):  # killed while it wrote its last line
        whole = whole[: whole.rfind("\n") + 1]
        write_atomic(path, whole)
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            key = json.dumps({f.name: line[f.name] for f in dataclasses.fields(Condition)} | dict(draws=line["draws"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a line of this study; name another --out") from None
        have[key] = line
    todo = {key: c for key, c in wanted.items() if key not in have}
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(key: str, line: dict) -> None:
        have[key] = line
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        worst = min(c["mean"] for kind in line["coverage"].values() for c in kind.values())
        print(
            f"{sum(k in have for k in wanted):3} of {len(wanted)}  {line['name']:<58}"
            f" least {worst:.0%}  {line['seconds']:6.1f} s",
            file=sys.stderr,
            flush=True,
        )

    if workers <= 1:
        for key, condition in todo.items():
            keep(key, run_condition(condition, draws))
    elif todo:
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(run_condition, c, draws): key for key, c in todo.items()}
            for done in concurrent.futures.as_completed(running):
                keep(running[done], done.result())
    return [have[key] for key in wanted]
