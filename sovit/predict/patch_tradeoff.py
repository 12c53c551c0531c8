"""Smaller patches or more width? What a law says of spending FLOPs on tokens, beside spending them on anything else.

by_value   at one budget, for each patch size (or image size) that was run: the best shape with it, and its excess loss
along      the same over a ladder of budgets, and the turns, where the next value becomes the better one
spend      from the best shape, twice the FLOPs an image spent on one dimension at a time: which lowers the loss most

Numpy only. Intervals are the headline ones, read draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.fitted_law import Fit
from sovit.law.form import FALLING
from sovit.predict.integer_search import SIZES, Rules, lattice, minimise
from sovit.predict.law_at_budget import TOKEN_DRAWS, TOKENS, Target, budgets_run, columns, estimated, target
from sovit.predict.recommend import rules_of

FACTOR = 2.0  # of the FLOPs of one image, in `spend`
POINTS = 6  # budgets at which a turn is looked for, below the runs, among them and beyond each
BELOW, ABOVE = 10.0, 100.0  # how far below and above the budgets run
SMALLEST, LARGEST = 1e-3, 1e6  # factors of a dimension between which `spend` looks for its FLOPs


def trade(fit: Fit, train_flops: float, name: str, **rules: Any) -> dict:
    """`by_value`, `along` and `spend` of a law at a budget, as plain data: what `sovit predict --by NAME` says.

    {form, metric, level, train_flops, by, rules, values, turns, spend, curves}. Raises UserError for a dimension that is not
    patch_size or image_size or of which the law has no term, and as `best_shape` does.
    """
    at = target(fit, train_flops)
    if name not in TOKENS:
        raise UserError(f"--by {name}: choose {' or '.join(TOKENS)}, which take only values that were run")
    if name not in at.dims:
        raise UserError(
            f"the law has no term in {name}, which was {at.fixed(name):g} in all its rows; run other values"
        )
    given = rules_of(at, **rules)
    values = by_value(at, name, given)
    best = min(values, key=lambda row: row["loss"])
    curves, turns = along(at, name, [row["value"] for row in values])
    return dict(
        form=fit.form,
        metric=fit.data.metric or "loss",
        level=fit.level,
        train_flops=float(train_flops),
        by=name,
        rules=vars(given),
        values=values,
        turns=turns,
        spend=spend(at, name, best["shape"]),
        curves=curves,
    )


def by_value(at: Target, name: str, rules: Rules) -> list[dict]:
    """The best whole shape for each value of `name` that was run, exactly, all other dimensions chosen anew.

    [{value, shape, num_params, forward_flops, num_examples, loss, loss_low, loss_high, excess}], value rising. excess:
    {estimate, low, high} of its loss over that of the best of them, relative: both shapes fixed, draw by draw, so that
    an interval that holds 0 says that the two cannot be told apart. Values without any feasible shape are left out.
    """
    shapes, losses = {}, {}
    for value in sorted({pair[TOKENS.index(name)] for pair in at.run_pairs().tolist()}):
        try:
            grid = lattice(at, rules, {name: value})
        except UserError:  # no shape with it is within the rules or pays for one image
            continue
        near = dict(zip(at.dims, np.exp(at.optimum(held={name: value}))))
        best, losses[value] = minimise(grid, {n: near.get(n, at.fixed(n)) for n in SIZES})
        shapes[value] = at.shape(best, rules.head_dim)
    if not shapes:
        raise UserError(f"no shape of any {name} that was run keeps to the rules; raise a cap or lower a multiple")
    theta, widen = at.draws()
    table, first = columns(list(shapes.values())), min(losses, key=lambda value: losses[value])
    images, many = at.images(table), at.loss(table, theta)  # [V], [R, V]
    over = many / many[:, list(losses).index(first)][:, None] - 1
    rows = []
    for i, (value, shape) in enumerate(shapes.items()):
        low, high = at.loss_interval(shape.to_dict())
        same = dict(estimate=0.0, low=0.0, high=0.0)
        excess = vars(estimated(losses[value] / losses[first] - 1, over[:, i], widen))
        rows.append(
            dict(
                value=value,
                shape=shape.to_dict(),
                num_params=shape.num_params,
                forward_flops=shape.forward_flops,
                num_examples=int(images[i]),
                loss=losses[value],
                loss_low=low,
                loss_high=high,
                excess=same if value == first else excess,
            )
        )
    return rows


def along(at: Target, name: str, values: list) -> tuple[dict, list[dict]]:
    """At a ladder of budgets, the loss with each value of `name`, all other dimensions at their best real sizes.

    Returns the curves and the turns.
    curves: {train_flops [T], values: [{value, loss [T], loss_low, loss_high, excess [T], excess_low, excess_high}]}. The
    excess is over the best of the values by the fit itself; in a draw over the draw's own loss with that same value.
    turns, between neighbouring values: [{fewer, more, **_turn}], the training FLOPs from which the value with more tokens
    (`more`) is the better one for good.
    """
    ladder = _ladder(at)
    theta, widen = _fit_and_draws(at)
    order = sorted(values, reverse=name in FALLING)  # tokens rise
    loss = np.stack([[at.at(b).least(theta, {name: v}) for b in ladder] for v in order])  # [V, T, 1 + R]
    best = loss[:, :, 0].argmin(0)
    excess = loss / loss[best, np.arange(len(ladder))] - 1
    curves: list[dict] = []
    for i, value in enumerate(order):
        curves.append(dict(value=value))
        for what, many, floor in (("loss", loss[i], 1e-300), ("excess", excess[i], None)):
            ends = [interval(draws, widen, floor) for draws in many[:, 1:]] if len(theta) > 1 else None
            low, high = map(list, zip(*ends)) if ends else (None, None)
            curves[-1] |= {what: many[:, 0].tolist(), f"{what}_low": low, f"{what}_high": high}
    pairs = zip(order, order[1:], loss, loss[1:])
    turns = [dict(fewer=a, more=b) | _turn(at, np.log(x / y), ladder, widen) for a, b, x, y in pairs]
    return dict(train_flops=ladder.tolist(), values=curves), turns


def spend(at: Target, name: str, shape: Mapping) -> dict:
    """From a shape: FACTOR times its FLOPs an image, spent on one dimension, at as many images as before.

    {shape, factor, num_examples, train_flops, options, difference, turn}. options by dimension of the law: {to, gain}, `to`
    being the real size that costs as much and gain {estimate, low, high} the relative fall of the loss. difference, by
    dimension: {estimate, low, high} of gain(name) - gain(dimension), draw by draw at the same shape, in shares of the
    loss. turn, against the best of the others: as in `along`, the budget from which `name` is the better place for the
    FLOPs if it stands at this shape's value, all other dimensions being re-optimised at every budget.
    """
    theta, widen = _fit_and_draws(at)
    start = {n: np.array([float(shape[n])]) for n in at.dims}
    images = at.images(start)
    moved = {n: _doubled(at, start, n) for n in at.dims}
    gains = {}
    for n, sizes in moved.items():
        loss = at.loss({k: np.append(start[k], sizes[k]) for k in at.dims}, theta, np.repeat(images, 2))  # [1 + R, 2]
        gains[n] = 1 - loss[:, 1] / loss[:, 0]
    others, turn = [n for n in at.dims if n not in TOKENS], None
    if others:
        rival = max(others, key=lambda n: gains[n][0])
        ladder, held = _ladder(at), {n: float(shape[n]) for n in TOKENS if n in at.dims}
        gain = np.stack([_lead(at.at(b), theta, held, name, rival) for b in ladder])
        turn = dict(against=rival) | _turn(at, gain, ladder, widen)
    return dict(
        shape=dict(shape),
        factor=FACTOR,
        num_examples=int(images[0]),
        train_flops=at.train_flops * FACTOR,
        options={n: dict(to=float(moved[n][n][0]), gain=_ends(gain, widen)) for n, gain in gains.items()},
        difference={n: _ends(gains[name] - gain, widen) for n, gain in gains.items() if n != name},
        turn=turn,
    )


def _fit_and_draws(at: Target) -> tuple[np.ndarray, float]:
    """theta [1 + R, P] of the fit itself and its first TOKEN_DRAWS draws, and the widening of their percentiles."""
    theta, widen = at.draws()
    return np.concatenate([at.fit.theta[None], theta[:TOKEN_DRAWS]]), widen


def _ends(many: np.ndarray, widen: float) -> dict:
    """{estimate, low, high} of the fit's own value [0] and its draws [1:]."""
    return vars(estimated(many[0], many[1:], widen))


def _lead(at: Target, theta: np.ndarray, held: Mapping, name: str, rival: str) -> np.ndarray:
    """ln loss with the FLOPs spent on `rival` over that spent on `name`, [R], each theta at its own best sizes."""
    v = at.optimum(theta, held)
    start = dict(zip(at.dims, np.exp(v.T)))
    images = at.images(start)
    losses = []
    for n in (rival, name):
        moved = _doubled(at, start, n)
        losses.append(at.paired(np.log(np.stack([moved[k] for k in at.dims], 1)), theta, images))
    return np.log(losses[0] / losses[1])


def _doubled(at: Target, start: Mapping, name: str) -> dict[str, np.ndarray]:
    """The sizes [R] with `name` moved until an image costs FACTOR times as much; by bisection, for F rises or falls."""
    goal = FACTOR * at.geometry.flops(start, head=True)
    low, high = np.full(len(goal), np.log(SMALLEST)), np.full(len(goal), np.log(LARGEST))
    sign = -1 if name in FALLING else 1
    for _ in range(60):
        middle = (low + high) / 2
        over = at.geometry.flops(dict(start) | {name: start[name] * np.exp(sign * middle)}, head=True) > goal
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return dict(start) | {name: start[name] * np.exp(sign * low)}


def _turn(at: Target, gain: np.ndarray, ladder: np.ndarray, widen: float) -> dict:
    """Where gain [T, 1 + R] (the fit's own first) comes to stay above 0 on a ladder of budgets.

    {estimate, low, high, where, changes, searched, run}. where, by estimate, low and high: "within" the budgets
    `searched`, or "before" or "after" them, and then the number is None (after: below 0 at the largest of them); None
    without draws. changes counts how often the sign changes. run: the budgets run, beyond which a turn is an extrapolation.
    """
    logs = np.log(ladder)
    turns = np.array([_zero(logs, column) for column in gain.T])
    found = _ends(np.r_[turns[0], np.clip(turns[1:], logs[0], logs[-1])], widen)
    where = {
        key: None if end is None else "before" if end <= logs[0] else "after" if end >= logs[-1] else "within"
        for key, end in found.items()
    }
    sides = np.sign(gain[:, 0])
    return {key: float(np.exp(end)) if where[key] == "within" else None for key, end in found.items()} | dict(
        searched=[float(ladder[0]), float(ladder[-1])],
        run=list(budgets_run(at.fit)),
        where=where,
        changes=int((sides[1:] != sides[:-1]).sum()),
    )


def _zero(x: np.ndarray, y: np.ndarray) -> float:
    """The last place where y [T] turns from below 0 to above, linear between points; -inf or inf where there is none."""
    below = np.flatnonzero(y <= 0)
    if not len(below):
        return -np.inf
    i = int(below[-1])
    if i == len(x) - 1:
        return np.inf
    return float(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i]))


def _ladder(at: Target) -> np.ndarray:
    low, high = budgets_run(at.fit)
    parts = [np.geomspace(*ends, POINTS) for ends in ((low / BELOW, low), (low, high), (high, high * ABOVE))]
    return np.unique(np.concatenate(parts))
