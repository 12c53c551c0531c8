"""The SoViT paper's own sweep (arXiv 2305.13035, App. B): a 54-run star and a 64-model grid. How much compute is it?

    python studies/sovit_paper.py --dry-run        the star, 18 shapes x 3 durations
    python studies/sovit_paper.py --dry-run --grid the grid of 64 small models

Cost: some 40 % of the 9T GFLOPs of the SoViT-400m that it planned; printed, not run, on anything but a TPU pod. Expected
totals: about 3.2T GFLOPs for the star and 0.53T for the grid, forward FLOPs x images. The recipe is the paper's where
it is printed (batch 128, rate 8e-4, rsqrt, 10k warm-up steps); the data, JFT-3B, is private: name your own with
`data=hub preset=...`.
"""

import sys

from sovit.spec.design import grid, star
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import study_main

NUM_HEADS = 16  # throughout, so that the head dimension runs from 26 to 123
CENTRE = (1968, 40, 6144)
ARMS = {
    "width": (608, 768, 928, 1088, 1328, 1648),
    "depth": (8, 10, 12, 16, 20, 24),
    "mlp_dim": (1088, 1360, 1728, 2160, 2592, 3072),
}
GRID = {"width": (416, 512, 608, 768), "depth": (6, 8, 10, 12), "mlp_dim": (768, 928, 1088, 1360)}
STAR_IMAGES = (64_000_000, 128_000_000, 256_000_000)  # 0.5, 1 and 2 M steps of 128
GRID_IMAGES = (600_000_000,)
RECIPE = Recipe(
    peak_lr=8e-4,
    batch_size=128,
    weight_decay=0.03,
    warmup_examples=1_280_000,
    schedule="rsqrt",
    rsqrt_examples=1_280_000,
    parametrisation="timm",
)


def shape(width: int, depth: int, mlp_dim: int) -> Shape:
    return Shape(width, depth, mlp_dim, width // NUM_HEADS, patch_size=14, image_size=224, pool="map")


def star_runs() -> list[Run]:
    """18 shapes; the centre itself is the paper's held-out point and not one of the 54."""
    shapes = star(Shape(*CENTRE, head_dim=1, patch_size=14, pool="map"), ARMS, corners=False)[1:]
    return [Run(shape(s.width, s.depth, s.mlp_dim), RECIPE, STAR_IMAGES, data="hub", preset="jft-3b") for s in shapes]


def grid_runs() -> list[Run]:
    shapes = grid(Shape(*CENTRE, head_dim=1, patch_size=14, pool="map"), GRID)
    return [Run(shape(s.width, s.depth, s.mlp_dim), RECIPE, GRID_IMAGES, data="hub", preset="jft-3b") for s in shapes]


runs = star_runs

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--grid"]
    chosen = ("sovit_paper_grid", grid_runs) if "--grid" in sys.argv else ("sovit_paper", star_runs)
    raise SystemExit(study_main.main(__doc__, *chosen, arguments))
