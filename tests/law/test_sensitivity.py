"""What a law depends on: planted breaks are named, countings have their closed form."""

import dataclasses
import json

import numpy as np
import planted_ledger as planted
import pytest

from sovit.law import fit as law
from sovit.law.checks.sensitivity import extrapolation_cuts, sensitivity
from sovit.ledger.measurements import measurements
from sovit.report import figures as plot

SIZE = dict(width=(18.0, 1.3), depth=(0.55, 1.3), mlp_dim=(9.0, 0.55))
BUDGET = 3.16e12


def joint_loss(row, tilt=0.0):
    """A planted joint law; `tilt` bends the exponent of the MLP dim."""
    size = sum(A * row[name] ** -a for name, (A, a) in SIZE.items() if name != "mlp_dim")
    return size + 9.0 * row["mlp_dim"] ** -(0.55 + tilt) + 42.0 * row["num_examples"] ** -0.3 + 0.2


def ledger_of(folder, change=lambda row: 1.0, noise=0.001, tilt=lambda row: 0.0):
    rng = np.random.default_rng(0)
    rows = [
        row | dict(val_loss=float(joint_loss(row, tilt(row)) * change(row) * np.exp(rng.normal(0, noise))))
        for row in planted.planted_rows(seeds=1)
    ]
    return measurements([planted.write_ledger(folder / "a.jsonl", rows)])


def fitted(data, form="joint", **options):
    return law.fit(form, data.columns, data.y, extrapolate=False, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ledger_of(tmp_path_factory.mktemp("sensitivity"))


@pytest.fixture(scope="module")
def found(data):
    return sensitivity(data, fitted(data, bootstrap=100), BUDGET)


def rows_of(found, what):
    return {row["setting"]: row for row in found["alterations"] if row["what"] == what}


def test_one_bad_shape_is_the_largest_mover_and_is_named(tmp_path, data, found):
    spoilt = ledger_of(tmp_path, lambda row: 1.3 if row["width"] == 16 else 1.0)
    out = sensitivity(spoilt, fitted(spoilt, loss="log_squares", bootstrap=100), BUDGET)
    shapes = rows_of(out, "shape")
    own = out["headline"]["exponents"]["width"]
    worst = max(shapes, key=lambda name: abs(shapes[name]["exponents"]["width"] - own))
    assert worst == "without 16x2x256"
    others = [
        row for row in out["alterations"] if row["what"] not in ("shape", "form")
    ]  # `bounded` is simply wrong here
    farthest = max(abs(row["exponents"]["width"] - own) for row in others)
    assert abs(shapes[worst]["exponents"]["width"] - own) > farthest
    moved = out["dimensions"]["width"]
    assert moved["mover"] in ("shape: without 16x2x256", "form: `bounded`")
    assert "shape: without 16x2x256" in [o["setting"] for o in moved["outside"][:2]]
    # without it the law is that of the ledger that was never spoilt
    healed = shapes[worst]["exponents"]
    for name, truth in found["headline"]["exponents"].items():
        assert healed[name] == pytest.approx(truth, abs=0.01)
    assert abs(own - found["headline"]["exponents"]["width"]) > 0.03


def test_a_refit_without_a_shape_is_that_of_the_rows_that_are_left(data, found):
    keep = data.columns["depth"] != 6
    alone = dataclasses.replace(data, columns={k: v[keep] for k, v in data.columns.items()}, y=data.y[keep])
    again = fitted(alone, dims=("width", "depth", "mlp_dim"))
    row = rows_of(found, "shape")["without 32x6x256"]
    assert row["num_rows"] == keep.sum()
    # over another range of compute and with its own noise components: nearly the same
    for name, e in again.exponents.items():
        assert row["exponents"][name] == pytest.approx(e.estimate, abs=0.004)
    assert row["excess_loss"] == pytest.approx(0, abs=1e-4) and row["excess_loss"] >= 0


def test_a_break_at_the_lowest_budget_shows_in_the_window(tmp_path, data, found):
    lowest = data.columns["train_flops"].min() * 1.1
    broken = ledger_of(tmp_path, tilt=lambda row: -0.08 if row["train_flops"] < lowest else 0.0)
    out = sensitivity(broken, fitted(broken, bootstrap=100), BUDGET)
    truth, own = found["headline"]["exponents"]["mlp_dim"], out["headline"]["exponents"]["mlp_dim"]
    windows = rows_of(out, "window")
    assert [name.partition(" (")[0] for name in windows] == [
        "without the lowest budget",
        "without the highest budget",
        "only the lower half of the budgets",
        "only the upper half of the budgets",
    ]
    assert windows["without the lowest budget (3.2e10)"]["exponents"]["mlp_dim"] == pytest.approx(truth, abs=0.01)
    assert abs(own - truth) > 0.03
    at = np.round(np.log10(data.columns["train_flops"]), 1)
    low, high = (at > at.min()).sum(), (at < at.max()).sum()
    assert [row["num_rows"] for row in windows.values()] == [low, high, (at < 11.2).sum(), (at > 11.2).sum()]


def test_a_law_by_arm_and_a_joint_one_answer_other_questions(data):
    out = sensitivity(data, fitted(data, "sovit"), BUDGET)
    joint = rows_of(out, "form")["`joint`"]
    assert "another question" in joint["note"] and out["headline"]["excess_loss"] is None
    assert not [o for moved in out["dimensions"].values() for o in moved["outside"] if "form: `joint`" in o["setting"]]


def test_everything_is_plain_data_and_the_same_again(data, found):
    again = sensitivity(data, fitted(data, bootstrap=100), BUDGET)
    assert json.dumps(found, allow_nan=False) == json.dumps(again, allow_nan=False)
    losses = rows_of(found, "loss")
    assert len(losses) == 3 and all(row["num_rows"] == len(data.y) for row in losses.values())
    for dim, moved in found["dimensions"].items():
        low, high = moved["smallest"], moved["largest"]
        every = [row["exponents"][dim] for row in found["alterations"] if row["kind"] == "joint"]
        assert low == min(every) and high == max(every)


def test_figure_shows_every_alteration_and_the_interval(found):
    figure = plot.sensitivity(found)
    for axis, dim in zip(figure.axes, found["dimensions"]):
        own = found["dimensions"][dim]
        dots = np.concatenate([c.get_offsets()[:, 0] for c in axis.collections])
        said = [row["exponents"][dim] for row in found["alterations"] if row["kind"] == "joint"]
        assert sorted(dots) == pytest.approx(sorted(said))
        (band,) = axis.patches
        assert [band.get_x(), band.get_x() + band.get_width()] == pytest.approx([own["low"], own["high"]])
    assert plot.sensitivity(dict(note="nothing")) is None


def test_cuts_hold_the_fits_own_test_and_name_the_budget(data):
    fit = law.fit("joint", data.columns, data.y)
    cuts = extrapolation_cuts(data, {"joint": fit})
    budgets = data.columns["train_flops"]
    assert [c["n_fit"] for c in cuts] == [(budgets < 2e11).sum(), (budgets < 5e11).sum()]
    assert [c["n_fit"] + c["n"] for c in cuts] == [len(data.y)] * 2
    assert [c["largest"] for c in cuts] == pytest.approx([1e11, 3.2e11], rel=0.01)
    own = fit.extrapolation.scores
    for name, score in cuts[-1]["forms"].items():
        assert score["rmse"] == pytest.approx(own[name].rmse, rel=1e-6)
    assert max(cut["forms"]["joint"]["rmse"] for cut in cuts) < 0.003  # the planted law: noise of .1 % and no more
    assert set(own) == {"joint", "chinchilla", "compute_only", "nearest"}


def test_one_budget_has_no_window_and_no_cut(data):
    one = data.columns["train_flops"] < data.columns["train_flops"].min() * 1.1
    single = dataclasses.replace(data, columns={k: v[one] for k, v in data.columns.items()}, y=data.y[one])
    fit = fitted(data)
    assert not rows_of(sensitivity(single, fit, BUDGET), "window") and not extrapolation_cuts(single, {"joint": fit})
