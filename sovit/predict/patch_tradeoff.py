"""Smaller patches or more width? What a law says of spending FLOPs on tokens, beside spending them on anything else.

by_value   at one budget, for each patch size (or image size) that was run: the best shape with it, and its excess loss
along      the same over a ladder of budgets, and the turns, where the next value becomes the better one
spend      from the best shape, twice the FLOPs an image spent on one dimension at a time: which lowers the loss most

Numpy only. Intervals are the headline ones, read draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.fitted_law import Fit
from sovit.law.form import FALLING
from sovit.predict.integer_search import SIZES, Rules, lattice, minimise
from sovit.predict.law_at_budget import TOKEN_DRAWS, TOKENS, Target, budgets_run, columns, target
from sovit.predict.recommend import rules_of

FACTOR = 2.0  # of the FLOPs of one image, in `spend`
POINTS = 6  # budgets at which a turn is looked for, below the runs, among them and beyond each
BELOW, ABOVE = 10.0, 100.0  # how far below and above the budgets run
SMALLEST, LARGEST = 1e-3, 1e6  # factors of a dimension between which `spend` looks for its FLOPs


def trade(fit: Fit, train_flops: float, name: str, **rules) -> dict:
    """`by_value`, `along` and `spend` of a law at a budget, as plain data: what `sovit predict --by NAME` says.

    {form, metric, level, train_flops, by, rules, values, turns, spend, curves}. Raises UserError for a dimension that is not
    patch_size or image_size or of which the law has no term, and as `predict.best_shape` does.
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
    curves = along(at, name, [row["value"] for row in values])
    return dict(
        form=fit.form,
        metric=fit.data.metric or "loss",
        level=fit.level,
        train_flops=float(train_flops),
        by=name,
        rules=vars(given),
        values=values,
        turns=curves.pop("turns"),
        spend=spend(at, name, best["shape"]),
        curves=curves,
    )


def by_value(at: Target, name: str, rules: Rules) -> list[dict]:
    """The best whole shape for each value of `name` that was run, exactly, all other dimensions chosen anew.

    [{value, shape, num_params, forward_flops, num_examples, loss, loss_low, loss_high, excess}], value rising. excess:
    {estimate, low, high} of its loss over that of the best of them, relative: both shapes fixed, draw by draw, so that
    an interval that holds 0 says that the two cannot be told apart. Values without any feasible shape are left out.
    """
    rows = []
    for value in sorted({pair[TOKENS.index(name)] for pair in at.run_pairs().tolist()}):
        try:
            grid = lattice(at, rules, {name: value})
        except UserError:  # no shape with it is within the rules or pays for one image
            continue
        near = dict(zip(at.dims, np.exp(at.optimum(held={name: value}))))
        best, loss = minimise(grid, {n: near.get(n, at.fixed(n)) for n in SIZES})
        shape = at.shape(best, rules.head_dim)
        low, high = at.loss_interval(best)
        rows.append(
            dict(
                value=value,
                shape=shape.to_dict(),
                num_params=shape.num_params,
                forward_flops=shape.forward_flops,
                num_examples=int(at.images(columns([shape]))[0]),
                loss=loss,
                loss_low=low,
                loss_high=high,
            )
        )
    if not rows:
        raise UserError(f"no shape of any {name} that was run keeps to the rules; raise a cap or lower a multiple")
    table = {n: np.array([row["shape"][n] for row in rows], float) for n in (*SIZES, *TOKENS)}
    first = int(np.argmin([row["loss"] for row in rows]))
    theta, widen = at.draws()
    many = at.loss(table, theta) if len(theta) else None  # [R, V]
    for i, row in enumerate(rows):
        ends = (None, None) if many is None else interval(many[:, i] / many[:, first] - 1, widen, floor=None)
        estimate = row["loss"] / rows[first]["loss"] - 1
        row["excess"] = dict(zip(("estimate", "low", "high"), (estimate, *((0.0, 0.0) if i == first else ends))))
    return rows


def along(at: Target, name: str, values: list) -> dict:
    """At a ladder of budgets, the loss with each value of `name`, all other dimensions at their best real sizes.

    {train_flops [T], values: [{value, loss [T], loss_low, loss_high, excess [T], excess_low, excess_high}], turns}. The
    excess is over the best of the values by the fit itself; in a draw over the draw's own loss with that same value. turns,
    between neighbouring values: [{fewer, more, estimate, low, high, where, changes, searched, run}], the training FLOPs
    from which the value with more tokens (`more`) is the better one for good; changes counts how often they change
    places. where, by estimate, low and high: "within" the budgets `searched`, or "before" or "after" them, and then the
    number is None (after: fewer tokens are better at the largest of them); None without draws. `run` are the budgets run,
    beyond which a turn is an extrapolation.
    """
    ladder, run = _ladder(at)
    theta, widen = at.draws()
    every = np.concatenate([at.fit.theta[None], theta[:TOKEN_DRAWS]])
    order = sorted(values, reverse=name in FALLING)  # tokens rise
    loss = np.stack([[at.at(b).least(every, {name: v}) for b in ladder] for v in order])  # [V, T, 1 + R]
    best = loss[:, :, 0].argmin(0)
    excess = loss / loss[best, np.arange(len(ladder))] - 1
    curves = []
    for i, value in enumerate(order):
        curve: dict = dict(value=value)
        for what, many in (("loss", loss[i]), ("excess", excess[i])):
            floor = 1e-300 if what == "loss" else None
            ends = [interval(draws, widen, floor) for draws in many[:, 1:]] if len(theta) else None
            curve[what] = many[:, 0].tolist()
            curve[f"{what}_low"], curve[f"{what}_high"] = map(list, zip(*ends)) if ends else (None, None)
        curves.append(curve)
    turns = [
        dict(fewer=order[i], more=order[i + 1]) | _turn(np.log(loss[i] / loss[i + 1]), ladder, run, widen)
        for i in range(len(order) - 1)
    ]
    return dict(train_flops=ladder.tolist(), values=curves, turns=turns)


def spend(at: Target, name: str, shape: Mapping) -> dict:
    """From a shape: FACTOR times its FLOPs an image, spent on one dimension, at as many images as before.

    {shape, factor, num_examples, train_flops, options, difference, turn}. options by dimension of the law: {to, gain}, `to`
    being the real size that costs as much and gain {estimate, low, high} the relative fall of the loss. difference, by
    dimension: {estimate, low, high} of gain(name) - gain(dimension), draw by draw at the same shape, in shares of the
    loss. turn, against the best of the others: as in `along`, the budget from which `name` is the better place for the
    FLOPs if it stands at this shape's value, all other dimensions being re-optimised at every budget.
    """
    theta, widen = at.draws()
    every = np.concatenate([at.fit.theta[None], theta[:TOKEN_DRAWS]])
    start = {n: np.array([float(shape[n])]) for n in at.dims}
    images = at.images(start)
    gains: dict = {}
    options: dict = {}
    for n in at.dims:
        moved = _doubled(at, start, n)
        loss = at.loss({k: np.append(start[k], moved[k]) for k in at.dims}, every, np.repeat(images, 2))  # [1 + R, 2]
        gains[n] = 1 - loss[:, 1] / loss[:, 0]
        options[n] = dict(to=float(moved[n][0]), gain=_ends(gains[n], widen))
    others = [n for n in at.dims if n not in TOKENS]
    out: dict = dict(
        shape=dict(shape),
        factor=FACTOR,
        num_examples=int(images[0]),
        train_flops=at.train_flops * FACTOR,
        options=options,
        difference={n: _ends(gains[name] - gains[n], widen) for n in at.dims if n != name},
        turn=None,
    )
    if others:
        rival = max(others, key=lambda n: options[n]["gain"]["estimate"])
        ladder, run = _ladder(at)
        held = {n: float(shape[n]) for n in TOKENS if n in at.dims}
        gain = np.stack([_lead(at.at(b), every, held, name, rival) for b in ladder])
        out["turn"] = dict(against=rival) | _turn(gain, ladder, run, widen)
    return out


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


def _turn(gain: np.ndarray, ladder: np.ndarray, run: list, widen: float) -> dict:
    """Where gain [T, 1 + R] (the fit's own first) comes to stay above 0 on a ladder of budgets."""
    logs = np.log(ladder)
    at = np.array([_zero(logs, column) for column in gain.T])
    ends = interval(np.clip(at[1:], logs[0], logs[-1]), widen, floor=None) if len(at) > 1 else (None, None)
    sides = np.sign(gain[:, 0])
    found: dict = dict(searched=[float(ladder[0]), float(ladder[-1])], run=run, where={})
    found["changes"] = int((sides[1:] != sides[:-1]).sum())
    for key, end in zip(("estimate", "low", "high"), (float(at[0]), *ends)):
        where = None if end is None else "before" if end <= logs[0] else "after" if end >= logs[-1] else "within"
        found[key] = float(np.exp(end)) if end is not None and where == "within" else None
        found["where"][key] = where
    return found


def _zero(x: np.ndarray, y: np.ndarray) -> float:
    """The last place where y [T] turns from below 0 to above, linear between points; -inf or inf where there is none."""
    below = np.flatnonzero(y <= 0)
    if not len(below):
        return -np.inf
    i = int(below[-1])
    if i == len(x) - 1:
        return np.inf
    return float(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i]))


def _ends(many: np.ndarray, widen: float) -> dict:
    """{estimate, low, high} of the fit's own value [0] and its draws [1:]."""
    ends = interval(many[1:], widen, floor=None) if len(many) > 1 else (None, None)
    return dict(zip(("estimate", "low", "high"), (float(many[0]), *ends)))


def _ladder(at: Target) -> tuple[np.ndarray, list]:
    low, high = budgets_run(at.fit)
    parts = [np.geomspace(*ends, POINTS) for ends in ((low / BELOW, low), (low, high), (high, high * ABOVE))]
    return np.unique(np.concatenate(parts)), [low, high]
