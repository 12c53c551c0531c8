"""Planted laws on SoViT's star (2305.13035, section A.4 of its sweep): 18 trunks, three budgets each, 54 rows."""

import numpy as np

from sovit.law.checks.simulate import ARMS, CENTRE, DIMS, IMAGES
from sovit.spec.shape import encoder_flops

GEOMETRY = dict(patch_size=14, image_size=224, pool="map", head_dim=16)
# (608, 10, 928) is about the optimum at 600 M images: a A x^-a = c g B n^-c, g the FLOPs elasticity
EXPONENTS, C, EPS = np.array([2.15, 0.80, 0.89]), 0.65, 0.2
B = 0.05 * 600e6**C
AMPLITUDES = C * np.array([1.51, 0.96, 0.37]) * 0.05 / EXPONENTS * np.array([608, 10, 928.0]) ** EXPONENTS
ZERO_LINE = 1.2


def columns(shapes: np.ndarray, images: np.ndarray) -> dict:
    flops = encoder_flops(*shapes.T, 256, 0, 14, "map")
    return dict(zip(DIMS, shapes.T)) | dict(num_examples=images, forward_flops=flops, compute=flops * images)


def star(extra: tuple = ()) -> tuple[dict, np.ndarray]:
    """Columns of the star (and of extra shapes) and the trunk of each row."""
    shapes = [tuple(v if k == j else CENTRE[j] for j in range(3)) for k in range(3) for v in ARMS[k]] + list(extra)
    shapes = np.repeat(np.array(shapes, float), len(IMAGES), 0)
    return columns(shapes, np.tile(IMAGES, len(shapes) // 3)), np.repeat(np.arange(len(shapes) // 3), 3)


def loss(
    table: dict, amplitudes=AMPLITUDES, power: float | None = None, exponents=EXPONENTS, c=C, eps=EPS
) -> np.ndarray:
    """The joint law; with a `power`, the power mean of both terms (x3, so that the zero line is felt), bounded."""
    shapes = np.stack([table[d] for d in DIMS], 1)
    capacity, data = (amplitudes * shapes**-exponents).sum(1), 0.05 * (table["num_examples"] / 600e6) ** -c
    if power is None:
        return capacity + data + eps
    value = 3 * (capacity**power + data**power) ** (1 / power) + eps / 2
    return (ZERO_LINE**-4 + value**-4) ** -0.25


def random_truth(seed: int) -> dict:
    """Exponents, data exponent and floor of another joint law that has (608, 10, 928) as its optimum at 600 M images."""
    rng = np.random.default_rng(1000 + seed)
    exponents, c = rng.uniform(0.6, 2.2, 3), rng.uniform(0.4, 0.75)
    amplitudes = c * np.array([1.51, 0.96, 0.37]) * 0.05 / exponents * np.array([608, 10, 928.0]) ** exponents
    return dict(exponents=exponents, c=c, eps=rng.uniform(0.1, 0.3), amplitudes=amplitudes)


def noise(trunk: np.ndarray, sd: float, seed: int) -> np.ndarray:
    """Multiplicative noise: a trunk effect and a branch effect of the same size, total s.d. `sd` of the log."""
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal(trunk.max() + 1)[trunk] + rng.standard_normal(len(trunk))
    return np.exp(sd / np.sqrt(2) * draws)
