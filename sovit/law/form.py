"""A law's form as an object: terms, bounds, starts, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from sovit.law.solver.link import link
from sovit.law.solver.starts import DATA_COLUMNS, starts

FALLING = ("patch_size",)  # columns whose growth raises the loss: x^+a in place of x^-a


@dataclass(frozen=True)
class Term:
    """amplitude x prod of column^(sign exponent); one without factors is the floor. factors: (column, exponent, sign)."""

    amplitude: str
    factors: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True)
class Form:
    """f = link(sum of terms). theta = [amplitudes, exponents, s of a power mean], in formula order.

    terms: the columns read, the data last. Of a form by arm: its arms, one dimension each; its columns are then
    u = [ln x of the row's own arm, ln compute, arm], and each parameter but exponents of compute stands once an arm.
    power_mean: f = (C^s + D^s)^(1/s) + floor, D the terms in the data, C the others. s = 1 is the plain sum; a large s
    says that the worse of the two limits decides, as when a skill is missing for want of capacity or of data.
    zero_line z: f is bounded by the loss of knowing nothing, (z^-4 + f^-4)^(-1/4).
    """

    terms: tuple[str, ...]
    formula: tuple[Term, ...]
    lowest: tuple[tuple[str, float], ...] = ()  # lower bound of an exponent where it is not 0.05
    arms: tuple[str, ...] = ()
    power_mean: bool = False
    zero_line: float | None = None

    @cached_property
    def exponents(self) -> tuple[tuple[str, str, int], ...]:
        """(column, exponent, sign) of each exponent; it stands on one column with one sign."""
        return tuple(dict.fromkeys(factor for term in self.formula for factor in term.factors))

    @cached_property
    def row(self) -> np.ndarray:
        """Row of u that each exponent stands on."""
        columns = ("x", "compute") if self.arms else self.terms
        return np.array([columns.index(column) for column, _, _ in self.exponents])

    @cached_property
    def signs(self) -> np.ndarray:
        return np.array([sign for _, _, sign in self.exponents], float)

    @cached_property
    def holds(self) -> list[list[int]]:
        """Exponents of each term."""
        return [[self.exponents.index(factor) for factor in term.factors] for term in self.formula]

    @cached_property
    def _of(self) -> list[list[int]]:
        """Terms of each exponent."""
        return [[j for j, held in enumerate(self.holds) if e in held] for e in range(len(self.exponents))]

    @cached_property
    def data(self) -> list[bool]:
        """Terms in the data column."""
        return [any(self.terms[-1] == column for column, _, _ in term.factors) for term in self.formula]

    @cached_property
    def _local(self) -> tuple[str, ...]:
        """Parameters before they are repeated by arm."""
        amplitudes, exponents = [t.amplitude for t in self.formula], [name for _, name, _ in self.exponents]
        return (*amplitudes, *exponents, *("s",) * self.power_mean)

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Parameters that all arms have in common."""
        return tuple(name for column, name, _ in self.exponents if self.arms and column == "compute")

    @cached_property
    def place(self) -> np.ndarray:
        """Place in theta of each local parameter in each arm, [L, arms]."""
        place = {name: i for i, name in enumerate(self.names)}
        return np.array([[place.get(f"{p}_{arm}", place.get(p)) for arm in self.arms or ("",)] for p in self._local])

    @cached_property
    def names(self) -> tuple[str, ...]:
        if not self.arms:
            return self._local
        return tuple(n for p in self._local for n in ([p] if p in self.shared else [f"{p}_{arm}" for arm in self.arms]))

    @cached_property
    def partners(self) -> list[tuple[str, str]]:
        """(amplitude, exponent) pairs: without the first the second means nothing."""
        found = [(terms[0], e) for e, terms in enumerate(self._of) if len(terms) == 1]
        pairs = [(self._local[j], self._local[len(self.formula) + e]) for j, e in found]
        return [(f"{p}_{arm}", f"{e}_{arm}") for p, e in pairs for arm in self.arms] if self.arms else pairs

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        ends = {t.amplitude: (0.0, np.inf) for t in self.formula} | dict(s=(1.0, 8.0))
        lowest = dict(self.lowest)
        for column, name, _ in self.exponents:
            ends[name] = lowest.get(name, lowest.get("", 0.05)), 2.0 if column in DATA_COLUMNS else 4.0
        both = np.empty((2, len(self.names)))
        for name, places in zip(self._local, self.place):
            both[:, places] = np.array(ends[name])[:, None]
        return both[0], both[1]

    @property
    def convex(self) -> bool:
        """Whether ln f is convex in the log dimensions at fixed compute: not where N stands in it."""
        return "num_params" not in self.terms

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """theta [R, P], u [K, n] (or [R, K, n]) -> ln f [R, n] and d ln f / d theta [R, P, n]."""
        value, _, jac = self._work(theta, u)
        if not self.arms:
            return value, jac
        full = np.zeros((len(theta), len(self.names), u.shape[-1]))
        full[:, self.place[:, u[2].astype(int)], np.arange(u.shape[-1])] = jac
        return value, full

    def advance(self, theta: np.ndarray, step: np.ndarray) -> np.ndarray:
        """theta + step [R, P] to first order, along the valley that power laws lie in.

        An exponent is nearly undetermined where the slope A a and the level A + eps of its term stay as they are. So
        what moves by the step exactly is, of each term, the sum of the amplitudes of all terms that hold its exponents
        times those exponents; amplitudes follow. Where one would turn negative, it and those it is left over from move
        by the step itself. A step this way takes a third of the iterations.
        """
        if self.power_mean:
            return theta + step
        out, num = theta + step, len(self.formula)
        sizes, powers = self.place[:num], self.place[num : num + len(self.exponents)]
        low, high = self.bounds
        size, grown = theta[:, sizes], out[:, sizes]  # [R, J, arms]
        old, new = theta[:, powers], np.clip(out[:, powers], low[powers], high[powers])  # [R, E, arms]
        moved, ratio = (new - old) / old, old / new
        stuck = (size <= 0) & (grown <= 0)
        alone, power, rest = self._order
        taken = (grown[:, alone] + size[:, alone] * moved[:, power]) * ratio[:, power]
        straight = grown.copy()
        grown[:, alone] = np.where((taken < 0) | stuck[:, alone], grown[:, alone], taken)
        for j, at, above in rest:
            level, amplitude = size[:, [j, *above]].sum(1), straight[:, [j, *above]].sum(1)
            if at:
                amplitude = (amplitude + level * moved[:, at].sum(1)) * ratio[:, at].prod(1)
            if above:
                amplitude = amplitude - grown[:, above].sum(1)
            bad = (amplitude < 0) | stuck[:, j]
            grown[:, j] = np.where(bad, straight[:, j], amplitude)
            if above:
                grown[:, above] = np.where(bad[:, None], straight[:, above], grown[:, above])
        out[:, sizes], out[:, powers] = grown, new
        return out

    @cached_property
    def _order(self) -> tuple[list[int], list[int], list[tuple[int, list[int], list[int]]]]:
        """For `advance`: terms of one exponent that stands nowhere else, those exponents, and the other terms.

        These from the most exponents to the fewest: (term, its exponents, the terms that hold them all).
        """
        above = [[i for i, b in enumerate(self.holds) if i != j and set(a) <= set(b)] for j, a in enumerate(self.holds)]
        alone = [j for j, at in enumerate(self.holds) if len(at) == 1 and not above[j]]
        others = sorted(set(range(len(self.formula))) - set(alone), key=lambda j: -len(self.holds[j]))
        return alone, [self.holds[j][0] for j in alone], [(j, self.holds[j], above[j]) for j in others]

    def elasticities(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln f [R, n] and d ln f / d u [R, K, n], for the optimum. Not for a form by arm."""
        value, part, _ = self._work(theta, u)
        out = np.zeros((len(theta), len(self.terms), u.shape[-1]))
        for e, (row, sign) in enumerate(zip(self.row, self.signs)):
            for j in self._of[e]:
                out[:, row] += sign * theta[:, len(self.formula) + e, None] * part[j]
        return value, out

    def _work(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """ln f [R, n]; d ln f / d ln term [R, n] of each term; the Jacobian [R, L, n] by local parameter."""
        num, held = len(self.formula), len(self.formula) + len(self.exponents)
        own = theta[:, self.place[:, u[2].astype(int)]] if self.arms else theta[:, :, None]  # [R, L, n] or [R, L, 1]
        logs = self.signs[:, None] * u[..., self.row, :]  # [E, n]
        factor = np.exp(own[:, num:held] * logs)
        power = [reduce(np.multiply, [factor[:, e] for e in at], 1.0) for at in self.holds]  # 1 = the floor
        value, slopes, by_s = link(self, [own[:, j] * p for j, p in enumerate(power)], own[:, held:])
        jac, part = np.empty((len(theta), own.shape[1], u.shape[-1])), []
        for j, p in enumerate(power):
            np.multiply(slopes[j], p, out=jac[:, j])
            part.append(own[:, j] * jac[:, j])
        for e, at in enumerate(self._of):
            np.multiply(reduce(np.add, [part[j] for j in at]), logs[..., e, :], out=jac[:, num + e])
        if self.power_mean:
            jac[:, held] = by_s
        return value, part, jac

    def starts(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The best points of an exponent grid, amplitudes by NNLS on relative error; [starts, P]."""
        return starts(self, u, y)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Undo the centring: A x^-a = (A e^{a centre}) applied to the raw column. centre: of each column, [K].

        Of a form by arm: [centre of each arm, centre of ln compute].
        """
        out, num = theta.copy(), len(self.formula)
        for g in range(len(self.arms) or 1):
            middle = np.array([centre[g], centre[-1]]) if self.arms else np.asarray(centre)
            for place, at in zip(self.place[:num, g], self.holds):
                for e in at:
                    out[:, place] *= np.exp(-self.signs[e] * theta[:, self.place[num + e, g]] * middle[self.row[e]])
        return out
