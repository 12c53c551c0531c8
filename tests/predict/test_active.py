"""The next run: its criterion against brute force and a closed form, what runs cost, checks, and when to stop."""

import dataclasses

import numpy as np
import planted
import pytest

from sovit import UserError
from sovit.law import compute_optimum as allocate
from sovit.law.exponents import optimum_of
from sovit.predict import next_run as active
from sovit.predict.belief import BeliefOptions, learn, members, prior_of
from sovit.predict.candidates import Candidate, Search, candidates
from sovit.predict.next_run import Checks, check_pick, choose, should_stop
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape

BASE = Shape(608, 10, 928, head_dim=16, patch_size=14, pool="map")
PILOT = ((608, 10, 928), (416, 6, 1360), (416, 16, 608), (880, 6, 608), (880, 16, 1360), (608, 10, 2176), (928, 8, 928))
VALUES = dict(width=(416, 608, 928), depth=(6, 10, 16, 28), mlp_dim=(608, 1216, 2176))
LEVELS = (32e6, 128e6)
TARGET = 3e22
OPTIONS = BeliefOptions(geometry=planted.GEOMETRY)


def measured(shapes=PILOT, seed=0, sd=0.005):
    """Columns, losses and ledger rows of trunks of two branches each."""
    table = planted.columns(np.repeat(np.array(shapes, float), 2, 0), np.tile(LEVELS, len(shapes)))
    trunk = np.repeat(np.arange(len(shapes)), 2)
    table["num_params"] = np.array([BASE.replace(**shape_of(s)).num_params for s in shapes for _ in LEVELS], float)
    table["trunk_id"] = np.array([f"t{g}" for g in trunk])
    rows = [
        dict(shape_of(shapes[g]), trunk_id=f"t{g}", num_examples=int(n), init_seed=0)
        for g, n in zip(trunk, table["num_examples"])
    ]
    return table, planted.loss(table) * planted.noise(trunk, sd, seed), rows


def shape_of(values):
    return dict(zip(planted.DIMS, map(int, values)))


def family_of(belief):
    limits = {d: np.exp([low, high]) for d, low, high in zip(belief.dims, *belief.reachable)}
    return allocate.Family(belief.form, belief.centre, belief.geometry, limits)


def pool_of(rows=(), **more):
    budgets = [n * BASE.train_flops_per_image() for n in (16e6, 32e6, 64e6, 128e6)]
    return candidates(BASE, VALUES, Search(budgets, **more), rows)


@pytest.fixture(scope="module")
def belief():
    table, y, _ = measured()
    return learn(table, y, TARGET, OPTIONS)


@pytest.fixture(scope="module")
def pool():
    return pool_of(measured()[2])


def test_a_pool_costs_what_training_would_spend(pool):
    """Against Run.new_examples, which bills the ledger."""
    kinds = {kind: [c for c in pool if c.kind == kind] for kind in ("trunk", "branch", "seed")}
    assert all(kinds.values())
    per_image = {c.shape: c.shape.train_flops_per_image() for c in pool}
    recipe = Recipe(0.001, batch_size=1)
    for c in kinds["trunk"] + kinds["seed"]:
        assert c.cost == Run(c.shape, recipe, c.budgets).total_examples * per_image[c.shape]
    for c in kinds["branch"]:
        both = Run(c.shape, recipe, tuple(sorted({32_000_000, 128_000_000, *c.budgets})))
        assert c.cost == both.new_examples(c.num_examples) * per_image[c.shape]
        whole = next(t for t in kinds["seed"] if t.shape == c.shape and t.budgets == c.budgets)
        assert c.cost < whole.cost or c.num_examples < 32e6
    assert {c.init_seed for c in kinds["seed"]} == {1}
    ran = {c.shape for c in kinds["branch"]}
    assert not ran & {c.shape for c in kinds["trunk"]}


def test_criterion_is_the_posterior_variance_by_brute_force(belief, pool):
    """Append the candidate's rows to all others, invert the whole information again: the same fall of tr(K Sigma)."""
    arrays = active._Pool.of(belief, pool)
    white = active._innovations(belief, arrays, active._made(belief))
    gains = active.gains(white, belief.covariance, belief.weight)
    prior = prior_of(belief.form, float(np.exp(np.log(measured()[1]).mean())))[1]
    for kind in ("trunk", "branch", "seed"):
        for i in [i for i, c in enumerate(pool) if c.kind == kind][::7]:
            own = belief.logs_of([pool[i].shape], np.array([pool[i].budgets]))[:, 0]
            logs = np.concatenate([belief.logs, own], 1)
            name = pool[i].trunk_id or "new"
            index = np.unique([*belief.trunk, *[name] * own.shape[1]], return_inverse=True)[1]
            trunk, shape = members(index[None]), members(logs[:3]) * np.sqrt(belief.form_variance(logs))[:, None]
            covariance = belief.row_sd**2 * np.eye(len(index)) + belief.trunk_sd**2 * trunk @ trunk.T + shape @ shape.T
            all_rows = np.concatenate([belief.jac, arrays.jac[i, arrays.real[i]].T], 1)
            information = all_rows @ np.linalg.solve(covariance, all_rows.T) + np.diag(prior**-2.0)
            after = float((belief.weight * np.linalg.inv(information)).sum())
            assert gains[i] == pytest.approx(belief.expected_regret - after, rel=1e-6)


def test_shape_moves_with_the_parameters_as_the_implicit_function_says(belief):
    """-H^-1 M against the optimum found again at parameters a little off."""
    moved = -np.linalg.solve(belief.hessian, belief.mixed)
    for p in range(len(belief.phi)):
        ends = []
        for step in (1e-3, -1e-3):
            phi = belief.phi + step * np.eye(len(belief.phi))[p]
            ends.append(optimum_of(family_of(belief), np.exp(phi)[None], belief.log_budget, head=True)[0])
        assert moved[:, p] == pytest.approx((ends[0] - ends[1]) / 2e-3, abs=2e-3)


def test_expected_regret_is_that_of_drawn_laws(belief):
    """Draw laws from the posterior (narrowed, so that second order is enough), pay the true regret under each."""
    rng = np.random.default_rng(0)
    narrow = 0.05
    draws = belief.phi + narrow * rng.standard_normal((400, len(belief.phi))) @ np.linalg.cholesky(belief.covariance).T
    family = family_of(belief)
    best = optimum_of(family, np.exp(draws), belief.log_budget, head=True)
    paid = []
    for phi, v in zip(draws, best):
        shapes = np.stack([belief.target, v])
        value, _ = allocate.loss_along_budget(family, phi, shapes, belief.log_budget)
        paid.append(np.expm1(value[0] - value[1]))
    assert min(paid) > -1e-9
    assert np.mean(paid) == pytest.approx(narrow**2 * belief.expected_regret, rel=0.15)


def test_two_parameters_in_closed_form():
    """One new row on a scalar posterior: variance s^2 -> s^2 r^2 / (s^2 + r^2) at unit slope."""
    covariance, weight = np.diag([4.0, 1.0]), np.diag([1.0, 0.0])
    white = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[2.0, 0.0]]]) / 1.5  # slope / row s.d.
    gains = active.gains(white, covariance, weight)
    after = [4 * 1.5**2 / (4 + 1.5**2), 4.0, 4 * 0.75**2 / (4 + 0.75**2)]
    assert gains == pytest.approx(4 - np.array(after))


def test_a_branch_is_not_an_independent_run(belief):
    """For a parameter that lifts all losses alike: a new shape tells most, a seed less, a branch of a trunk least.

    (Of how loss falls with images a branch may tell more than a new trunk: its trunk's error cancels.)
    """
    shape = BASE.replace(**shape_of(PILOT[4]))
    run = (64_000_000,)
    pool = [
        Candidate(shape.replace(mlp_dim=1376), run, "trunk", 1.0),
        Candidate(shape, run, "seed", 1.0, None, 1),
        Candidate(shape, run, "branch", 1.0, "t4"),
    ]
    arrays = dataclasses.replace(active._Pool.of(belief, pool), jac=np.ones((3, 1, 1)))
    white = active._innovations(belief, arrays, {arrays.keys[1]: (np.ones((2, 1)), ["t4", "t4"])})
    trunk, seed, branch = active.gains(white, np.full((1, 1), 0.01**2), np.ones((1, 1)))
    assert trunk > 1.5 * seed and seed > 1.5 * branch > 0


def test_the_same_rows_in_other_units_choose_the_same_runs(belief, pool):
    first = [p.candidate for p in choose(belief, pool, num=6)]
    table, y, _ = measured()
    again = learn(table, 7.0 * y, TARGET, OPTIONS)
    assert [p.candidate for p in choose(again, pool, num=6)] == first
    cheaper = [Candidate(**{**vars(c), "cost": c.cost / 1e9}) for c in pool]
    picks = choose(belief, cheaper, num=6)
    assert [(p.candidate.shape, p.candidate.budgets) for p in picks] == [(c.shape, c.budgets) for c in first]


def test_picks_are_deterministic(pool):
    table, y, _ = measured()
    picks = [choose(learn(table, y, TARGET, OPTIONS), pool, num=3) for _ in range(2)]
    assert picks[0] == picks[1]
    per_flop = [(p.regret_before - p.regret_after) / p.candidate.cost for p in picks[0]]
    assert per_flop == sorted(per_flop, reverse=True)
    assert all("expected regret" in p.why and p.to_dict()["candidate"]["cost"] > 0 for p in picks[0])


def test_a_batch_counts_its_earlier_picks_as_made(belief, pool):
    picks = choose(belief, pool, num=8)
    assert all(a.regret_after == pytest.approx(b.regret_before) for a, b in zip(picks, picks[1:]))
    assert len({(p.candidate.shape, p.candidate.init_seed) for p in picks}) == len(picks)  # one trunk, one job


def test_a_check_is_the_nearest_to_the_target_that_is_allowed(belief, pool):
    trunks = [c for c in pool if c.kind != "branch"]
    cap = float(np.median([c.cost for c in trunks]))
    allowed = [c for c in trunks if c.cost <= cap]
    check = check_pick(belief, allowed)
    logs = [belief.logs_of([c.shape], np.array([c.num_examples])) for c in allowed]
    predicted = [float(np.exp(belief.evaluate(at)[0][0])) for at in logs]
    assert check.is_check and check.candidate in allowed
    assert check.predicted[-1] == pytest.approx(min(predicted))
    assert "nearest the target" in check.why and check.prediction_sd[0] > belief.noise_sd


def test_after_a_check_that_failed_new_trunks_are_drawn_until_one_comes_true(belief, pool):
    failed, true = (dict(predicted=0.5, measured=m) for m in (0.55, 0.501))
    picks = choose(belief, pool, num=4, checks=Checks([true, failed]))
    assert picks == choose(belief, pool, num=4, checks=Checks([true, failed]))
    assert all(p.candidate.kind == "trunk" and "did not come true" in p.why for p in picks)
    best = choose(belief, pool, num=4)
    assert choose(belief, pool, num=4, checks=Checks([failed, true])) == best
    assert [p.candidate for p in picks] != [p.candidate for p in best]


def test_discrepancy_moves_the_picks_towards_the_target(pool, monkeypatch):
    table, y, _ = measured()
    away = []
    for d in (0.0, 0.03):
        monkeypatch.setattr("sovit.predict.belief.DISCREPANCY", d)
        belief = learn(table, y, TARGET, OPTIONS)
        picks = choose(belief, pool, num=12)
        logs = np.log([[getattr(p.candidate.shape, n) for n in planted.DIMS] for p in picks])
        away.append(np.sqrt(((logs - belief.target) ** 2).sum(1)).mean())
    assert away[1] < away[0]


def test_noise_is_recovered_once_there_are_rows(monkeypatch):
    rng = np.random.default_rng(1)
    shapes = [
        tuple(int(x) for x in np.exp(rng.uniform(np.log([400, 6, 600]), np.log([1200, 24, 3000])))) for _ in range(40)
    ]
    shapes = [(w // 16 * 16, d, m) for w, d, m in shapes]
    table, y, _ = measured(shapes, seed=2, sd=0.01)
    monkeypatch.setattr("sovit.predict.belief.DISCREPANCY", 0.0)
    belief = learn(table, y, TARGET, OPTIONS)
    assert belief.trunk_sd == pytest.approx(0.0071, rel=0.35)
    assert belief.row_sd == pytest.approx(0.0071, rel=0.35)


def test_stop_on_a_check_that_came_true_and_on_nothing_else(belief):
    noise = 2 * belief.expected_regret  # the criterion is content
    good, bad = (dict(predicted=0.5, measured=m) for m in (0.503, 0.55))
    assert should_stop(belief, Checks([], noise))[0] is False
    assert should_stop(belief, Checks([good], noise))[0] is True
    stop, why = should_stop(belief, Checks([good, bad], noise))
    assert not stop and "missed by +9.53 %" in why
    assert should_stop(belief, Checks([good], belief.expected_regret / 2))[0] is False


def test_a_check_is_judged_by_the_noise_between_seeds_where_that_is_known(belief, pool):
    """What the form gets wrong is in a belief's own noise: by that a miss of many seed s.d. would have come true."""
    wrong = dataclasses.replace(belief, row_sd=0.03, covariance=1e-6 * belief.covariance)
    missed = dict(predicted=0.5, measured=0.5 * np.exp(-0.03))
    assert should_stop(wrong, Checks([missed]))[0]
    stop, why = should_stop(wrong, Checks([missed], 0.0023))
    assert not stop and "missed by -3 % (-13.0 noise s.d.)" in why
    assert "at random" not in choose(wrong, pool, checks=Checks([missed]))[0].why
    assert "at random" in choose(wrong, pool, checks=Checks([missed], 0.0023))[0].why


def test_bad_losses_are_refused():
    with pytest.raises(UserError, match="y=0.0 in row 0"):
        learn(measured()[0], np.zeros(14), TARGET, OPTIONS)


def test_bad_pools_say_why(belief):
    with pytest.raises(UserError, match="raise max_cost"):
        pool_of(max_cost=1.0)
    with pytest.raises(UserError, match="no candidate"):
        choose(belief, [])


def test_a_diverged_trunk_is_not_branched():
    rows = measured()[2]
    rows[0]["status"] = "diverged"
    assert "t0" not in {c.trunk_id for c in pool_of(rows)}
    assert "t1" in {c.trunk_id for c in pool_of(rows)}
