"""What rows were trained on is read from their columns, and held to their trunk_id."""

import pytest

from sovit import UserError
from sovit.ledger.schema import new_row
from sovit.ledger.trained_on import trained_on
from sovit.spec.run import Recipe, Run, learning_rate
from sovit.spec.shape import Shape

SHAPES = [Shape(w, d, 64, head_dim=8, patch_size=4, image_size=16) for w, d in ((16, 1), (32, 2), (48, 3))]
IMAGES = dict(data="hub", preset="/photos")


def rows_of(recipe, **where):
    runs = [Run(shape, recipe(shape), (3200,), **(IMAGES | where)) for shape in SHAPES]
    return [new_row(run, 3200, status="ok", num_classes=10, data_key="k") for run in runs]


def test_a_recipe_by_rule_is_found_again_for_a_new_shape():
    """Every field that is not the default, also those that small studies never change."""
    more = dict(batch_size=32, warmup_examples=640, schedule="rsqrt", rsqrt_examples=3200, cooldown=0.3, beta2=0.99)
    found = trained_on(rows_of(lambda shape: Recipe(learning_rate(shape, 0.003), clip_norm=2.0, **more)))
    assert (found.data, found.preset, found.data_keys, found.base_lr) == ("hub", "/photos", ["k"], 0.003)
    new = SHAPES[0].replace(width=64)
    assert found.recipe_of(new) == Recipe(learning_rate(new, 0.003), clip_norm=2.0, **more)


def test_one_rate_for_all_shapes_is_kept():
    found = trained_on(rows_of(lambda shape: Recipe(1e-3, batch_size=64)))
    assert found.recipe_of(SHAPES[0]) == Recipe(1e-3, batch_size=64)


def test_rates_without_a_rule_are_refused():
    rates = iter((0.001, 0.005, 0.002))
    found = trained_on(rows_of(lambda shape: Recipe(next(rates))))
    with pytest.raises(UserError, match="follow no known rule"):
        found.recipe_of(SHAPES[0])


def test_a_field_that_a_row_does_not_tell_is_missed_by_its_trunk_id():
    rows = rows_of(lambda shape: Recipe(learning_rate(shape), warmup_examples=1600))
    for row in rows:
        del row["warmup_examples"]
    with pytest.raises(UserError, match="whole recipe"):
        trained_on(rows).recipe_of(SHAPES[0])


def test_rows_of_others_say_nothing():
    assert trained_on([{"width": 8, "depth": 1, "mlp_dim": 8, "val_loss": 1.0}]) is None
    mixed = rows_of(lambda shape: Recipe(0.01)) + rows_of(lambda shape: Recipe(0.01), preset="/others")
    assert trained_on(mixed) is None
