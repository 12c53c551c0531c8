"""The law forms: value, Jacobian, bounds and starting points, batched over replicates. Numpy only.

A form works on centred log columns u = ln x - centre, so that its amplitudes are losses at the middle of the data and
nothing overflows; `raw` undoes the centring where parameters are printed. Shapes below: R replicates, P parameters,
K columns (terms), n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

SIZE_GRID = (0.1, 0.3, 0.6, 1.0, 1.8, 3.0)
DATA_GRID = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
DATA_COLUMNS = ("num_examples", "tokens", "compute")
NUM_STARTS = 8
MAX_GRID = 1500  # points; with more columns the grid gets coarser instead of longer
BOUND_POWER = 4.0  # sharpness of the zero line in `bounded`; fixed, not fitted


def nnls(basis: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative least squares of target [n] on basis [G, p, n] for G bases at once, exactly.

    Every one of the 2^p - 1 supports is solved and the best feasible one kept: with p <= 7 that is faster than an
    active-set method, has no iterations and cannot stop early. Returns coefficients [G, p] and the sum of squares [G].
    """
    num, p, _ = basis.shape
    scale = np.linalg.norm(basis, axis=2) + 1e-300
    unit = basis / scale[:, :, None]
    normal = unit @ unit.transpose(0, 2, 1) + 1e-13 * np.eye(p)
    moment = unit @ target
    best = np.full(num, float(target @ target))
    coef = np.zeros((num, p))
    for size in range(1, p + 1):
        for support in combinations(range(p), size):
            s = list(support)
            x = np.linalg.solve(normal[:, s][:, :, s], moment[:, s][:, :, None])[:, :, 0]
            objective = target @ target - np.einsum("gs,gs->g", x, moment[:, s])
            better = (x >= 0).all(1) & (objective < best)
            best[better] = objective[better]
            rows = np.zeros((int(better.sum()), p))
            rows[:, s] = x[better]
            coef[better] = rows
    return coef / scale, best


def _exponent_limits(term: str, lowest: float) -> tuple[float, float]:
    return (lowest, 2.0) if term in DATA_COLUMNS else (lowest, 4.0)


@dataclass(frozen=True)
class Additive:
    """f = sum_k A_k x_k^-a_k + eps over any columns: joint, Chinchilla (2203.15556), the Gemstones forms (2502.06857).

    theta = [A (K), eps, a (K)]. `labels` are the printed names of (amplitude, exponent) of each column.
    """

    terms: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    floor: str = "eps"
    lowest: float = 0.05

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(a for a, _ in self.labels) + (self.floor,) + tuple(e for _, e in self.labels)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        k = len(self.terms)
        limits = np.array([_exponent_limits(t, self.lowest) for t in self.terms])
        return np.r_[np.zeros(k + 1), limits[:, 0]], np.r_[np.full(k + 1, np.inf), limits[:, 1]]

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """theta [R, P], u [K, n] -> ln f [R, n] and d ln f / d theta [R, P, n]."""
        k = len(self.terms)
        power = np.exp(-theta[:, k + 1 :, None] * u)
        value = (theta[:, :k, None] * power).sum(1) + theta[:, k : k + 1]
        jac = np.empty((len(theta), 2 * k + 1, u.shape[1]))
        jac[:, :k] = power / value[:, None]
        jac[:, k] = 1 / value
        jac[:, k + 1 :] = -u * theta[:, :k, None] * jac[:, :k]
        return np.log(value), jac

    def starts(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The best points of an exponent grid, amplitudes by NNLS on relative error; [NUM_STARTS, P]."""
        k = len(self.terms)
        per_term = len(SIZE_GRID)
        while per_term**k > MAX_GRID:
            per_term -= 1
        pick = np.linspace(0, len(SIZE_GRID) - 1, per_term).round().astype(int)
        grids = [np.array(DATA_GRID if t in DATA_COLUMNS else SIZE_GRID)[pick] for t in self.terms]
        a = np.array(list(product(*grids)))
        basis = np.concatenate([np.exp(-a[:, :, None] * u), np.ones((len(a), 1, u.shape[1]))], 1) / y
        amplitude, objective = nnls(basis, np.ones(len(y)))
        best = np.argsort(objective, kind="stable")[:NUM_STARTS]
        return np.concatenate([amplitude[best], a[best]], 1)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Undo the centring: A x^-a = (A e^{a centre}) applied to the raw column."""
        k = len(self.terms)
        out = theta.copy()
        out[:, :k] *= np.exp(theta[:, k + 1 :] * centre)
        return out

    def split(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """Capacity and data terms, the last column being the data: A a [R, K-1]; B c s eps [R]."""
        k = len(self.terms)
        return dict(
            A=theta[:, : k - 1],
            B=theta[:, k - 1],
            eps=theta[:, k],
            a=theta[:, k + 1 : -1],
            c=theta[:, -1],
            s=np.ones(len(theta)),
        )


@dataclass(frozen=True)
class PowerMean:
    """f = (K^s + D^s)^(1/s) + eps, K = sum_k A_k x_k^-a_k, D = B n^-c; then bounded by the zero line z, if any.

    s = 1 is the additive form; a large s says that the worse of the two limits decides, as when a skill is missing for
    want of capacity or of data. The bound (z^-4 + f^-4)^(-1/4) keeps an early loss below that of knowing nothing.
    theta = [A (K-1), B, eps, a (K-1), c, s]; the last column is the data.
    """

    terms: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    zero_line: float | None = None
    lowest: float = 0.05

    @property
    def names(self) -> tuple[str, ...]:
        return self._additive.names + ("s",)

    @property
    def _additive(self) -> Additive:
        return Additive(self.terms, self.labels, lowest=self.lowest)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = self._additive.bounds
        return np.r_[low, 1.0], np.r_[high, 8.0]

    def bound(self, loss: np.ndarray) -> np.ndarray:
        if self.zero_line is None:
            return loss
        return (self.zero_line**-BOUND_POWER + loss**-BOUND_POWER) ** (-1 / BOUND_POWER)

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """theta [R, P], u [K, n] -> ln f [R, n] and d ln f / d theta [R, P, n]."""
        k = len(self.terms)
        s = theta[:, -1:]
        power = np.exp(-theta[:, k + 1 : -1, None] * u)
        part = theta[:, :k, None] * power
        # the floor keeps ln 0 out where every amplitude of one side is zero; it is far below any loss
        ln_k, ln_d = np.log(part[:, :-1].sum(1) + 1e-12), np.log(part[:, -1] + 1e-12)
        top = np.maximum(ln_k, ln_d)
        ln_m = top + np.log(np.exp(s * (ln_k - top)) + np.exp(s * (ln_d - top))) / s
        share_k, share_d = np.exp(s * (ln_k - ln_m)), np.exp(s * (ln_d - ln_m))  # K^s / M^s, D^s / M^s
        loss = np.exp(ln_m) + theta[:, k : k + 1]
        value = self.bound(loss)
        slope = 1 / loss if self.zero_line is None else value**BOUND_POWER / loss ** (BOUND_POWER + 1)  # d ln f/d loss
        jac = np.empty((len(theta), 2 * k + 2, u.shape[1]))
        # dM/dK = (K/M)^(s-1)
        by_k, by_d = slope * np.exp((s - 1) * (ln_k - ln_m)), slope * np.exp((s - 1) * (ln_d - ln_m))
        jac[:, : k - 1] = by_k[:, None] * power[:, :-1]
        jac[:, k - 1] = by_d * power[:, -1]
        jac[:, k] = slope
        jac[:, k + 1 : -1] = -u * theta[:, :k, None] * jac[:, :k]
        # d ln M / ds = (sum_i share_i ln x_i - ln M) / s
        jac[:, -1] = slope * np.exp(ln_m) * (share_k * ln_k + share_d * ln_d - ln_m) / s
        return np.log(value), jac

    def starts(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Additive starts on the unbounded loss, each at several s, with amplitudes rescaled so that the level fits."""
        loss = y
        if self.zero_line is not None:
            capped = np.minimum(y, 0.98 * self.zero_line)
            loss = (capped**-BOUND_POWER - self.zero_line**-BOUND_POWER) ** (-1 / BOUND_POWER)
        base = self._additive.starts(u, loss)
        k = len(self.terms)
        found = []
        for s in (1.0, 1.7, 3.0):
            for factor in (1.0, 1.2, 1.5, 2.0):
                theta = np.column_stack([base, np.full(len(base), s)])
                theta[:, :k] *= factor
                found.append(theta)
        theta = np.array(found)  # [s x factor, starts, P]
        residual = (self.evaluate(theta.reshape(-1, theta.shape[2]), u)[0] - np.log(y)) ** 2
        score = residual.sum(1).reshape(3, 4, -1).argmin(1)  # the best factor of each (s, start)
        theta = theta.reshape(3, 4, len(base), -1)
        return np.concatenate([theta[i, score[i], np.arange(len(base))] for i in range(3)])

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        return np.concatenate([self._additive.raw(theta[:, :-1], centre), theta[:, -1:]], 1)

    def split(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        return self._additive.split(theta[:, :-1]) | dict(s=theta[:, -1])


@dataclass(frozen=True)
class PerArm:
    """Eq. 2 of 2305.13035 for each arm of a star, c shared: alpha x^-a + (beta x^b + xi) t^-c + eps.

    theta = [alpha, beta, xi, eps, a, b (one an arm each), c]; columns u = [ln x of the row's own arm, ln t, arm].
    """

    terms: tuple[str, ...]  # the arms: one dimension each

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{p}_{t}" for p in ("alpha", "beta", "xi", "eps", "a", "b") for t in self.terms) + ("c",)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        one = np.ones(len(self.terms))
        return (
            np.r_[np.zeros(4 * len(one)), 0.05 * one, 0.02 * one, 0.05],
            np.r_[np.full(4 * len(one), np.inf), 4 * one, 4 * one, 2.0],
        )

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """theta [R, P], u [3, n] -> ln f [R, n] and d ln f / d theta [R, P, n]."""
        num, arm = len(self.terms), u[2].astype(int)
        own = arm == np.arange(num)[:, None]
        alpha, beta, xi, eps, a, b = (theta[:, i * num : (i + 1) * num][:, arm] for i in range(6))
        size, cost, data = np.exp(-a * u[0]), np.exp(b * u[0]), np.exp(-theta[:, -1:] * u[1])
        value = alpha * size + (beta * cost + xi) * data + eps
        by_arm = (size, cost * data, data, np.ones_like(value), -u[0] * alpha * size, u[0] * beta * cost * data)
        jac = np.empty((len(theta), 6 * num + 1, u.shape[1]))
        for i, part in enumerate(by_arm):
            jac[:, i * num : (i + 1) * num] = (part / value)[:, None] * own
        jac[:, -1] = -u[1] * (beta * cost + xi) * data / value
        return np.log(value), jac

    def starts(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Given c the arms separate: for every c the best (a, b) of a grid, arm by arm; [len(DATA_GRID), P]."""
        num, arm = len(self.terms), u[2].astype(int)
        a, b = np.array(list(product(SIZE_GRID, SIZE_GRID))).T
        found = []
        for c in DATA_GRID:
            theta = np.empty((6, num))
            for g in range(num):
                x, t, loss = u[0, arm == g], u[1, arm == g], y[arm == g]
                size, cost = np.exp(-a[:, None] * x), np.exp(b[:, None] * x)
                data = np.broadcast_to(np.exp(-c * t), size.shape)
                amplitude, objective = nnls(
                    np.stack([size, cost * data, data, np.ones_like(size)], 1) / loss, np.ones(len(loss))
                )
                best = int(objective.argmin())
                theta[:, g] = np.r_[amplitude[best], a[best], b[best]]
            found.append(np.r_[theta.ravel(), c])
        return np.array(found)

    def raw(self, theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """centre = [centre of each arm, centre of ln t]."""
        num = len(self.terms)
        out = theta.copy()
        data = np.exp(theta[:, -1:] * centre[-1])
        out[:, :num] *= np.exp(theta[:, 4 * num : 5 * num] * centre[:-1])
        out[:, num : 2 * num] *= np.exp(-theta[:, 5 * num : 6 * num] * centre[:-1]) * data
        out[:, 2 * num : 3 * num] *= data
        return out


Form = Additive | PowerMean | PerArm


@dataclass(frozen=True)
class Law:
    """One entry of LAWS: the family, the columns it reads beside the shape dimensions, and where it comes from."""

    family: type
    needs: tuple[str, ...]  # columns, the shape dimensions apart
    uses_dims: bool
    about: str

    def build(self, dims: tuple[str, ...], zero_line: float | None = None, terms: tuple | None = None) -> Form:
        """The form for these dimensions; `terms` replaces the columns of an additive form."""
        if self.family is PerArm:
            return PerArm(dims)
        if not self.uses_dims:
            return Additive(
                terms or ("num_params", "num_examples"), (("A", "alpha"), ("B", "beta")), floor="E", lowest=0.01
            )
        columns = tuple(terms or (*dims, "num_examples"))
        labels = tuple(("B", "c") if t == "num_examples" else (f"A_{t}", f"a_{t}") for t in columns)
        if self.family is PowerMean:
            return PowerMean(columns, labels, zero_line)
        return Additive(columns, labels, lowest=0.01 if terms else 0.05)


LAWS = {
    "sovit": Law(PerArm, ("compute",), True, "Eq. 2 of arXiv 2305.13035 for each arm of a star, c shared"),
    "joint": Law(Additive, ("num_examples",), True, "sum_k A_k x_k^-a_k + B n^-c + eps; exact FLOPs give the compute"),
    "bounded": Law(PowerMean, ("num_examples",), True, "joint with a power mean, bounded by the zero line"),
    "power_mean": Law(PowerMean, ("num_examples",), True, "bounded without the zero line"),
    "chinchilla": Law(Additive, ("num_params", "num_examples"), False, "E + A/N^alpha + B/D^beta, arXiv 2203.15556"),
    "additive": Law(Additive, (), True, "sum over `terms` of A_k x_k^-a_k, plus eps: any columns (arXiv 2502.06857)"),
}
