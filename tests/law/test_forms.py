"""The table of law forms: every entry evaluates, starts, recovers a planted law and, where it can, ranks shapes."""

from itertools import product

import numpy as np
import planted
import pytest

from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.law.compute_optimum import Family, _measure, optimum
from sovit.law.exponents import box
from sovit.law.forms import LAWS, WHOLE_SHAPE
from sovit.law.geometry import Geometry
from sovit.predict.recommend import best_shape
from sovit.spec.shape import POOLS, Shape

CORNERS = tuple(product((608, 1152), (8, 20), (1088, 3072)))


def crossed(sd=0.0, seed=0):
    """Star and corners with an interaction through the parameter count, and the trunk of each row."""
    table, trunk = planted.star(extra=CORNERS)
    table["num_params"] = Geometry(**planted.GEOMETRY).num_params(table)
    y = planted.loss(table) + 0.05 * (table["num_params"] / 5e8) ** -0.35
    return table, y * planted.noise(trunk, sd, seed), trunk


def test_num_params_of_a_geometry_are_those_of_the_shape():
    rng = np.random.default_rng(0)
    for pool in POOLS * 10:
        head_dim, patch = int(rng.integers(1, 9)) * 8, int(rng.integers(1, 17))
        sizes = dict(width=head_dim * int(rng.integers(1, 20)), depth=int(rng.integers(1, 50)))
        sizes |= dict(mlp_dim=int(rng.integers(1, 9000)), patch_size=patch, image_size=patch * int(rng.integers(1, 30)))
        registers = int(rng.integers(0, 5))
        shape = Shape(**sizes, head_dim=head_dim, pool=pool, num_registers=registers)
        geometry = Geometry(head_dim=head_dim, pool=pool, num_prefix_tokens=shape.num_prefix_tokens)
        assert geometry.num_params(sizes) == shape.num_params and geometry.flops(sizes, False) == shape.forward_flops


@pytest.mark.parametrize("name", ["joint", "joint_n", "bounded_tokens"])
def test_the_gradient_along_the_budget_equals_differences(name):
    dims = (*planted.DIMS, "patch_size", "image_size")
    form, rng = LAWS[name].build(dims, zero_line=None), np.random.default_rng(0)
    low, high = form.bounds
    theta, budget = rng.uniform(low + 0.1, np.minimum(high, 2.0), (2, len(low))), np.log([1e18, 1e20])
    problem = form, np.full(len(form.terms), 6.0), dims, Geometry(num_classes=1000), True
    v = np.log([[608.0, 10, 928, 14, 224], [1968, 40, 6144, 16, 160]])
    _, slope = _measure(problem, theta, budget, v)
    for k in range(len(dims)):
        ends = [_measure(problem, theta, budget, v + sign * 1e-5 * np.eye(5)[k])[0] for sign in (1, -1)]
        np.testing.assert_allclose(slope[:, k], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, entry in LAWS.items() if entry.ranks_shapes])
def test_elasticities_of_a_form_equal_differences(name):
    form = LAWS[name].build(planted.DIMS, zero_line=1.2)
    rng = np.random.default_rng(0)
    low, high = form.bounds
    theta = rng.uniform(low + 0.1, np.minimum(high, 2.0), (5, len(low)))
    u = rng.standard_normal((5, len(form.terms), 4))
    value, slope = form.elasticities(theta, u)
    np.testing.assert_allclose(value, form.evaluate(theta, u)[0])
    for k in range(len(form.terms)):
        bent = np.zeros_like(u)
        bent[:, k] = 1e-6
        ends = [form.evaluate(theta, u + sign * bent)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slope[:, k], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-9)


def test_joint_n_recovers_a_planted_interaction_and_counts_parameters_itself():
    table, y, trunk = crossed()
    options = dict(clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False)
    found = law.fit("joint_n", table, y, **options)
    assert found.params["a_N"] == pytest.approx(0.35, rel=1e-3)
    assert found.params["A_N"] == pytest.approx(0.05 * 5e8**0.35, rel=2e-2)
    for dim, exponent in zip(planted.DIMS, planted.EXPONENTS):
        assert found.params[f"a_{dim}"] == pytest.approx(exponent, rel=1e-3)
    bare = {n: c for n, c in table.items() if n != "num_params"}
    assert law.fit("joint_n", bare, y, **options).params == pytest.approx(found.params, rel=1e-9)
    np.testing.assert_allclose(fitted_law.Fit.from_json(found.to_json()).predict(bare), y, rtol=1e-6)


def test_parameters_counted_otherwise_are_met_by_a_scale():
    table, y, trunk = crossed()
    table["num_params"] = 1.1 * table["num_params"]
    found = law.fit("joint_n", table, y, clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False)
    assert found.geometry.params_scale == pytest.approx(1.1)
    np.testing.assert_allclose(found.predict({n: c for n, c in table.items() if n != "num_params"}), y, rtol=1e-6)


@pytest.mark.parametrize("name", ["joint", "joint_n", "bounded"])
def test_the_optimum_is_that_of_a_dense_grid(name):
    """Random laws of each form: no point of a dense grid over the whole box is better, at budgets far apart."""
    form = LAWS[name].build(planted.DIMS, zero_line=5.0)
    rng = np.random.default_rng(1)
    low, high = form.bounds
    theta = rng.uniform(low, np.minimum(high, 2.0), (40, len(low)))
    theta[:, : len(form.formula)] = np.exp(rng.uniform(-5, 0, (40, len(form.formula))))
    geometry = Geometry(**planted.GEOMETRY, num_classes=1000)
    centre = np.log([900.0, 15, 2000] + [2e8] * (name == "joint_n") + [1e8])
    grid = {d: list(arm) for d, arm in zip(planted.DIMS, planted.ARMS)}
    ends = box(grid)
    budget = rng.uniform(np.log(1e16), np.log(1e22), 40)
    v = optimum(Family(form, centre, geometry, grid), theta, budget, ends, head=True)
    assert (v >= ends[0]).all() and (v <= ends[1]).all()

    def losses(points, i):  # [K, G]
        table = dict(zip(planted.DIMS, np.exp(points)))
        images = np.exp(budget[i]) / geometry.flops(table, head=True)
        logs = [points, np.log(geometry.num_params(table))[None]] if name == "joint_n" else [points]
        u = np.concatenate([*logs, np.log(images)[None]]) - centre[:, None]
        return form.evaluate(theta[i : i + 1], u)[0][0]

    axes = [np.linspace(a, b, 36) for a, b in zip(*ends)]
    dense = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")])
    for i in range(40):
        assert losses(v[i][:, None], i)[0] <= losses(dense, i).min() + 1e-12


def test_patch_and_image_size_are_dimensions_of_joint():
    """A larger image helps and a larger patch hurts; both cost. The planted law is found, its optimum lies inside."""
    shapes = [(w, p, i) for w, p, i in product((128, 256, 512), (4, 8, 16, 32), (64, 128, 256))]
    width, patch, image = np.repeat(np.array(shapes, float), 4, 0).T
    n = np.tile([1e6, 4e6, 16e6, 64e6], len(shapes))
    fixed = dict(depth=np.full(len(n), 6), mlp_dim=np.full(len(n), 1024))
    table = fixed | dict(width=width, patch_size=patch, image_size=image, num_examples=n)
    table["forward_flops"] = Geometry(depth=6, mlp_dim=1024).flops(table, head=False)
    exponents = dict(a_width=0.8, a_patch_size=0.7, a_image_size=1.1, c=0.5)
    y = 0.2 + 0.02 * (width / 256) ** -0.8 + 0.05 * (patch / 8) ** 0.7 + 0.05 * (image / 128) ** -1.1
    y = y + 0.1 * (n / 8e6) ** -0.5
    options = dict(clusters=np.repeat(np.arange(len(shapes)), 4), extrapolate=False)
    found = law.fit("joint", table, y, **options)
    assert {k: found.params[k] for k in exponents} == pytest.approx(exponents, rel=1e-5)
    noisy = law.fit("joint", table, y * planted.noise(options["clusters"], 0.003, 0), bootstrap=50, **options)
    growth = noisy.exponents
    assert growth["image_size"].low > 0 > growth["patch_size"].high > growth["patch_size"].low
    assert all(e.low <= e.estimate <= e.high and e.status == "ok" for e in growth.values()), growth
    best = best_shape(found, 3 * 3e16)
    for dim, e in best.optimum.items():
        assert min(found.data.grid[dim]) < e.estimate < max(found.data.grid[dim])


def test_which_forms_rank_shapes():
    assert set(WHOLE_SHAPE) == {*("joint", "joint_n", "joint_tokens", "bounded", "bounded_tokens", "power_mean")}
