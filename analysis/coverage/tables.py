"""Do the 90 % intervals hold the truth in 90 % of cases? A simulation over planted laws, designs and noise.

    python -m analysis.coverage.tables [--quick] [--out results/coverage.jsonl]

Each condition draws random laws (exponents, amplitudes, floor), measures them on a design with noise by trunk and by
row, fits, and counts how often each of the two intervals holds the true growth exponents and the true best shape at
10 and 100 times the largest compute. One JSON line a finished condition: a stopped run goes on where it was. Prints a
table in markdown. --quick: 20 sets a condition, a look only.

Cost: .2 to .3 s a set for `joint`, .9 for `joint_n`, 1.4 for `sovit`: about 25 minutes of one core.
Expected: 85 to 95 % for the headline and the pairs where the form is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.coverage.intervals import KINDS, REACHES, Setup, one_set, setup, summary
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law.bootstrap import LEVEL
from sovit.law.checks import simulate as planted

BAD = 1.05  # factor on the loss of a bad row or trunk
RIGHT = {  # form -> truths that it holds
    "joint": ("joint", "weak"),
    "joint_n": ("joint", "weak", "inter"),
    "sovit": ("eq3",),
    "bounded": ("bounded", "stream"),
}


def _unbalanced() -> planted.Design:
    whole = planted.sovit_star(images=(32e6, 64e6, 128e6, 256e6))
    branch = np.arange(len(whole.trunk)) % 4
    return whole.rows(np.flatnonzero(branch <= whole.trunk % 4))


DESIGNS = {
    "star": planted.sovit_star,
    "star+8": lambda: planted.sovit_star(corners=True),
    "star x4": lambda: planted.sovit_star(images=(32e6, 64e6, 128e6, 256e6)),
    "stream": planted.stream_star,
    "4 an arm": lambda: planted.sovit_star(per_arm=4),
    "3 an arm": lambda: planted.sovit_star(per_arm=3),
    "1-4 branches": _unbalanced,
}


@dataclass(frozen=True)
class Condition:
    """One line of the study. frac: of a truth `inter`, what its interaction makes up."""

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
        """A condition's draws are seeded by it: do not change."""
        truth = f"{self.truth} {self.frac:g}" if self.frac else self.truth
        return f"{truth} | {self.form} | {self.design} | {self.sd:.1%} {self.rho:g} | {self.noise}"


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
    """Simulate one condition: a line of the study, plain data. `right`: the fitted form holds the truth."""
    design = DESIGNS[condition.design]()
    s = setup(condition.form, design, planted.truth(condition.truth).zero_line or 1.2)
    sets, true = [], []
    for i in range(condition.sets):
        law, y = draw_set(condition, design, i)
        try:
            sets.append(one_set(s, np.log(y)[s.rows.source], draws, np.random.default_rng(i)))
        except np.linalg.LinAlgError:
            continue
        true.append(true_quantities(s, law))
    about = dict(name=condition.name, right=condition.truth in RIGHT.get(condition.form, ()))
    rows = s.rows.trunk
    counts = dict(draws=draws, failed=condition.sets - len(sets), num_rows=len(rows), num_trunks=int(rows.max()) + 1)
    about |= dataclasses.asdict(condition) | counts | dict(level=LEVEL, reaches=list(REACHES))
    return about | summary(s.labels, np.array(true), sets)


def study(path: Path, conditions: Sequence[Condition] = CONDITIONS, draws: int = 99) -> list[dict]:
    """Run what of `conditions` is not yet in `path`, one JSON line a finished one; returns the lines, in their order.

    A line belongs to a condition if all its settings do, so that a longer run is not taken for a shorter one. Progress
    goes to stderr. Raises UserError for a file that is not of this study.
    """
    have: dict[tuple, dict] = {}
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if whole and not whole.endswith("\n"):  # killed while it wrote its last line
        whole = whole[: whole.rfind("\n") + 1]
        write_atomic(path, whole)
    names = [field.name for field in dataclasses.fields(Condition)]
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            have[(*(line[name] for name in names), line["draws"])] = line
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a line of this study; name another --out") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    out = []
    for condition in conditions:
        key = (*dataclasses.astuple(condition), draws)
        if key not in have:
            have[key] = run_condition(condition, draws)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(have[key]) + "\n")
        out.append(have[key])
        print(f"{len(out)} of {len(conditions)}  {condition.name}", file=sys.stderr, flush=True)
    return out


def table(lines: Sequence[dict]) -> str:
    """The study as a markdown table: coverage of headline / pairs in per cent, mean over dimensions."""
    quantities = ("exponent", *(f"shape_{r:g}x" for r in REACHES))
    out = [
        f"| condition | sets | {' | '.join(quantities)} | width of exponents | bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in sorted(lines, key=lambda line: not line["right"]):
        cells = [
            line["name"].replace(" | ", ", ") + ("" if line["right"] else " *(the form is wrong)*"),
            str(line["sets"]),
        ]
        for quantity in quantities:
            found = [line["coverage"][kind].get(quantity) for kind in KINDS]
            cells.append(" / ".join(f"{100 * c['mean']:.0f}±{100 * c['se']:.0f}" if c else "–" for c in found))
        cells.append(" ".join(f"{w:.2f}" for w in line["width"]["random_effects"]["exponent"]))
        cells.append(" ".join(f"{b:+.2f}" for b in line["bias"]["exponent"]))
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="20 sets a condition")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "coverage.jsonl", help="default %(default)s")
    options = parser.parse_args(argv)
    conditions = [dataclasses.replace(c, sets=20) if options.quick else c for c in CONDITIONS]
    try:
        lines = study(options.out, conditions)
        print(table(lines))
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
