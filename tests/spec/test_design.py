"""Designs: which shapes, how many, and what each of them varies."""

import pytest

from sovit import UserError
from sovit.spec.design import grid, isoflop, star, to_runs
from sovit.spec.run import Recipe
from sovit.spec.shape import Shape

CENTRE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
ARMS = {"width": (16, 24, 48, 64), "depth": (1, 3, 4, 6), "mlp_dim": (32, 64, 256, 512)}


def moved(shape, centre=CENTRE):
    return {name for name, value in shape.to_dict().items() if value != getattr(centre, name)}


def test_star_is_a_centre_and_arms_of_one_dimension_each():
    shapes = star(CENTRE, ARMS, corners=False)
    assert shapes[0] == CENTRE
    assert len(shapes) == 1 + 4 + 4 + 4
    assert [moved(s) for s in shapes[1:]] == [{"width"}] * 4 + [{"depth"}] * 4 + [{"mlp_dim"}] * 4
    assert [s.width for s in shapes[1:5]] == [16, 24, 48, 64]


@pytest.mark.parametrize(
    "arms",
    [
        ARMS,
        {"width": (16, 24, 48, 64, 96), "depth": (1, 3, 4, 6), "mlp_dim": (64, 256, 512, 1024)},
        {"width": (16, 64), "depth": (1, 4)},
        {"width": (16, 24), "depth": (1,)},  # all below the centre: it is the upper quartile of both
        {"width": (16,), "depth": (1,), "mlp_dim": (64,)},
        {**ARMS, "image_size": (32, 64)},
    ],
)
def test_corners_are_off_every_axis(arms):
    axes = star(CENTRE, arms, corners=False)
    shapes = star(CENTRE, arms)
    assert shapes[: len(axes)] == axes
    corners = shapes[len(axes) :]
    assert corners and all(len(moved(c)) >= 2 and moved(c) <= set(arms) for c in corners)
    assert len(set(shapes)) == len(shapes)
    for c in corners:  # of values that the arms run, so that no corner is an extrapolation
        assert all(getattr(c, name) in (*arms[name], getattr(CENTRE, name)) for name in arms)


def test_three_arms_have_four_corners_that_tell_interactions_apart():
    corners = star(CENTRE, ARMS)[13:]
    assert len(corners) == 4
    for one, other in (("width", "depth"), ("width", "mlp_dim"), ("depth", "mlp_dim")):
        assert len({(getattr(c, one), getattr(c, other)) for c in corners}) == 4  # every pair of levels


def test_the_shapes_of_sovit():
    """arXiv 2305.13035 section 3.1: a star of 18 shapes off the centre, at three durations 54 runs; a grid of 64."""
    arms = {
        "width": (608, 768, 928, 1088, 1328, 1648),
        "depth": (8, 10, 12, 16, 20, 24),
        "mlp_dim": (1088, 1360, 1728, 2160, 2592, 3072),
    }
    centre = Shape(1968, 40, 6144, head_dim=1, patch_size=14, pool="map")
    shapes = star(centre, arms, corners=False)
    assert len(shapes) - 1 == 18
    assert len(star(centre, arms)) == 19 + 4
    assert {s.depth for s in shapes} == {8, 10, 12, 16, 20, 24, 40}
    small = grid(centre, {"width": (416, 512, 608, 768), "depth": (6, 8, 10, 12), "mlp_dim": (768, 928, 1088, 1360)})
    assert len(set(small)) == 64


def test_grid_is_every_combination():
    shapes = grid(CENTRE, {"width": (16, 32), "depth": (1, 2, 3)})
    assert [(s.width, s.depth) for s in shapes] == [(16, 1), (16, 2), (16, 3), (32, 1), (32, 2), (32, 3)]
    assert all(moved(s) <= {"width", "depth"} for s in shapes)


def test_isoflop_keeps_proportions():
    shapes = isoflop(Shape(64, 4, 256, head_dim=8), (16, 32, 64, 128))
    assert [s.label for s in shapes] == ["16x1x64", "32x2x128", "64x4x256", "128x8x512"]
    assert isoflop(Shape(64, 4, 256, head_dim=8), (8,))[0].depth == 1


def test_what_cannot_be_built_is_left_out_and_said():
    base = Shape(64, 4, 256, head_dim=8, patch_size=4, image_size=32)
    with pytest.warns(UserWarning, match=r"patch_size=3 \(patch 3 does not divide 32 pixels\)"):
        assert [s.patch_size for s in grid(base, {"patch_size": (2, 3, 8)})] == [2, 8]
    with pytest.warns(UserWarning, match=r"patch_size=8, image_size=20 \(patch 8 does not divide 20 pixels\)$"):
        shapes = grid(base, {"patch_size": (4, 8), "image_size": (16, 20)})
    assert [(s.patch_size, s.image_size) for s in shapes] == [(4, 16), (4, 20), (8, 16)]


def test_a_star_over_patch_and_image_has_its_corners():
    base = Shape(64, 4, 256, head_dim=8, patch_size=4, image_size=32)
    shapes = star(base, {"width": (32, 48, 96), "patch_size": (2, 8), "image_size": (16, 48, 64)})
    corners = [moved(s, base) for s in shapes if len(moved(s, base)) > 1]
    assert {"width", "patch_size", "image_size"} in corners and {"width", "patch_size"} in corners
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"no value of patch_size in \(3, 5\) can be built"):
        star(base, {"patch_size": (3, 5)})


def test_runs_spend_the_budgets_to_one_per_cent():
    budgets = (3.2e10, 1e11, 3.2e11)
    runs = to_runs(star(CENTRE, ARMS), budgets, 16, lambda s: Recipe(0.008), study="s", preset="cpu")
    assert len(runs) == len({run.trunk_id for run in runs}) == len(star(CENTRE, ARMS))
    for run in runs:
        spent = [n * run.shape.train_flops_per_image(16) for n in run.budgets]
        assert all(min(abs(x / b - 1) for b in budgets) < 0.01 for x in spent)
        assert all(n >= 100 * 16 for n in run.budgets)
        assert run.study == "s"


def test_budgets_too_small_for_a_shape_are_left_out():
    big = CENTRE.replace(width=96, depth=6, mlp_dim=512)
    runs = to_runs([CENTRE, big], (3.2e10, 1e11), 16, lambda s: Recipe(0.008), min_steps=300)
    assert [len(run.budgets) for run in runs if run.shape == CENTRE] == [2]
    assert [len(run.budgets) for run in runs if run.shape == big] == []
    with pytest.raises(UserError, match="no shape reaches 300 steps within 1e"):
        to_runs([CENTRE], (1e9, 1e10), 16, lambda s: Recipe(0.008), min_steps=300)


def test_seeds_are_common_random_numbers():
    runs = to_runs([CENTRE, CENTRE.replace(width=64)], (1e11,), 16, lambda s: Recipe(0.008), seeds={CENTRE: 3})
    assert [(r.shape.width, r.init_seed, r.data_seed) for r in runs] == [(32, 0, 0), (32, 1, 1), (32, 2, 2), (64, 0, 0)]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"colour": (1,)}, "'colour' is not a dimension of a design; choose from width, depth"),
        ({"width": ()}, "no values of width"),
        ({}, "one dimension at least"),
        ({"width": (17,)}, "width=17 is not a multiple of head_dim=8"),
    ],
)
def test_bad_designs_say_why(arms, message):
    with pytest.raises(UserError, match=message):
        star(CENTRE, arms)


def test_a_design_that_explodes_is_refused():
    with pytest.raises(UserError, match="at most 100,000 shapes"):
        grid(CENTRE, {"width": range(8, 8000, 8), "depth": range(1, 200)})
