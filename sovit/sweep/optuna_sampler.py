"""A sampler of Optuna for shapes: `NextRunSampler`, which asks for the most informative run.

space = {"width": (16, 24, 32, 48, 64, 96), "depth": (1, 2, 3, 4, 6), "mlp_dim": (64, 128, 256, 512, 1024)}
base = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
search = Search((3.2e10, 1e11, 3.2e11, 1e12), num_classes=16, batch_size=16)
sampler = NextRunSampler(base, space, search, target_flops=1e13)

def objective(trial):
    shape, num_examples, seed = sampler.suggest(trial)
    return train_and_validate(shape, num_examples, seed)  # yours; returns a loss

study = optuna.create_study(sampler=sampler)
study.optimize(objective, n_trials=40)
print(sampler.recommend(study))
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from sovit import UserError
from sovit.predict.belief import Belief, BeliefOptions, learn
from sovit.predict.candidates import Candidate, Search, candidates
from sovit.predict.next_run import choose, whole_shape
from sovit.spec.design import star
from sovit.spec.shape import Shape

PARAMS = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size")  # of a trial, with those below
MORE = ("num_examples", "init_seed")
WIDE = IntDistribution(0, 2**60)


class NextRunSampler(optuna.samplers.BaseSampler):
    """Proposes the run that lowers the expected regret of the recommended shape most per FLOP (`next_run.choose`).

    base, space: the shape, and the values of its dimensions that are chosen. search: its budgets, rising, at one of
    which each trial trains; its value is its loss. The first trials are those of `pilot_of`, each shape at the two lowest
    budgets; from then on the study's trials alone decide, so that equal studies get equal proposals. Trials that run or
    failed are not asked for again. law: form and zero_line of the law that is believed. resumes: whether the objective
    goes on from a shorter trial of the same shape and seed, so that only the rest is paid for.
    """

    def __init__(
        self,
        base: Shape,
        space: Mapping[str, Sequence[int]],
        search: Search,
        *,
        target_flops: float,
        law: BeliefOptions | None = None,
        resumes: bool = False,
    ):
        self.base, self.space, self.search, self.target_flops = base, dict(space), search, target_flops
        fixed = {name: getattr(base, name) for name in ("patch_size", "image_size", "pool", "head_dim")}
        geometry = fixed | dict(num_classes=search.num_classes)
        # the discrepancy is held: the runs so far do not show what the form gets wrong elsewhere
        self.law = dataclasses.replace(
            law or BeliefOptions(), geometry=geometry, reachable=self.space, discrepancy_dof=np.inf
        )
        self.resumes, self.pilot = resumes, pilot_of(base, space)

    def suggest(self, trial: optuna.Trial) -> tuple[Shape, int, int]:
        """(shape, num_examples, init_seed) of a trial, taken up into its parameters."""
        found = {name: trial.suggest_int(name, WIDE.low, WIDE.high) for name in (*PARAMS, *MORE)}
        return self.base.replace(**{n: found[n] for n in PARAMS}), found["num_examples"], found["init_seed"]

    def recommend(self, study: optuna.Study) -> Shape:
        """The shape for target_flops, by all finished trials. Raises UserError while the pilot is not finished."""
        rows = self._rows(study)
        if len(rows) <= self._num_pilot // 2:
            raise UserError(f"{len(rows)} finished trials are too few to recommend a shape; run {self._num_pilot}")
        return whole_shape(self._belief(rows), self.base)

    # what Optuna calls

    def infer_relative_search_space(self, study, trial) -> dict:
        return {name: WIDE for name in (*PARAMS, *MORE)}

    def sample_relative(self, study, trial, search_space) -> dict[str, int]:
        picked = self._next(study, trial.number)
        shape = {name: getattr(picked.shape, name) for name in PARAMS}
        return shape | dict(num_examples=picked.num_examples, init_seed=picked.init_seed)

    def sample_independent(self, study, trial, param_name, param_distribution):
        """Reached where an objective asks for what this sampler does not know, or in a range without its proposal."""
        known = ", ".join((*PARAMS, *MORE))
        raise UserError(
            f"trial {trial.number} asks for {param_name} in {param_distribution}, which is not what was proposed; use"
            f" sampler.suggest(trial), or trial.suggest_int of {known} in ranges that hold the sampler's values"
        )

    def _next(self, study: optuna.Study, number: int) -> Candidate:
        rows = self._rows(study)
        others = self._rows(study, (TrialState.RUNNING, TrialState.FAIL, TrialState.PRUNED), number)
        if len(rows) <= self._num_pilot // 2 or len(rows) + len(others) < self._num_pilot:
            taken = {(row["trunk_id"], row["num_examples"]) for row in (*rows, *others)}
            for seed in itertools.count():  # seeds beyond the first only for more workers than the pilot has trials
                for shape in self.pilot:
                    for n in self._budgets(shape):
                        if (_trunk(shape, seed), n) not in taken:
                            return Candidate(shape, (n,), "trunk", self.search.cost(shape, (n,)), None, seed)
        pool = candidates(self.base, self.space, self.search, [*rows, *others])
        pool = [c for c in pool if len(c.budgets) == 1]
        if not self.resumes:
            pool = [dataclasses.replace(c, cost=self.search.cost(c.shape, c.budgets)) for c in pool]
        return choose(self._belief(rows), pool)[0].candidate

    @property
    def _num_pilot(self) -> int:
        return sum(len(self._budgets(shape)) for shape in self.pilot)

    def _budgets(self, shape: Shape) -> tuple[int, ...]:
        return self.search.levels(shape)[:2]

    def _belief(self, rows: Sequence[dict]) -> Belief:
        names = ("width", "depth", "mlp_dim", "patch_size", "image_size", "num_examples", "num_params", "forward_flops")
        columns = {name: np.array([row[name] for row in rows], float) for name in names}
        columns["trunk_id"] = np.array([row["trunk_id"] for row in rows])
        return learn(columns, [row["loss"] for row in rows], self.target_flops, self.law)

    def _rows(self, study, states=(TrialState.COMPLETE,), apart_from: int | None = None) -> list[dict]:
        """Trials as rows, in the order of their numbers."""
        rows = []
        for trial in study.get_trials(deepcopy=False, states=states):
            missing = [name for name in (*self.space, *MORE) if name not in trial.params]
            if trial.number == apart_from or (missing and trial.state != TrialState.COMPLETE):
                continue
            if missing:
                raise UserError(
                    f"trial {trial.number} has no parameter {missing[0]}; let the objective take its run from"
                    " sampler.suggest(trial)"
                )
            shape = self.base.replace(**{n: int(trial.params[n]) for n in PARAMS if n in trial.params})
            row = shape.to_dict() | {n: int(trial.params[n]) for n in MORE}
            row |= dict(trunk_id=_trunk(shape, row["init_seed"]), loss=trial.values[0] if trial.values else None)
            rows.append(row | dict(num_params=shape.num_params, forward_flops=shape.forward_flops))
        return rows


def pilot_of(base: Shape, space: Mapping[str, Sequence[int]]) -> list[Shape]:
    """The shape in the middle of the space and corners off every axis, at its quartiles; ends of it if it has one axis."""
    ladder = {name: sorted(values) for name, values in space.items() if len(values) > 1}
    ends = {name: (v[len(v) // 4], v[-1 - len(v) // 4]) for name, v in ladder.items()}
    centre = base.replace(**{name: v[(len(v) - 1) // 2] for name, v in ladder.items()})
    shapes = star(centre, {n: [x for x in pair if x != getattr(centre, n)] for n, pair in ends.items()})
    off_axis = [s for s in shapes if sum(getattr(s, n) != getattr(centre, n) for n in space) != 1]
    return off_axis if len(ladder) > 1 else shapes


def _trunk(shape: Shape, seed: int) -> str:
    return f"{shape.label}/{shape.patch_size}@{shape.image_size}-{seed}"
