"""Laws of patch and image size: what a planted one gives back, the exact optimum, and the answer to what to spend on."""

import dataclasses
import itertools
import json

import numpy as np
import planted_tokens as planted
import pytest
from planted_ledger import write_ledger

from sovit import UserError
from sovit.cli.main import main
from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.law.fitted_law import Fit
from sovit.ledger.measurements import measurements
from sovit.predict.law_at_budget import predicted_loss, target
from sovit.predict.patch_tradeoff import FACTOR, by_value, trade
from sovit.predict.recommend import best_shape, rules_of
from sovit.report.build import fit_ledgers
from sovit.report.text import trade_text
from sovit.spec.shape import DIMENSIONS, Shape

FLOPS = 3e12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write_ledger(tmp_path_factory.mktemp("tokens") / "tokens.jsonl", planted.planted_rows())
    return measurements([path])


@pytest.fixture(scope="module")
def fit(data):
    return law.fit("joint", data.columns, data.y, bootstrap=120, metric="val_loss")


@pytest.fixture(scope="module")
def exact(fit):
    """The law with the planted parameters themselves in place of the fitted ones."""
    form, centre = fit.shape_form, fit.centre
    raw = {f"A_{n}": A for n, (A, _) in planted.TRUTH.items()} | dict(B=planted.B, c=planted.C, eps=planted.EPS)
    raw |= {f"a_{n}": abs(a) for n, (_, a) in planted.TRUTH.items()}
    theta = form.raw(np.array([[raw[n] for n in form.names]]), -centre)[0]
    return dataclasses.replace(fit, model=dataclasses.replace(fit.model, theta=theta.tolist()), draws={})


@pytest.fixture(scope="module")
def answer(exact):
    return trade(exact, FLOPS, "patch_size")


def every_shape(at, head_dim=8):
    """All shapes of a lattice about the optimum, and their losses."""
    pairs = [(p, r) for p, r in at.run_pairs().tolist()]
    sizes = itertools.product(range(8, 129, 8), range(1, 8), range(8, 1201, 8), pairs)
    shapes = [(w, d, m, p, r) for w, d, m, (p, r) in sizes]
    table = dict(zip(DIMENSIONS, np.array(shapes, float).T))
    return shapes, at.loss(table)


def test_the_planted_law_is_what_it_says(exact):
    shapes = [planted.CENTRE, planted.CENTRE.replace(patch_size=2), planted.CENTRE.replace(image_size=64, width=64)]
    for shape, predicted in zip(shapes, predicted_loss(exact, shapes, FLOPS)):
        images = FLOPS / shape.train_flops_per_image(planted.NUM_CLASSES)
        assert predicted == pytest.approx(planted.planted_loss(shape, images), rel=1e-9)


def test_planted_terms_of_patch_and_image_are_recovered_within_their_intervals(fit):
    for name, (A, a) in planted.TRUTH.items():
        ends = fit.intervals[f"a_{name}"]
        assert ends.low <= abs(a) <= ends.high, name
        assert fit.intervals[f"A_{name}"].low <= A <= fit.intervals[f"A_{name}"].high, name
    assert {e.status for e in fit.exponents.values()} == {"ok"}
    assert fit.diagnostics.residual_rms < 2 * 0.004


def test_the_growth_of_the_planted_optimum_is_in_its_interval(fit, exact):
    grown = law.exponents(exact.family, exact.theta, {}, (1, 1), exact.data.compute_range)
    assert grown["patch_size"].estimate < 0 < grown["image_size"].estimate
    for name, found in fit.exponents.items():
        assert found.low <= grown[name].estimate <= found.high, name


def test_the_best_shape_is_that_of_brute_force(exact):
    at = target(exact, FLOPS)
    shapes, loss = every_shape(at)
    best = best_shape(exact, FLOPS)
    assert tuple(getattr(best.shape, n) for n in DIMENSIONS) == shapes[int(loss.argmin())]
    assert best.loss == pytest.approx(loss.min(), rel=1e-12)


def test_no_grid_of_tokens_is_named_that_is_coarser_or_finer_than_any_run(fit):
    pairs = {tuple(pair) for pair in target(fit, FLOPS).run_pairs().tolist()}
    assert (4, 16) in pairs and (8, 32) in pairs and (2, 32) in pairs
    assert (8, 16) not in pairs  # 2 x 2 tokens; (2, 64), 32 x 32 tokens, was run off the axes
    assert (8, 48) not in pairs  # 6 x 6 tokens, on 4 x 4 cells


def test_each_value_has_the_best_shape_with_it(exact):
    at = target(exact, FLOPS)
    shapes, loss = every_shape(at)
    for name in ("patch_size", "image_size"):
        k = DIMENSIONS.index(name)
        rows = by_value(at, name, rules_of(at))
        assert [row["value"] for row in rows] == sorted({s[k] for s in shapes})
        for row in rows:
            mine = np.array([s[k] == row["value"] for s in shapes])
            assert row["loss"] == pytest.approx(loss[mine].min(), rel=1e-12)
        assert min(row["loss"] for row in rows) == pytest.approx(loss.min(), rel=1e-12)


def test_rules_hold_for_each_value(exact):
    rows = trade(exact, FLOPS, "patch_size", max_params=20_000, mlp_multiple=32)["values"]
    assert all(row["num_params"] <= 20_000 and row["shape"]["mlp_dim"] % 32 == 0 for row in rows)
    with pytest.raises(UserError, match="no shape of any patch_size that was run keeps to the rules"):
        trade(exact, FLOPS, "patch_size", max_params=100)


@pytest.fixture(scope="module")
def drawn(fit):
    return trade(fit, FLOPS, "patch_size")


def test_excess_is_of_the_shapes_named(fit, drawn):
    found = drawn
    losses = predicted_loss(fit, [Shape(**row["shape"]) for row in found["values"]], FLOPS)
    for row, loss in zip(found["values"], losses):
        assert row["loss"] == pytest.approx(loss) and row["loss_low"] < loss < row["loss_high"]
        assert row["excess"]["estimate"] == pytest.approx(loss / losses.min() - 1, abs=1e-12)
        assert row["excess"]["low"] <= row["excess"]["estimate"] <= row["excess"]["high"]


def test_spending_doubles_the_flops_of_one_image_and_keeps_the_images(exact, answer):
    found = answer["spend"]
    shape = found["shape"]
    geometry = target(exact, FLOPS).geometry
    start = {n: float(shape[n]) for n in DIMENSIONS}
    images = FLOPS / 3 / geometry.flops(start, head=True)
    assert found["train_flops"] == FACTOR * FLOPS

    def loss(sizes):
        return (
            sum(A * sizes[n] ** a for n, (A, a) in planted.TRUTH.items()) + planted.B * images**-planted.C + planted.EPS
        )

    for name, option in found["options"].items():
        moved = start | {name: option["to"]}
        assert geometry.flops(moved, head=True) == pytest.approx(2 * geometry.flops(start, head=True), rel=1e-9)
        assert option["gain"]["estimate"] == pytest.approx(1 - loss(moved) / loss(start), rel=1e-9)
    assert found["options"]["patch_size"]["to"] < shape["patch_size"]


# statuses --------------------------------------------------------------------------------------------------------------


def refit(tmp_path, bootstrap=100, **changed):
    truth = planted.TRUTH | changed
    path = write_ledger(tmp_path / "some.jsonl", planted.planted_rows(truth, seed=1))
    data = measurements([path])
    return law.fit("joint", data.columns, data.y, bootstrap=bootstrap, metric="val_loss")


def test_a_patch_that_costs_nothing_is_unidentified_and_the_largest_run_is_named(tmp_path):
    fit = refit(tmp_path, patch_size=(0.0, 0.7))
    found = fit.exponents["patch_size"]
    assert found.status == "unidentified" and found.estimate is None
    best = best_shape(fit, FLOPS)
    assert best.shape.patch_size == 8 and best.optimum["patch_size"].estimate <= 8 * 4
    assert best.regret.high < 0.05  # against what can be built, not against patches of no tokens
    trade(fit, FLOPS, "patch_size")


def test_a_patch_that_hardly_hurts_is_at_the_edge(tmp_path):
    found = refit(tmp_path, patch_size=(0.03, 0.7)).exponents["patch_size"]
    assert found.status == "edge" and "largest value run (8)" in found.note


# a data term that tells tokens -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dear(tmp_path_factory):
    """Rows of a world in which an image teaches less the more patches it is cut into: B (tokens / 64)^.4 n^-c."""
    rows = planted.planted_rows(seed=2)
    for row in rows:
        tokens = (row["image_size"] / row["patch_size"]) ** 2
        row["val_loss"] += planted.B * row["num_examples"] ** -planted.C * ((tokens / 64) ** 0.4 - 1)
    return measurements([write_ledger(tmp_path_factory.mktemp("dear") / "dear.jsonl", rows)])


def test_tokens_in_the_data_term_are_found_where_they_are_and_the_optimum_is_exact(dear):
    options = dict(bootstrap=100, metric="val_loss")
    fits = {form: law.fit(form, dear.columns, dear.y, **options) for form in ("joint", "joint_tokens")}
    rmse = {form: found.extrapolation.scores[form].rmse for form, found in fits.items()}
    assert rmse["joint_tokens"] < 0.01 < rmse["joint"]
    found = fits["joint_tokens"]
    for name, planted_value in dict(h=0.4, c=planted.C, a_patch_size=0.7, a_image_size=1.1).items():
        assert found.intervals[name].low <= planted_value <= found.intervals[name].high, name
    at = target(found, FLOPS)
    shapes, loss = every_shape(at)
    assert tuple(getattr(best_shape(found, FLOPS).shape, n) for n in DIMENSIONS) == shapes[int(loss.argmin())]
    v = at.optimum()
    for step in np.eye(5) * 1e-3:  # no real shape around the optimum is better
        for sign in (1, -1):
            moved = dict(zip(at.dims, np.exp(v + sign * step)[:, None]))
            assert at.loss(moved)[0] >= at.loss(dict(zip(at.dims, np.exp(v)[:, None])))[0]
    columns = {n: dear.columns[n] for n in (*DIMENSIONS, "num_examples")}  # tokens are counted where they are not given
    assert np.abs(np.log(found.predict(columns) / dear.y)).max() < 0.02


# surfaces --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    path = write_ledger(root / "tokens.jsonl", planted.planted_rows())
    fit_ledgers([path], bootstrap=100, form="joint", out=root / "tokens_law")
    return root / "tokens_law"


def test_the_report_speaks_of_patch_and_image_as_they_are(folder):
    text = (folder / "report.md").read_text()
    assert "best patch size falls as compute^-0." in text and "best image size grows as compute^0." in text
    assert "patch_size is" not in text.replace("`", "") and "Patch_size" not in text
    assert "2 times the FLOPs an image at as many images" in text
    assert (folder / "optimal_shape.png").is_file() and (folder / "fit_by_dimension.png").is_file()
    fitted = Fit.from_json((folder / "law.json").read_text())
    assert fitted.data.grid_sides == [4, 8, 12, 16, 32]
    # by arm the paper's own form says the same: its patch shrinks as compute grows
    by_arm = Fit.from_json((folder / "forms" / "sovit.json").read_text()).exponents["patch_size"]
    assert by_arm.estimate is None or by_arm.estimate < 0


def test_the_command_answers_in_words_and_json(folder, capsys):
    arguments = ["predict", str(folder / "law.json"), "--train-flops", "3e12", "--by", "patch_size"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "lower the loss by, spent on: " in said and "best shape with it" in said
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert trade_text(found) + "\n" == said
    assert [row["value"] for row in found["values"]] == [2, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-flops", "3e12", "--by", "width"], "by='width': choose patch_size or image_size"),
        (["--by", "patch_size"], "name a budget with --train-flops"),
        (["--frontier", "--by", "patch_size"], "--by asks at one budget"),
        (["--train-flops", "3e12", "--out", "x"], "--out belongs to --frontier"),
        (["--train-flops", "3e40", "--by", "patch_size"], "decades from the budgets run"),
    ],
)
def test_bad_questions_get_one_line(folder, capsys, arguments, message):
    assert main(["predict", str(folder / "law.json"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_law_of_one_patch_size_says_so():
    path = "results/stream_star_law/law.json"
    with pytest.raises(UserError, match="the law has no term in patch_size, which was 4 in all its rows"):
        trade(fitted_law.read_law(path), 1e12, "patch_size")


def test_without_draws_there_is_no_interval_and_that_is_said(exact):
    text = trade_text(trade(exact, FLOPS, "image_size"))
    assert "none" in text and "%" in text and " to " not in text
