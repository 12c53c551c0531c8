"""The rules that others grow shapes by, beside the law's own answer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sovit import UserError
from sovit.law.fitted_law import Fit
from sovit.predict.integer_search import SIZES, Rules
from sovit.predict.law_at_budget import TOKENS, Target, budgets_run, columns, target
from sovit.predict.recommend import Recommendation, proportional_family
from sovit.spec.shape import Shape

PAPER = dict(width=0.22, depth=0.45, mlp_dim=0.60)  # s_k as stated in 2305.13035, classification


def paper_rule(fit: Fit, best: Recommendation, marginal: Fit | None = None) -> dict:
    """Apply SoViT's recipe (2305.13035, section 3.2 and App. B) from the law's optimum at the least budget run.

    Each dimension grows by tau^(s_k / D), tau the ratio of the budgets, D the number of dimensions that grow, under the
    rules of `best`. s_k: the marginal exponents of `marginal`, a fit of form `sovit` to the same rows, where it determines
    them all, else those that the paper states. Returns {shape, num_params, num_examples, loss, difference, start,
    exponents, source}; difference: {estimate, low, high} of ln loss(rule) - ln loss(best). Raises UserError.
    """
    at, least = target(fit, best.train_flops), budgets_run(fit)[0]
    exponents, source = _marginal([name for name in SIZES if name in at.dims], marginal)
    start = dict(zip(at.dims, np.exp(Target(fit, least, at.geometry).optimum()).tolist()))
    growth = at.train_flops / least
    sizes = start | {n: start[n] * growth ** (s / len(exponents)) for n, s in exponents.items()}
    return _beside(at, nearest(at, sizes, best.rules), best) | dict(start=start, exponents=exponents, source=source)


def size_rule(fit: Fit, best: Recommendation, sizes: Fit) -> dict:
    """Choose the size of constant proportions by `sizes`, a fit of form `chinchilla` to the same rows.

    Returns what `paper_rule` does as far as `difference`. Raises UserError for another form.
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
    """Give the answers of other rules at the budget of `best`: {paper_rule, size_rule}, where laws can say it.

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
    table = columns([shape])
    return dict(
        shape=shape.to_dict(),
        num_params=shape.num_params,
        num_examples=int(at.images(table)[0]),
        loss=float(at.loss(table)[0]),
        difference=vars(at.difference(shape.to_dict(), best.shape.to_dict())),
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
