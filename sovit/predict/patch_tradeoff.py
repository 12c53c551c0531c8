"""Smaller patches or more width? What a law says of spending FLOPs on tokens, beside spending them on anything else.

by_value   at one budget, for each patch size (or image size) that was run: the best shape with it, and its excess loss
spend      from the best shape, twice the FLOPs an image spent on one dimension at a time: which lowers the loss most
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.fitted_law import Fit
from sovit.law.form import FALLING
from sovit.predict.integer_search import SIZES, Rules, lattice, minimise
from sovit.predict.law_at_budget import TOKENS, Estimate, Target, columns, estimated, target
from sovit.predict.recommend import rules_of

FACTOR = 2.0  # of the FLOPs of one image, in `spend`
LARGEST = 1e6  # factor of a dimension up to which `spend` looks for its FLOPs


def trade(fit: Fit, train_flops: float, name: str, **rules: Any) -> dict:
    """Compare the values of a dimension, and the ways to spend FLOPs: what `sovit predict --by NAME` says.

    Returns {form, metric, level, train_flops, by, rules, values, spend} as plain data. Raises UserError for a dimension
    that is not patch_size or image_size or of which the law has no term, and as `best_shape` does.
    """
    at = target(fit, train_flops)
    if name not in TOKENS:
        raise UserError(f"by={name!r}: choose {' or '.join(TOKENS)}, which take only values that were run")
    if name not in at.dims:
        raise UserError(
            f"the law has no term in {name}, which was {at.fixed(name):g} in all its rows; run other values"
        )
    given = rules_of(at, **rules)
    values = by_value(at, name, given)
    return dict(
        form=fit.form,
        metric=fit.data.metric or "loss",
        level=fit.level,
        train_flops=float(train_flops),
        by=name,
        rules=vars(given),
        values=values,
        spend=spend(at, min(values, key=lambda row: row["loss"])["shape"]),
    )


def by_value(at: Target, name: str, rules: Rules) -> list[dict]:
    """Find the best whole shape for each value of `name` that was run, exactly, all other dimensions chosen anew.

    Returns [{value, shape, num_params, num_examples, loss, loss_low, loss_high, excess}], value rising. excess:
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
    first = min(losses, key=lambda value: losses[value])
    images = at.images(columns(list(shapes.values())))
    rows = []
    for (value, shape), seen in zip(shapes.items(), images):
        low, high = at.loss_interval(shape.to_dict())
        excess = at.excess(shape.to_dict(), shapes[first].to_dict())
        rows.append(
            dict(
                value=value,
                shape=shape.to_dict(),
                num_params=shape.num_params,
                num_examples=int(seen),
                loss=losses[value],
                loss_low=low,
                loss_high=high,
                excess=vars(Estimate(0.0, 0.0, 0.0) if value == first else excess),
            )
        )
    return rows


def spend(at: Target, shape: Mapping) -> dict:
    """Spend FACTOR times the FLOPs an image of a shape on one dimension, at as many images as before.

    Returns {shape, factor, train_flops, options}; options by dimension of the law: {to, gain}, `to` being the real size
    that costs as much and gain {estimate, low, high} the relative fall of the loss.
    """
    theta, widen = at.draws()
    every = np.concatenate([at.fit.theta[None], theta])
    start = {n: float(shape[n]) for n in at.dims}
    images, options = np.repeat(at.images(start), 2), {}
    for name in at.dims:
        to = _doubled(at, start, name)
        both = {n: np.array([x, to if n == name else x]) for n, x in start.items()}
        before, after = at.loss(both, every, images).T  # [1 + R] each
        options[name] = dict(to=to, gain=vars(estimated(1 - after / before, widen)))
    return dict(shape=dict(shape), factor=FACTOR, train_flops=at.train_flops * FACTOR, options=options)


def _doubled(at: Target, start: dict, name: str) -> float:
    """The size of `name` at which an image costs FACTOR times as much; by bisection, for FLOPs rise or fall with it."""
    goal, sign = FACTOR * at.geometry.flops(start, head=True), -1 if name in FALLING else 1
    low, high = 0.0, np.log(LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        over = at.geometry.flops(start | {name: start[name] * np.exp(sign * middle)}, head=True) > goal
        low, high = (low, middle) if over else (middle, high)
    return float(start[name] * np.exp(sign * low))
