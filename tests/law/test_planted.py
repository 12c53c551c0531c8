"""Planted laws: their optimum against the law engine's and against neighbours, their counts, their designs, their noise."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sovit import UserError
from sovit.law import fit as law
from sovit.law.checks import simulate as planted
from sovit.spec.shape import Shape

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from studies import stream_star

COMPUTE = float(planted.SOVIT.flops(dict(zip(planted.DIMS, planted.ANCHOR)), head=False)) * planted.ANCHOR_IMAGES


@pytest.mark.parametrize("kind", planted.KINDS)
def test_the_optimum_is_where_it_was_calibrated_and_no_neighbour_is_better(kind):
    where, compute = planted.ANCHOR, COMPUTE
    if kind == "stream":
        where, compute = planted.STREAM_ANCHOR, planted.STREAM_COMPUTE
    truth = planted.truth(kind)
    np.testing.assert_allclose(truth.optimum(compute), where, rtol=2e-3)
    rng = np.random.default_rng(0)
    for law_ in (truth, planted.truth(kind, rng)):
        best = law_.optimum(100 * compute)
        around = best * np.exp(rng.normal(0, 0.02, (200, 3)))
        assert (law_.loss_at(around, 100 * compute) >= law_.loss_at(best, 100 * compute)).all()
        assert law_.regret(best, 100 * compute) == pytest.approx(0, abs=1e-12)


def growth(truth, low, high):
    return np.log(truth.optimum(high) / truth.optimum(low)) / np.log(high / low)


@pytest.mark.parametrize("kind", ["joint", "weak", "bounded", "stream"])
def test_an_exact_fit_finds_the_growth_of_the_truth(kind):
    truth = planted.truth(kind, np.random.default_rng(5))
    design = planted.stream_star() if kind == "stream" else planted.sovit_star()
    form = "joint" if truth.zero_line is None else "bounded"
    options = dict(geometry=design.known, extrapolate=False, zero_line=truth.zero_line)
    found = law.fit(form, design.columns, design.losses(truth), clusters=design.trunk, **options)
    assert tuple(found.exponents) == planted.DIMS
    for true, (name, e) in zip(growth(truth, *found.data.compute_range), found.exponents.items()):
        assert e.status == "edge" or e.estimate == pytest.approx(true, rel=5e-3), name


def test_eq3_is_eq2_on_every_arm():
    truth, design = planted.truth("eq3"), planted.sovit_star()
    options = dict(geometry=design.known, extrapolate=False)
    found = law.fit("sovit", design.columns, design.losses(truth), clusters=design.trunk, **options)
    assert found.diagnostics.residual_rms < 1e-4
    np.testing.assert_allclose([e.estimate for e in found.exponents.values()], [0.22, 0.45, 0.6], rtol=0.02)
    np.testing.assert_allclose(growth(truth, 1e18, 1e20), [0.22, 0.45, 0.6], rtol=2e-3)


def test_more_interaction_moves_the_optimum_away_from_the_additive_law():
    compute = 1000 * COMPUTE
    depth = [planted.truth("inter", frac=f).optimum(compute)[1] for f in (0.0, 0.4, 0.8)]
    assert depth[0] == pytest.approx(planted.truth("joint").optimum(compute)[1]) and depth == sorted(depth)


@pytest.mark.parametrize(
    "shape",
    [Shape(608, 10, 928, 16, 14, 224, "map"), Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")],
)
def test_parameters_are_counted_as_shapes_count_them(shape):
    geometry = planted.SOVIT if shape.pool == "map" else planted.STREAM
    assert planted.num_params([shape.width, shape.depth, shape.mlp_dim], geometry) == shape.num_params


def test_the_stream_star_is_that_of_the_study():
    design, runs = planted.stream_star(), stream_star.runs()
    own = sorted((run.shape.width, run.shape.depth, run.shape.mlp_dim, n) for run in runs for n in run.budgets)
    ours = sorted((*map(int, s), n) for s, n in zip(design.shapes.tolist(), design.columns["num_examples"]))
    assert [row[:3] for row in own] == [row[:3] for row in ours] and design.trunk.max() + 1 == len(runs)
    np.testing.assert_allclose([row[3] for row in own], [row[3] for row in ours], rtol=0.01)


@pytest.mark.parametrize("kind", ["normal", "t3", "arms"])
def test_noise_has_the_size_and_the_share_it_was_asked_for(kind):
    design = planted.sovit_star()
    logs = np.log([planted.noise(design, 0.01, 0.7, np.random.default_rng(s), kind) for s in range(4000)])
    within = logs - logs.reshape(4000, 18, 3).mean(2).repeat(3, 1)
    assert logs.std() == pytest.approx(0.01, rel=0.06)
    assert (within**2).sum() / 4000 / 36 == pytest.approx(0.3e-4, rel=0.12)
    same_arm = np.corrcoef(logs[:, 0], logs[:, 3])[0, 1]
    assert same_arm == pytest.approx(0.35 if kind == "arms" else 0.0, abs=0.06)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'cubic'"):
        planted.truth("cubic")
