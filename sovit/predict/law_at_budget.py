"""A law at one budget: the loss of any shape trained for it, and the law's real-valued optimum.

Budget: train_flops = 3 (forward_flops + head_flops) x num_examples. Below: S shapes, R draws, P parameters, K dimensions
of the law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.compute_optimum import law_columns
from sovit.law.exponents import amplitudes, optimum_of
from sovit.law.fitted_law import Fit
from sovit.law.form import FALLING
from sovit.law.forms import LAWS
from sovit.law.geometry import Geometry
from sovit.spec.shape import DIMENSIONS, Shape

TOKENS = ("patch_size", "image_size")  # what sets the number of tokens: values that were run, never between them
TOKEN_DRAWS = 250  # that `least` is asked for where it has a pair of them after the other to look at
FAR_DECADES = 2.0  # extrapolation beyond which a recommendation carries a warning
MAX_DECADES = 6.0  # budgets further than this from the data are refused


@dataclass(frozen=True)
class Estimate:
    """A number that a law gives, with its headline interval; low and high are None for a law fitted without draws."""

    estimate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SizeEstimate(Estimate):
    """A size of the real-valued optimum with the interval by pairs of trunks beside the headline one."""

    pairs_low: float | None = None
    pairs_high: float | None = None


def estimated(values: np.ndarray, widen: float) -> Estimate:
    """The number of the fit itself, values[0], with the interval of its draws, values[1:], on the plain scale."""
    return Estimate(float(values[0]), *(interval(values[1:], widen, floor=None) if len(values) > 1 else (None, None)))


@dataclass(frozen=True)
class Target:
    """What a law says at one budget. A table maps dimension -> real or whole values [S]; what it lacks is as run."""

    fit: Fit
    train_flops: float
    geometry: Geometry

    @property
    def dims(self) -> list[str]:
        return self.fit.model.dims

    def images(self, table: Mapping) -> np.ndarray:
        """Images that the budget pays for, [S], real."""
        return self.train_flops / 3 / self.geometry.flops(table, head=True)

    def loss(self, table: Mapping, theta: np.ndarray | None = None, images: np.ndarray | None = None) -> np.ndarray:
        """Predicted loss, [S], or [R, S] for theta [R, P]; trained for the budget unless `images` [S] are given."""
        images = self.images(table) if images is None else images
        form = self.fit.shape_form
        u = law_columns(form.terms, table, images, self.geometry) - self.fit.centre[:, None]
        value = form.evaluate(self.fit.theta[None] if theta is None else theta, u)[0]
        return np.exp(value[0] if theta is None else value)

    def loss_of(self, values: Mapping, theta: np.ndarray | None = None) -> np.ndarray:
        """Loss of one shape, dimension -> value: a number, or [R] for theta [R, P]."""
        return self.loss({n: np.array([x]) for n, x in values.items()}, theta)[..., 0]

    def loss_interval(self, values: Mapping, kind: str = "random_effects") -> tuple[float | None, float | None]:
        """Interval of the expected loss at one shape (the law's own, one run's noise apart); None without draws."""
        theta, widen = self.draws(kind)
        return interval(self.loss_of(values, theta), widen) if len(theta) else (None, None)

    def difference(self, values: Mapping, over: Mapping) -> Estimate:
        """ln loss of one shape less ln loss of another, draw by draw, so that what both share cancels."""
        both = {n: np.array([values[n], over.get(n, values[n])], float) for n in DIMENSIONS if n in values}
        theta, widen = self.draws()
        first, second = np.log(self.loss(both, np.concatenate([self.fit.theta[None], theta]))).T  # [1 + R] each
        return estimated(first - second, widen)

    def excess(self, values: Mapping, over: Mapping) -> Estimate:
        """Relative excess of the loss of one shape over another's."""
        found = self.difference(values, over)
        return Estimate(*(None if x is None else float(np.expm1(x)) for x in vars(found).values()))  # type: ignore[arg-type]

    def optimum(self, theta: np.ndarray | None = None, held: Mapping | None = None) -> np.ndarray:
        """ln x of the real-valued optimum, [K], or [R, K] for theta [R, P]; held: dimension -> value that is not free.

        A dimension without effect is held at its cheapest value run, before the others are optimised beside it.
        """
        grid = self.fit.data.grid
        held = {n: max(grid[n]) if n in FALLING else min(grid[n]) for n in self.absent()} | dict(held or {})
        many = self.fit.theta[None] if theta is None else theta
        v = optimum_of(self.fit.family, many, float(np.log(self.train_flops / 3)), head=True, held=held)
        return v[0] if theta is None else v

    def run_pairs(self) -> np.ndarray:
        """(patch_size, image_size) of the values run, [G, 2]: what divides, on a grid of tokens such as was run.

        A law of patch and image size apart says nothing of grids coarser or finer than any that it was fitted to; and a
        side is a multiple of what all sides run have in common, as where labels lie on a grid of cells.
        """
        grid, sides = self.fit.data.grid, self.fit.data.grid_sides
        whole = [np.rint(grid.get(n, [getattr(self.geometry, n)])).astype(int).tolist() for n in TOKENS]
        pairs = [(p, s) for p in whole[0] for s in whole[1] if s % p == 0]
        if sides:
            common = gcd(*sides)
            pairs = [(p, s) for p, s in pairs if sides[0] <= s // p <= sides[-1] and s // p % common == 0]
        return np.array(pairs, int).reshape(-1, 2)

    def paired(self, v: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Loss [R] of each theta [R, P] at its own ln x [R, K], trained for the budget."""
        table, form = dict(zip(self.dims, np.exp(v.T))), self.fit.shape_form
        u = law_columns(form.terms, table, self.images(table), self.geometry).T - self.fit.centre
        return np.exp(form.evaluate(theta, u[:, :, None])[0][:, 0])

    def least(self, theta: np.ndarray) -> np.ndarray:
        """Loss [R] of each theta [R, P] at its own best real sizes, patch and image size being values that were run."""
        best = np.full(len(theta), np.inf)
        for pair in self.run_pairs().tolist():
            held = {name: value for name, value in zip(TOKENS, pair) if name in self.dims}
            best = np.minimum(best, self.paired(self.optimum(theta, held), theta))
        return best

    def draws(self, kind: str = "random_effects") -> tuple[np.ndarray, float]:
        """Bootstrap draws theta [R, P] and the widening of their percentiles; [0, P] where the law has none."""
        theta = np.array(self.fit.draws.get(kind, np.empty((0, len(self.fit.theta)))))
        made = self.fit.diagnostics.draws
        if not len(theta) or made is None:
            return theta, 1.0
        return theta, made.t_over_z if kind == "random_effects" else made.pairs_stretch

    def absent(self) -> list[str]:
        """Dimensions whose amplitude is 0: the law has nothing to say for them, so they stay within the values run."""
        present = amplitudes(self.fit.shape_form, self.fit.theta[None])[0] > 0
        return [n for n, known in zip(self.dims, present) if not known]

    def fixed(self, name: str) -> float:
        """The value of a dimension that the law has no term for, or else its centre."""
        return self.fit.data.centre.get(name, getattr(self.geometry, name))

    def shape(self, values: Mapping, head_dim: int) -> Shape:
        """The Shape of whole values by dimension."""
        registers = self.geometry.num_prefix_tokens - (self.geometry.pool == "token")
        sizes = {n: int(values[n]) for n in DIMENSIONS}
        return Shape(**sizes, head_dim=head_dim, pool=self.geometry.pool, num_registers=registers)  # type: ignore[arg-type]


def target(fit: Fit, train_flops: float) -> Target:
    """Ask a law at a budget in training FLOPs.

    Raises UserError for a law that cannot rank or price shapes, and for a budget that is no positive number or more than
    MAX_DECADES from those run.
    """
    if not (LAWS[fit.form].ranks_shapes and fit.model.dims):
        raise UserError(f"form={fit.form!r} cannot rank whole shapes; fit 'joint' or 'bounded' to the same rows")
    if fit.geometry is None:
        raise UserError("the law does not know patch_size and image_size; fit it with geometry={'patch_size': ...}")
    if not (np.isfinite(train_flops) and train_flops > 0):
        raise UserError(f"train_flops={train_flops!r} is not a positive number; give FLOPs, such as 1e15")
    low, high = budgets_run(fit)
    if not low / 10**MAX_DECADES <= train_flops <= high * 10**MAX_DECADES:
        raise UserError(
            f"train_flops={train_flops:g} is more than {MAX_DECADES:g} decades from the budgets run, {low:.3g} to"
            f" {high:.3g}; choose a budget between {low / 10**MAX_DECADES:.3g} and {high * 10**MAX_DECADES:.3g}"
        )
    return Target(fit, float(train_flops), fit.geometry)


def budgets_run(fit: Fit) -> tuple[float, float]:
    """Least and largest training FLOPs in the data; from its compute where the rows do not carry train_flops."""
    if fit.data.train_flops_range:
        low, high = fit.data.train_flops_range
        return low, high
    if not fit.data.compute_range:
        raise UserError("the law was fitted to rows without forward_flops or compute; give the rows one of them")
    low, high = fit.data.compute_range
    return 3 * low, 3 * high


def columns(shapes: Sequence[Shape]) -> dict[str, np.ndarray]:
    return {n: np.array([getattr(s, n) for s in shapes], float) for n in DIMENSIONS}


def predicted_loss(fit: Fit, shapes: Sequence[Shape], train_flops: float) -> np.ndarray:
    """Predicted loss [S] of shapes trained for the same budget, each on as many images as it pays for."""
    return target(fit, train_flops).loss(columns(shapes))


def ladder(fit: Fit, low: float | None = None, high: float | None = None, points: int = 9) -> list[float]:
    """`points` budgets in equal ratios; from the least budget run to FAR_DECADES beyond the largest unless said.

    Raises UserError for ends that are not positive numbers in rising order, and for fewer than 2 points.
    """
    ends = budgets_run(fit)
    low, high = (ends[0] if low is None else low), (ends[1] * 10**FAR_DECADES if high is None else high)
    if not (np.isfinite(low) and np.isfinite(high) and 0 < low < high):
        raise UserError(f"budgets from {low:g} to {high:g}: both must be positive FLOPs, the second the larger")
    if not 2 <= points <= 200:
        raise UserError(f"{points} points; give 2 to 200")
    return [float(f"{budget:.4g}") for budget in np.geomspace(low, high, points)]
