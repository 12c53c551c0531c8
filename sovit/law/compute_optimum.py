"""Where a law has its optimum: the shape that minimises the predicted loss at a given compute. Numpy only.

Minimise ln M over v = ln x, M = the law less its irreducible term and its zero line (both monotone in M, they move no
optimum) at n = budget / F(x), with exact FLOPs F and, where the law reads it, the exact parameter count N(x). Sums of
powers are log-sum-exps of linear functions and ln F that of a posynomial, so ln M is convex and has one optimum; N(x)
with a negative power and a shift of the data are not convex, and start from the best of a grid too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit.law.form import Form
from sovit.law.geometry import Geometry

BEND = 1e-20  # of the complex step
DIFFERENCE = 1e-5  # of the gradient, for the curvature
STEP = 1e-3  # of the differences in ln x
STEPS = 80  # of Newton at most
FLAT = 3e-4  # least curvature of ln loss: a log unit of shape that moves the loss by less than .015 % is flat
GRID_POINTS = 512  # of the survey where a law is not convex


def law_columns(terms: Sequence[str], table: Mapping, images: Any, geometry: Geometry) -> np.ndarray:
    """ln of a law's columns [K, n] for dimensions name -> [n] trained on `images` [n]; parameters are counted.

    Of complex values complex.
    """
    known = {"num_examples": lambda: images, "num_params": lambda: geometry.num_params(table)}
    known["num_patches"] = lambda: geometry.num_patches(table) + 0 * np.asarray(next(iter(table.values())))
    return np.log(np.stack([np.asarray(table[n] if n in table else known[n]()) for n in terms]))


@dataclass(frozen=True)
class Family:
    """The laws of one form over one design, whatever their parameters: what an optimal shape is asked of.

    centre: of the form's columns in ln x. geometry: counts the FLOPs; a form by arm needs none. grid: the values run of
    each dimension, in the order of the answers.
    """

    form: Form
    centre: np.ndarray
    geometry: Geometry | None
    grid: Mapping[str, Any]

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.grid)


def optimum(
    family: Family,
    theta: np.ndarray,
    log_budget: np.ndarray | float,
    ends: tuple[np.ndarray, np.ndarray],
    head: bool = False,
) -> np.ndarray:
    """ln x of the optimal dimensions [R, K] for each theta [R, P], by damped Newton within a box.

    log_budget [R] or a number: ln of forward FLOPs x images (head=True: head FLOPs included); ends, [K] each: the box in
    ln x, where a dimension without an amplitude ends up.
    """
    centre, names = np.asarray(family.centre, float), family.dims
    log_budget = np.broadcast_to(np.asarray(log_budget, float), (len(theta),))
    form = dataclasses.replace(family.form, zero_line=None)
    theta = np.array(theta, float)
    theta[:, [j for j, term in enumerate(form.formula) if not term.factors]] = 1e-30
    problem = form, centre, names, family.geometry, head
    middle = np.array([centre[form.terms.index(name)] for name in names])
    starts = [np.tile(np.clip(middle, *ends), (len(theta), 1))]
    if not form.convex:
        starts.append(_survey(problem, theta, log_budget, *ends))
    many = len(starts)  # all starts as one batch: for a few laws the steps cost what they cost for one
    repeated = np.tile(theta, (many, 1)), np.tile(log_budget, many)
    v, phi = _newton(problem, *repeated, np.concatenate(starts), ends)
    best = phi.reshape(many, -1).argmin(0)
    return v.reshape(many, len(theta), -1)[best, np.arange(len(theta))]


def _measure(problem: tuple, theta: np.ndarray, log_budget: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln M [R] and its gradient [R, K] at v [R, K]: the form's own value and elasticities, chained through F and N.

    Slopes of the columns are by complex step: the counts are analytic in x, so that they are exact.
    """
    form, centre, names, geometry, head = problem
    bent = v[:, None] + BEND * 1j * np.eye(v.shape[1])  # [R, K, K]
    table = dict(zip(names, np.exp(np.moveaxis(bent, 2, 0))))  # [R, K] each
    images = np.exp(log_budget)[:, None] / geometry.flops(table, head)
    columns = law_columns(form.terms, table, images, geometry)  # [T, R, K]
    value, by_column = form.elasticities(theta, (columns[:, :, 0].real.T - centre)[:, :, None])
    return value[:, 0], np.einsum("rt,trk->rk", by_column[:, :, 0], columns.imag / BEND)


def _newton(
    problem: tuple, theta: np.ndarray, log_budget: np.ndarray, v: np.ndarray, ends: tuple
) -> tuple[np.ndarray, np.ndarray]:
    """From v [R, K] to a local minimum and its ln M; curvature by differences of the gradient, damped until it falls."""
    num, (low, high) = v.shape[1], ends
    identity = np.eye(num)
    phi, gradient = _measure(problem, theta, log_budget, v)
    out, out_phi, live = v.copy(), phi.copy(), np.arange(len(v))
    damping = np.full(len(v), 1e-3)
    for _ in range(STEPS):
        near = (v[:, None] + DIFFERENCE * identity).reshape(-1, num)
        _, bent = _measure(problem, np.repeat(theta, num, 0), np.repeat(log_budget, num), near)
        curve = (bent.reshape(len(v), num, num) - gradient[:, None]) / DIFFERENCE
        curve = (curve + curve.transpose(0, 2, 1)) / 2
        frozen = ((v <= low) & (gradient > 0)) | ((v >= high) & (gradient < 0))
        matrix = np.where(frozen[:, :, None] | frozen[:, None, :], 0.0, curve)
        matrix = matrix + identity * np.where(frozen, 1.0, damping[:, None])[:, :, None]
        step = np.linalg.solve(matrix, np.where(frozen, 0.0, -gradient)[:, :, None])[:, :, 0]
        trial = np.clip(v + np.clip(step, -0.7, 0.7), low, high)
        new_phi, new_gradient = _measure(problem, theta, log_budget, trial)
        better = new_phi <= phi + 1e-14
        still = np.abs(trial - v).max(1) < 1e-10
        damping = np.clip(np.where(better, damping * 0.2, damping * 10), 1e-9, 1e6)
        v = np.where(better[:, None], trial, v)
        phi = np.where(better, new_phi, phi)
        gradient = np.where(better[:, None], new_gradient, gradient)
        out[live], out_phi[live] = v, phi
        if still.all():
            break
        go = ~still
        live, v, phi, gradient, damping = live[go], v[go], phi[go], gradient[go], damping[go]
        theta, log_budget = theta[go], log_budget[go]
    return out, out_phi


def _survey(problem: tuple, theta: np.ndarray, log_budget: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The best point of a grid over the box, of each theta: [R, K]."""
    form, centre, names, geometry, head = problem
    per_dim = int(GRID_POINTS ** (1 / len(names)) + 1e-9)
    axes = [np.linspace(a, b, per_dim) for a, b in zip(low, high)]
    points = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")])  # [K, G]
    table = dict(zip(names, np.exp(points)))
    ln_f, sizes = np.log(geometry.flops(table, head)), law_columns(form.terms[:-1], table, None, geometry)
    best = []
    for i in range(0, len(theta), 256):
        images = log_budget[i : i + 256, None, None] - ln_f
        u = np.concatenate([np.broadcast_to(sizes, (len(images), *sizes.shape)), images], 1) - centre[:, None]
        best.append(form.evaluate(theta[i : i + 256], u)[0].argmin(1))
    return points[:, np.concatenate(best)].T


def curvature(
    family: Family, phi: np.ndarray, v: np.ndarray, log_budget: float, edges: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """How the optimum moves with the law: H [K, K] and M [K, P] at v = ln x [K], for phi = ln theta [P].

    H is the Hessian of ln loss over v along the budget, floored at FLAT; M = d2 ln loss / dv dphi; both by differences.
    By the implicit function theorem dv / dphi = -H^-1 M. A dimension on the edge of the box (`edges`, from
    `exponents.box`) does not move: its M is 0.
    """
    k, theta = len(v), np.exp(phi)
    near = v + STEP * np.concatenate([np.eye(k), -np.eye(k)])
    problem = family.form, family.centre, family.dims, family.geometry, True
    _, gradient = _measure(problem, np.tile(theta, (2 * k, 1)), np.full(2 * k, log_budget), near)
    hessian = (gradient[:k] - gradient[k:]) / (2 * STEP)
    hessian = (hessian + hessian.T) / 2
    _, jac = loss_along_budget(family, phi, near, log_budget)
    mixed = ((jac[:, :k] - jac[:, k:]) / (2 * STEP)).T * theta
    stuck = (v <= edges[0] + STEP) | (v >= edges[1] - STEP)
    mixed[stuck] = 0
    hessian[stuck] = hessian[:, stuck] = 0
    size, axes = np.linalg.eigh(hessian)
    return (axes * np.maximum(size, FLAT)) @ axes.T, mixed


def loss_along_budget(
    family: Family, phi: np.ndarray, v: np.ndarray, log_budget: float
) -> tuple[np.ndarray, np.ndarray]:
    """ln loss [S] and its derivatives to theta [P, S] of shapes v [S, K], each on as many images as the budget pays."""
    geometry, table = family.geometry, dict(zip(family.dims, np.exp(v).T))
    assert geometry is not None
    images = np.exp(log_budget) / geometry.flops(table, head=True)
    u = law_columns(family.form.terms, table, images, geometry) - family.centre[:, None]
    value, jac = family.form.evaluate(np.exp(phi)[None], u)
    return value[0], jac[0]
