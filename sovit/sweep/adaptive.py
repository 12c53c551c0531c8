"""A study that grows: fit what is known, pick the most informative runs, write down what they should give, train, again.

    exit_status = main(__doc__, Question("active_stream", pilot, VALUES, BUDGETS, recipe, ...), argv)

The pilot and the rows decide everything: the picks of a round are a function (`active.choose`) of the rows of what was
asked for before. `<name>_rounds.json` beside the ledger keeps each round with its predictions, written before its runs are
launched; without it the rounds are worked out again from the ledger. So a kill at any moment loses no measurement, repeats
none and changes no pick.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.files import is_locked, locked, write_atomic
from sovit.ledger.ledger import read_ledger
from sovit.ledger.measurements import measurements
from sovit.ledger.schema import ANSWERED
from sovit.predict.belief import FORM, Belief, learn
from sovit.predict.candidates import Candidate, candidates
from sovit.predict.next_run import CHECK_EVERY, Pick, choose, should_stop
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

    def spent(self, runs: Sequence[Run]) -> float:
        """Training FLOPs of runs, the trunk of each counted once."""
        return float(sum(run.shape.train_flops_per_image(self.num_classes) * run.total_examples for run in runs))


# rounds --------------------------------------------------------------------------------------------------------------


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
        budgets = {*run.budgets, *(runs[run.trunk_id].budgets if run.trunk_id in runs else ())}
        runs[run.trunk_id] = run.replace(budgets=tuple(sorted(budgets)))
    return list(runs.values())


def _run_of(question: Question, candidate: Mapping) -> Run:
    first, shape, seed = question.pilot[0], Shape(**candidate["shape"]), candidate["init_seed"]
    seeds = dict(init_seed=seed, data_seed=seed)
    run = first.replace(shape=shape, recipe=question.recipe(shape), budgets=tuple(candidate["budgets"]), **seeds)
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
    reachable, zero_line = dict(question.values), data.zero_line
    belief = learn(
        columns,
        y,
        question.target_flops,
        form=question.form,
        zero_line=zero_line,
        reachable=reachable,
        discrepancy_dof=np.inf,  # held, as in `active.next_run`
    )
    measured = {row["run_id"]: value for row, value in zip(data.rows, data.y.tolist())}
    checks = []
    for pick in made:
        run = _run_of(question, pick["candidate"])
        if pick["is_check"] and (value := measured.get(run.run_id(run.budgets[-1]))):
            checks.append(dict(predicted=pick["predicted"][-1], measured=value))
    noise = seed_sd(columns, y)
    done, verdict = should_stop(belief, checks, noise)
    stop, picks = verdict if done else "", []
    if not stop:
        try:
            pool = candidates(
                base,
                question.values,
                train_flops=question.train_flops,
                rows=[row for row in read_ledger(ledger) if row["run_id"] in ids and row["status"] in ANSWERED],
                max_cost=left,
                num_classes=question.num_classes,
                batch_size=question.pilot[0].recipe.batch_size,
                cooldown=question.pilot[0].recipe.cooldown,
                min_examples=question.min_steps * question.pilot[0].recipe.batch_size,
            )
        except UserError as error:
            stop = f"stop: {left:.3g} of {question.max_flops:.3g} FLOPs are left ({error})"
        else:
            picks = picks_of(
                belief,
                pool,
                range(len(made), len(made) + workers),
                check_cost=CHECK_SHARE * question.max_flops,
                checks=checks,
                noise_sd=noise,
            )
            while picks and sum(pick.candidate.cost for pick in picks) > left:
                picks.pop()
    return Look(belief, len(y), spent, whole_shape(belief, base), noise, picks, stop, verdict)


def picks_of(
    belief: Belief,
    pool: Sequence[Candidate],
    numbers: range,
    check_cost: float,
    checks: Sequence[Mapping],
    noise_sd: float | None,
) -> list[Pick]:
    """The picks of these numbers, counted from 0, by `active.choose`, but for the shape of a check: it was never run.

    Every CHECK_EVERY-th is a check of the law, the run of the lowest predicted loss that check_cost pays for. Another seed
    of a shape that stands in the fit would come true without telling anything of the next.
    """
    picks: list[Pick] = []
    if numbers.stop // CHECK_EVERY > numbers.start // CHECK_EVERY:
        new = [c for c in pool if c.kind == "trunk" and len(c.budgets) == 1 and c.cost <= check_cost]
        if new:
            losses = predicted(belief, [c.shape for c in new], [c.num_examples for c in new])
            check = new[int(losses.argmin())]
            picks += choose(belief, [check], num_made=CHECK_EVERY - 1)
            pool = [c for c in pool if c.shape != check.shape]
    if len(picks) < len(numbers) and pool:
        rest = dict(num=len(numbers) - len(picks), num_made=numbers.start, check_every=0)
        picks += choose(belief, pool, **rest, checks=checks, noise_sd=noise_sd)
    return picks


def seed_sd(columns: Mapping, y: np.ndarray) -> float | None:
    """S.d. of ln loss between the seeds of one shape at one number of images, pooled; None where nothing was repeated.

    A belief's own noise also holds what its form gets wrong, which no seed explains.
    """
    keys = np.stack([columns[name] for name in (*DIMENSIONS, "num_examples")], 1)
    group = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    many = [np.log(y[group == g]) for g in range(group.max() + 1) if (group == g).sum() > 1]
    return (
        float(np.sqrt(sum(((v - v.mean()) ** 2).sum() for v in many) / sum(len(v) - 1 for v in many))) if many else None
    )


def whole_shape(belief: Belief, base: Shape) -> Shape:
    """The best of the buildable shapes around the real optimum: each dimension rounded down and up.

    Width to a multiple of head_dim, mlp_dim to one of 8.
    """
    steps = dict(width=base.head_dim, mlp_dim=8)
    ends = []
    for name, x in belief.shape.items():
        step = steps.get(name, 1)
        ends.append({step * max(1, int(np.floor(x / step))), step * max(1, int(np.ceil(x / step)))})
    shapes = [base.replace(**dict(zip(belief.dims, pick))) for pick in itertools.product(*map(sorted, ends))]
    flops = belief.geometry.flops({n: np.array([getattr(s, n) for s in shapes], float) for n in belief.dims}, head=True)
    return shapes[int(predicted(belief, shapes, np.exp(belief.log_budget) / flops).argmin())]


def predicted(belief: Belief, shapes: Sequence[Shape], num_examples) -> np.ndarray:
    """Losses [S] that the belief gives shapes trained on so many images."""
    names = [term for term in belief.form.terms if term != "num_examples"]
    table = {n: np.array([getattr(s, n) for s in shapes], float) for n in names}
    table["num_examples"] = np.asarray(num_examples, float)
    u = np.log(np.stack([table[term] for term in belief.form.terms])) - belief.centre[:, None]
    return np.exp(belief.form.evaluate(belief.theta[None], u)[0][0])


# the command line ----------------------------------------------------------------------------------------------------


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
    path, rounds = rounds_path(question, options), read_rounds(question, options)
    while True:
        sweep = _sweep(question, rounds, options)
        if sweep.pending():
            run(sweep, options.workers, options.device)
            if sweep.pending():
                return 1
        else:
            sweep.collect()
        now = look(question, rounds, sweep.ledger, options.workers)
        print(f"round {len(rounds)}: {now.line}", flush=True)
        if now.stop:
            write_atomic(path, _text(question, rounds, now.to_dict()))
            print(f"{now.stop}\nnext: sovit fit {sweep.ledger}")
            return 0
        for pick in now.picks:
            print(f"  {pick_text(pick)}", flush=True)
        rounds.append(dict(round=len(rounds) + 1, **now.to_dict()))
        write_atomic(path, _text(question, rounds, None))


def _dry_run(question: Question, options: argparse.Namespace) -> int:
    """What would be launched now: what is pending of the pilot and the rounds, else the next picks."""
    rounds = read_rounds(question, options)
    sweep = _sweep(question, rounds, options)
    if any(run_id not in sweep.in_ledger for run in sweep.runs.values() for run_id in run.run_ids):
        return dry_run(sweep, options)
    now = look(question, rounds, sweep.ledger, options.workers)
    if options.json:
        print(json.dumps(now.to_dict(), indent=1))
        return 0
    print(f"{question.name} after {len(rounds)} rounds: {now.line}\n{now.stop or now.verdict}")
    for pick in now.picks:
        print(f"  {pick_text(pick)}")
    return 0


def pick_text(pick: Pick) -> str:
    """One line: what and why, its cost in it, and the loss that it should give."""
    losses = zip(pick.candidate.budgets, pick.predicted, pick.prediction_sd)
    predicted = ", ".join(f"{loss:.4f} +- {100 * sd:.2g} % at {n:,}" for n, loss, sd in losses)
    return f"{pick.why}; predicted {predicted}"


def _sweep(question: Question, rounds: Sequence[Mapping], options: argparse.Namespace) -> Sweep:
    ledger = options.results / f"{question.name}.jsonl"
    return Sweep(question.name, asked(question, rounds), options.runs, ledger, options.storage, question.metric)


def rounds_path(question: Question, options: argparse.Namespace) -> Path:
    return options.results / f"{question.name}_rounds.json"


def read_rounds(question: Question, options: argparse.Namespace) -> list[dict]:
    path = rounds_path(question, options)
    try:
        return json.loads(path.read_text())["rounds"] if path.exists() else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it: it is worked out again from the ledger") from None


def _text(question: Question, rounds: Sequence[Mapping], end: Mapping | None) -> str:
    body = dict(target_flops=question.target_flops, max_flops=question.max_flops, end=end, rounds=rounds)
    return json.dumps(body, indent=1, allow_nan=False) + "\n"
