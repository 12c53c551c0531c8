"""The built model: its outputs, its initialisation and its parameter groups."""

import pytest
import torch

from sovit import UserError
from sovit.encoder.model import build, parameter_groups
from sovit.spec.shape import POOLS, Shape

SHAPE = Shape(32, 2, 64, head_dim=8, patch_size=4, image_size=16)


def state(model):
    return torch.cat([p.flatten() for p in model.state_dict().values()])


@pytest.mark.parametrize("pool", POOLS)
def test_logits_have_the_promised_shape(pool):
    model = build(SHAPE.replace(pool=pool), 10, "fan_in", seed=0)
    expected = (2, 16, 10) if pool == "none" else (2, 10)
    assert model(torch.randn(2, 3, 16, 16)).shape == expected


def test_no_classes_gives_features():
    assert build(SHAPE, 0, seed=0)(torch.randn(2, 3, 16, 16)).shape == (2, 32)


def test_logits_of_a_patch_belong_to_that_patch():
    """With depth 0 in effect (blocks silenced), only the patch that changes may change its logits."""
    model = build(SHAPE.replace(pool="none"), 10, "fan_in", seed=0).eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    image = torch.randn(1, 3, 16, 16)
    other = image.clone()
    other[:, :, 4:8, 8:12] += 1  # row 1, column 2: token 6 in raster order
    changed = (model(image) != model(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [6]


def test_registers_have_no_labels_so_a_head_on_every_token_refuses_them():
    with pytest.raises(UserError, match="num_registers=2"):
        build(SHAPE.replace(pool="none", num_registers=2), 10)


@pytest.mark.parametrize("parametrisation", ["fan_in", "timm"])
def test_weights_are_a_function_of_the_seed_alone(parametrisation):
    torch.manual_seed(1)
    first = state(build(SHAPE, 10, parametrisation, seed=7))
    after = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(first, state(build(SHAPE, 10, parametrisation, seed=7)))
    assert not torch.equal(first, state(build(SHAPE, 10, parametrisation, seed=8)))
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))  # the global generator was left as it was


def test_without_a_seed_weights_come_from_the_global_generator():
    torch.manual_seed(3)
    first, second = state(build(SHAPE)), state(build(SHAPE))
    torch.manual_seed(3)
    assert torch.equal(first, state(build(SHAPE)))
    assert not torch.equal(first, second)


def test_fan_in_initialisation():
    """Standard deviations after truncation at 2 s.d., which multiplies them by 0.8796."""
    model = build(Shape(128, 8, 512, head_dim=8, patch_size=4, image_size=16, pool="map"), 10, "fan_in", seed=0)
    std = {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}
    cut = 0.8796
    assert std["blocks.3.attn.qkv.weight"] == pytest.approx(cut * 128**-0.5, rel=0.03)
    assert std["blocks.3.attn.proj.weight"] == pytest.approx(cut * (128 * 16) ** -0.5, rel=0.03)
    assert std["blocks.3.mlp.fc1.weight"] == pytest.approx(cut * 128**-0.5, rel=0.03)
    assert std["blocks.3.mlp.fc2.weight"] == pytest.approx(cut * (512 * 16) ** -0.5, rel=0.03)
    assert std["patch_embed.proj.weight"] == pytest.approx(cut * 48**-0.5, rel=0.03)
    assert std["attn_pool.kv.weight"] == pytest.approx(cut * 128**-0.5, rel=0.03)
    assert std["pos_embed"] == pytest.approx(0.1, rel=0.05)
    assert std["head.weight"] == pytest.approx(0.02, rel=0.1)
    assert all(
        p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias") and "norm" not in name
    )


@pytest.mark.parametrize("pool", ["none", "map", "token"])
def test_only_matrices_decay(pool):
    registers = 0 if pool == "none" else 2
    model = build(SHAPE.replace(pool=pool, num_registers=registers, layer_scale=True), 10, "fan_in", seed=0)
    decay, keep = parameter_groups(model, 0.05)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(map(id, decay["params"] + keep["params"])) == sorted(names)
    assert all(names[id(p)].endswith("weight") and p.ndim in (2, 4) for p in decay["params"])
    assert all(not names[id(p)].endswith("weight") or "norm" in names[id(p)] for p in keep["params"])


def test_frozen_parameters_are_left_out():
    model = build(SHAPE, 10, seed=0)
    model.patch_embed.requires_grad_(False)
    groups = parameter_groups(model, 0.05)
    ours = {id(p) for group in groups for p in group["params"]}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
