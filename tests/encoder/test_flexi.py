"""One trunk at several patch sizes: what it computes, what is drawn when, what its row says."""

from collections import Counter

import pytest
import torch

from sovit import UserError
from sovit.encoder.model import build
from sovit.encoder.resize import at_patch_size, resize_state
from sovit.encoder.trained import base_of, load_branch
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.train.finetune import begin
from sovit.train.trainer import train

SHAPE = Shape(16, 2, 24, head_dim=8, patch_size=8, image_size=32, pool="none")
RUN = Run(SHAPE, Recipe(0.01, patch_sizes=(2, 4, 8), warmup_examples=0), (160, 320), preset="small")


@pytest.mark.parametrize("pool", ["none", "avg", "token", "map"])
@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_it_computes_what_a_model_with_resized_weights_does(pool, patch_size):
    shape = SHAPE.replace(pool=pool)
    model = build(shape, 5, "fan_in", seed=0)
    images = torch.randn(2, 3, 32, 32)
    new = shape.replace(patch_size=patch_size)
    resized = build(new, 5)
    resized.load_state_dict(resize_state(model.state_dict(), shape, new, "linear"))
    torch.testing.assert_close(at_patch_size(model, shape, patch_size)(images), resized(images))


def test_gradients_reach_the_stored_weights():
    """By finite differences, in the kernel and in the positions."""
    model = build(SHAPE, 5, "fan_in", seed=0).double()
    forward = at_patch_size(model, SHAPE, 4)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forward(images).square().sum().backward()
    for p in (model.patch_embed.proj.weight, model.pos_embed):
        direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = (p.grad * direction).sum()
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                p += sign * 1e-5 * direction
                ends.append(forward(images).square().sum())
                p -= sign * 1e-5 * direction
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, found, rtol=1e-3, atol=0)  # positions are in float32


def test_every_size_is_drawn_once_in_a_cycle_and_the_bill_is_what_was_drawn():
    drawn = [RUN.patch_size_at(step) for step in range(20)]
    assert all(Counter(drawn[i : i + 3]) == Counter((2, 4, 8)) for i in range(0, 18, 3))
    assert len({tuple(drawn[i : i + 3]) for i in range(0, 18, 3)}) > 1
    cost = {p: SHAPE.replace(patch_size=p).train_flops_per_image(16) for p in (2, 4, 8)}
    for n in (160, 304, 320):
        assert RUN.train_flops(n, 16) == 16 * sum(cost[p] for p in drawn[: n // 16])
    assert sum(RUN.spent_flops(n) for n in RUN.budgets) == RUN.total_flops
    assert (
        RUN.replace(data_seed=1).patch_size_at(0) != drawn[0] or RUN.replace(data_seed=2).patch_size_at(0) != drawn[0]
    )


def test_a_row_tells_each_size(tmp_path):
    rows = train(RUN, tmp_path)
    for row in rows:
        assert row["patch_sizes"] == [2, 4, 8]
        assert row["val_loss@p8"] == row["val_loss"] and row["val_error@p8"] == row["val_error"]
        assert len({row[f"val_loss@p{p}"] for p in (2, 4, 8)}) == 3
        assert row["train_flops"] == RUN.train_flops(row["num_examples"], 16)


@pytest.mark.slow
def test_a_stopped_trunk_goes_on_to_the_same_bits(tmp_path):
    whole = train(RUN, tmp_path / "whole")
    train(RUN.replace(budgets=(160,)), tmp_path / "parts")
    parts = train(RUN, tmp_path / "parts")
    assert [row["val_loss"] for row in parts] == [row["val_loss"] for row in whole]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 8), "3 does not divide image_size=32; leave it out"),
        ((2, 4), "patch_sizes lack 8, at which the weights are stored"),
        ((8, 8), r"patch_sizes=\[8, 8\] must be different sizes"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        Run(SHAPE, Recipe(0.01, patch_sizes=sizes), (160,))


def test_a_fine_tuning_begins_with_what_its_flexi_base_computed_at_that_size(tmp_path):
    train(RUN, tmp_path)
    tuning = Run(SHAPE.replace(patch_size=4), Recipe(0.01), (80,), preset="small", base=RUN.run_ids[0], trained="head")
    base = base_of(tuning, tmp_path)
    model, _ = load_branch(RUN.run_ids[0], tmp_path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(begin(tuning, base, 16)(images), at_patch_size(model, SHAPE, 4)(images))
