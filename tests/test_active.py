"""The next run: its criterion against brute force and a closed form, what runs cost, checks, and when to stop."""

import numpy as np
import planted
import pytest

from sovit import UserError, active, design
from sovit.active import Candidate, candidates, choose, learn, should_stop
from sovit.run import Recipe, Run
from sovit.shape import Shape

BASE = Shape(608, 10, 928, head_dim=16, patch_size=14, pool="map")
PILOT = ((608, 10, 928), (416, 6, 1360), (416, 16, 608), (880, 6, 608), (880, 16, 1360), (608, 10, 2176), (928, 8, 928))
VALUES = dict(width=(416, 608, 928), depth=(6, 10, 16, 28), mlp_dim=(608, 1216, 2176))
LEVELS = (32e6, 128e6)
TARGET = 3e22


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


def pool_of(rows=(), **more):
    return candidates(BASE, VALUES, num_examples=(16e6, 32e6, 64e6, 128e6), rows=rows, **more)


@pytest.fixture(scope="module")
def belief():
    table, y, _ = measured()
    return learn(table, y, TARGET, geometry=planted.GEOMETRY)


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
    arrays = active._arrays(belief, pool)
    _, jac = active._jacobian(belief, arrays.logs)
    white = active._innovations(belief, pool, arrays, jac, active._Made.of(belief))
    gains = active._gains(white, belief.covariance, belief.weight)
    prior = active._prior(belief.form, float(np.exp(np.log(measured()[1]).mean())))[1]
    for kind in ("trunk", "branch", "seed"):
        for i in [i for i, c in enumerate(pool) if c.kind == kind][::7]:
            own = arrays.logs[:, i, arrays.real[i]]
            logs = np.concatenate([belief.logs, own], 1)
            name = pool[i].trunk_id or "new"
            index = np.unique([*belief.trunk, *[name] * own.shape[1]], return_inverse=True)[1]
            covariance = active._covariance(logs[:3], index, belief.form_variance(logs), belief.trunk_sd, belief.row_sd)
            all_rows = np.concatenate([belief.jac, jac[i, arrays.real[i]].T], 1)
            information = all_rows @ np.linalg.solve(covariance, all_rows.T) + np.diag(prior**-2.0)
            after = float((belief.weight * np.linalg.inv(information)).sum())
            assert gains[i] == pytest.approx(belief.expected_regret - after, rel=1e-6)
