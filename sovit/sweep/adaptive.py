"""A study that grows: fit what is known, pick the most informative runs, write down what they should give, train, again.

    exit_status = main(__doc__, Question("active_stream", pilot, VALUES, BUDGETS, recipe, ...), argv)

The pilot and the rows decide everything: the picks of a round are a function (`next_run.choose`) of the rows of what was
asked for before. `<name>_rounds.json` beside the ledger keeps each round with its predictions, written before its runs are
launched; without it the rounds are worked out again from the ledger. So a kill at any moment loses no measurement, repeats
none and changes no pick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.files import is_locked, locked, write_atomic
from sovit.law.diagnostics import pooled_sd
from sovit.ledger.ledger import read_ledger
from sovit.ledger.measurements import measurements
from sovit.ledger.schema import ANSWERED
from sovit.predict.belief import FORM, Belief, BeliefOptions, learn
from sovit.predict.candidates import Candidate, Search, candidates
from sovit.predict.next_run import CHECK_EVERY, Checks, Pick, check_pick, choose, should_stop, whole_shape
from sovit.spec.config import override
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import DIMENSIONS, Shape
from sovit.sweep.queue import Sweep
from sovit.sweep.study_main import check_workers, dry_run, exit_status, run_sweep, study_parser

CHECK_SHARE = 1 / 8  # of max_flops that one check of the law near the target may cost


@dataclass(frozen=True)
class Question:
    """What a growing study is after, and what it may ask for.

    pilot: runs that come first. values: dimension -> lattice of the picks; train_flops: budgets of the picks. recipe(shape)
    -> Recipe. target_flops: training FLOPs of the run that the study is for; max_flops: what all its runs may cost.
    """

    name: str
    pilot: Sequence[Run]
    values: Mapping[str, Sequence[int]]
    train_flops: Sequence[float]
    recipe: Callable[[Shape], Recipe]
    num_classes: int
    target_flops: float
    max_flops: float
    form: str = FORM  # of the belief that chooses
    min_steps: int = 100
    metric: str = "val_loss"
    overrides: Sequence[str] = ()  # key=value, of every run

    def __post_init__(self) -> None:
        for name in ("target_flops", "max_flops"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise UserError(f"{name}={value!r} is not a positive number; give training FLOPs, such as 1e13")
        if (pilot := self.spent(self.pilot)) >= self.max_flops:
            raise UserError(f"max_flops={self.max_flops:g} does not pay for the pilot ({pilot:.3g} FLOPs); give more")

    def search(self, max_cost: float) -> Search:
        """What may be asked for next, each run for max_cost training FLOPs at most."""
        recipe = self.pilot[0].recipe
        return Search(
            self.train_flops,
            max_cost=max_cost,
            num_classes=self.num_classes,
            batch_size=recipe.batch_size,
            cooldown=recipe.cooldown,
            min_examples=self.min_steps * recipe.batch_size,
        )

    def spent(self, runs: Sequence[Run]) -> float:
        """Training FLOPs of runs, the trunk of each counted once."""
        return float(sum(run.shape.train_flops_per_image(self.num_classes) * run.total_examples for run in runs))


@dataclass(frozen=True)
class Look:
    """What is known when a round begins, and what it would ask for. stop: why no more is asked for, or ""."""

    belief: Belief
    num_rows: int
    spent: float
    shape: Shape
    noise_sd: float | None
    picks: list[Pick]
    stop: str
    verdict: str

    def to_dict(self) -> dict:
        return dict(
            num_rows=self.num_rows,
            spent_flops=self.spent,
            expected_regret=self.belief.expected_regret,
            noise_sd=self.noise_sd,
            optimum={name: float(f"{x:.4g}") for name, x in self.belief.shape.items()},
            recommendation=self.shape.to_dict(),
            verdict=self.verdict,
            stop=self.stop,
            picks=[pick.to_dict() for pick in self.picks],
        )

    @property
    def line(self) -> str:
        return (
            f"{self.num_rows} measurements, {self.spent:.3g} FLOPs; best at the target"
            f" {self.shape.label}, expected regret {100 * self.belief.expected_regret:.3g} %"
        )


def asked(question: Question, rounds: Sequence[Mapping]) -> list[Run]:
    """The pilot and what the rounds added: new trunks, and further budgets of trunks there are."""
    runs = {run.trunk_id: run for run in question.pilot}
    for pick in (pick for one in rounds for pick in one["picks"]):
        run = _run_of(question, pick["candidate"])
        budgets = {*run.budgets, *runs.get(run.trunk_id, run).budgets}
        runs[run.trunk_id] = run.replace(budgets=tuple(sorted(budgets)))
    return list(runs.values())


def _run_of(question: Question, candidate: Mapping) -> Run:
    shape, seeds = Shape(**candidate["shape"]), dict.fromkeys(("init_seed", "data_seed"), candidate["init_seed"])
    more = dict(recipe=question.recipe(shape), budgets=tuple(candidate["budgets"]), **seeds)
    run = question.pilot[0].replace(shape=shape, **more)
    run = override(run, [o for o in question.overrides if not o.startswith("shape.")])  # its shape has them already
    if candidate["trunk_id"] not in (None, run.trunk_id):
        raise UserError(
            f"{candidate['trunk_id']} is not a trunk of this study's recipe ({run.trunk_id}); use another --name"
        )
    return run


def look(question: Question, rounds: Sequence[Mapping], ledger: Path, workers: int) -> Look:
    """Fit the rows of what was asked for so far and choose `workers` runs. Deterministic; changes nothing."""
    runs = asked(question, rounds)
    ids = {run_id for run in runs for run_id in run.run_ids}  # the ledger may know later rounds, to be worked out again
    data = measurements([ledger], question.metric)
    keep = np.array([row["run_id"] in ids for row in data.rows])
    columns, y = {name: column[keep] for name, column in data.columns.items()}, data.y[keep]
    base = question.pilot[0].shape
    made = [pick for one in rounds for pick in one["picks"]]
    # not of the merged runs: a budget below one that is trained shares nothing with it any more
    spent = question.spent(question.pilot) + sum(pick["candidate"]["cost"] for pick in made)
    left = question.max_flops - spent
    taken = BeliefOptions(question.form, zero_line=data.zero_line, reachable=question.values)
    belief = learn(columns, y, question.target_flops, taken)
    measured = {row["run_id"]: value for row, value in zip(data.rows, data.y.tolist())}
    found = [(pick["predicted"][-1], measured.get(_run_of(question, pick["candidate"]).run_ids[-1])) for pick in made]
    tested = [dict(predicted=p, measured=m) for pick, (p, m) in zip(made, found) if pick["is_check"] and m]
    checks = Checks(tested, seed_sd(columns, y))
    done, verdict = should_stop(belief, checks)
    stop, picks = verdict if done else "", []
    if not stop:
        try:
            rows = [row for row in read_ledger(ledger) if row["run_id"] in ids and row["status"] in ANSWERED]
            pool = candidates(base, question.values, question.search(left), rows)
        except UserError as error:
            stop = f"stop: {left:.3g} of {question.max_flops:.3g} FLOPs are left ({error})"
        else:
            numbers = range(len(made), len(made) + workers)
            picks = picks_of(belief, pool, numbers, CHECK_SHARE * question.max_flops, checks)
            while picks and sum(pick.candidate.cost for pick in picks) > left:
                picks.pop()
    return Look(belief, len(y), spent, whole_shape(belief, base), checks.noise_sd, picks, stop, verdict)


def picks_of(
    belief: Belief, pool: Sequence[Candidate], numbers: range, check_cost: float, checks: Checks
) -> list[Pick]:
    """The picks of these numbers, counted from 0, by `choose`, but for the shape of a check: it was never run.

    Every CHECK_EVERY-th is a check of the law that check_cost pays for. Another seed of a shape that stands in the fit
    would come true without telling anything of the next.
    """
    picks: list[Pick] = []
    if numbers.stop // CHECK_EVERY > numbers.start // CHECK_EVERY:
        new = [c for c in pool if c.kind == "trunk" and len(c.budgets) == 1 and c.cost <= check_cost]
        if new:
            picks.append(check_pick(belief, new))
            pool = [c for c in pool if c.shape != picks[0].candidate.shape]
    if len(picks) < len(numbers) and pool:
        picks += choose(belief, pool, len(numbers) - len(picks), numbers.start, checks)
    return picks


def seed_sd(columns: Mapping, y: np.ndarray) -> float | None:
    """S.d. of ln loss between the seeds of one shape at one number of images, pooled; None where nothing was repeated."""
    keys = np.stack([columns[name] for name in (*DIMENSIONS, "num_examples")], 1)
    return pooled_sd(np.log(y), np.unique(keys, axis=0, return_inverse=True)[1].ravel())


def main(
    doc: str,
    make_question: Callable[..., Question],
    name: str,
    argv: Sequence[str] | None = None,
    run: Callable[..., list[dict]] = run_sweep,
) -> int:
    """What `python studies/active_sweep.py` does. make_question(target_flops, max_flops) -> Question.

    `run`: what trains a sweep (`launch.run_sweep`). Returns the exit status: 0 done, 1 a run failed, 2 bad input.
    """
    parser = study_parser(doc, name)
    parser.add_argument("--target-flops", type=float, help="training FLOPs of the run that is asked about")
    parser.add_argument("--max-flops", type=float, help="training FLOPs that all runs together may cost")
    options = parser.parse_intermixed_args(argv)
    limits = {key: getattr(options, key) for key in ("target_flops", "max_flops") if getattr(options, key) is not None}

    def study() -> int:
        check_workers(options)
        question = make_question(**limits)
        pilot = [override(run, options.overrides).replace(study=options.name) for run in question.pilot]
        question = dataclasses.replace(question, name=options.name, pilot=pilot, overrides=options.overrides)
        if options.dry_run:
            return _dry_run(question, options)
        lock = options.runs / f"{options.name}.grow"
        if is_locked(lock):
            raise UserError(f"{options.name} is grown by another process; wait for it, or give another --name")
        with locked(lock):
            return grow(question, options, run)

    return exit_status(study)


def grow(question: Question, options: argparse.Namespace, run: Callable[..., list[dict]] = run_sweep) -> int:
    """Rounds of look, write down, train, until a look says stop. Returns the exit status."""
    rounds = read_rounds(question, options)
    while True:
        sweep = _sweep(question, rounds, options)
        if sweep.pending():
            run(sweep, options.workers, options.device)
            if sweep.pending():
                return 1
        else:
            sweep.collect()
        now = look(question, rounds, sweep.ledger, options.workers)
        print("\n".join([f"round {len(rounds)}: {now.line}", *map(pick_text, now.picks)]), flush=True)
        if now.stop:
            write_rounds(question, options, rounds, now.to_dict())
            print(f"{now.stop}\nnext: sovit fit {sweep.ledger}")
            return 0
        rounds.append(dict(round=len(rounds) + 1, **now.to_dict()))
        write_rounds(question, options, rounds, None)


def _dry_run(question: Question, options: argparse.Namespace) -> int:
    """What would be launched now: what is pending of the pilot and the rounds, else the next picks."""
    rounds = read_rounds(question, options)
    sweep = _sweep(question, rounds, options)
    if any(run_id not in sweep.in_ledger for run in sweep.runs.values() for run_id in run.run_ids):
        return dry_run(sweep, options)
    now = look(question, rounds, sweep.ledger, options.workers)
    if options.json:
        print(json.dumps(now.to_dict(), indent=1))
    else:
        said = [f"{question.name} after {len(rounds)} rounds: {now.line}", now.stop or now.verdict]
        print("\n".join([*said, *map(pick_text, now.picks)]))
    return 0


def pick_text(pick: Pick) -> str:
    """One line: what and why, its cost in it, and the loss that it should give."""
    losses = zip(pick.candidate.budgets, pick.predicted, pick.prediction_sd)
    predicted = ", ".join(f"{loss:.4f} +- {100 * sd:.2g} % at {n:,}" for n, loss, sd in losses)
    return f"  {pick.why}; predicted {predicted}"


def _sweep(question: Question, rounds: Sequence[Mapping], options: argparse.Namespace) -> Sweep:
    ledger = options.results / f"{question.name}.jsonl"
    return Sweep(question.name, asked(question, rounds), options.runs, ledger, options.storage, question.metric)


def read_rounds(question: Question, options: argparse.Namespace) -> list[dict]:
    path = options.results / f"{question.name}_rounds.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rounds"] if path.exists() else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it: it is worked out again from the ledger") from None


def write_rounds(
    question: Question, options: argparse.Namespace, rounds: Sequence[Mapping], end: Mapping | None
) -> None:
    """end: the look that stopped, None while it goes on."""
    body = dict(target_flops=question.target_flops, max_flops=question.max_flops, end=end, rounds=rounds)
    path = options.results / f"{question.name}_rounds.json"
    write_atomic(path, json.dumps(body, indent=1, allow_nan=False) + "\n")
