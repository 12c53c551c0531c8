"""Other rules beside the law's, the frontier and its figure, and what the command line prints of them."""

import json
from dataclasses import replace

import numpy as np
import planted
import pytest

from sovit import UserError
from sovit.cli.main import main
from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.law.checks.simulate import elasticity
from sovit.predict import growth_rules as growth
from sovit.predict.growth_rules import paper_rule, size_rule
from sovit.predict.law_at_budget import ladder, predicted_loss, target
from sovit.predict.recommend import best_shape
from sovit.report import figures as plot
from sovit.report.text import frontier_text
from sovit.spec.shape import Shape

BUDGET = 3 * 600e6 * 25e9
SO400M = np.array([1152.0, 27, 4304])


def fitted(form="joint", bootstrap=0, noise=0.0, **options):
    table, trunk = planted.star()
    y = planted.loss(table) * planted.noise(trunk, noise, 0)
    options = dict(geometry=planted.GEOMETRY, extrapolate=False, bootstrap=bootstrap) | options
    return law.fit(form, table, y, clusters=trunk, **options)


def frontier(fit, budgets, **rules):
    return [best_shape(fit, budget, **rules) for budget in budgets]


@pytest.fixture(scope="module")
def fit():
    return fitted(bootstrap=120, noise=0.003, metric="val_error")


def at_so400m() -> tuple[fitted_law.Fit, float]:
    """A law with the a and c that SoViT's published s and c imply, whose optimum at 40 G images is SoViT-400m."""
    found = fitted()
    geometry = found.geometry

    def flops(x):
        return geometry.flops(dict(zip(planted.DIMS, np.asarray(x, complex).T)), True)

    g = elasticity(flops, SO400M)
    names, centres = found.model.names, found.centre
    theta = np.zeros(len(names))
    data = (40e9 / np.exp(centres[-1])) ** -planted.C  # B = 1 on the centred column
    for k, name in enumerate(planted.DIMS):
        a = planted.EXPONENTS[k]
        theta[names.index(f"A_{name}")] = planted.C * g[k] * data / a * np.exp(a * (np.log(SO400M[k]) - centres[k]))
        theta[names.index(f"a_{name}")] = a
    theta[names.index("B")], theta[names.index("c")] = 1.0, planted.C
    compute = float(flops(SO400M).real) * 40e9
    data = replace(found.data, compute_range=[compute / 100, compute * 100])
    return replace(found, model=replace(found.model, theta=theta.tolist()), data=data), 3 * compute


def test_published_exponents_imply_a_joint_growth_that_is_not_the_recipe():
    """a from the stated s and c: (2.15, .80, .89), c = .65. With exact FLOPs elasticities at SoViT-400m."""
    found, budget = at_so400m()
    real = np.exp(target(found, budget).optimum())
    np.testing.assert_allclose(real, SO400M, rtol=1e-6)
    far = target(found, budget * 100).optimum()
    rule = paper_rule(found, best_shape(found, budget * 100))
    slopes = (far - np.log(list(rule["start"].values()))) / np.log(1e4)  # over the four decades of compute
    assert slopes == pytest.approx([0.124, 0.308, 0.229], abs=1e-3)
    assert rule["exponents"] == dict(width=0.22, depth=0.45, mlp_dim=0.60) and "2305.13035" in rule["source"]


def test_the_recipe_starts_at_the_laws_own_optimum_and_takes_measured_exponents(fit):
    table, trunk = planted.star()
    y = planted.loss(table) * planted.noise(trunk, 0.001, 0)
    marginal = law.fit("sovit", table, y, clusters=trunk, extrapolate=False)
    best = best_shape(fit, BUDGET, head_dim=64, mlp_multiple=128)
    rule = paper_rule(fit, best, marginal)
    least = 3 * fit.data.compute_range[0]
    start = np.exp(target(fit, least).optimum())
    assert list(rule["start"].values()) == pytest.approx(start)
    assert rule["exponents"] == {n: marginal.exponents[n].estimate for n in planted.DIMS}
    sizes = start * (BUDGET / least) ** (np.array(list(rule["exponents"].values())) / 3)
    steps = np.array([64, 1, 128])
    assert [rule["shape"][n] for n in planted.DIMS] == (steps * np.maximum(1, np.round(sizes / steps))).tolist()
    shape = Shape(**rule["shape"])
    assert (
        rule["loss"] == pytest.approx(predicted_loss(fit, [shape], BUDGET)[0])
        and rule["num_params"] == shape.num_params
    )
    assert rule["difference"] == vars(target(fit, BUDGET).difference(shape.to_dict(), best.shape.to_dict()))
    difference = rule["difference"]
    assert difference["estimate"] >= 0 and difference["low"] < difference["estimate"] < difference["high"]
    with pytest.raises(UserError, match="marginal"):
        paper_rule(fit, best, fit)


def test_an_undetermined_exponent_gives_way_to_the_papers(fit):
    table, trunk = planted.star()
    marginal = law.fit("sovit", table, planted.loss(table), clusters=trunk, extrapolate=False)
    marginal.exponents["depth"] = replace(marginal.exponents["depth"], estimate=None)
    rule = paper_rule(fit, best_shape(fit, BUDGET), marginal)
    assert rule["exponents"] == growth.PAPER and "does not determine" in rule["source"]


def test_the_size_rule_is_the_least_of_the_proportions_by_the_other_law(fit):
    table, trunk = planted.star()
    shapes = [
        Shape(*(int(table[n][i]) for n in planted.DIMS), head_dim=1, patch_size=14, pool="map") for i in range(54)
    ]
    table = table | dict(num_params=np.array([s.num_params for s in shapes], float))
    sizes = law.fit("chinchilla", table, planted.loss(table), clusters=trunk, extrapolate=False)
    rule = size_rule(fit, best_shape(fit, BUDGET), sizes)
    shape = Shape(**rule["shape"])
    assert shape.mlp_dim == 4 * shape.width and shape.depth == max(1, round(shape.width / 64))
    near = [shape] + [shape.replace(width=w, depth=max(1, round(w / 64)), mlp_dim=4 * w) for w in range(64, 3072, 64)]
    images = [BUDGET / s.train_flops_per_image() for s in near]
    loss = sizes.predict(dict(num_params=[s.num_params for s in near], num_examples=images))
    assert loss[0] <= loss.min() * (1 + 1e-5)
    with pytest.raises(UserError, match="chinchilla"):
        size_rule(fit, best_shape(fit, BUDGET), fit)


def test_the_frontier_is_a_ladder_of_recommendations_and_falls(fit):
    budgets = ladder(fit, points=5)
    assert budgets[0] == pytest.approx(3 * fit.data.compute_range[0], rel=1e-3)
    assert budgets[-1] == pytest.approx(300 * fit.data.compute_range[1], rel=1e-3)
    rows = frontier(fit, budgets, head_dim=64, mlp_multiple=128)
    for field in ("loss", "optimum_loss"):
        assert (np.diff([getattr(row, field) for row in rows]) < 0).all()
    for name in ("num_params", "num_examples"):
        sizes = [row.optimum_size[name] for row in rows]
        assert (np.diff([s.estimate for s in sizes]) > 0).all()
        assert all(s.low < s.estimate < s.high and s.pairs_low < s.pairs_high for s in sizes)
    for row in rows:
        assert row.loss_low < row.loss < row.loss_high
        assert row.shape.width % 64 == 0 and row.shape.mlp_dim % 128 == 0
    one = best_shape(fit, budgets[2], head_dim=64, mlp_multiple=128)
    assert rows[2] == one


def test_a_frontier_says_where_it_did_not_count_all_shapes(fit, monkeypatch):
    monkeypatch.setattr("sovit.predict.integer_search.MAX_CELLS", 10)
    rows = frontier(fit, ladder(fit, points=2), head_dim=64, mlp_multiple=128)
    assert not any(row.flat_region.exact for row in rows)
    assert f"at least {rows[0].flat_region.count:,}" in frontier_text(rows)


@pytest.mark.parametrize(
    "ends, words",
    [
        ((1e20, 1e19, 3), "1e[+]20 to 1e[+]19"),
        ((-1.0, None, 3), "-1 to"),
        ((None, None, 1), "1 points; give 2 to 200"),
    ],
)
def test_bad_ladders_are_refused(fit, ends, words):
    with pytest.raises(UserError, match=words):
        ladder(fit, *ends)


def test_far_budgets_are_refused(fit):
    with pytest.raises(UserError, match="choose a budget between"):
        frontier(fit, [BUDGET, 1e30])


def test_the_figure_shows_the_rows(fit, tmp_path):
    rows = frontier(fit, ladder(fit, points=4), head_dim=64, mlp_multiple=128)
    figure = plot.frontier(fit, rows)
    markers = [[line for line in axis.get_lines() if line.get_marker() == "D"][0] for axis in figure.axes]
    for field, line in zip(("loss", "num_params", "num_examples"), markers):
        np.testing.assert_allclose(line.get_ydata(), [getattr(row, field) for row in rows])
    plot.save(figure, tmp_path / "frontier")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    bare = plot.frontier(fitted(), frontier(fitted(), [BUDGET, 10 * BUDGET]))
    assert len(bare.axes) == 3


@pytest.fixture(scope="module")
def law_file(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("law")
    (folder / "law.json").write_text(fit.to_json())
    return folder / "law.json"


def test_predict_prints_the_recommendation_and_what_stands_beside_it(law_file, fit, capsys):
    arguments = ["predict", str(law_file), "--train-flops", f"{BUDGET:g}", "--head-dim", "64", "--mlp-multiple", "128"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    best = best_shape(fit, BUDGET, head_dim=64, mlp_multiple=128)
    s = best.shape
    assert f"best shape: width {s.width}, depth {s.depth}, MLP {s.mlp_dim} (head 64, patch 14, 224 px)" in text
    assert f"predicted val_error {best.loss:.4f} (90% interval {best.loss_low:.4f} to {best.loss_high:.4f})" in text
    assert f"{best.flat_region.count:,} shapes" in text and "at least" not in text
    rule = paper_rule(fit, best)
    assert f"SoViT's 1/D recipe: {rule['shape']['width']}x{rule['shape']['depth']}x{rule['shape']['mlp_dim']}" in text
    assert main([*arguments, "--json"]) == 0
    twin = json.loads(capsys.readouterr().out)
    assert twin["paper_rule"] == rule and "size_rule" not in twin
    assert {k: v for k, v in twin.items() if k in best.to_dict()} == json.loads(json.dumps(best.to_dict()))


def test_frontier_on_the_command_line(law_file, fit, tmp_path, capsys):
    arguments = ["predict", str(law_file), "--frontier", "--from", "1e19", "--to", "1e21", "--points", "3"]
    arguments += ["--head-dim", "64", "--mlp-multiple", "128"]
    assert main([*arguments, "--json"]) == 0
    twin = json.loads(capsys.readouterr().out)
    rows = frontier(fit, [1e19, 1e20, 1e21], head_dim=64, mlp_multiple=128)
    assert twin["rows"] == json.loads(json.dumps([row.to_dict() for row in rows])) and twin["metric"] == "val_error"
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row, line in zip(twin["rows"], lines[1:4]):
        s = row["shape"]
        expected = [f"{row['train_flops']:.3g}", f"{row['decades']:+.1f}", f"{s['width']}x{s['depth']}x{s['mlp_dim']}"]
        assert line.split()[:4] == [*expected, f"{row['num_params']:,}"]
    assert (tmp_path / "out" / "frontier.svg").is_file()


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "name a budget with --train-flops"),
        (["--train-flops", "-1"], "not a positive number"),
        (["--train-flops", "1e40"], "choose a budget between"),
        (["--train-flops", "1e20", "--max-params", "1000"], "no shape keeps to the rules"),
        (["--train-flops", "1e20", "--mlp-multiple", "0"], "mlp_multiple=0 is too small"),
        (["--train-flops", "1e20", "--points", "3"], "--points belongs to --frontier"),
        (["--frontier", "--train-flops", "1e20"], "--frontier takes --from and --to, not --train-flops"),
        (["--frontier", "--to", "1e9"], "the second the larger"),
    ],
)
def test_bad_input_is_one_line(law_file, more, words, capsys):
    assert main(["predict", str(law_file), *more]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    "form, words", [("chinchilla", "cannot rank whole shapes"), ("joint", "does not know patch_size")]
)
def test_laws_that_cannot_rank_shapes_are_refused(form, words):
    table, trunk = planted.star()
    table = table | dict(num_params=np.prod([table[n] for n in planted.DIMS], 0))
    if form == "chinchilla":
        blind = law.fit(form, table, planted.loss(table), clusters=trunk, extrapolate=False)
    else:
        table = {n: table[n] for n in (*planted.DIMS, "num_examples", "compute")}
        blind = law.fit(form, table, planted.loss(table), clusters=trunk, extrapolate=False)
    with pytest.raises(UserError, match=words):
        best_shape(blind, BUDGET)
