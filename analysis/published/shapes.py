"""Do SoViT's published exponents give its published shapes? The compute ratio that each dimension implies (2305.13035).

python -m analysis.published.shapes [--json]

The paper starts from x0 = (608, 10, 928) and grows each dimension as compute^(s/3), its "simplest strategy" of equal
shares, with s = .22, .45, .60 for classification. If exponents and shapes were one story, the three dimensions would imply
one ratio of compute between two shapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import numpy as np

from sovit import UserError
from sovit.predict.growth_rules import PAPER
from sovit.spec.named_shapes import named_shape

DIMS = ("width", "depth", "mlp_dim")
SHARE = 3  # dimensions among which the compute is split evenly
START = {"width": 608, "depth": 10, "mlp_dim": 928}
STEPS = {"width": 16, "depth": 1, "mlp_dim": 16}  # published widths and MLP dims are multiples of 16
# images of both published models: 40 B for 400m (Table 1); 150m was matched in compute to ViT-B/14 on 4 B (section 4)
IMAGES_400M, IMAGES_B = 40e9, 4e9
AGREE = 2.0  # implied compute ratios nearer to each other than this factor tell one story


def shapes() -> dict[str, dict]:
    found = {"x0": START}
    for label, name in (("SoViT-150m", "So150m/14"), ("SoViT-400m", "So400m/14")):
        shape = named_shape(name)
        found[label] = {d: getattr(shape, d) for d in DIMS}
    return found


def implied_compute(
    start: Mapping[str, float],
    end: Mapping[str, float],
    exponents: Mapping[str, float],
    steps: Mapping[str, float] | None = None,
) -> dict:
    """The compute ratio tau = (x / x0)^(1/s) that each dimension says lies between two shapes.

    exponents: s of x* ~ compute^s by dimension. steps: the grid on which a dimension was rounded, none where left out; a
    shape may be off by half a step. Returns {dimensions: {dim: {start, end, exponent, tau, low, high}}, spread, agree}: low
    and high are what rounding allows, spread is the largest tau over the smallest, and agree says whether that is below
    AGREE, or one ratio lies within what rounding allows in all dimensions. Raises UserError for an exponent that is not
    positive.
    """
    out = {}
    for dim, s in exponents.items():
        if not s > 0:
            raise UserError(f"the exponent of {dim} is {s:g}; only a dimension that grows implies a compute")
        half = (steps or {}).get(dim, 0.0) / 2
        x0, x = float(start[dim]), float(end[dim])
        low, tau, high = (
            float(np.exp(np.clip(np.log(ratio) / s, -700, 700)))
            for ratio in (max(x - half, 1e-9) / (x0 + half), x / x0, (x + half) / max(x0 - half, 1e-9))
        )
        out[dim] = dict(start=x0, end=x, exponent=float(s), tau=tau, low=low, high=high)
    taus = [v["tau"] for v in out.values()]
    spread = max(taus) / min(taus)
    common = max(v["low"] for v in out.values()) <= min(v["high"] for v in out.values())
    return dict(dimensions=out, spread=float(spread), agree=bool(spread < AGREE or common))


def implied_exponents(start: Mapping[str, float], end: Mapping[str, float], compute_ratio: float) -> dict[str, float]:
    """The exponents s that would take `start` to `end` over a compute ratio: ln(x / x0) / ln(tau), by dimension."""
    return {dim: float(np.log(end[dim] / start[dim]) / np.log(compute_ratio)) for dim in start}


def table() -> dict:
    """{implied: [{from, to, dimensions, spread, agree}], compute_ratio, exponents: {dim: ...}}, plain data."""
    known, rule = shapes(), {d: s / SHARE for d, s in PAPER.items()}
    pairs = (("x0", "SoViT-400m"), ("x0", "SoViT-150m"), ("SoViT-150m", "SoViT-400m"))
    implied = [{"from": a, "to": b} | implied_compute(known[a], known[b], rule, STEPS) for a, b in pairs]
    spent = named_shape("So400m/14").forward_flops * IMAGES_400M, named_shape("B/14").forward_flops * IMAGES_B
    ratio = spent[0] / spent[1]
    exponents = implied_exponents(known["SoViT-150m"], known["SoViT-400m"], ratio)
    return dict(implied=implied, compute_ratio=ratio, exponents={d: SHARE * s for d, s in exponents.items()})


def main(argv=None) -> int:
    found = table()
    if "--json" in (sys.argv[1:] if argv is None else argv):
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'compute ratio implied':<28}{'width':>14}{'depth':>14}{'MLP dim':>14}{'spread':>10}")
    for row in found["implied"]:
        taus = "".join(f"{row['dimensions'][d]['tau']:>14,.0f}" for d in DIMS)
        print(f"{row['from'] + ' -> ' + row['to']:<28}{taus}{row['spread']:>9.1f}x")
        ends = [f"{row['dimensions'][d]['low']:,.0f}-{row['dimensions'][d]['high']:,.0f}" for d in DIMS]
        print(f"{'  rounding allows':<28}" + "".join(f"{e:>14}" for e in ends))
    print(f"\nSoViT-150m -> SoViT-400m took {found['compute_ratio']:.1f} times the compute; exponents, times {SHARE}:")
    print(f"{'  that it implies':<28}" + "".join(f"{found['exponents'][d]:>14.2f}" for d in DIMS))
    print(f"{'  stated':<28}" + "".join(f"{PAPER[d]:>14.2f}" for d in DIMS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
