"""How fast is the law engine? Refits of a 54-row star, against a multi-start of scipy, side by side in one run.

python tests/bench_law.py
"""

import time
from functools import partial

import numpy as np
import planted
from scipy.optimize import least_squares

from sovit import law


def seconds(f) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def scipy_multistart(table: dict, y: np.ndarray, starts: int) -> float:
    """Best half sum of squared log residuals of the joint law over random starts; log-amplitudes, all parameters free."""
    x = np.stack([table[d] for d in planted.DIMS] + [table["num_examples"]], 1)
    u = np.log(x) - np.log(x).mean(0)
    rng = np.random.default_rng(0)

    def residual(p):
        return np.log((np.exp(p[:4]) * np.exp(-p[4:8] * u)).sum(1) + np.exp(p[8])) - np.log(y)

    def one():
        start = np.concatenate([rng.normal(-3, 1.5, 4), rng.uniform(0.1, 2, 4), [-2]])
        bounds = ([-30] * 4 + [0.05] * 4 + [-30], [10] * 4 + [4] * 4 + [1])
        return least_squares(residual, start, bounds=bounds, max_nfev=2000).cost

    return min(one() for _ in range(starts))


def main() -> None:
    table, trunk = planted.star()
    y = planted.loss(table) * planted.noise(trunk, 0.005, 0)
    common = dict(clusters=trunk, geometry=planted.GEOMETRY, extrapolate=False)
    for form, options in (("joint", {}), ("bounded", dict(zero_line=10.0)), ("sovit", {})):
        fit = partial(law.fit, form, table, y, **common, **options)
        once, both = seconds(fit), seconds(partial(fit, bootstrap=1000))
        print(f"{form:8} point fit {once:.3f} s; with 1,000 draws of each interval {both:.2f} s")
    plain = dict(loss="log_squares", whiten=False)
    ours = seconds(lambda: law.fit("joint", table, y, **common, **plain))
    objective = law.fit("joint", table, y, **common, **plain).objective
    best = []
    theirs = seconds(lambda: best.append(scipy_multistart(table, y, 100)))
    print(
        f"joint, squared log error: ours {ours:.3f} s, scipy with 100 starts {theirs:.2f} s: {theirs / ours:.0f} times"
    )
    print(f"objective: ours {objective:.9g}, scipy's best {best[0]:.9g}")


if __name__ == "__main__":
    main()
