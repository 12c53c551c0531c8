"""Shape arithmetic against timm models on the meta device and torch's own FLOP counter, to the unit.

SOVIT_SHAPES=200 python -m pytest tests/spec/test_shape.py -s -k random     the long run, with its tally
"""

import dataclasses
import json
import os
import random

import pytest
import timm
import torch
from random_shapes import random_shape
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.encoder.model import build
from sovit.spec.named_shapes import TIMM_SHAPES, VARIANTS, named_shape
from sovit.spec.shape import POOLS, Shape, encoder_flops

NUM_SHAPES = int(os.environ.get("SOVIT_SHAPES", "20"))
SMALL = Shape(64, 2, 96, head_dim=16, patch_size=4, image_size=16)


def measured(model, image_size):
    """Parameters and forward FLOPs of one image, as torch counts them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, image_size, image_size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def on_meta(shape, num_classes=0):
    with torch.device("meta"):
        return build(shape, num_classes)


def test_counts_of_random_shapes_equal_the_built_model():
    rng = random.Random(2305)
    pools = dict.fromkeys(POOLS, 0)
    for _ in range(NUM_SHAPES):
        shape = random_shape(rng)
        assert measured(on_meta(shape), shape.image_size) == (shape.num_params, shape.forward_flops), shape
        if shape.pool == "none":  # registers have no label, so that a head on every token goes without them
            shape = shape.replace(num_registers=0)
        with_head = (shape.num_params + shape.head_params(10), shape.forward_flops + shape.head_flops(10))
        assert measured(on_meta(shape, 10), shape.image_size) == with_head, shape
        pools[shape.pool] += 1
    assert all(pools.values())
    print(
        f"\n{NUM_SHAPES} random shapes, parameters and FLOPs equal to the unit, with and without a head; pools {pools}"
    )


@pytest.mark.parametrize("name", TIMM_SHAPES)
def test_timm_names_count_like_timm_itself(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    shape = TIMM_SHAPES[name]
    assert len(model.blocks) == shape.depth
    assert model.patch_embed.grid_size[0] ** 2 == shape.num_patches  # timm leaves 384 % 14 pixels unread, we say 378
    assert sum(p.numel() for p in model.parameters()) == shape.num_params
    model.blocks = model.blocks[:2]  # all blocks are alike; running 48 of them on paper takes seconds
    flops = measured(model, model.patch_embed.img_size[0])[1]
    assert flops == shape.replace(depth=2).forward_flops


# one other value for each field; a field added to Shape without an entry here fails the test below
CHANGES = {
    "width": 128,
    "depth": 3,
    "mlp_dim": 97,
    "head_dim": 32,
    "patch_size": 8,
    "image_size": 32,
    "pool": "token",
    "num_registers": 1,
    "qkv_bias": False,
    "layer_scale": True,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Shape)])
def test_every_field_changes_the_built_model(field):
    shape = SMALL.replace(**{field: CHANGES[field]})
    assert signature(on_meta(shape)) != signature(on_meta(SMALL))
    assert shape != SMALL


def signature(model):
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return parameters, model.blocks[0].attn.num_heads, model.global_pool


@pytest.mark.parametrize("pool", [p for p in POOLS if p != "avg"])
def test_every_pool_is_another_model(pool):
    assert signature(on_meta(SMALL.replace(pool=pool))) != signature(on_meta(SMALL))


def test_mlp_dim_is_built_exactly():
    """timm truncates width * mlp_ratio, and mlp_dim / width loses a unit for some pairs, (88, 120) among them."""
    rng = random.Random(4304)
    lost = 0
    for _ in range(20_000):
        width, mlp_dim = rng.randint(1, 4096), rng.randint(1, 16384)
        shape = Shape(width, 1, mlp_dim, head_dim=1)
        assert int(width * shape.timm_kwargs["mlp_ratio"]) == mlp_dim, shape
        lost += int(width * (mlp_dim / width)) != mlp_dim
    assert lost > 100  # so that the check above is about something
    for width, mlp_dim in ((88, 120), (704, 960), (448, 3904), (1152, 4304), (32, 1)):
        model = on_meta(Shape(width, 1, mlp_dim, head_dim=8, patch_size=4, image_size=8, pool="map"))
        assert model.blocks[0].mlp.fc1.out_features == mlp_dim
        assert model.attn_pool.mlp.fc1.out_features == mlp_dim


# arXiv 2305.13035 Table 1 (forward GFLOPs by XLA) and arXiv 2106.04560 Table 2 (g and G at 224 px)
PUBLISHED_GFLOPS = {
    "So400m/14@224": 221,
    "L/16@384": 383,
    "So400m/14@384": 672,
    "g/14@518": 3208,
    "So400m/14@518": 1374,
    "G/14@518": 5668,
    "g/14@224": 533.1,
    "G/14@224": 965.3,
}


@pytest.mark.parametrize(("name", "gflops"), PUBLISHED_GFLOPS.items())
def test_published_gflops(name, gflops):
    size = int(name.partition("@")[2])
    shape = named_shape(name, image_size=size - size % named_shape(name.partition("@")[0]).patch_size)
    assert shape.forward_flops / 1e9 == pytest.approx(gflops, rel=0.005)


def test_published_parameter_counts():
    """Table 1 counts the MAP head of SoViT and G/14, and leaves it out for L/16 and g/14; positions as at 224 px."""

    def millions(name, **changes):
        return round(named_shape(name, **changes).num_params / 1e6)

    assert millions("So400m/14") == 428
    assert millions("L/16", pool="avg") == 303
    assert millions("g/14", pool="avg") == 1011
    assert millions("G/14") == 1881  # printed as 1882
    assert millions("vit_base_patch16_224") == 86


def test_big_vision_names():
    """Width, depth, mlp_dim, heads of big_vision's decode_variant, written down a second time."""
    decode_variant = {
        "mu": (32, 1, 128, 2),
        "Ti": (192, 12, 768, 3),
        "S": (384, 12, 1536, 6),
        "M": (512, 12, 2048, 8),
        "B": (768, 12, 3072, 12),
        "L": (1024, 24, 4096, 16),
        "So400m": (1152, 27, 4304, 16),
        "H": (1280, 32, 5120, 16),
        "g": (1408, 40, 6144, 16),
        "g-opt": (1536, 40, 6144, 16),
        "G": (1664, 48, 8192, 16),
        "G-opt": (1536, 48, 8192, 16),
        "e": (1792, 56, 15360, 16),
    }
    for name, expected in decode_variant.items():
        shape = named_shape(f"{name}/16")
        assert (shape.width, shape.depth, shape.mlp_dim, shape.num_heads) == expected
        assert (shape.patch_size, shape.image_size) == (16, 224)
    assert set(VARIANTS) - set(decode_variant) == {"So150m"}  # SoViT's own, App. B: (880, 18, 2320)
    assert named_shape("B/32@384").num_patches == 144
    assert named_shape("S/16", pool="map", image_size=64) == Shape(384, 12, 1536, 64, 16, 64, "map")
    assert named_shape("S/16", head_dim=32, depth=2) == Shape(384, 2, 1536, 32)


def test_the_head_is_counted_apart_and_training_costs_three_forward_passes():
    shape = SMALL.replace(pool="none")
    assert shape.head_params(16) == 64 * 16 + 16
    assert shape.head_flops(16) == 2 * 64 * 16 * 16  # 16 patches
    assert SMALL.head_flops(16) == 2 * 64 * 16
    assert shape.train_flops_per_image(16) == 3 * (shape.forward_flops + shape.head_flops(16))
    assert shape.train_flops_per_image() == 3 * shape.forward_flops


def test_closed_form_takes_real_numbers():
    import numpy as np

    s = SMALL
    real = encoder_flops(np.array([64.0, 64.5]), 2.0, 96.0, s.num_patches, s.num_prefix_tokens, s.patch_size, s.pool)
    assert real[0] == s.forward_flops
    assert real[1] > real[0]


def test_shapes_survive_json():
    shape = SMALL.replace(pool="map", num_registers=4)
    assert Shape(**json.loads(json.dumps(shape.to_dict()))) == shape
    assert hash(shape) == hash(shape.replace())
    json.dumps(shape.timm_kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 65}, "width=65 is not a multiple of head_dim=16; the nearest width is 64"),
        ({"width": 7}, "width=7 .* the nearest width is 16"),
        ({"image_size": 15}, "image_size=15 is not a multiple of patch_size=4; the nearest image_size is 16"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"num_registers": -1}, "num_registers=-1 must be at least 0"),
        ({"mlp_dim": 96.0}, "mlp_dim=96.0 must be of type int"),
        ({"depth": True}, "depth=True must be of type int"),
        ({"width": "64"}, "width='64' must be of type int"),
        ({"pool": "max"}, "pool='max' is unknown; choose one of avg, map, token, none"),
    ],
)
def test_shapes_that_cannot_be_built_say_why(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        SMALL.replace(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "B", "B/", "B/16@", "Q/16", "B/x", "vit_base_patch16_225", "So400m/14@3.5"])
def test_unknown_names_say_what_is_near(name):
    with pytest.raises(UserError, match="unknown shape .* such as ") as caught:
        named_shape(name)
    assert "\n" not in str(caught.value)


def test_nearest_name_is_suggested():
    with pytest.raises(UserError, match="vit_base_patch16_224"):
        named_shape("vit_base_patch16_225")
