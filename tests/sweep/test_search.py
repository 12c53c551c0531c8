"""Optuna asks for the most informative run: the pilot first, then what the trials say."""

import zlib

import numpy as np
import optuna
import pytest

from sovit import UserError
from sovit.law.checks import simulate as planted
from sovit.predict.belief import BeliefOptions
from sovit.predict.candidates import Search, candidates
from sovit.predict.next_run import choose
from sovit.spec.run import budgets_for
from sovit.spec.shape import Shape
from sovit.sweep.optuna_sampler import NextRunSampler, pilot_of

TRUTH = planted.truth("stream")
BASE = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
SPACE = {"width": (16, 24, 32, 48, 64, 96), "depth": (1, 2, 3, 4, 6), "mlp_dim": (64, 128, 256, 512, 1024)}
BUDGETS = (3.2e10, 1e11, 3.2e11, 1e12)
SEARCH = Search(BUDGETS, num_classes=16, batch_size=16)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def sampler_of(**more):
    law = BeliefOptions("bounded", zero_line=TRUTH.zero_line)
    return NextRunSampler(BASE, SPACE, SEARCH, target_flops=1e13, law=law, **more)


def loss_of(shape, num_examples, seed):
    rng = np.random.default_rng(zlib.crc32(f"{shape.label} {num_examples} {seed}".encode()))
    loss = TRUTH.loss([shape.width, shape.depth, shape.mlp_dim], num_examples)
    return float(loss * np.exp(0.004 * rng.standard_normal()))


def run_of(trial):
    names = ("width", "depth", "mlp_dim", "num_examples", "init_seed")
    return tuple(trial.params[name] for name in names)


@pytest.fixture(scope="module")
def studied():
    sampler = sampler_of()
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: loss_of(*sampler.suggest(trial)), n_trials=24)
    return sampler, study


def test_the_pilot_comes_first_and_no_run_twice(studied):
    sampler, study = studied
    pilot = {(s.width, s.depth, s.mlp_dim, n) for s in sampler.pilot for n in budgets_for(s, BUDGETS[:2], 16, 16)}
    runs = [run_of(trial) for trial in study.trials]
    assert {run[:4] for run in runs[: len(pilot)]} == pilot and len(pilot) == 10
    assert len(set(runs)) == len(runs) == 24
    assert all(t.params["patch_size"] == 4 and t.params["head_dim"] == 8 for t in study.trials)


def test_its_picks_are_those_of_the_criterion(studied):
    """The 14th trial, chosen again by hand from the 13 before it."""
    sampler, study = studied
    before = sampler._rows(study)[:13]
    pool = [c for c in candidates(BASE, SPACE, SEARCH, before) if len(c.budgets) == 1]
    whole = [
        c for c in pool if c.kind != "branch"
    ]  # a branch costs the sampler a whole run: it may be picked all the same
    best = choose(sampler._belief(before), whole)[0].candidate
    picked = study.trials[13].params
    names = ("width", "depth", "mlp_dim")
    branch = any(all(row[n] == picked[n] for n in names) for row in before)
    assert branch or all(picked[n] == getattr(best.shape, n) for n in names)


def test_an_equal_study_gets_an_equal_proposal(studied):
    sampler, study = studied
    again = optuna.create_study(sampler=sampler_of())
    for trial in study.trials:
        again.add_trial(trial)
    first, second = study.ask(), again.ask()
    assert sampler.suggest(first) == sampler_of().suggest(second)
    study.tell(first, state=optuna.trial.TrialState.FAIL)


def test_the_shape_is_good_for_the_target(studied):
    sampler, study = studied
    best = sampler.recommend(study)
    assert TRUTH.regret([best.width, best.depth, best.mlp_dim], 1e13 / 3) < 0.015
    tried = min(study.trials, key=lambda trial: trial.value or 9)
    assert TRUTH.regret(run_of(tried)[:3], 1e13 / 3) > 0.015  # what a search without a law would name


def test_ask_and_tell_with_several_at_once(studied):
    """Running and failed trials are not asked for again; with more workers than the pilot has runs, more seeds."""
    sampler = sampler_of()
    study = optuna.create_study(sampler=sampler)
    trials = [study.ask() for _ in range(12)]
    runs = [sampler.suggest(trial) for trial in trials]
    assert len(set(runs)) == 12 and {seed for _, _, seed in runs} == {0, 1}
    with pytest.raises(UserError, match="0 finished trials are too few"):
        sampler.recommend(study)
    for trial, run in zip(trials, runs):
        study.tell(trial, loss_of(*run)) if trial.number != 3 else study.tell(trial, state=optuna.trial.TrialState.FAIL)
    later = [sampler.suggest(study.ask()) for _ in range(3)]
    assert len({*later, *runs}) == 15


def test_an_objective_of_its_own_words(studied):
    sampler = sampler_of()
    study = optuna.create_study(sampler=sampler)

    def objective(trial):
        width, depth = trial.suggest_int("width", 8, 128), trial.suggest_int("depth", 1, 12)
        mlp_dim, n = trial.suggest_int("mlp_dim", 8, 4096), trial.suggest_int("num_examples", 1, 10**9)
        return loss_of(BASE.replace(width=width, depth=depth, mlp_dim=mlp_dim), n, trial.suggest_int("init_seed", 0, 9))

    study.optimize(objective, n_trials=12)
    assert [run_of(t) for t in study.trials] == [run_of(t) for t in studied[1].trials[:12]]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (lambda trial: trial.suggest_int("width", 8, 16), r"trial 0 asks for width in .*low=8"),
        (lambda trial: trial.suggest_float("dropout", 0, 1), "trial 0 asks for dropout"),
    ],
)
def test_what_is_not_proposed_is_not_made_up(objective, words):
    study = optuna.create_study(sampler=sampler_of())
    with pytest.raises(UserError, match=words):
        study.optimize(objective, n_trials=1)


def test_an_objective_that_hides_its_run_is_told():
    study = optuna.create_study(sampler=sampler_of())
    with pytest.raises(UserError, match=r"trial 0 has no parameter depth"):
        study.optimize(lambda trial: 1.0 + trial.suggest_int("width", 8, 128), n_trials=2)


def test_a_pilot_is_off_every_axis():
    centre, *corners = pilot_of(BASE, SPACE)
    assert len(corners) == 4 and all(
        sum(getattr(c, n) != getattr(centre, n) for n in SPACE) >= 2 and c.width in SPACE["width"] for c in corners
    )
    assert [s.depth for s in pilot_of(BASE, {"depth": (1, 2, 4, 8)})] == [2, 4]
