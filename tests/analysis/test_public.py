"""Published sweeps against their published figures, and extrapolation on planted truths.

What needs the sweeps themselves skips where they are not beside this repository; the readers are held to planted files.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from planted_ledger import planted_rows, write_ledger

from analysis.published import extrapolation, fits
from analysis.published import sweeps as public
from analysis.published.shapes import implied_compute, implied_exponents, shapes_table
from sovit import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT.parent / "shared" / "data"


def published(folder):
    if not (FOLDER / folder).exists():
        pytest.skip(f"the published sweep {folder} is not here")
    return FOLDER


# file and terms -> refitted exponents, E, our objective as first found
ACCEPTED = {
    0: ((0.259, 0.597), 1.951, 0.006592534166),
    1: ((0.261, 0.142, 0.531), 0.000, 0.003878217383),
    2: ((0.205, 0.475, 0.372, 0.503), 1.486, 0.002642729095),
    3: ((0.300, 0.580), 2.075, 0.001964086431),
}


@pytest.fixture(scope="module")
def gemstones():
    return fits.gemstones(published("gemstones"), num_starts=4)


@pytest.mark.parametrize("i", ACCEPTED)
def test_gemstones(gemstones, i):
    """Arxiv 2502.06857: exponents to their digits, an objective below that at the authors' parameters and scipy's."""
    exponents, floor, objective = ACCEPTED[i]
    row = gemstones[i]
    assert row["exponents"] == pytest.approx(exponents, abs=5.1e-4)
    assert row["floor"] == pytest.approx(floor, abs=1.1e-3)
    assert row["published"]["objective"] * (1 - 1e-4) < row["objective"] < row["published"]["objective"]
    assert row["objective"] == pytest.approx(objective, rel=1e-8)
    assert row["excess"] < fits.TOLERANCE


def test_a_power_mean_extrapolates_farseer_and_a_sum_the_parallel_models():
    table = {(r["family"], r["form"], len(r["terms"])): r for r in fits.scalebench(published("scalebench"), 2)}
    assert table["farseer", "power_mean", 2]["rmse"] < 0.2 * table["farseer", "additive", 2]["rmse"]
    assert table["parallel", "additive", 2]["rmse"] < 0.2 * table["parallel", "additive", 1]["rmse"]
    assert all(row["excess"] < fits.TOLERANCE for row in table.values())


def write_scalebench(folder, family):
    import pyarrow
    import pyarrow.parquet as parquet

    (columns, target), rng = public.POWER_SUMS[family], np.random.default_rng(0)
    for split, low in (("train", 0.0), ("test", 3.0)):
        x = np.exp(rng.uniform(low, low + 2, (24, len(columns))))
        loss = 0.3 + (x ** -np.linspace(0.3, 0.6, len(columns))).sum(1)
        path = (
            folder
            / "scalebench"
            / "benchmark"
            / "dataset"
            / f"{family}_scaling_law"
            / f"{split}-00000-of-00001.parquet"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        table = dict(zip(columns, x.T)) | {target: loss, "group": ["all_data"] * 24}
        parquet.write_table(pyarrow.table(table), path)


def test_planted_power_sums_are_recovered_and_extrapolate(tmp_path):
    for family in public.POWER_SUMS:
        write_scalebench(tmp_path, family)
    for row in fits.scalebench(tmp_path, num_starts=2):
        terms, _ = public.POWER_SUMS[row["family"]]
        if row["form"] == "additive" and row["terms"] == terms:
            assert row["exponents"] == pytest.approx(np.linspace(0.3, 0.6, len(terms)), abs=1e-3)
            assert row["rmse"] < 1e-4
        elif row["form"] != "power_mean":
            assert row["rmse"] > 0.02


def test_the_second_optimiser_finds_what_ours_would_have_missed():
    n = np.geomspace(3e6, 1e9, 40)
    y = (0.2 + 0.4 * (n / 1e9) ** -0.5) * (1 + 0.01 * np.sin(n))
    sweep = public.Sweep(dict(num_examples=n), y, np.arange(len(n)), np.zeros(len(n), bool))
    found = fits.fit_columns("additive", sweep, ("num_examples",), kind="log_squares")
    assert abs(fits.optimum(found, 8)["excess"]) < fits.TOLERANCE
    worse = dataclasses.replace(
        found, solved=dataclasses.replace(found.solved, objective=found.solved.objective * 1.01)
    )
    assert fits.optimum(worse, 8)["excess"] == pytest.approx(0.01, rel=1e-4)
    pinned = [fits.pinned_objective(found, dict(c=found.params["c"] + step)) for step in (0.0, 0.01, 0.02)]
    assert pinned[0] == pytest.approx(found.solved.objective, rel=1e-9) and pinned[0] < pinned[1] < pinned[2]


@pytest.mark.parametrize("analysis", [fits, extrapolation])
def test_a_folder_without_the_sweeps_is_said_in_one_line(analysis, tmp_path, capsys):
    ledger = write_ledger(tmp_path / "a.jsonl", planted_rows())
    folder = [str(tmp_path)] if analysis is fits else [str(ledger), "--public", str(tmp_path)]
    assert analysis.main([*folder, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"sovit: cannot read {tmp_path}") and "give the folder that holds gemstones" in said


@pytest.fixture
def few_forms(monkeypatch):
    """The forms that the tests of choices need: the others cost time and change nothing here."""
    monkeypatch.setattr("analysis.published.data_sets.TRIED", ("joint", "bounded"))
    monkeypatch.setattr(extrapolation, "FORMS", ("joint", "bounded"))


def test_a_truth_with_shape_is_extrapolated_better_than_by_every_baseline(tmp_path, few_forms):
    """Loss that depends on the three dimensions in another way than on their parameter count."""
    amplitudes = dict(width=(40.0, 1.3), depth=(0.05, 1.3), mlp_dim=(2.0, 0.55))
    ledger = write_ledger(tmp_path / "shaped.jsonl", planted_rows(amplitudes=amplitudes, seeds=1))
    data, error = extrapolation.of_ledger(ledger)
    found = extrapolation.study(data)
    assert (data.metric, error.metric) == ("val_loss", "val_error")
    assert len(found["cuts"]) == 3
    assert {c["verdict"] for c in found["pooled"]["against"]["headline"].values()} == {"better"}
    last = found["cuts"][-1]
    assert last["headline"] == "bounded" and last["forms"]["headline"]["rmse"] < 0.01  # noise is 0.45 %
    assert last["forms"]["nearest"]["bias"] > 0  # a dearer run is a better one
    assert all(c["high"] < 1 for c in last["against"]["headline"].values())
    assert last["forms"]["headline"]["by_distance"][0]["decades"] == pytest.approx(0.5, abs=0.05)


def test_a_truth_of_size_alone_is_not_extrapolated_better_than_by_the_size_law(tmp_path, few_forms):
    rows, rng = planted_rows(seeds=1), np.random.default_rng(0)
    for row in rows:
        row["val_loss"] = 0.3 + 9 * row["num_params"] ** -0.3 + 20 * row["num_examples"] ** -0.3
        row["val_loss"] *= float(np.exp(rng.normal(0, 0.003)))
    data = extrapolation.of_ledger(write_ledger(tmp_path / "sized.jsonl", rows))[0]
    found = extrapolation.study(data)
    assert found["pooled"]["against"]["headline"]["chinchilla"]["verdict"] != "better"
    last = found["cuts"][-1]  # at the first, size and images of one budget cannot be told apart
    assert last["against"]["headline"]["chinchilla"]["verdict"] != "better"
    assert last["winner"] == "chinchilla" and last["forms"]["chinchilla"]["rmse"] < 0.006


def test_what_lies_above_the_cut_has_no_say_in_the_choice_or_the_prediction(tmp_path, few_forms):
    data = extrapolation.of_ledger(write_ledger(tmp_path / "a.jsonl", planted_rows(seeds=1)))[0]
    cut = extrapolation.cuts_of(data.columns["compute"])[1]
    above = data.columns["compute"] >= cut
    other = dataclasses.replace(data, y=np.where(above, 0.9 * data.y, data.y))
    chosen, predicted = [], []
    for each in (data, other):
        fits_below = extrapolation.fits_below(each, np.flatnonzero(~above))
        chosen.append(extrapolation.choose(fits_below, ("joint", "bounded")))
        predicted.append(extrapolation.predictions(each, fits_below, cut))
    assert chosen[0] == chosen[1] is not None
    assert set(predicted[0]) == {"joint", "bounded", "chinchilla", "compute_only", "nearest"}
    for form in predicted[0]:
        np.testing.assert_array_equal(predicted[0][form], predicted[1][form])
    own = data.fit("bounded", cut=cut).extrapolation.scores["bounded"]  # the same test as `law.fit` makes
    np.testing.assert_allclose(predicted[0]["bounded"], own.predicted, rtol=1e-9)


def test_comparison_by_trunk():
    rng = np.random.default_rng(1)
    trunks = np.repeat(np.arange(12), 3)
    ours, theirs = 0.01 * rng.standard_normal((2, 36))
    half = extrapolation.compare(0.5 * theirs, theirs, trunks)
    assert (half["ratio"], half["low"], half["high"]) == pytest.approx((0.5, 0.5, 0.5)) and half["verdict"] == "better"
    assert extrapolation.compare(theirs, 0.5 * theirs, trunks)["verdict"] == "worse"
    even = extrapolation.compare(ours, theirs, trunks)
    assert even["low"] < 1 < even["high"] and even["verdict"] == "not distinguishable"
    again = extrapolation.compare(np.tile(ours, 4), np.tile(theirs, 4), np.tile(trunks, 4))
    assert again["low"] == pytest.approx(even["low"]) and again["high"] == pytest.approx(even["high"])
    assert extrapolation.compare(ours[:6], theirs[:6], trunks[:6])["verdict"] == "too few trunks"


def test_coverage_of_the_comparison_of_two_equal_errors():
    """Two forms whose errors are drawn alike, by trunk: the interval leaves 1 out in about a tenth of the draws."""
    rng, left_out = np.random.default_rng(0), 0
    trunks = np.repeat(np.arange(20), 3)
    for _ in range(200):
        ours, theirs = (rng.standard_normal(20)[trunks] + rng.standard_normal(60) for _ in range(2))
        left_out += extrapolation.compare(ours, theirs, trunks)["verdict"] != "not distinguishable"
    assert 0.05 < left_out / 200 < 0.2


def test_cuts_lie_between_budgets_or_half_decades_apart():
    budgets = np.repeat([1e10, 3e10, 1e11], 20) * np.exp(0.02 * np.sin(np.arange(60)))
    cuts = extrapolation.cuts_of(budgets)
    assert len(cuts) == 2 and 1.1e10 < cuts[0] < 2.9e10 and 3.1e10 < cuts[1] < 9.9e10
    spread = extrapolation.cuts_of(np.geomspace(1e10, 1e12, 101))
    assert np.log10(spread) == pytest.approx([10.5, 11, 11.5])
    assert extrapolation.cuts_of(np.geomspace(1e10, 1.1e10, 50)) == []


def test_a_ledger_that_nothing_orders_is_refused(tmp_path):
    rows = [dict(run_id=str(i), status="ok", val_loss=1.0 + i, num_examples=10 + i) for i in range(3)]
    with pytest.raises(UserError):
        extrapolation.of_ledger(write_ledger(tmp_path / "bare.jsonl", rows))


def test_the_committed_scores_are_what_the_ledger_gives():
    data = extrapolation.of_ledger(ROOT / "results" / "stream_star.jsonl")[0]
    kept = json.loads((ROOT / "results" / "extrapolation.json").read_text())[0]
    found = extrapolation.study(data)["pooled"]
    for form, scored in found["forms"].items():
        assert scored["rmse"] == pytest.approx(kept["pooled"]["forms"][form]["rmse"], rel=1e-6), form
    assert found["winner"] == kept["pooled"]["winner"]
    assert found["against"]["headline"]["chinchilla"]["ratio"] == pytest.approx(
        kept["pooled"]["against"]["headline"]["chinchilla"]["ratio"], rel=1e-6
    )


def test_a_power_law_path_implies_its_own_compute():
    s = dict(width=0.2, depth=0.35)
    start = dict(width=64.0, depth=3.0)
    end = {n: x * 50 ** s[n] for n, x in start.items()}
    assert implied_compute(start, end, s) == pytest.approx(dict(width=50, depth=50))
    assert implied_exponents(start, end, 50) == pytest.approx(s)


def test_the_published_shapes_and_the_published_exponents_disagree_as_known():
    table = shapes_table()
    ratios = [[round(ratio) for ratio in row["ratios"].values()] for row in table["implied"]]
    assert ratios[:2] == [[6092, 751, 2146], [155, 50, 98]]
    assert [round(s, 2) for s in table["exponents"].values()] == [0.21, 0.31, 0.48]
    assert table["compute_ratio"] == pytest.approx(48.1, rel=0.01)
