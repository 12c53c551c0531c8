"""Published numbers beside what our counting and SoViT's own rule (arXiv 2305.13035) say of them.

SoViT starts from x0 = (608, 10, 928) and grows each dimension as compute^(s/3), its "simplest strategy" of equal shares,
with s = .22, .45, .60 for classification. If exponents and shapes were one story, the three dimensions would imply one
ratio of compute between two shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sovit.predict.growth_rules import PAPER
from sovit.spec.named_shapes import named_shape

DIMS = ("width", "depth", "mlp_dim")
SHARE = 3  # dimensions among which the compute is split evenly
START = {"width": 608, "depth": 10, "mlp_dim": 928}
# images of both published models: 40 B for 400m (Table 1); 150m was matched in compute to ViT-B/14 on 4 B (section 4)
IMAGES_400M, IMAGES_B = 40e9, 4e9
# name, published GFLOPs of a forward pass, published parameters in millions, whether those include the MAP head: Table 1
# of SoViT, Table 2 of 2106.04560. At "384" a patch of 14 draws 27 x 27 patches, which is 378 px.
PUBLISHED = (
    ("So400m/14@224", 221, 428, True),
    ("L/16@384", 383, 303, False),
    ("So400m/14@378", 672, 428, True),
    ("g/14@518", 3208, 1011, False),
    ("So400m/14@518", 1374, 428, True),
    ("G/14@518", 5668, 1882, True),
    ("g/14@224", 533.1, 1011, False),
    ("G/14@224", 965.3, 1882, True),
)


def implied_compute(start: Mapping[str, float], end: Mapping[str, float], exponents: Mapping[str, float]) -> dict:
    """The compute ratio (x / x0)^(1/s) that each dimension says lies between two shapes, for x* ~ compute^s."""
    return {dim: float((end[dim] / start[dim]) ** (1 / s)) for dim, s in exponents.items()}


def implied_exponents(start: Mapping[str, float], end: Mapping[str, float], compute_ratio: float) -> dict[str, float]:
    """The exponents s that would take `start` to `end` over a compute ratio: ln(x / x0) / ln(ratio), by dimension."""
    return {dim: float(np.log(end[dim] / start[dim]) / np.log(compute_ratio)) for dim in start}


def shapes_table() -> dict:
    """{implied: [{from, to, ratios: {dim: ratio}}], compute_ratio, exponents: {dim: s}} of SoViT's published models."""
    known: dict = {"x0": START}
    for label, name in (("SoViT-150m", "So150m/14"), ("SoViT-400m", "So400m/14")):
        known[label] = {dim: getattr(named_shape(name), dim) for dim in DIMS}
    rule = {dim: s / SHARE for dim, s in PAPER.items()}
    pairs = (("x0", "SoViT-400m"), ("x0", "SoViT-150m"), ("SoViT-150m", "SoViT-400m"))
    implied = [{"from": a, "to": b, "ratios": implied_compute(known[a], known[b], rule)} for a, b in pairs]
    ratio = named_shape("So400m/14").forward_flops * IMAGES_400M / (named_shape("B/14").forward_flops * IMAGES_B)
    exponents = implied_exponents(known["SoViT-150m"], known["SoViT-400m"], ratio)
    return {"implied": implied, "compute_ratio": ratio, "exponents": {d: SHARE * s for d, s in exponents.items()}}


def flops_table() -> list[dict]:
    """Of each model of PUBLISHED its GFLOPs and parameters, published and ours."""
    rows = []
    for name, gflops, millions, with_head in PUBLISHED:
        shape = named_shape(name)
        params = shape.num_params if with_head else shape.replace(pool="avg").num_params
        ours = shape.forward_flops / 1e9
        row = {"name": name, "published_gflops": gflops, "gflops": ours, "gflops_difference": ours / gflops - 1}
        rows.append(row | {"published_params": millions * 1e6, "params": params})
    return rows
