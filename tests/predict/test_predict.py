"""Prediction: the optimum against closed form and brute force, the flat region, intervals, warnings, refusals."""

import dataclasses
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import planted
import pytest

from sovit import UserError
from sovit.law import fit as law
from sovit.law.compute_optimum import Family, optimum
from sovit.law.diagnostics import Noise
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.predict.law_at_budget import predicted_loss, target
from sovit.predict.recommend import best_shape, form_dependence, proportional_shape, rules_of
from sovit.spec.shape import Shape

BUDGET = 3 * 600e6 * 25e9


@pytest.fixture(scope="module")
def fits():
    table, trunk = planted.star()
    out = {}
    corners = [(w, d, m) for w in (608, 1152) for d in (8, 20) for m in (1088, 3072)]
    crossed, crossed_trunk = planted.star(extra=tuple(corners))
    num_params = Geometry(**planted.GEOMETRY).num_params(crossed)
    y = (planted.loss(crossed) + 0.02 * (num_params / 5e8) ** -0.35) * planted.noise(crossed_trunk, 0.003, 0)
    options = dict(clusters=crossed_trunk, geometry=planted.GEOMETRY | dict(num_classes=1000))
    out["joint_n"] = law.fit("joint_n", crossed, y, bootstrap=120, **options)
    for name, power in (("joint", None), ("bounded", 1.9)):
        y = planted.loss(table, power=power) * planted.noise(trunk, 0.003, 0)
        zero_line = planted.ZERO_LINE if power else None
        out[name] = law.fit(
            name,
            table,
            y,
            clusters=trunk,
            geometry=planted.GEOMETRY | dict(num_classes=1000),
            zero_line=zero_line,
            bootstrap=120,
        )
    return out


def test_optimum_has_the_closed_form_exponents_where_flops_are_a_power_law():
    """x_k ~ t^sigma_k, sigma_k = (1/a_k) / (1/c + sum_j g_j/a_j): with F = w d m exactly, g = (1, 1, 1)."""

    class Product(Geometry):
        def flops(self, dims, head):
            return dims["width"] * dims["depth"] * dims["mlp_dim"]

    a, c = planted.EXPONENTS, planted.C
    theta = np.tile(np.r_[0.1, 0.1, 0.1, 0.2, 0.7, a, c], (2, 1))
    budgets = np.log([1e12, 1e16])
    box = np.full(3, -50.0), np.full(3, 50.0)
    joint = LAWS["joint"].build(planted.DIMS)
    family = Family(joint, np.array([3.0, 2.0, 4.0, 10.0]), Product(), dict.fromkeys(planted.DIMS, ()))
    v = optimum(family, theta, budgets, box)
    sigma = (1 / a) / (1 / c + (1 / a).sum())
    np.testing.assert_allclose((v[1] - v[0]) / (budgets[1] - budgets[0]), sigma, rtol=1e-7)


@pytest.mark.parametrize("name", ["joint", "bounded", "joint_n"])
def test_the_real_optimum_beats_its_surroundings(fits, name):
    found = best_shape(fits[name], BUDGET)
    real = np.array([found.optimum[d].estimate for d in planted.DIMS])
    rng = np.random.default_rng(0)
    around = real * np.exp(0.02 * rng.standard_normal((500, 3)))
    around[0] = real
    geometry = fits[name].geometry
    table = dict(zip(planted.DIMS, around.T))
    table["num_examples"] = BUDGET / 3 / geometry.flops(table, head=True)
    losses = fits[name].predict(table)
    assert losses.argmin() == 0 and losses[0] == pytest.approx(found.optimum_loss, rel=1e-12)


@pytest.mark.parametrize("name", ["joint", "bounded", "joint_n"])
def test_the_best_whole_shape_equals_brute_force(fits, name):
    found = best_shape(fits[name], BUDGET, head_dim=32, mlp_multiple=32)
    best = found.shape
    near = [
        best.replace(width=w, depth=d, mlp_dim=m)
        for w, d, m in product(range(320, 1280, 32), range(4, 30), range(64, 2400, 32))
    ]
    losses = predicted_loss(fits[name], near, BUDGET)
    assert found.loss == pytest.approx(losses.min(), rel=1e-12) and near[losses.argmin()] == best
    assert found.optimum_loss <= found.loss and found.rounding.estimate >= 0


@pytest.fixture(scope="module")
def mixed():
    """A law whose optimum is not known to be unique: a term in parameters."""
    table, trunk = planted.star(((608, 8, 1088), (1152, 20, 3072), (608, 20, 3072), (1152, 8, 1088)))
    y = planted.loss(table) * (1 + 0.1 * table["forward_flops"] ** -0.1) * planted.noise(trunk, 0.003, 0)
    return law.fit("joint_n", table, y, clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False)


RULES = [
    dict(head_dim=64, width_multiple=128, mlp_multiple=128),
    dict(head_dim=64, depth_multiple=3, mlp_multiple=64),
    dict(head_dim=64, mlp_multiple=128, max_params=4e7),
    dict(head_dim=64, mlp_multiple=128, max_forward_flops=1.2e10),
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: ",".join(rules))
@pytest.mark.parametrize("form", ["joint", "bounded", "joint_n"])
def test_the_search_under_rules_equals_brute_force_over_a_box(fits, mixed, form, rules):
    fit = mixed if form == "joint_n" else fits[form]
    at = target(fit, BUDGET)
    given = rules_of(at, **rules)
    w, d, m = (np.arange(step, top, step) for step, top in zip(given.steps.values(), (1700, 61, 4100)))
    table = dict(zip(planted.DIMS, (grid.ravel() for grid in np.meshgrid(w, d, m, indexing="ij"))))
    shapes = table | dict(patch_size=np.full(table["width"].shape, 14), image_size=np.full(table["width"].shape, 224))
    keep = at.geometry.num_params(shapes) <= rules.get("max_params", np.inf)
    keep &= at.geometry.flops(shapes, head=False) <= rules.get("max_forward_flops", np.inf)
    loss = np.where(keep, at.loss(table), np.inf)
    i = int(loss.argmin())
    found = best_shape(fit, BUDGET, **rules)
    assert found.loss == pytest.approx(loss[i], rel=1e-12)
    assert [getattr(found.shape, n) for n in planted.DIMS] == [table[n][i] for n in planted.DIMS]
    assert found.num_params <= rules.get("max_params", np.inf) and found.shape.head_dim == 64
    inside = loss <= found.loss * np.exp(fit.noise.sd)
    flat = found.flat_region
    assert flat.exact and flat.count == inside.sum()
    assert flat.ranges == {n: [table[n][inside].min(), table[n][inside].max()] for n in planted.DIMS}
    if flat.count <= 50:
        listed = {tuple(s[n] for n in planted.DIMS) for s in flat.shapes}
        assert listed == set(zip(*(table[n][inside].tolist() for n in planted.DIMS)))


@pytest.mark.parametrize("form", [name for name, entry in law.LAWS.items() if entry.ranks_shapes])
def test_every_law_that_ranks_shapes_falls_with_size_and_with_images(form):
    """What the exact search rests on: at fixed images no size, and at fixed sizes no images, may raise the loss."""
    table, trunk = planted.star()
    y = planted.loss(table) * planted.noise(trunk, 0.003, 0)
    if "num_patches" in law.LAWS[form].needs:
        table["num_patches"] = np.random.default_rng(7).choice([144.0, 256.0], len(trunk))
    zero_line = planted.ZERO_LINE if law.LAWS[form].bounded else None
    fit = law.fit(form, table, y, clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False, zero_line=zero_line)
    at, rng = target(fit, BUDGET), np.random.default_rng(0)
    low, high = fit.shape_form.bounds
    theta = np.exp(rng.normal(-2, 1.5, (40, len(low))))
    theta = np.clip(
        np.where(np.isfinite(high), low + rng.random(theta.shape) * np.minimum(high - low, 3), theta), low, high
    )
    shapes = np.exp(rng.uniform(0, 8, (60, 3))) + 1
    images = np.exp(rng.uniform(8, 25, 60))

    def loss(sizes, seen):
        return at.loss(dict(zip(planted.DIMS, sizes.T)), theta, images=seen)

    base = loss(shapes, images)
    for k in range(3):
        assert (loss(shapes * (1 + 0.3 * np.eye(3)[k]), images) <= base * (1 + 1e-9)).all()
    assert (loss(shapes, images * 1.3) <= base * (1 + 1e-9)).all()


def test_what_rounding_and_rules_cost_is_told_with_intervals(fits):
    fit = fits["joint"]
    ruled = best_shape(fit, BUDGET, head_dim=64, width_multiple=256, mlp_multiple=512)
    cost = ruled.rounding
    assert cost.estimate == pytest.approx(ruled.loss / ruled.optimum_loss - 1)
    assert cost.estimate > best_shape(fit, BUDGET).rounding.estimate >= 0 and cost.low < cost.estimate < cost.high
    # draw by draw, by hand
    theta, widen = np.array(fit.draws["random_effects"]), fit.diagnostics.draws.t_over_z
    real = {n: ruled.optimum[n].estimate for n in planted.DIMS}
    both = {n: np.array([getattr(ruled.shape, n), real[n]]) for n in planted.DIMS}
    many = np.log(target(fit, BUDGET).loss(both, theta))
    low, middle, high = np.quantile(many[:, 0] - many[:, 1], [0.05, 0.5, 0.95], method="weibull")
    ends = middle + widen * (low - middle), middle + widen * (high - middle)
    assert (cost.low, cost.high) == pytest.approx(np.expm1(ends))


def test_regret_of_listed_shapes_is_over_each_draws_own_optimum(fits):
    fit = fits["bounded"]
    found = best_shape(fit, BUDGET)
    listed = found.flat_region.shapes
    assert all(s["regret_high"] > 0 for s in listed)
    at, theta = target(fit, BUDGET), np.array(fit.draws["random_effects"])
    v = at.optimum(theta)
    least = [at.loss(dict(zip(planted.DIMS, np.exp(x)[:, None])), t[None])[0, 0] for x, t in zip(v, theta)]
    excess = at.loss({n: np.array([listed[-1][n]]) for n in planted.DIMS}, theta)[:, 0] / least - 1
    assert listed[-1]["regret_high"] == pytest.approx(np.quantile(excess, 0.95))


@pytest.mark.parametrize("most", [10, 3000])
def test_of_a_region_too_large_to_count_a_part_is_told(fits, monkeypatch, most):
    exact = best_shape(fits["joint"], BUDGET).flat_region
    monkeypatch.setattr("sovit.predict.integer_search.MAX_CELLS", most)
    found = best_shape(fits["joint"], BUDGET).flat_region
    assert not found.exact and 0 < found.count < exact.count and found.shapes[0] == exact.shapes[0]
    for name, (low, high) in found.ranges.items():
        assert exact.ranges[name][0] <= low <= high <= exact.ranges[name][1]


@pytest.mark.parametrize(
    "rules, words",
    [
        (dict(max_params=1e4), "no shape keeps to the rules: the smallest, width 16 x depth 1 x mlp_dim 8"),
        (dict(max_forward_flops=1e6), "no shape keeps to the rules"),
        (dict(mlp_multiple=0), "mlp_multiple=0 is too small"),
        (dict(max_params=-1), "max_params=-1 is too small"),
        (dict(max_params=float("nan")), "max_params=nan is too small"),
    ],
)
def test_rules_that_leave_nothing_are_refused(fits, rules, words):
    with pytest.raises(UserError, match=words):
        best_shape(fits["joint"], BUDGET, **rules)


def test_the_budget_is_spent_head_included(fits):
    found = best_shape(fits["joint"], BUDGET)
    per_image = found.shape.train_flops_per_image(1000)
    assert found.num_examples == BUDGET // per_image
    assert found.num_params == found.shape.num_params and found.shape.width % 16 == 0


def test_the_flat_region_contains_the_best_and_only_shapes_as_good(fits):
    found = best_shape(fits["joint"], BUDGET)
    flat = found.flat_region
    first = {k: v for k, v in flat.shapes[0].items() if k != "regret_high"}
    assert first == {k: getattr(found.shape, k) for k in (*planted.DIMS, "patch_size", "image_size")} | dict(regret=0.0)
    assert flat.shapes[0]["regret_high"] == pytest.approx(found.regret.high)
    shapes = [found.shape.replace(**{k: s[k] for k in planted.DIMS}) for s in flat.shapes]
    excess = np.log(predicted_loss(fits["joint"], shapes, BUDGET) / found.loss)
    assert (excess >= -1e-12).all() and (excess <= flat.within).all() and flat.within == fits["joint"].noise.sd
    assert 1 < len(flat.shapes) <= min(flat.count, 50) and flat.exact
    for dim, (low, high) in flat.ranges.items():
        assert low <= getattr(found.shape, dim) <= high


def test_intervals_contain_the_planted_optimum():
    table, trunk = planted.star()
    y, options = planted.loss(table), dict(clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False)
    truth = best_shape(law.fit("joint", table, y, **options), BUDGET)
    hits = []
    for seed in range(6):
        noisy = y * planted.noise(trunk, 0.003, seed)
        found = best_shape(law.fit("joint", table, noisy, bootstrap=99, **options), BUDGET)
        for e, true in zip(found.optimum.values(), truth.optimum.values()):
            hits += [getattr(e, p + "low") <= true.estimate <= getattr(e, p + "high") for p in ("", "pairs_")]
        hits.append(found.loss_low <= true_loss(found, BUDGET) <= found.loss_high)
        assert 0 <= found.regret.median <= found.regret.high < 0.05
    assert np.mean(hits) >= 0.7  # nominal 0.9, 42 strongly correlated trials


def true_loss(found, train_flops: float) -> float:
    """The planted law's own loss at the recommended shape, trained for that budget."""
    shape = np.array([[getattr(found.shape, d) for d in planted.DIMS]], float)
    images = train_flops / 3 / planted.columns(shape, np.ones(1))["forward_flops"]
    return float(planted.loss(planted.columns(shape, images))[0])


def test_far_extrapolation_is_warned_of(fits):
    largest = 3 * fits["joint"].data.compute_range[1]
    near, far = (best_shape(fits["joint"], largest * factor) for factor in (50, 1e3))
    assert near.decades == pytest.approx(np.log10(50)) and far.decades == pytest.approx(3)
    assert any("decades" in w for w in far.warnings) and not any("decades" in w for w in near.warnings)
    assert best_shape(fits["joint"], largest / 100).decades == pytest.approx(-2)


def test_a_law_that_misses_more_than_noise_warns_of_its_flat_region(fits):
    fit = fits["joint"]
    for sd, warned in ((0.1, 0), (0.5, 0), (2, 1)):
        noise = Noise(sd=fit.diagnostics.residual_rms / sd, source="seeds", n=4, num_rows=12)
        found = best_shape(dataclasses.replace(fit, noise=noise), BUDGET).warnings
        assert sum("so the flat region is too narrow" in w for w in found) == warned


def test_the_difference_of_two_shapes_has_a_narrower_interval_than_their_losses(fits):
    found = best_shape(fits["joint"], BUDGET)
    usual, d = found.proportional, found.difference
    assert d.estimate == pytest.approx(np.log(found.loss / usual.loss)) and d.low < d.estimate < d.high
    low, high = target(fits["joint"], BUDGET).loss_interval(usual.shape.to_dict())
    assert low < usual.loss < high and d.high - d.low < np.log(found.loss_high / low) - np.log(found.loss_low / high)
    shapes = found.shape, usual.shape
    back = target(fits["joint"], BUDGET).difference(*(shape.to_dict() for shape in reversed(shapes)))
    assert [back.estimate, back.low, back.high] == pytest.approx([-d.estimate, -d.high, -d.low])
    # draw by draw, by hand
    theta, widen = np.array(fits["joint"].draws["random_effects"]), fits["joint"].diagnostics.draws.t_over_z
    many = [
        np.subtract(
            *np.log(
                predicted_loss(
                    dataclasses.replace(fits["joint"], model=dataclasses.replace(fits["joint"].model, theta=t)),
                    shapes,
                    BUDGET,
                )
            )
        )
        for t in theta
    ]
    low, middle, high = np.quantile(many, [0.05, 0.5, 0.95], method="weibull")
    assert d.low == pytest.approx(middle + widen * (low - middle)) and d.high == pytest.approx(
        middle + widen * (high - middle)
    )


def test_proportional_shape_is_of_the_proportions_and_no_better(fits):
    found = best_shape(fits["joint"], BUDGET)
    shape = found.proportional.shape
    assert shape.mlp_dim == 4 * shape.width and shape.depth == max(1, round(shape.width / 64))
    assert found.proportional.loss >= found.optimum_loss
    assert found.proportional == proportional_shape(target(fits["joint"], BUDGET), 16, found.loss)
    assert predicted_loss(fits["joint"], [shape], BUDGET)[0] == pytest.approx(found.proportional.loss, rel=1e-12)


def test_a_dimension_without_gain_stays_within_the_values_run():
    table, trunk = planted.star()
    y = planted.loss(table, planted.AMPLITUDES * np.array([1, 1, 0]))
    found = best_shape(law.fit("joint", table, y, clusters=trunk, geometry=planted.GEOMETRY), BUDGET)
    if found.optimum["mlp_dim"].status == "unidentified":
        assert found.shape.mlp_dim >= 1088 and any("mlp_dim is unidentified" in w for w in found.warnings)
    else:
        assert found.optimum["mlp_dim"].status == "edge"


def test_forms_are_compared_on_each_others_shapes(fits):
    table = form_dependence([fits["joint"], fits["bounded"]], BUDGET)
    assert [row["form"] for row in table] == ["joint", "bounded"]
    for row in table:
        assert row["loss_excess"][row["form"]] == 0 and max(row["loss_excess"].values()) < 0.1


def test_to_dict_is_json(fits):
    json.dumps(best_shape(fits["bounded"], BUDGET).to_dict(), allow_nan=False)


def test_a_fit_without_draws_predicts_without_intervals():
    table, trunk = planted.star()
    found = best_shape(law.fit("joint", table, planted.loss(table), clusters=trunk, geometry=planted.GEOMETRY), BUDGET)
    assert found.difference.low is None
    assert found.loss_low is None and found.regret is None and "bootstrap=0" in found.optimum["width"].note


@pytest.mark.parametrize(
    "budget, words",
    [
        (-1.0, "train_flops=-1.0"),
        (float("nan"), "train_flops=nan"),
        (1e5, r"train_flops=100000 is more than 6 decades from the budgets run, \d.*e\+\d\d to \d"),
        (1e30, "more than 6 decades"),
    ],
)
def test_bad_budgets_are_refused(fits, budget, words):
    with pytest.raises(UserError, match=words):
        best_shape(fits["joint"], budget)


def test_a_law_of_single_arms_cannot_rank_shapes():
    table, trunk = planted.star()
    with pytest.raises(UserError, match="joint"):
        best_shape(law.fit("sovit", table, planted.loss(table), clusters=trunk), BUDGET)


def test_a_law_of_rows_without_costs_cannot_rank_shapes():
    table, trunk = planted.star()
    table = {n: table[n] for n in (*planted.DIMS, "num_examples")}
    found = law.fit("joint", table, planted.loss(table), clusters=trunk, geometry=planted.GEOMETRY)
    with pytest.raises(UserError, match="without forward_flops"):
        best_shape(found, BUDGET)


def test_prediction_needs_neither_scipy_nor_torch(fits, tmp_path):
    (tmp_path / "law.json").write_text(fits["joint"].to_json())
    code = (
        "import sys; from sovit.law.fit import Fit; from sovit.predict.recommend import best_shape;"
        f"best_shape(Fit.from_json(open({str(tmp_path / 'law.json')!r}).read()), 1e20);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


def test_a_pool_that_the_rows_do_not_say_is_read_from_their_flops():
    shapes = [Shape(w, d, 64, 8, 4, 16, "none") for w in (16, 32, 48) for d in (1, 2, 3)]
    table = {
        n: np.array([getattr(s, n) for s in shapes] * 2, float) for n in ("width", "depth", "patch_size", "image_size")
    }
    table |= {n: np.array([getattr(s, n) for s in shapes] * 2, float) for n in ("mlp_dim", "head_dim", "forward_flops")}
    table |= dict(num_examples=np.repeat([1e4, 1e5], 9), num_classes=np.full(18, 16.0))
    per_image = np.array([s.train_flops_per_image(16) for s in shapes] * 2)
    y = 0.5 + table["width"] ** -0.5 + table["depth"] ** -1.0 + 20 * table["num_examples"] ** -0.4
    found = law.fit("joint", table | dict(train_flops=per_image * table["num_examples"]), y)
    assert found.geometry.pool == "none" and found.geometry.flops_scale == 1.0
    chosen = best_shape(found, 1e11)
    assert chosen.shape.pool == "none" and chosen.shape.mlp_dim == 64 and chosen.shape.head_dim == 8
