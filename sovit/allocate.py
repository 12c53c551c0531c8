"""Where a law has its optimum: the shape that minimises the predicted loss at a given compute. Numpy only.

Minimise phi(v) = ln M, M = (K^s + D^s)^(1/s), over v = ln x; K = sum_k A_k e^{-a_k v_k}, D = B (F(x)/t)^c, exact F.
s = 1 is the additive law; an irreducible term or a zero line is monotone in M and moves no optimum. ln K is a
log-sum-exp of linear functions and ln F that of a posynomial, so phi is convex: there is one optimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sovit.shape import encoder_flops


@dataclass(frozen=True)
class Geometry:
    """What FLOPs need beyond the dimensions of a law: the values held fixed, and the task head.

    `flops_scale` is the data's own forward_flops over our count (geometric mean); 1 for rows that sovit wrote.
    """

    width: float | None = None
    depth: float | None = None
    mlp_dim: float | None = None
    patch_size: float | None = None
    image_size: float | None = None
    head_dim: int = 64
    pool: str = "avg"
    num_prefix_tokens: int = 0
    num_classes: int = 0
    flops_scale: float = 1.0
    counting: str = "exact"  # a key of shape.COUNTINGS

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def flops(self, dims: Mapping[str, np.ndarray], head: bool):
        """Forward FLOPs of one image, task head included or not; real, complex or integer arrays."""
        width, depth, mlp_dim, patch, size = (
            dims.get(name, getattr(self, name)) for name in ("width", "depth", "mlp_dim", "patch_size", "image_size")
        )
        patches = (size / patch) ** 2
        if self.counting == "params_tokens":
            count = 2 * self.num_params(dims) * (patches + self.num_prefix_tokens)
        else:
            prefix = self.num_prefix_tokens
            count = encoder_flops(width, depth, mlp_dim, patches, prefix, patch, self.pool, self.counting)
        if head:
            count = count + 2 * width * self.num_classes * (patches if self.pool == "none" else 1)
        return count * self.flops_scale

    def log_flops(self, names, v: np.ndarray, head: bool) -> tuple[np.ndarray, np.ndarray]:
        """ln F [R] and its gradient [R, K] at v = ln x [R, K], by complex step (F is analytic in x: exact)."""
        value, gradient = np.log(self.flops(dict(zip(names, np.exp(v).T)), head)), np.empty_like(v)
        for k in range(v.shape[1]):
            bent = v.astype(complex)
            bent[:, k] += 1e-20j
            gradient[:, k] = np.log(self.flops(dict(zip(names, np.exp(bent).T)), head)).imag / 1e-20
        return value, gradient


def optimum(parts, centre, names, geometry: Geometry, log_budget, low, high, head=False, steps=80) -> np.ndarray:
    """ln x of the optimal dimensions [R, K], by damped projected Newton from the middle of the box.

    parts: A a [R, K], B c s [R] as `split` of a form gives them, on centred logs; centre [K + 1], the last of
    ln num_examples; log_budget [R] or a number: ln of forward FLOPs x images (head=True: head FLOPs included);
    low, high [K]: the box in ln x, where a dimension without an amplitude ends up.
    """
    A, a, B, c, s = (parts[key] for key in ("A", "a", "B", "c", "s"))
    log_budget = np.broadcast_to(np.asarray(log_budget, float), B.shape)
    identity = np.eye(len(names))

    def measure(v):
        term = A * np.exp(-a * (v - centre[:-1]))
        total = term.sum(1) + 1e-30
        ln_f, g_f = geometry.log_flops(names, v, head)
        ln_k = np.log(total)
        ln_d = np.log(B + 1e-30) + c * (ln_f + centre[-1] - log_budget)
        phi = np.logaddexp(s * ln_k, s * ln_d) / s
        g_k, g_d = -a * term / total[:, None], c[:, None] * g_f
        p = np.exp(s * (ln_k - phi))[:, None]
        gap = g_k - g_d
        # exact Hessian but for the curvature of ln F, which is small and positive
        curve = (p * a * a * term / total[:, None])[:, :, None] * identity
        curve = curve - p[:, :, None] * g_k[:, :, None] * g_k[:, None, :]
        curve = curve + (s[:, None] * p * (1 - p))[:, :, None] * gap[:, :, None] * gap[:, None, :]
        return phi, p * g_k + (1 - p) * g_d, curve

    v = np.tile(np.clip(np.asarray(centre[:-1], float), low, high), (len(B), 1))
    phi, gradient, curve = measure(v)
    damping = np.full(len(B), 1e-3)
    for _ in range(steps):
        frozen = ((v <= low) & (gradient > 0)) | ((v >= high) & (gradient < 0))
        matrix = np.where(frozen[:, :, None] | frozen[:, None, :], 0.0, curve)
        matrix = matrix + identity * np.where(frozen, 1.0, damping[:, None])[:, :, None]
        step = np.linalg.solve(matrix, np.where(frozen, 0.0, -gradient)[:, :, None])[:, :, 0]
        trial = np.clip(v + np.clip(step, -0.7, 0.7), low, high)
        if np.abs(trial - v).max() < 1e-10:
            break
        new_phi, new_gradient, new_curve = measure(trial)
        better = new_phi <= phi
        damping = np.clip(np.where(better, damping * 0.2, damping * 10), 1e-9, 1e6)
        v = np.where(better[:, None], trial, v)
        phi = np.where(better, new_phi, phi)
        gradient = np.where(better[:, None], new_gradient, gradient)
        curve = np.where(better[:, None, None], new_curve, curve)
    return v
