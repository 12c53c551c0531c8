"""A projected Levenberg-Marquardt on a robust, whitened, bounded objective, batched over replicates. Numpy only.

The residual of row i is r_i = ln f_i - ln y_i; rows of one trunk share an error (same data order, same initialisation),
so residuals can be whitened by trunk before the loss. Axis order: replicate, parameter, row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

DRAW_TOLERANCE = 1e-9  # 1e-6 leaves up to 17 % of sovit replicates above their optimum
CACHED = 100_000  # numbers of the Jacobian that are worked on at once
DENSE_ROWS = 200  # rows up to which whitening is a matrix product


@dataclass(frozen=True)
class Groups:
    """Which trunk each row belongs to, and how much of the trunk mean whitening takes off (kappa, one a trunk)."""

    index: np.ndarray  # [n], 0..G-1
    kappa: np.ndarray  # [G], 0 = unwhitened

    @staticmethod
    def plain(index: np.ndarray) -> Groups:
        return Groups(index, np.zeros(int(index.max()) + 1))

    @cached_property
    def _sums(self) -> Callable[[np.ndarray], np.ndarray]:
        return group_sums(self.index)

    @cached_property
    def _matrix(self) -> np.ndarray:
        """Whitening as one matrix [n, n]; of few rows that is the fastest."""
        return self._subtract(np.eye(len(self.index)))

    def _subtract(self, x: np.ndarray) -> np.ndarray:
        return x - (self._sums(x) * (self.kappa / np.bincount(self.index)))[..., self.index]

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """x [..., n] less kappa times its trunk mean; turns a trunk effect plus a row error into a white error."""
        if not self.kappa.any():
            return x
        if len(self.index) > DENSE_ROWS:
            return self._subtract(x)
        return (x.reshape(-1, x.shape[-1]) @ self._matrix).reshape(x.shape)


def group_sums(index: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """x [..., n] -> its sums over the rows of each group [..., G]; index [n] holds each of 0..G-1."""
    order = np.argsort(index, kind="stable")
    first = np.concatenate([[0], np.flatnonzero(np.diff(index[order])) + 1])
    if (order[1:] > order[:-1]).all():
        return lambda x: np.add.reduceat(x, first, -1)
    return lambda x: np.add.reduceat(x[..., order], first, -1)


@dataclass(frozen=True)
class Polished:
    theta: np.ndarray  # [R, P]
    objective: np.ndarray  # [R], sum over rows of the loss
    converged: np.ndarray  # [R]

    def take(self, which: np.ndarray) -> Polished:
        return Polished(self.theta[which], self.objective[which], self.converged[which])

    def best_first(self) -> Polished:
        return self.take(np.argsort(self.objective, kind="stable"))


def loss_of(residual: np.ndarray, delta: float) -> np.ndarray:
    """Huber loss, r^2/2 inside delta (delta = inf: squares), element by element."""
    size = np.abs(residual)
    if np.isinf(delta):
        return 0.5 * residual**2
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Objective:
    """sum_i w_i rho(whitened residual_i) of a form on rows u [K, n]; log_y and weights [n], or [R, n] one a replicate.

    form: a `Form`, or what has its `bounds` and `evaluate` and may say how a step is taken (`advance`: theta, step ->
    theta, equal to theta + step for small ones).
    """

    form: Any
    u: np.ndarray
    log_y: np.ndarray
    groups: Groups
    delta: float = np.inf
    weights: np.ndarray | None = None

    def measure(self, theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss [R], gradient [R, P] and Gauss-Newton Hessian [R, P, P] of the replicates `rows`."""
        value, jac = self.form.evaluate(theta, self.u)
        residual, jac = self.groups.whiten(value - self.log_y[rows]), self.groups.whiten(jac)
        loss, weight = loss_of(residual, self.delta), None
        if np.isfinite(self.delta):
            weight = np.minimum(1.0, self.delta / np.maximum(np.abs(residual), 1e-300))
        if self.weights is not None:
            loss = loss * self.weights[rows]
            weight = self.weights[rows] if weight is None else weight * self.weights[rows]
        weighted = jac if weight is None else jac * weight[:, None]
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        return loss.sum(1), gradient, weighted @ jac.transpose(0, 2, 1)


@dataclass(frozen=True)
class _Live:
    """Replicates that are worked on: where each is, and how its last steps went."""

    rows: np.ndarray  # [L] which replicate
    theta: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    hessian: np.ndarray
    damping: np.ndarray
    calm: np.ndarray  # accepted steps in a row that gained next to nothing
    age: np.ndarray
    scale: np.ndarray

    @staticmethod
    def enter(objective: Objective, theta: np.ndarray, rows: np.ndarray) -> _Live:
        start, zero = theta[rows], np.zeros(len(rows), int)
        measured = objective.measure(start, rows)
        return _Live(rows, start, *measured, np.full(len(rows), 1e-3), zero, zero, np.zeros_like(start))

    def keep(self, which: np.ndarray) -> _Live:
        return _Live(*(part[which] for part in vars(self).values()))

    def join(self, more: _Live) -> _Live:
        return _Live(*(np.concatenate(pair) for pair in zip(vars(self).values(), vars(more).values())))

    def step(self, objective: Objective, tolerance: float) -> _Live:
        """One damped step, taken where it does not raise the loss."""
        low, high = objective.form.bounds
        advance = getattr(objective.form, "advance", np.add)
        diagonal = np.arange(self.theta.shape[1])
        diag = self.hessian[:, diagonal, diagonal]
        scale = np.maximum(diag, 0.5 * self.scale)
        # a parameter on its bound whose descent direction points outwards sits still in this step
        frozen = ((self.theta <= low) & (self.gradient > 0)) | ((self.theta >= high) & (self.gradient < 0))
        descent = np.where(frozen, 0.0, -self.gradient)
        system = np.where(frozen[:, :, None] | frozen[:, None, :], 0.0, self.hessian)
        damped = self.damping[:, None] * (scale + 1e-14 * diag.max(1, keepdims=True)) + 1e-300
        system[:, diagonal, diagonal] += np.where(frozen, 1.0, damped)
        step = np.linalg.solve(system, descent[:, :, None])[:, :, 0]
        trial = np.clip(advance(self.theta, step), low, high)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a loss of 0 is tried, and refused
            loss, gradient, hessian = objective.measure(trial, self.rows)
        accept, gain = loss <= self.loss, self.loss - loss  # False for nan
        # Nielsen's rule: the damping falls as far as the quadratic model foretold the gain
        foretold = (step * (descent - 0.5 * (self.hessian @ step[:, :, None])[:, :, 0])).sum(1)
        ratio = gain / np.maximum(foretold, 1e-300)
        factor = np.where(accept, np.clip(1 - (2 * ratio - 1) ** 3, 0.1, 2.0), 5.0)
        return _Live(
            self.rows,
            np.where(accept[:, None], trial, self.theta),
            np.where(accept, loss, self.loss),
            np.where(accept[:, None], gradient, self.gradient),
            np.where(accept[:, None, None], hessian, self.hessian),
            np.clip(self.damping * factor, 1e-15, None),
            np.where(accept, np.where(gain < tolerance * self.loss, self.calm + 1, 0), self.calm),
            self.age + 1,
            scale,
        )


def polish(objective: Objective, theta: np.ndarray, tolerance: float = DRAW_TOLERANCE, cap: int = 800) -> Polished:
    """Minimise the objective from each row of theta [R, P].

    Converged = two accepted steps in a row, each lowering the objective by less than `tolerance` of itself, or a
    damping beyond 1e10; `cap` steps at most. As many replicates as the cache holds are worked on at once; one that is
    done makes room for the next.
    """
    num, n = len(theta), objective.u.shape[1]
    weights = None if objective.weights is None else np.broadcast_to(objective.weights, (num, n))
    log_y = np.broadcast_to(objective.log_y, (num, n))
    objective = dataclasses.replace(objective, log_y=log_y, weights=weights)
    theta = np.clip(theta, *objective.form.bounds)
    size = max(1, min(512, CACHED // (theta.shape[1] * n)))
    out = Polished(theta.copy(), np.empty(num), np.zeros(num, bool))
    live, entered = _Live.enter(objective, theta, np.arange(min(size, num))), min(size, num)
    while len(live.rows):
        live = live.step(objective, tolerance)
        done = (live.calm >= 2) | (live.damping > 1e10) | (live.loss < 1e-24)
        stop = done | (live.age >= cap)
        if stop.any():
            rows = live.rows[stop]
            out.theta[rows], out.objective[rows], out.converged[rows] = live.theta[stop], live.loss[stop], done[stop]
            live = live.keep(~stop)
        if entered < num and len(live.rows) <= 0.75 * size:
            more = np.arange(entered, min(entered + size - len(live.rows), num))
            live, entered = live.join(_Live.enter(objective, theta, more)), entered + len(more)
    return out
