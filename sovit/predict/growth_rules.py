"""How the best shape grows with the budget, and the rules that others grow shapes by.

exact_growth  the slope of the law's exact optimum at a budget, and its mean slope from the least budget run
paper_rule    SoViT's recipe (2305.13035, section 3.2 and App. B): each dimension by tau^(s_k / D)
size_rule     constant proportions, the size chosen by a law of parameters and images (Chinchilla)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sovit import UserError
from sovit.law.fitted_law import Fit
from sovit.predict.integer_search import SIZES, Rules
from sovit.predict.law_at_budget import TOKENS, Target, budgets_run, columns, estimated, predicted_difference, target
from sovit.predict.recommend import Recommendation, proportional_family
from sovit.spec.shape import Shape

PAPER = dict(width=0.22, depth=0.45, mlp_dim=0.60)  # s_k as stated in 2305.13035, classification
STEP = 1e-2  # of ln t, for the slope at one budget
SLOW_DRAWS = 250  # that the interval of an exponent is read from where the optimum is not convex and takes longer


def exact_growth(fit: Fit, train_flops: float) -> dict:
    """How the exact optimum grows up to a budget of training FLOPs: exponents of its sizes, FLOPs and images.

    Returns {train_flops, span, level, dims, flops, images}; dims (by dimension), flops (of one image) and images hold
    {slope, exact, low, high}: the slope at this budget, and the mean slope over `span` with its interval. span: from
    the least budget run, or a decade below this one, to this one. The interval is None without draws.
    Raises UserError as `sovit.predict.law_at_budget` does.
    """
    at, low = target(fit, train_flops), min(budgets_run(fit)[0], train_flops / 10)
    theta, widen = at.draws()
    every = np.concatenate([fit.theta[None], theta if fit.shape_form.convex else theta[:SLOW_DRAWS]])
    (slope,) = _slopes(at, train_flops * np.exp(-STEP), train_flops * np.exp(STEP), every[:1])
    mean = _slopes(at, low, train_flops, every)
    rows = {}
    for name, here, many in zip((*at.dims, "flops", "images"), slope, mean.T):
        exact = estimated(many[0], many[1:], widen)
        rows[name] = dict(slope=float(here), exact=exact.estimate, low=exact.low, high=exact.high)
    return dict(
        train_flops=float(train_flops),
        span=[float(low), float(train_flops)],
        level=fit.level,
        dims={name: rows[name] for name in at.dims},
        flops=rows["flops"],
        images=rows["images"],
    )


def paper_rule(fit: Fit, best: Recommendation, marginal: Fit | None = None) -> dict:
    """SoViT's recipe at the budget of `best`: from the law's optimum x(0) at the least budget run, each dimension by
    tau^(s_k / D).

    tau is the ratio of the budgets and D the number of dimensions that grow; s_k are the marginal exponents of
    `marginal`, a fit of form `sovit` to the same rows, where it determines all of them, else those that the paper states.
    The rules of `best` hold here too.
    Returns {shape, num_params, num_examples, loss, difference, note, start, exponents, source, factors, budget_ratio,
    params_per_decade, law_params_per_decade, under_growth}. difference: {estimate, low, high} of ln loss(rule) -
    ln loss(best); factors, by dimension: the law's real optimum over the rule's real size; budget_ratio: tau;
    under_growth: the factor a decade of compute by which the law's models outgrow the rule's in parameters (None at the
    least budget itself). Raises UserError for a marginal law of another form.
    """
    at, least = target(fit, best.train_flops), budgets_run(fit)[0]
    exponents, source = _marginal([name for name in SIZES if name in at.dims], marginal)
    start, real = (dict(zip(at.dims, np.exp(law.optimum()).tolist())) for law in (at.at(least), at))
    decades = float(np.log10(at.train_flops / least))
    sizes = start | {n: start[n] * 10 ** (decades * s / len(exponents)) for n, s in exponents.items()}
    ends = {n: np.array([values[n] for values in (start, sizes, real)]) for n in at.dims}
    first, rule, law = at.geometry.num_params(ends).tolist()

    def a_decade(ratio: float) -> float | None:
        return float(ratio ** (1 / decades)) if abs(decades) > 1e-9 else None

    return _beside(at, nearest(at, sizes, best.rules), best) | dict(
        start=start,
        exponents=exponents,
        source=source,
        factors={n: real[n] / sizes[n] for n in at.dims},
        budget_ratio=float(at.train_flops / least),
        params_per_decade=a_decade(rule / first),
        law_params_per_decade=a_decade(law / first),
        under_growth=a_decade(law / rule),
    )


def size_rule(fit: Fit, best: Recommendation, sizes: Fit) -> dict:
    """ViT-B's proportions, their size chosen by `sizes`, a fit of form `chinchilla` to the same rows.

    Returns what `paper_rule` does as far as `note`. Raises UserError for another form.
    """
    if sizes.form != "chinchilla":
        raise UserError(f"form={sizes.form!r} is no law of parameters and images; give a fit of form 'chinchilla'")
    at = target(fit, best.train_flops)
    table = proportional_family(at, best.rules.steps["width"])
    images = at.images(table)
    loss = sizes.predict(dict(num_params=at.geometry.num_params(table), num_examples=images))
    i = int(np.where(images >= 1, loss, np.inf).argmin())
    return _beside(at, at.shape({n: x[i] for n, x in table.items()}, best.rules.head_dim), best)


def other_rules(fit: Fit, best: Recommendation, fits: Mapping[str, Fit]) -> dict:
    """Answers of other rules at the budget of a recommendation of `fit`: {paper_rule, size_rule}, where laws can say it.

    fits: form -> law of the same rows; `sovit` and `chinchilla` are used where they stand.
    """
    found = {}
    if set(SIZES) & set(fit.model.dims):
        found["paper_rule"] = paper_rule(fit, best, fits.get("sovit"))
    if "chinchilla" in fits:
        found["size_rule"] = size_rule(fit, best, fits["chinchilla"])
    return found


def nearest(at: Target, sizes: Mapping, rules: Rules) -> Shape:
    """The nearest whole shape by the rules' multiples, each size by itself; patch and image size as run."""
    values = {n: step * max(1, round(sizes.get(n, at.fixed(n)) / step)) for n, step in rules.steps.items()}
    pairs = at.run_pairs()
    off = np.log(pairs / np.array([sizes.get(name, at.fixed(name)) for name in TOKENS]))
    values |= dict(zip(TOKENS, pairs[(off**2).sum(1).argmin()].tolist()))
    return at.shape(values, rules.head_dim)


def _beside(at: Target, shape: Shape, best: Recommendation) -> dict:
    """A shape of another rule compared with the law's best at the same budget."""
    images = int(at.images(columns([shape]))[0])
    unpaid = "the budget does not pay for one image of it"
    return dict(
        shape=shape.to_dict(),
        num_params=shape.num_params,
        num_examples=images,
        loss=float(at.loss(columns([shape]))[0]),
        difference=vars(predicted_difference(at.fit, shape, best.shape, at.train_flops)),
        note=unpaid if images < 1 else best.rules.misfit(shape),
    )


def _marginal(names: list[str], marginal: Fit | None) -> tuple[dict, str]:
    """s_k by dimension and where they come from."""
    if marginal is not None:
        if marginal.form != "sovit":
            raise UserError(f"form={marginal.form!r} has no marginal exponents; give a fit of form 'sovit'")
        found = {n: marginal.exponents[n].estimate if n in marginal.exponents else None for n in names}
        if all(s is not None for s in found.values()):
            return found, "Eq. 2 fitted to the same rows"
    lack = "" if marginal is None else "; Eq. 2 fitted to the same rows does not determine them all"
    return {n: PAPER[n] for n in names}, "as stated in arXiv 2305.13035" + lack


def _slopes(at: Target, low: float, high: float, theta: np.ndarray) -> np.ndarray:
    """Mean slope of the optimum between two budgets, of ln of dimensions, FLOPs of an image and images: [R, K + 2]."""
    paths = []
    for budget in (low, high):
        v = at.at(budget).optimum(theta)
        paths.append(np.column_stack([v, at.geometry.log_flops(at.dims, v, True)[0]]))
    growth = (paths[1] - paths[0]) / np.log(high / low)
    return np.column_stack([growth, 1 - growth[:, -1]])
