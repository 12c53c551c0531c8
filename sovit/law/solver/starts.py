"""Starting points of a fit: the best of an exponent grid, amplitudes by non-negative least squares."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from sovit.law.solver.link import unbounded

if TYPE_CHECKING:
    from sovit.law.form import Form

SIZE_GRID = (0.1, 0.3, 0.6, 1.0, 1.8, 3.0)
DATA_GRID = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
DATA_COLUMNS = ("num_examples", "tokens", "compute")
NUM_STARTS = 8
MAX_GRID = 1500  # points; with more columns the grid gets coarser instead of longer
IN_MEMORY = 2_000_000  # numbers of the bases that are solved at once


def nnls(basis: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative least squares of target [n] on basis [G, p, n] for G bases at once, exactly.

    Block principal pivoting (Judice and Pires 1994) on the normal equations: all infeasible coefficients change sides,
    or, after three exchanges without progress, the last of them alone, which cannot cycle. Returns coefficients [G, p]
    and the sum of squares [G].
    """
    num, p, _ = basis.shape
    scale = np.linalg.norm(basis, axis=2) + 1e-300
    unit = basis / scale[:, :, None]
    normal = unit @ unit.transpose(0, 2, 1) + 1e-13 * np.eye(p)
    moment = unit @ target
    squares = float(target @ target)
    coef, held = np.zeros((num, p)), np.ones((num, p), bool)
    fewest, patience, live = np.full(num, p + 1), np.full(num, 3), np.arange(num)
    identity, tolerance = np.eye(p, dtype=bool), 1e-12 * np.sqrt(squares)
    while len(live):
        on = held[live]
        system = np.where(on[:, :, None] & on[:, None, :], normal[live], identity)
        x = np.linalg.solve(system, np.where(on, moment[live], 0.0)[:, :, None])[:, :, 0]
        slope = (normal[live] @ x[:, :, None])[:, :, 0] - moment[live]
        wrong = np.where(on, x < 0, slope < -tolerance)
        count = wrong.sum(1)
        coef[live] = np.maximum(x, 0)
        better = count < fewest[live]
        patience[live] = np.where(better, 3, patience[live] - 1)
        fewest[live] = np.minimum(fewest[live], count)
        last = p - 1 - wrong[:, ::-1].argmax(1)
        change = np.where((patience[live] >= 0)[:, None], wrong, wrong & (np.arange(p) == last[:, None]))
        held[live] = on ^ change
        live = live[count > 0]
    return coef / scale, squares - (coef * moment).sum(1)


def starts(form: Form, u: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The best points of an exponent grid, amplitudes by NNLS on relative error; [starts, P]."""
    if form.power_mean:
        return _mean_starts(form, u, y)
    names = [name for _, name, _ in form.exponents]
    grid = dict(zip(names, _grids(form)))
    own = [name for name in names if name not in form.shared]
    points = np.array(list(product(*(grid[name] for name in own))))
    num, found, score = len(form.formula), [], []
    for common in product(*(grid[name] for name in names if name in form.shared)):
        local = np.empty((len(points), len(names)))
        local[:, [names.index(n) for n in own]] = points
        local[:, [names.index(n) for n in names if n in form.shared]] = common
        theta = np.empty((NUM_STARTS, len(form.names)))
        objective = np.zeros(NUM_STARTS)
        for g in range(len(form.arms) or 1):
            rows = u[2] == g if form.arms else slice(None)
            amplitude, squares = _amplitudes(form, local, u[:, rows], y[rows])
            best = np.argsort(squares, kind="stable")[:NUM_STARTS]
            best = np.resize(best, NUM_STARTS)
            theta[:, form.place[:num, g]] = amplitude[best]
            theta[:, form.place[num:, g]] = local[best]
            objective += squares[best]
        keep = 1 if form.shared else min(NUM_STARTS, len(points))
        found.append(theta[:keep])
        score.append(objective[:keep])
    best = np.argsort(np.concatenate(score), kind="stable")[:NUM_STARTS]
    return np.concatenate(found)[best]


def _grids(form: Form) -> list[tuple[float, ...]]:
    """Grid of each exponent, thinned until all points that go together are at most MAX_GRID."""
    free = sum(name not in form.shared for _, name, _ in form.exponents)
    per_term = len(SIZE_GRID)
    while per_term**free > MAX_GRID and per_term > 2:
        per_term -= 1
    pick = np.linspace(0, len(SIZE_GRID) - 1, per_term).round().astype(int)
    grids = [DATA_GRID if column in DATA_COLUMNS else SIZE_GRID for column, _, _ in form.exponents]
    return [tuple(np.array(g)[pick]) for g in grids]


def _amplitudes(form: Form, local: np.ndarray, u: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best amplitudes [G, J] at exponents local [G, E], and the sum of squared relative errors [G]."""
    size = max(1, IN_MEMORY // (len(form.formula) * len(y)))
    parts = [local[i : i + size] for i in range(0, len(local), size)]
    found = [nnls(_basis(form, part, u) / y, np.ones(len(y))) for part in parts]
    return np.concatenate([amplitude for amplitude, _ in found]), np.concatenate([squares for _, squares in found])


def _basis(form: Form, local: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Terms with amplitudes 1 at exponents local [G, E]: [G, J, n]."""
    logs = form.signs[:, None] * u[form.row]
    out = np.ones((len(local), len(form.formula), u.shape[1]))
    for j, at in enumerate(form.holds):
        if at:
            out[:, j] = np.exp((local[:, at, None] * logs[at]).sum(1))
    return out


def _mean_starts(form: Form, u: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Starts of the plain sum on the unbounded loss, each at several s, amplitudes rescaled so that the level fits."""
    base = starts(replace(form, power_mean=False, zero_line=None), u, unbounded(form, y))
    found = []
    for s in (1.0, 1.7, 3.0):
        for factor in (1.0, 1.2, 1.5, 2.0):
            theta = np.insert(base, len(form.formula) + len(form.exponents), s, 1)
            theta[:, [bool(t.factors) for t in form.formula] + [False] * (theta.shape[1] - len(form.formula))] *= factor
            found.append(theta)
    theta = np.array(found)  # [s x factor, starts, P]
    residual = (form.evaluate(theta.reshape(-1, theta.shape[2]), u)[0] - np.log(y)) ** 2
    score = residual.sum(1).reshape(3, 4, -1).argmin(1)  # the best factor of each (s, start)
    theta = theta.reshape(3, 4, len(base), -1)
    return np.concatenate([theta[i, score[i], np.arange(len(base))] for i in range(3)])
