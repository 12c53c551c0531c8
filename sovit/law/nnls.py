"""Non-negative least squares, many problems at once."""

from __future__ import annotations

import numpy as np


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
