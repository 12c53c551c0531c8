"""A fitted law and a budget -> the best shape that can be built, how sure that is, and what is as good. Numpy only.

    recommendation = best_shape(Fit.from_json(text), train_flops=1e15, width_multiple=128, mlp_multiple=128)

Budget: train_flops = 3 (forward_flops + head_flops) x num_examples. A law's compute is forward_flops x num_examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.read import Fit
from sovit.predict.flat_region import flat_region
from sovit.predict.integer_search import SIZES, Rules, lattice, minimise
from sovit.predict.law_at_budget import (
    FAR_DECADES,
    MAX_DECADES,
    TOKEN_DRAWS,
    TOKENS,
    Target,
    budgets_run,
    columns,
    target,
)
from sovit.spec.shape import Shape

__all__ = ["MAX_DECADES", "Recommendation", "Rules", "best_shape", "form_dependence", "predicted_difference"]
PROPORTIONS = (768, 12, 3072)  # ViT-B: width, depth, mlp_dim


@dataclass(frozen=True)
class Recommendation:
    """What to train at a budget. Losses are predictions of the law; intervals are at `level`.

    shape: the best feasible integers, exactly. rules: what "feasible" was (`integers.Rules`). optimum: by dimension of
    the law {estimate, low, high, pairs_low, pairs_high, status, note, grid}: the real-valued optimum. optimum_size: its
    num_params and num_examples, {estimate, low, high, pairs_low, pairs_high} each. flat_region: the shapes within one
    noise s.d. of the best, see `sovit.predict.flat_region`. proportional: the usual proportions at that budget, see
    `proportional_shape`. difference: {estimate, low, high} of ln loss(shape) - ln loss(proportional), see
    `predicted_difference`. rounding_regret: relative excess of the loss of `shape` over the real optimum's, rules
    included; `rounding` is the same with its interval. rules_cost: {estimate, low, high}, the relative excess over the
    best shape without rules; None where there are none. regret: excess of `shape` over the best shape if a bootstrap
    draw were the truth (median, high = 95th percentile). decades: of compute from the largest run, negative below it.
    """

    form: str
    metric: str
    train_flops: float
    level: float
    rules: dict
    shape: dict
    num_params: int
    forward_flops: int
    num_examples: int
    loss: float
    loss_low: float | None
    loss_high: float | None
    loss_pairs_low: float | None
    loss_pairs_high: float | None
    optimum: dict
    optimum_size: dict
    optimum_loss: float
    rounding_regret: float
    rounding: dict
    rules_cost: dict | None
    regret: dict | None
    flat_region: dict
    proportional: dict
    difference: dict
    decades: float
    warnings: list

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def best_shape(fit: Fit, train_flops: float, **rules) -> Recommendation:
    """The best shape for a training budget in FLOPs, head included, under `rules` (fields of `integers.Rules`).

    Without rules width is a multiple of the data's head_dim and mlp_dim of 8; patch and image size are values that were
    run. Raises UserError for a law that cannot rank shapes, for a budget without one image, for one more than
    MAX_DECADES from the budgets run, and for rules that no shape keeps.
    """
    at = target(fit, train_flops)
    given = rules_of(at, **rules)
    v = at.optimum()
    real = dict(zip(at.dims, np.exp(v)))
    real |= {n: at.within(n, real[n]) for n in at.absent()}
    real_loss = float(at.loss({n: np.array([x]) for n, x in real.items()})[0])
    cost = 3 * float(at.geometry.flops(real, head=True))
    if cost > train_flops:
        raise UserError(
            f"train_flops={train_flops:g} does not pay for one image of the law's best shape there"
            f" ({_sizes(real)}; {cost:.3g} FLOPs): this law has no optimum within reach"
        )
    grid = lattice(at, given)
    near = {n: real.get(n, at.fixed(n)) for n in SIZES}
    best, best_loss = minimise(grid, near)
    shape = at.shape(best, given.head_dim)
    free = rules_of(at)
    plain = best if given == free else minimise(lattice(at, free), near)[0]

    least = {kind: _least(at, kind) for kind in fit.draws}
    ends = {kind: loss_interval(at, kind, best) for kind in fit.draws}
    (low, high), (pairs_low, pairs_high) = (ends.get(k, (None, None)) for k in ("random_effects", "pairs"))
    optimum = _optimum_by_dimension(at, real, least)
    decades = float(np.log10(train_flops / budgets_run(fit)[1]))
    proportional = proportional_shape(fit, train_flops, head_dim=given.head_dim, reference=best_loss)
    return Recommendation(
        form=fit.form,
        metric=fit.data.get("metric", "loss"),
        train_flops=float(train_flops),
        level=fit.level,
        rules=dataclasses.asdict(given),
        shape=shape.to_dict(),
        num_params=shape.num_params,
        forward_flops=shape.forward_flops,
        num_examples=int(at.images(columns([shape]))[0]),
        loss=best_loss,
        loss_low=low,
        loss_high=high,
        loss_pairs_low=pairs_low,
        loss_pairs_high=pairs_high,
        optimum=optimum,
        optimum_size=_size(at, real, least),
        optimum_loss=real_loss,
        rounding_regret=best_loss / real_loss - 1,
        rounding=_excess(at, best, real),
        rules_cost=None if given == free else _excess(at, best, plain),
        regret=_regret(at, best, least),
        flat_region=flat_region(grid, near, best, best_loss, least.get("random_effects", (None, None))[1]),
        proportional=proportional,
        difference=predicted_difference(fit, shape, Shape(**proportional["shape"]), train_flops),
        decades=decades,
        warnings=_warnings(fit, optimum, decades),
    )


def rules_of(at: Target, *, head_dim: int | None = None, **rules) -> Rules:
    """Rules with what was not said filled in: head_dim = that of the data."""
    return Rules(
        at.geometry.head_dim if head_dim is None else head_dim, **{k: v for k, v in rules.items() if v is not None}
    )


def predicted_loss(fit: Fit, shapes: Sequence[Shape], train_flops: float) -> np.ndarray:
    """Predicted loss [S] of shapes trained for the same budget, each on as many images as it pays for."""
    return target(fit, train_flops).loss(columns(shapes))


def predicted_difference(fit: Fit, shape_a: Shape, shape_b: Shape, train_flops: float) -> dict:
    """{estimate, low, high} of ln loss(a) - ln loss(b), both trained for the same budget; negative = a is better.

    The headline interval, at `fit.level`, of the expected losses' difference: draw by draw, so that what both shapes
    share cancels. low and high are None for a law fitted without draws.
    """
    at, table = target(fit, train_flops), columns([shape_a, shape_b])
    first, second = np.log(at.loss(table))
    low = high = None
    theta, widen = at.draws()
    if len(theta):
        many = np.log(at.loss(table, theta))  # [R, 2]
        low, high = interval(many[:, 0] - many[:, 1], widen, floor=None)
    return dict(estimate=float(first - second), low=low, high=high)


def proportional_shape(fit: Fit, train_flops: float, *, head_dim: int | None = None, reference: float | None = None):
    """The best shape of ViT-B's proportions (width w, depth w/64 rounded and at least 1, mlp_dim 4w) at a budget.

    w is the multiple of head_dim that the law itself thinks best at that budget: the strongest opponent that constant
    proportions allow. Returns {shape, num_examples, loss, loss_low, loss_high, loss_excess, note}; the interval is
    the headline one (None without draws), loss_excess is relative to `reference`.
    """
    at = target(fit, train_flops)
    head_dim = head_dim or at.geometry.head_dim
    table = proportional_family(at, head_dim)
    loss = at.loss(table)
    i = int(loss.argmin())
    chosen = {n: float(column[i]) for n, column in table.items()}
    shape = at.shape(chosen, head_dim)
    low = high = None
    if "random_effects" in fit.draws:
        low, high = loss_interval(at, "random_effects", chosen)
    excess = None if reference is None else float(loss[i] / reference - 1)
    blind = [n for n in SIZES if n not in at.dims]
    return dict(
        shape=shape.to_dict(),
        num_examples=int(at.images(columns([shape]))[0]),
        loss=float(loss[i]),
        loss_low=low,
        loss_high=high,
        loss_excess=excess,
        note=f"the law knows nothing of {', '.join(blind)}" if blind else "",
    )


def proportional_family(at: Target, head_dim: int) -> dict[str, np.ndarray]:
    """Shapes of ViT-B's proportions at 200 widths, as a table."""
    widths = head_dim * np.unique(np.geomspace(1, 512, 200).round().astype(int))
    width, depth, mlp_dim = PROPORTIONS
    table = dict(width=widths, depth=np.maximum(1, np.round(widths * depth / width)), mlp_dim=widths * mlp_dim // width)
    return table | {n: np.full(len(widths), float(at.fixed(n))) for n in ("patch_size", "image_size")}


def form_dependence(fits: Sequence[Fit], train_flops: float) -> list[dict]:
    """How far the recommendation hangs on the form: each form's best shape, and its excess loss under every form."""
    shapes = [Shape(**best_shape(fit, train_flops).shape) for fit in fits]
    losses = np.array([predicted_loss(fit, shapes, train_flops) for fit in fits])
    excess = losses / np.diag(losses)[:, None] - 1
    return [
        dict(
            form=fit.form,
            shape=shape.to_dict(),
            loss=float(losses[i, i]),
            loss_excess={other.form: float(excess[j, i]) for j, other in enumerate(fits)},
        )
        for i, (fit, shape) in enumerate(zip(fits, shapes))
    ]


def loss_interval(at: Target, kind: str, values: Mapping) -> tuple[float, float]:
    """Interval of the expected loss at one shape (the law's uncertainty, one run's own noise apart)."""
    theta, widen = at.draws(kind)
    return interval(at.loss(_one(values), theta)[:, 0], widen)


def _one(values: Mapping) -> dict[str, np.ndarray]:
    return {n: np.array([x]) for n, x in values.items()}


def _least(at: Target, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The real optimum of each draw: ln x [R, K], and the loss [R] of its best sizes, patch and image size as run.

    Where a law reads these the losses are those of the first TOKEN_DRAWS draws.
    """
    theta, _ = at.draws(kind)
    v = at.optimum(theta)
    return v, at.least(theta[:TOKEN_DRAWS]) if set(TOKENS) & set(at.dims) else at.paired(v, theta)


def _optimum_by_dimension(at: Target, real: Mapping, least: Mapping) -> dict:
    """The optimum by dimension with both intervals."""
    grid, exponents = at.fit.data["grid"], at.fit.exponents
    out = {
        n: dict(
            estimate=float(x),
            low=None,
            high=None,
            pairs_low=None,
            pairs_high=None,
            status=exponents[n]["status"],
            note=exponents[n]["note"],
            grid="below" if x <= min(grid[n]) else "above" if x >= max(grid[n]) else "inside",
        )
        for n, x in real.items()
    }
    for kind, (v, _) in least.items():
        prefix = "" if kind == "random_effects" else "pairs_"
        for k, n in enumerate(at.dims):
            out[n][prefix + "low"], out[n][prefix + "high"] = interval(np.exp(v[:, k]), at.draws(kind)[1])
    return out


def _size(at: Target, real: Mapping, least: Mapping) -> dict:
    """Parameters and images of the real optimum with both intervals."""

    def size(table):
        return dict(num_params=at.geometry.num_params(table), num_examples=at.images(table))

    nothing = dict(low=None, high=None, pairs_low=None, pairs_high=None)
    out = {name: dict(estimate=float(value)) | nothing for name, value in size(real).items()}
    for kind, (v, _) in least.items():
        prefix = "" if kind == "random_effects" else "pairs_"
        for name, many in size(dict(zip(at.dims, np.exp(v).T))).items():
            out[name][prefix + "low"], out[name][prefix + "high"] = interval(many, at.draws(kind)[1])
    return out


def _excess(at: Target, values: Mapping, over: Mapping) -> dict:
    """{estimate, low, high}: relative excess of the loss of one shape over another's, draw by draw."""
    both = {n: np.array([values[n], over[n]], float) for n in values if n in over}
    both |= {n: np.full(2, float(x)) for n, x in values.items() if n not in over}
    loss = at.loss(both)
    low = high = None
    theta, widen = at.draws()
    if len(theta):
        many = at.loss(both, theta)
        low, high = interval(many[:, 0] / many[:, 1] - 1, widen, floor=None)
    return dict(estimate=float(loss[0] / loss[1] - 1), low=low, high=high)


def _regret(at: Target, best: Mapping, least: Mapping) -> dict | None:
    if "random_effects" not in least:
        return None
    known = least["random_effects"][1]
    excess = at.loss(_one(best), at.draws()[0][: len(known)])[:, 0] / known - 1
    return dict(median=float(np.median(excess)), high=float(np.quantile(excess, 0.95)))


def _sizes(values: Mapping) -> str:
    return ", ".join(f"{n} {x:.4g}" for n, x in values.items())


def _warnings(fit, optimum, decades) -> list[str]:
    out = []
    if decades > FAR_DECADES:
        out.append(
            f"{decades:.1f} decades of compute beyond the largest run, past {FAR_DECADES:g}: treat the shape as a guess"
        )
    if not fit.noise["source"].startswith("seeds"):
        out.append("no repeated seeds in the data: the flat region uses the noise of the residuals")
    elif fit.diagnostics["residual_rms"] > fit.noise["sd"]:
        out.append(
            f"the law misses its own rows by {100 * fit.diagnostics['residual_rms']:.2f} %, more than the"
            f" {100 * fit.noise['sd']:.2f} % of noise that bound the flat region: that region is narrower than what"
            " the law can resolve"
        )
    for name, value in optimum.items():
        if value["status"] != "ok":
            out.append(f"{name} is {value['status']}: {value['note']}")
        elif value["grid"] != "inside":
            out.append(f"{name}: the optimum {value['estimate']:.4g} is {value['grid']} every value run")
    return out
