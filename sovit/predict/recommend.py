"""A fitted law and a budget -> the best shape that can be built, how sure that is, and what is as good.

Budget: train_flops = 3 (forward_flops + head_flops) x num_examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.fitted_law import Fit
from sovit.predict.integer_search import SIZES, FlatRegion, Rules, flat_region, lattice, minimise
from sovit.predict.law_at_budget import (
    FAR_DECADES,
    TOKEN_DRAWS,
    TOKENS,
    Estimate,
    SizeEstimate,
    Target,
    budgets_run,
    columns,
    predicted_loss,
    target,
)
from sovit.spec.shape import Shape

MAX_REGRET = 0.1  # 95th percentile, above which a law that identifies no dimension recommends nothing
PROPORTIONS = (768, 12, 3072)  # ViT-B: width, depth, mlp_dim


@dataclass(frozen=True)
class Optimum(SizeEstimate):
    """A dimension of the real-valued optimum. status, note: of its exponent; grid: below, inside or above the values run."""

    status: str = "ok"
    note: str = ""
    grid: str = "inside"


@dataclass(frozen=True)
class Regret:
    """Relative excess loss of the recommended shape if a bootstrap draw were the truth: median and 95th percentile."""

    median: float
    high: float


@dataclass(frozen=True)
class Proportional:
    """The best shape of ViT-B's proportions at the budget; loss_excess: relative, over the recommended shape."""

    shape: Shape
    num_examples: int
    loss: float
    loss_excess: float


@dataclass(frozen=True)
class Recommendation:
    """What to train at a budget. Losses are predictions of the law; intervals are at `level`.

    shape: the best that `rules` allow, exactly. optimum: the real-valued optimum by dimension of the law. optimum_size:
    its num_params and num_examples. rounding: relative excess of the loss of `shape` over the real optimum's, what the
    rules cost included. difference: ln loss(shape) - ln loss(proportional). decades: of compute from the largest run,
    negative below it.
    """

    form: str
    metric: str
    train_flops: float
    level: float
    rules: Rules
    shape: Shape
    num_params: int
    forward_flops: int
    num_examples: int
    loss: float
    loss_low: float | None
    loss_high: float | None
    loss_pairs_low: float | None
    loss_pairs_high: float | None
    optimum: dict[str, Optimum]
    optimum_size: dict[str, SizeEstimate]
    optimum_loss: float
    rounding: Estimate
    regret: Regret | None
    flat_region: FlatRegion
    proportional: Proportional
    difference: Estimate
    decades: float
    warnings: list[str]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def best_shape(fit: Fit, train_flops: float, **rules: Any) -> Recommendation:
    """Find the best shape for a training budget in FLOPs, head included, under `rules` (fields of `Rules`).

    Without rules width is a multiple of the data's head_dim and mlp_dim of 8; patch and image size are values that were
    run. Raises UserError for a law that cannot rank shapes, for a budget without one image, for one more than
    MAX_DECADES from the budgets run, and for rules that no shape keeps.

    >>> law = sovit.read_law("results/stream_star_law/law.json")
    >>> sovit.best_shape(law, 3e12).shape.label
    '40x3x704'
    """
    at = target(fit, train_flops)
    given = rules_of(at, **rules)
    real = _real_optimum(at)
    grid = lattice(at, given)
    best, best_loss = minimise(grid, {n: real.get(n, at.fixed(n)) for n in SIZES})
    shape = at.shape(best, given.head_dim)
    least = {kind: _least(at, kind) for kind in fit.draws}
    headline = least["random_effects"][1] if "random_effects" in least else None
    optimum = _optimum_by_dimension(at, real, least)
    decades = float(np.log10(train_flops / budgets_run(fit)[1]))
    proportional = proportional_shape(at, given.head_dim, best_loss)
    regret = _regret(at, best, headline)
    _refuse_ignorance(fit, optimum, regret)
    low, high = at.loss_interval(best)
    pairs_low, pairs_high = at.loss_interval(best, "pairs")
    return Recommendation(
        form=fit.form,
        metric=fit.data.metric or "loss",
        train_flops=float(train_flops),
        level=fit.level,
        rules=given,
        shape=shape,
        num_params=shape.num_params,
        forward_flops=shape.forward_flops,
        num_examples=int(at.images(columns([shape]))[0]),
        loss=best_loss,
        loss_low=low,
        loss_high=high,
        loss_pairs_low=pairs_low,
        loss_pairs_high=pairs_high,
        optimum=optimum,
        optimum_size={
            name: SizeEstimate(float(of(real)), **_both_intervals(at, least, of))
            for name, of in dict[str, Callable](num_params=at.geometry.num_params, num_examples=at.images).items()
        },
        optimum_loss=float(at.loss_of(real)),
        rounding=at.excess(best, real),
        regret=regret,
        flat_region=flat_region(grid, best, best_loss, headline),
        proportional=proportional,
        difference=at.difference(best, proportional.shape.to_dict()),
        decades=decades,
        warnings=_warnings(fit, optimum, decades),
    )


def rules_of(at: Target, **rules: Any) -> Rules:
    """Rules with the head_dim of the data where none is said."""
    return Rules(**dict(head_dim=at.geometry.head_dim) | rules)


def _real_optimum(at: Target) -> dict[str, float]:
    """The real-valued optimum by dimension. Raises UserError where the budget does not pay for one image of it."""
    real = dict(zip(at.dims, np.exp(at.optimum()).tolist()))
    cost = at.train_flops / float(at.images(real))
    if cost > at.train_flops:
        sizes = ", ".join(f"{n} {x:.4g}" for n, x in real.items())
        raise UserError(
            f"train_flops={at.train_flops:g} is below the cost of one image ({cost:.3g} FLOPs) of the law's best shape"
            f" there ({sizes}); choose a larger budget"
        )
    return real


def proportional_shape(at: Target, head_dim: int, reference: float) -> Proportional:
    """Find the shape of ViT-B's proportions that the law itself thinks best: the strongest opponent that they allow.

    Width w is a multiple of head_dim, depth w/64 rounded and at least 1, mlp_dim 4w. reference: loss of the recommended.
    """
    table = proportional_family(at, head_dim)
    loss = at.loss(table)
    i = int(loss.argmin())
    shape = at.shape({n: column[i] for n, column in table.items()}, head_dim)
    images = int(at.images(columns([shape]))[0])
    return Proportional(shape, images, float(loss[i]), float(loss[i] / reference - 1))


def proportional_family(at: Target, head_dim: int) -> dict[str, np.ndarray]:
    """Shapes of ViT-B's proportions at 200 widths, as a table."""
    widths = head_dim * np.unique(np.geomspace(1, 512, 200).round().astype(int))
    width, depth, mlp_dim = PROPORTIONS
    table = dict(width=widths, depth=np.maximum(1, np.round(widths * depth / width)), mlp_dim=widths * mlp_dim // width)
    return table | {n: np.full(len(widths), float(at.fixed(n))) for n in TOKENS}


def form_dependence(fits: Sequence[Fit], train_flops: float) -> list[dict]:
    """Compare the forms' best shapes: {form, shape, loss, loss_excess}; loss_excess: form -> of that shape under it."""
    shapes = [best_shape(fit, train_flops).shape for fit in fits]
    losses = {fit.form: predicted_loss(fit, shapes, train_flops) for fit in fits}
    rows = []
    for i, (fit, shape) in enumerate(zip(fits, shapes)):
        excess = {other.form: float(losses[other.form][i] / losses[other.form][j] - 1) for j, other in enumerate(fits)}
        rows.append(dict(form=fit.form, shape=shape, loss=float(losses[fit.form][i]), loss_excess=excess))
    return rows


def _least(at: Target, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The real optimum of each draw, ln x [R, K], and the loss of its best shape of patch and image size as run."""
    theta, _ = at.draws(kind)
    v = at.optimum(theta)
    return v, at.least(theta[:TOKEN_DRAWS]) if set(TOKENS) & set(at.dims) else at.paired(v, theta)


def _both_intervals(at: Target, least: Mapping, measure: Callable[[dict], Any]) -> dict[str, float]:
    """Both intervals of measure(table of the draws' optima) [R], as fields of SizeEstimate."""
    ends = {}
    for kind, (v, _) in least.items():
        prefix = "" if kind == "random_effects" else "pairs_"
        many = measure(dict(zip(at.dims, np.exp(v).T)))
        ends[prefix + "low"], ends[prefix + "high"] = interval(many, at.draws(kind)[1])
    return ends


def _optimum_by_dimension(at: Target, real: Mapping, least: Mapping) -> dict[str, Optimum]:
    grid, exponents = at.fit.data.grid, at.fit.exponents
    return {
        n: Optimum(
            estimate=x,
            status=exponents[n].status,
            note=exponents[n].note,
            grid="below" if x <= min(grid[n]) else "above" if x >= max(grid[n]) else "inside",
            **_both_intervals(at, least, lambda table, n=n: table[n]),  # type: ignore[misc]
        )
        for n, x in real.items()
    }


def _regret(at: Target, best: Mapping, least: np.ndarray | None) -> Regret | None:
    """least [R]: the loss of each of the first draws' own optimum."""
    if least is None:
        return None
    excess = at.loss_of(best, at.draws()[0][: len(least)]) / least - 1
    return Regret(*np.quantile(excess, [0.5, 0.95]).tolist())


def _refuse_ignorance(fit: Fit, optimum: Mapping[str, Optimum], regret: Regret | None) -> None:
    """Raise UserError where the law identifies no dimension and its shape may be far from the best."""
    if regret is None or regret.high < MAX_REGRET or any(value.status != "unidentified" for value in optimum.values()):
        return
    best = f"; the best that was run is {fit.data.best_run}" if fit.data.best_run else ""
    lost = f"{regret.high:.0%}" if regret.high < 10 else "more than tenfold"
    raise UserError(
        f"the rows identify none of {', '.join(optimum)}: a shape by this law may lose {lost} to the best, so none is"
        f" recommended{best}; run shapes further apart, or more seeds"
    )


def _warnings(fit: Fit, optimum: Mapping[str, Optimum], decades: float) -> list[str]:
    out = []
    if decades > FAR_DECADES:
        out.append(
            f"{decades:.1f} decades of compute beyond the largest run, past {FAR_DECADES:g}: treat the shape as a guess"
        )
    if fit.noise.source != "seeds":
        out.append("no repeated seeds in the data: the flat region uses the noise of the residuals")
    elif fit.diagnostics.residual_rms > fit.noise.sd:
        out.append(
            f"the residuals ({100 * fit.diagnostics.residual_rms:.2f} %) exceed the seed noise"
            f" ({100 * fit.noise.sd:.2f} %), so the flat region is too narrow"
        )
    for name, value in optimum.items():
        if value.status != "ok":
            out.append(f"{name} is {value.status}: {value.note}")
        elif value.grid != "inside":
            out.append(f"{name}: the optimum {value.estimate:.4g} is {value.grid} every value run")
    return out
