"""Projectors against their counterparts in transformers, and what they refuse."""

import json

import pytest
import torch
from parity_table import CASES, TABLE, table
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.vlm.projectors import PROJECTORS, build, options_of, space_to_depth

SMALL = {"perceiver": dict(num_latents=5, num_heads=4, head_dim=6, num_kv_heads=2, depth=2)}


def small(name, **more):
    return build(name, 12, 20, **dict(num_tokens=16) | SMALL.get(name, {}) | more)


# parity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", range(len(CASES)), ids=[f"{name}-{system}" for name, system, _ in CASES])
def test_each_equals_its_oracle_on_random_weights(row):
    found = table()[row]
    assert found["num_cases"] >= 3 and found["max_output"] > 1
    assert found["max_difference"] <= 1e-5


def test_every_projector_has_an_oracle():
    assert {name for name, _, _ in CASES} == set(PROJECTORS)


def test_the_committed_table_is_what_is_computed():
    committed = json.loads(TABLE.read_text())["rows"]
    said = [{k: v for k, v in row.items() if not k.startswith("max_")} for row in committed]
    assert said == [{k: v for k, v in row.items() if not k.startswith("max_")} for row in table()]
    for old, new in zip(committed, table(), strict=True):
        assert old["max_difference"] <= 1e-5
        assert old["max_output"] == pytest.approx(new["max_output"], rel=1e-3)


def test_a_block_is_read_by_rows_and_channels_come_fastest():
    """Token t of a 4 x 4 grid holds 10 t and 10 t + 1; block (0, 1) is of tokens 2, 3, 6, 7."""
    x = torch.stack([torch.tensor([10.0 * t, 10.0 * t + 1]) for t in range(16)])[None]
    assert space_to_depth(x, 2)[0, 1].tolist() == [20, 21, 30, 31, 60, 61, 70, 71]


# what it is to be a projector -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTORS)
def test_shapes_and_gradients_in_every_weight_and_token(name):
    module = small(name)
    x = torch.randn(3, 16, 12, requires_grad=True)
    y = module(x)
    num_out = {"perceiver": 5, "linear": 16, "mlp2x_gelu": 16}.get(name, 4)
    assert y.shape == (3, num_out, 20) and module.num_tokens_out == num_out
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())
    assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", PROJECTORS)
def test_weights_are_a_function_of_the_seed_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = small(name, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b, c = small(name, seed=3).state_dict(), small(name, seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("name", PROJECTORS)
def test_at_rest_neither_silent_nor_loud_and_tokens_differ(name):
    """Normed tokens in, features of about the same size out, and no two of them alike (latents all at one would be)."""
    more = dict(num_latents=6) if name == "perceiver" else {}
    module = build(name, 64, 96, num_tokens=64, **SMALL.get(name, {}) | more)
    with torch.no_grad():
        y = module(torch.randn(4, 64, 64))
    assert 0.3 < y.square().mean().sqrt() < 3
    assert torch.cdist(y[0], y[0]).fill_diagonal_(9).min() > 1


@pytest.mark.parametrize("name", PROJECTORS)
def test_half_precision_and_the_meta_device(name):
    module = small(name)
    x = torch.randn(2, 16, 12)
    half = module.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    with torch.device("meta"):
        empty = small(name)
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        assert empty(torch.empty(2, 16, 12)).shape == half.shape
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in module.parameters())


def test_fewer_tokens_cost_less():
    """The matrix alone: factor² times as many inputs, factor² times fewer tokens; what shrinks is the sequence."""
    for factor in (1, 2, 4):
        module = small("pixel_shuffle_linear", factor=factor)
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(1, 16, 12))
        assert counter.get_total_flops() == 2 * 16 * 12 * 20
        assert module.num_tokens_out == 16 // factor**2


# bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("mpl", {}, "unknown projector 'mpl'; choose one of linear, mlp2x_gelu"),
        ("linear", dict(factor=2), "projector linear has no option 'factor'; it has none"),
        ("pixel_shuffle_mlp", dict(scale=2), "has no option 'scale'; it has factor"),
        ("pixel_shuffle_linear", dict(factor=3), "factor=3 does not divide a grid of 4 x 4 tokens; choose one of 1, 2, 4"),
        ("avgpool_rms_linear", dict(num_tokens=17), r"num_tokens=17 is no square grid; give patch tokens alone, such as 16"),
        ("pixel_shuffle_mlp", dict(factor=0), "factor=0 of projector pixel_shuffle_mlp does not fit"),
        ("pixel_shuffle_mlp", dict(factor=2.0), "factor=2.0 of projector"),
        ("linear", dict(num_tokens=0), "num_tokens=0 of projector linear"),
        ("perceiver", dict(num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("perceiver", dict(num_latents=-1), "num_latents=-1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_the_value_and_the_remedy(name, wrong, words):
    with pytest.raises(UserError, match=words) as error:
        small(name, **wrong)
    assert "\n" not in str(error.value)


def test_tokens_that_are_no_grid_are_refused_when_seen():
    with pytest.raises(UserError, match="num_tokens=17"):
        small("pixel_shuffle_linear")(torch.randn(1, 17, 12))


def test_options_are_told():
    assert options_of("linear") == {}
    assert options_of("pixel_shuffle_linear") == {"factor": 2}
    assert options_of("perceiver")["num_latents"] == 64
