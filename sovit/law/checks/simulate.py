"""Planted laws and designs: what simulations draw from and analyses must find again. No model is trained.

    truth = planted.truth("inter", frac=0.8)        # the reference law of that kind; with rng=..., one of its family
    truth.loss(shapes, num_examples)                # shapes [..., 3] = width, depth, mlp_dim
    truth.optimum(compute)                          # the best shape at forward FLOPs x images, by exact FLOPs
    design = planted.sovit_star(corners=True)       # columns and trunk of each row
    y = design.losses(truth) * planted.noise(design, 0.005, 0.5, rng)

Kinds (K = sum_k A_k x_k^-a_k, D = B n^-c, n images, t = forward FLOPs x images):
    joint    K + D + eps
    weak     the same with small exponents: flat valleys
    inter    joint plus A_N N^-.35 of the parameter count N, `frac` of the largest amplitude that leaves every A_k >= 0
    eq3      K + sum_k beta_k x_k^b_k t^-c + xi t^-c + eps, Eq. 3 of arXiv 2305.13035: Eq. 2 holds on every arm
    bounded  (z^-4 + (3 (K^s + D^s)^(1/s) + eps)^-4)^(-1/4), s = 1.9: a power mean under the zero line z
    stream   bounded with the exponents, geometry and size of the procedural stream (16 pixels, patches of 4)
All but `stream` have (608, 10, 928) as their optimum at 600 M images, SoViT's starting point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.geometry import Geometry

DIMS = ("width", "depth", "mlp_dim")
KINDS = ("joint", "weak", "inter", "eq3", "bounded", "stream")
SOVIT = Geometry(patch_size=14, image_size=224, pool="map", head_dim=16)
STREAM = Geometry(patch_size=4, image_size=16, pool="none", head_dim=8, num_classes=16)
ANCHOR, ANCHOR_IMAGES = (608.0, 10.0, 928.0), 600e6
STREAM_ANCHOR, STREAM_COMPUTE = (28.0, 2.4, 230.0), 1.07e11
CENTRE = (1968, 40, 6144)
ARMS = ((608, 768, 928, 1088, 1328, 1648), (8, 10, 12, 16, 20, 24), (1088, 1360, 1728, 2160, 2592, 3072))
IMAGES = (64e6, 128e6, 256e6)
CORNERS = tuple((w, d, m) for w in (608, 1152) for d in (8, 20) for m in (1088, 3072))
STREAM_CENTRE = (32, 2, 256)
STREAM_ARMS = ((16, 24, 48, 64, 96), (1, 3, 4, 6), (64, 128, 512, 1024))
STREAM_CORNERS = ((24, 2, 512), (24, 4, 128), (64, 2, 128), (64, 4, 512))
STREAM_TRAIN_FLOPS = (3.2e10, 1e11, 3.2e11, 1e12)


@dataclass(frozen=True)
class Truth:
    """One planted law over (width, depth, mlp_dim) and images."""

    kind: str
    amplitudes: np.ndarray  # [3] A_k
    exponents: np.ndarray  # [3] a_k
    B: float
    c: float
    eps: float
    anchor: np.ndarray  # [3] near the optimum: where the search for it starts
    geometry: Geometry = SOVIT
    param_amplitude: float = 0.0  # A_N; its exponent is .35
    cost_amplitudes: np.ndarray | None = None  # [3] beta_k of eq3
    cost_exponents: np.ndarray | None = None  # [3] b_k of eq3
    power: float = 1.0
    scale: float = 1.0
    zero_line: float | None = None

    def flops(self, shapes: Any) -> np.ndarray:
        """Forward FLOPs of one image, task head apart; shapes [..., 3]."""
        return self.geometry.flops(dict(zip(DIMS, np.moveaxis(np.asarray(shapes), -1, 0))), head=False)

    def loss(self, shapes: Any, num_examples: Any) -> np.ndarray:
        """Loss without noise at shapes [..., 3] and images [...]."""
        shapes = np.asarray(shapes)
        capacity = (self.amplitudes * shapes**-self.exponents).sum(-1)
        if self.param_amplitude:
            capacity = capacity + self.param_amplitude * num_params(shapes, self.geometry) ** -PARAM_EXPONENT
        if self.cost_amplitudes is not None:
            cost = (self.cost_amplitudes * shapes**self.cost_exponents).sum(-1)
            data = (cost + self.B) * (self.flops(shapes) * num_examples) ** -self.c
        else:
            data = self.B * num_examples**-self.c
        value = self.scale * (capacity**self.power + data**self.power) ** (1 / self.power) + self.eps
        return value if self.zero_line is None else (self.zero_line**-4 + value**-4) ** -0.25

    def loss_at(self, shapes: Any, compute: Any) -> np.ndarray:
        """Loss at shapes [..., 3] trained for `compute` = forward FLOPs x images."""
        return self.loss(shapes, compute / self.flops(shapes))

    def optimum(self, compute: float) -> np.ndarray:
        """The best (width, depth, mlp_dim) [3], real numbers, at `compute`; numerical, gradients by complex step."""
        from scipy.optimize import minimize

        def both(v: np.ndarray) -> tuple[float, np.ndarray]:
            bent = v + 1e-20j * np.eye(3)  # [3, 3], one row a direction
            value = np.log(self.loss_at(np.exp(bent), compute))
            return float(value[0].real), value.imag / 1e-20

        v = minimize(both, np.log(self.anchor), jac=True, method="BFGS", options=dict(gtol=1e-7)).x
        for _ in range(5):  # Newton to the last digit, where the line search sees only rounding
            gradient = both(v)[1]
            ends = [[both(v + sign * 1e-5 * e)[1] for sign in (1, -1)] for e in np.eye(3)]
            v = v - np.linalg.solve(np.array([(up - down) / 2e-5 for up, down in ends]), gradient)
        return np.exp(v)

    def regret(self, shape: Any, compute: float) -> float:
        """Relative excess of the loss of `shape` [3] over that of the optimum at the same compute."""
        return float(self.loss_at(np.asarray(shape, float), compute) / self.loss_at(self.optimum(compute), compute) - 1)


PARAM_EXPONENT = 0.35


def num_params(shapes: Any, geometry: Geometry) -> np.ndarray:
    """Encoder parameters [...] of shapes [..., 3], which may be real or complex."""
    return geometry.num_params(dict(zip(DIMS, np.moveaxis(np.asarray(shapes), -1, 0))))


def elasticity(count: Callable[[np.ndarray], Any], shape: Any) -> np.ndarray:
    """d ln count / d ln x_k [3] at a shape, by complex step."""
    bent = np.exp(np.log(np.asarray(shape, float)) + 1e-20j * np.eye(3))
    return np.log(count(bent)).imag / 1e-20


def truth(kind: str, rng: np.random.Generator | None = None, frac: float = 0.4) -> Truth:
    """The reference law of a kind, or with `rng` a random one of its family. `frac` is read by "inter" alone.

    Random: exponents of joint, inter and bounded uniform in .6 to 2.2 and c in .4 to .75; those of the others within
    25 % of the reference; the loss at the anchor and the anchor itself move too, so that widths are not of one law.
    """
    if kind not in KINDS:
        raise UserError(f"a planted law of kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    near = (lambda x: np.asarray(x) * np.exp(rng.uniform(-0.25, 0.25, np.shape(x)))) if rng else np.asarray
    stream = kind == "stream"
    anchor, level = near(STREAM_ANCHOR if stream else ANCHOR), float(near(0.05))
    eps = rng.uniform(0.1, 0.3) if rng else 0.2
    reference = dict(weak=([1.0, 0.6, 0.6], 0.4), stream=([1.3, 1.3, 0.55], 0.3))
    middle, middle_c = reference.get(kind, ([2.15, 0.80, 0.89], 0.65))
    if kind in ("weak", "eq3", "stream"):
        exponents, c = near(middle), float(near(middle_c))
    else:
        exponents, c = (rng.uniform(0.6, 2.2, 3), float(rng.uniform(0.4, 0.75))) if rng else (np.array(middle), 0.65)
    geometry = STREAM if stream else SOVIT
    cost = float(geometry.flops(dict(zip(DIMS, anchor)), head=False))  # of one image, at the anchor
    images = STREAM_COMPUTE / cost if stream else ANCHOR_IMAGES
    level = 1.1 * level / 0.05 if stream else level
    flops = elasticity(lambda x: geometry.flops(dict(zip(DIMS, x.T)), head=False), anchor)
    pull = c * flops * level  # of the data term at the anchor: what a_k A_k x_k^-a_k must equal
    amplitudes = pull / exponents * anchor**exponents
    law = Truth(kind, amplitudes, exponents, level * images**c, c, eps, anchor, geometry)
    if kind == "inter":
        size = elasticity(lambda x: num_params(x, SOVIT), anchor)
        term = frac * (pull / size).min() / PARAM_EXPONENT
        amplitudes = (pull - PARAM_EXPONENT * size * term) / exponents * anchor**exponents
        scaled = term * float(num_params(anchor, SOVIT)) ** PARAM_EXPONENT
        return replace(law, amplitudes=amplitudes, param_amplitude=scaled)
    if kind == "eq3":  # b_k = c / s_k - a_k at the published s
        powers, compute = near([0.805, 0.644, 0.193]), cost * images
        beta = pull / powers * anchor**-powers * compute**c
        return replace(law, B=0.2 * level * compute**c, cost_amplitudes=beta, cost_exponents=powers)
    if kind in ("bounded", "stream"):  # K^(s-1) dK = D^(s-1) dD at the anchor
        power = 2.0 if stream else float(rng.uniform(1.5, 2.5)) if rng else 1.9
        capacity = float((amplitudes * anchor**-exponents).sum())
        law = replace(law, amplitudes=amplitudes * (level / capacity) ** ((power - 1) / power), power=power)
        if stream:
            return replace(law, eps=0.2, zero_line=2.767)
        return replace(law, eps=eps / 2, scale=3.0 * 0.05 / level, zero_line=1.2)
    return law


@dataclass(frozen=True)
class Design:
    """Rows to measure: columns name -> [n], trunk of each row [n], and the geometry that counts their FLOPs."""

    columns: dict
    trunk: np.ndarray
    geometry: Geometry

    @property
    def shapes(self) -> np.ndarray:
        return np.stack([self.columns[d] for d in DIMS], 1)

    def losses(self, law: Truth) -> np.ndarray:
        return law.loss(self.shapes, self.columns["num_examples"])

    @property
    def known(self) -> dict:
        """What `law.fit` takes as `geometry`: all that the columns do not say."""
        names = ("patch_size", "image_size", "pool", "head_dim", "num_classes", "num_prefix_tokens")
        return {name: getattr(self.geometry, name) for name in names}

    def rows(self, keep: np.ndarray) -> Design:
        """The rows of a mask or an index [m]; trunks are numbered anew."""
        trunk = np.unique(self.trunk[keep], return_inverse=True)[1]
        return Design({name: column[keep] for name, column in self.columns.items()}, trunk, self.geometry)


def design(trunks: Any, images: Any, geometry: Geometry = SOVIT) -> Design:
    """Trunks [G, 3], each with its images (a list a trunk, or one for all)."""
    trunks = np.asarray(trunks, float)
    images = list(images) if np.ndim(images[0]) else [images] * len(trunks)
    trunk = np.repeat(np.arange(len(trunks)), [len(i) for i in images])
    shapes, seen = trunks[trunk], np.concatenate([np.asarray(i, float) for i in images])
    columns = dict(zip(DIMS, shapes.T))
    flops = geometry.flops(columns, head=False)
    columns |= dict(num_params=num_params(shapes, geometry), num_examples=seen, forward_flops=flops)
    columns |= dict(compute=flops * seen, train_flops=3 * geometry.flops(columns, head=True) * seen)
    return Design(columns, trunk, geometry)


def sovit_star(images: Any = IMAGES, per_arm: int = 6, corners: bool = False) -> Design:
    """SoViT's star, centre held out: `per_arm` trunks an arm spread over its values; 8 cheap off-axis trunks on demand."""
    picks = np.linspace(0, 5, per_arm).round().astype(int)
    trunks: list[tuple] = [
        tuple(ARMS[k][i] if k == j else CENTRE[j] for j in range(3)) for k in range(3) for i in picks
    ]
    return design(trunks + list(CORNERS if corners else ()), images)


def stream_star() -> Design:
    """The star of studies/stream_star.py: 18 shapes, three seeds at two of them, four budgets of training FLOPs."""
    shapes: list[tuple] = [STREAM_CENTRE]
    shapes += [tuple(v if k == j else STREAM_CENTRE[j] for j in range(3)) for k in range(3) for v in STREAM_ARMS[k]]
    shapes += [*STREAM_CORNERS, STREAM_CENTRE, STREAM_CENTRE, (64, 2, 256), (64, 2, 256)]
    cost = 3 * STREAM.flops(dict(zip(DIMS, np.array(shapes, float).T)), head=True)
    images = [[b / f for b in STREAM_TRAIN_FLOPS if b / f >= 100 * 16] for f in cost]
    return design(shapes, images, STREAM)


def noise(rows: Design, sd: float, rho: float, rng: np.random.Generator, kind: str = "normal") -> np.ndarray:
    """Factors on the losses [n]: ln is a trunk effect plus a row effect of total s.d. `sd`, a share rho the trunk's.

    kind: "normal"; "t3", both effects from Student's t with 3 degrees of freedom, of the same s.d.; "arms", half of the
    variance between trunks is shared by the trunks of an arm (those that differ in the same dimension).
    """
    num, n = int(rows.trunk.max()) + 1, len(rows.trunk)
    if kind == "t3":
        trunk, row = rng.standard_t(3, num) / np.sqrt(3), rng.standard_t(3, n) / np.sqrt(3)
    else:
        trunk, row = rng.standard_normal(num), rng.standard_normal(n)
    if kind == "arms":
        first = rows.shapes[np.unique(rows.trunk, return_index=True)[1]]
        middle = np.array([max(set(column), key=list(column).count) for column in first.T.tolist()])
        arm = np.unique(first != middle, axis=0, return_inverse=True)[1].ravel()
        trunk = np.sqrt(0.5) * (trunk + rng.standard_normal(arm.max() + 1)[arm])
    return np.exp(sd * (np.sqrt(rho) * trunk[rows.trunk] + np.sqrt(1 - rho) * row))
