"""Published GFLOPs and parameters of ViTs beside ours: Table 1 of SoViT (arXiv 2305.13035), Table 2 of 2106.04560.

python -m analysis.published.flops
"""

from __future__ import annotations

import sys

from sovit.spec.named_shapes import named_shape

# name, published GFLOPs of a forward pass, published parameters in millions, whether those include the MAP head.
# At "384" a patch of 14 draws 27 x 27 patches, which is 378 px.
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


def table() -> list[dict]:
    rows = []
    for name, gflops, millions, with_head in PUBLISHED:
        shape = named_shape(name)
        params = shape.num_params if with_head else shape.replace(pool="avg").num_params
        rows.append(
            {
                "name": name,
                "published_gflops": gflops,
                "gflops": shape.forward_flops / 1e9,
                "gflops_difference": shape.forward_flops / 1e9 / gflops - 1,
                "published_params": millions * 1e6,
                "params": params,
                "params_difference": params / millions / 1e6 - 1,
            }
        )
    return rows


def main() -> int:
    print(f"{'model':<15}{'GFLOPs published':>18}{'ours':>9}{'':>9}{'params published':>18}{'ours':>15}")
    for r in table():
        print(
            f"{r['name']:<15}{r['published_gflops']:>18}{r['gflops']:>9.1f}{r['gflops_difference']:>+9.2%}"
            f"{r['published_params'] / 1e6:>17.0f}M{r['params']:>15,}"
        )
    return int(any(abs(r["gflops_difference"]) > 0.005 for r in table()))


if __name__ == "__main__":
    sys.exit(main())
