"""Branches of every kind of shape, drawn and not trained, for what opens and exports trained ones."""

import dataclasses
import json

import torch

from sovit.encoder.model import build
from sovit.encoder.weights import save_weights
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape

BASE = Shape(24, 2, 40, head_dim=12, patch_size=4, image_size=16)
SHAPES = {
    "none": dict(pool="none"),
    "avg": dict(pool="avg"),
    "map": dict(pool="map"),
    "token": dict(pool="token"),
    "avg, registers": dict(pool="avg", num_registers=3),
    "map, registers": dict(pool="map", num_registers=1),
    "token, registers": dict(pool="token", num_registers=2),
    "map, layer scale": dict(pool="map", layer_scale=True),
    "avg, qkv without bias": dict(pool="avg", qkv_bias=False),
    "token, qkv without bias": dict(pool="token", qkv_bias=False),
    "avg, all of it": dict(pool="avg", num_registers=1, qkv_bias=False, layer_scale=True),
}


def plant(shape, runs_dir, **more):
    """A branch whose tensors are all drawn at random, those that start at 0 or 1 too: no name can hide behind them."""
    run = Run(shape, Recipe(0.01, warmup_examples=32), budgets=(160,), **more)
    model = build(shape, 16, "fan_in", seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = noise.exp() if name.endswith("gamma") else tensor + 0.2 * noise
    model.load_state_dict(weights)
    folder = runs_dir / run.trunk_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    save_weights(model, folder / f"{run.run_ids[0]}.safetensors", run.run_ids[0])
    return run.run_ids[0]
