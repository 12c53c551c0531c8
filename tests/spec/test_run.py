"""Runs: identity, strict reading and overriding, and the arithmetic of budgets."""

import dataclasses
import json

import pytest

from sovit import UserError
from sovit.spec.config import override
from sovit.spec.named_shapes import named_shape
from sovit.spec.run import Recipe, Run, budgets_for, learning_rate
from sovit.spec.shape import Shape

SHAPE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
RUN = Run(SHAPE, Recipe(peak_lr=0.008), (1600, 3200))


# identity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "trunk_id"),
    [
        (RUN, "5a7d264457"),
        (
            Run(
                SHAPE.replace(width=64),
                Recipe(0.004, schedule="rsqrt", weight_decay=0.1),
                (1600,),
                init_seed=3,
                data_seed=1,
            ),
            "f0207bd366",
        ),
        (
            Run(
                named_shape("So400m/14"), Recipe(1e-3, 128, parametrisation="timm"), (12800,), data="icons", preset="x"
            ),
            "53d5ec1f8b",
        ),
    ],
)
def test_golden_trunk_ids(run, trunk_id):
    """These ids name records that exist. If this fails, a default or a field's name changed: change it back."""
    assert run.trunk_id == trunk_id
    assert run.run_ids == tuple(f"{trunk_id}-{n}" for n in run.budgets)


def test_budgets_study_and_probe_are_not_identity():
    assert RUN.replace(budgets=(800,), study="other", probe="icons:single40").trunk_id == RUN.trunk_id


# one other value for each field; a field added without an entry here fails the test below
CHANGES = {
    "precision": "bfloat16",
    "peak_lr": 0.004,
    "batch_size": 32,
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.99,
    "clip_norm": 2.0,
    "warmup_examples": 160,
    "schedule": "rsqrt",
    "rsqrt_examples": 80_000,
    "cooldown": 0.4,
    "parametrisation": "timm",
    "data": "icons",
    "preset": "small",
    "init_seed": 1,
    "data_seed": 1,
    "width": 64,
    "depth": 3,
    "mlp_dim": 96,
    "head_dim": 16,
    "patch_size": 8,
    "image_size": 32,
    "pool": "avg",
    "num_registers": 1,
    "qkv_bias": False,
    "layer_scale": True,
    "patch_sizes": (2, 4),
    "objective": "siglip",
    "base": "0123456789-1600",
    "base_sha256": "ab",
    "trained": "attention",
}
NEEDS = {"trained": {"base": "0123456789-1600"}}  # what must be said besides
NOT_IDENTITY = {"shape", "recipe", "budgets", "study", "probe"}


@pytest.mark.parametrize("owner", ["recipe", "shape", None])
def test_every_other_field_is_identity(owner):
    fields = [f.name for f in dataclasses.fields(getattr(RUN, owner) if owner else RUN)]
    for name in set(fields) - NOT_IDENTITY:
        change, run = {name: CHANGES[name]}, RUN.replace(**NEEDS.get(name, {}))
        other = run.replace(**({owner: dataclasses.replace(getattr(RUN, owner), **change)} if owner else change))
        assert other.trunk_id != run.trunk_id, name


def test_only_values_that_are_not_default_enter_the_identity():
    spelt_out = Recipe(peak_lr=0.008, batch_size=16, weight_decay=0.05, schedule="constant", cooldown=0.2)
    assert RUN.replace(recipe=spelt_out, data="stream", init_seed=0).trunk_id == RUN.trunk_id


def test_a_whole_number_for_a_float_is_the_same_run():
    """0 == 0.0, so two such runs compare equal; a study says 0, and its workers read 0.0 from JSON."""
    whole, real = (RUN.replace(recipe=Recipe(peak_lr=lr, weight_decay=wd)) for lr, wd in ((1, 0), (1.0, 0.0)))
    assert whole == real
    assert whole.trunk_id == real.trunk_id
    assert Run.from_dict(json.loads(json.dumps(whole.to_dict()))).trunk_id == whole.trunk_id


def test_runs_survive_json():
    run = RUN.replace(recipe=Recipe(0.1 + 0.2, schedule="rsqrt"), study="s", init_seed=7)
    again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    assert again.trunk_id == run.trunk_id
    assert RUN.replace(budgets=[1600, 3200]) == RUN


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("recipe.peak_lr", "fast", r"peak_lr='fast' must be of type float"),
        ("recipe.peak_lr", float("nan"), r"peak_lr=nan must be finite"),
        ("recipe.peak_lr", 0, r"peak_lr=0.0 must be above 0"),
        ("recipe.batch_size", 16.0, r"batch_size=16.0 must be of type int"),
        ("recipe.batch_size", True, r"batch_size=True must be of type int"),
        ("recipe.cooldown", 1.0, r"cooldown=1.0 must be a share"),
        ("recipe.weight_decay", -0.1, r"weight_decay=-0.1 must be at least 0"),
        ("recipe.schedule", "cosine", r"schedule='cosine' is unknown; choose one of constant, rsqrt"),
        ("recipe.parametrisation", "mup", r"parametrisation='mup' is unknown; choose one of fan_in, timm"),
        ("recipe.momentum", 0.9, r"unknown key 'momentum' in recipe; known keys are batch_size"),
        ("shape.width", 36, r"width=36 is not a multiple of head_dim=8"),
        ("shape", 3, r"shape must be an object of fields, got 3"),
        ("budgets", 1600, r"budgets=1600 must be a list"),
        ("budgets", [], r"budgets=\(\) must be examples in rising order, at least one"),
        ("budgets", [3200, 1600], r"budgets=\(3200, 1600\) must be examples in rising order"),
        ("budgets", [1600, 1600], r"in rising order"),
        ("budgets", [1601], r"budget of 1601 examples is not a multiple of the batch of 16"),
        ("budgets", [64], r"budget of 64 examples .* under 80"),
        ("init_seed", -1, r"init_seed=-1 must be a whole number from 0 to"),
        ("data_seed", 1 << 32, r"data_seed=4294967296 must be a whole number from 0 to"),
        ("seed", 1, r"unknown key 'seed' in run"),
    ],
)
def test_reading_is_strict(path, value, message):
    d = RUN.to_dict()
    owner, _, name = path.rpartition(".")
    (d[owner] if owner else d)[name] = value
    with pytest.raises(UserError, match=message) as caught:
        Run.from_dict(d)
    assert "\n" not in str(caught.value)


def test_missing_fields_are_named():
    d = RUN.to_dict()
    del d["recipe"]["peak_lr"]
    with pytest.raises(UserError, match="recipe lacks peak_lr"):
        Run.from_dict(d)
    with pytest.raises(UserError, match="run must be an object"):
        Run.from_dict([1])


# overrides -----------------------------------------------------------------------------------------------------------


def test_overrides_are_typed():
    assignments = [
        "recipe.peak_lr=1",
        "shape.width=64",
        "shape.qkv_bias=False",
        "shape.pool=map",
        "budgets=[800]",
        "preset=7",
        "probe=icons:single40",
    ]
    run = override(RUN, assignments)
    assert run.recipe.peak_lr == 1.0 and isinstance(run.recipe.peak_lr, float)
    assert (run.shape.width, run.shape.qkv_bias, run.shape.pool) == (64, False, "map")
    assert run.budgets == (800,) and run.probe == "icons:single40"
    assert run.preset == "7"
    assert override(RUN, []) == RUN


@pytest.mark.parametrize(
    "assignment",
    [
        "recipe.lr=1",
        "lr=1",
        "recipe.peak_lr",
        "shape=3",
        "recipe.peak_lr.x=1",
        "shape.depth.x=1",
        "=1",
        "",
        "recipe.=1",
    ],
)
def test_unknown_keys_name_the_known_ones(assignment):
    with pytest.raises(UserError, match="unknown key .*shape.width.*recipe.peak_lr.*budgets.*init_seed") as caught:
        override(RUN, [assignment])
    assert repr(assignment) in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("recipe.peak_lr=fast", "recipe.peak_lr='fast' is not a value"),
        ("shape.width=64.5", "width=64.5 must be of type int"),
        ("shape.width=", "shape.width='' is not a value"),
        ("shape.qkv_bias=1", "qkv_bias=1 must be of type bool"),
        ("recipe.peak_lr=NaN", "peak_lr=nan must be finite"),
        ("recipe.peak_lr=true", "peak_lr=True must be of type float"),
        ("budgets=1600", "budgets=1600 must be a list"),
        ("shape.depth=null", "depth=None must be of type int"),
    ],
)
def test_wrong_values_are_named(assignment, message):
    with pytest.raises(UserError, match=message):
        override(RUN, [assignment])


# budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flops", [3.2e10, 1e11, 1e12])
@pytest.mark.parametrize(
    "shape", [SHAPE, SHAPE.replace(width=16, depth=1), SHAPE.replace(width=96, depth=6, mlp_dim=512)]
)
def test_budgets_spend_the_flops_to_half_a_batch(shape, flops):
    (n,) = budgets_for(shape, [flops], 16, 16)
    cost = 3 * (shape.forward_flops + shape.head_flops(16))
    assert n % 16 == 0
    assert abs(n * cost - flops) <= 8 * cost


def test_budgets_rise_without_repeats():
    assert budgets_for(SHAPE, [1e11, 3.2e10], 16, 16) == budgets_for(SHAPE, [3.2e10, 1e11], 16, 16)
    assert budgets_for(SHAPE, [1.0, 2.0], 16, 16) == (80,)  # five steps at least


@pytest.mark.parametrize(
    ("batch", "n", "expected"), [(16, 1600, 320), (16, 80, 16), (128, 64_000_000, 12_800_000), (16, 1008, 208)]
)
def test_cooldown_is_a_fifth_in_whole_batches(batch, n, expected):
    run = RUN.replace(recipe=Recipe(0.008, batch_size=batch), budgets=(n,))
    assert run.cooldown_examples(n) == expected
    assert run.trunk_examples(n) + run.cooldown_examples(n) == n


def test_total_examples_count_the_shared_trunk_once():
    run = RUN.replace(budgets=(1600, 3200, 6400))
    # trunk to 5120, and cooldowns of 320, 640 and 1280
    assert run.total_examples == 5120 + 320 + 640 + 1280
    assert [run.new_examples(n) for n in run.budgets] == [1600, 3200 - 1280, 6400 - 2560]
    assert RUN.replace(budgets=(6400,)).total_examples == 6400


@pytest.mark.parametrize("cooldown", [0.05, 0.2, 0.5, 0.9, 0.99])
def test_a_longer_budget_never_leaves_the_trunk_earlier(cooldown):
    run = RUN.replace(recipe=Recipe(0.008, cooldown=cooldown), budgets=tuple(range(80, 3200, 16)))
    ends = [run.trunk_examples(n) for n in run.budgets]
    assert ends == sorted(ends)
    assert ends[0] >= 0


def test_learning_rate_rule():
    assert learning_rate(SHAPE, 0.008, 0.5, 0.0) == 0.008
    assert learning_rate(SHAPE.replace(width=128), 0.008, 0.5, 0.0) == 0.004
    assert learning_rate(SHAPE.replace(depth=8), 0.008, 0.5, 0.5) == 0.004
    assert learning_rate(SHAPE.replace(width=96), 0.008, 0.5, 0.0) == 0.004619
