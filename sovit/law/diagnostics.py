"""What a fit says and what it cannot say: exponents with their status, noise, extrapolation, diagnostics in words."""

from __future__ import annotations

import numpy as np

from sovit import UserError
from sovit.law.bootstrap import interval
from sovit.law.compute_optimum import optimum
from sovit.law.design_matrix import Rows, positive, prepare
from sovit.law.fitter import free_columns, solve
from sovit.law.form import FALLING
from sovit.law.forms import facing
from sovit.spec.shape import DIMENSIONS

MAX_RATIO = 10.0  # high / low of an exponent's interval beyond which it is not determined
MAX_ABSENT = 0.25  # share of draws without the dimension's amplitude beyond which it is not determined
EXPONENT_FLOOR = 1e-3  # stands for "does not grow" on the log scale
CUT_RULE = "widest gap of ln compute that holds out 10 to 40 % of the rows"
SIGNIFICANT = 0.05  # p of the F test of lack of fit
MIN_SPAN = 1.5  # ratio of largest to smallest compute below which nothing is said of growth or extrapolation
BOX_BELOW, BOX_ABOVE = 30.0, 1e3  # how far the optimum may go below and above the values run
BOX_FEW_TOKENS = 4.0  # and how far where that leaves fewer tokens: beyond, an image is less than one


def box(grid: dict) -> tuple[np.ndarray, np.ndarray]:
    """The box of the optimum in ln x, from the values run of each dimension."""
    ends = np.array([[min(values), max(values)] for values in grid.values()], float)
    below = [BOX_FEW_TOKENS if name == "image_size" else BOX_BELOW for name in grid]
    above = [BOX_FEW_TOKENS if name == "patch_size" else BOX_ABOVE for name in grid]
    return np.log(ends[:, 0] / below), np.log(ends[:, 1] * above)


def optimum_of(form, centre, theta, geometry, grid: dict, log_compute, head=False, held=None) -> np.ndarray:
    """ln x of the optimal dimensions [R, K] at ln compute (a number, or [R]), for each theta [R, P].

    held: dimension -> value, those that are not free (of a form by arm there is no such thing).
    For `sovit` each dimension has its own, x* = (alpha a t^c / (beta b))^(1/(a+b)) (Eq. 4), the others at the centre.
    """
    low, high = box(grid)
    for k, name in enumerate(grid):
        if name in (held or {}):
            low[k] = high[k] = np.log(held[name])
    if form.arms:
        num = len(form.arms)
        alpha, beta, _, _, a, b = (theta[:, i * num : (i + 1) * num] for i in range(6))
        above = np.broadcast_to(np.asarray(log_compute, float), (len(theta),))[:, None] - centre[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = (np.log(alpha * a) - np.log(beta * b) + theta[:, 6 * num :] * above) / (a + b)
        shift = np.where(alpha <= 0, -np.inf, np.where(beta <= 0, np.inf, shift))
        return np.clip(facing(form.arms) * (centre[:-1] + shift), low, high)
    return optimum(form, theta, centre, tuple(grid), geometry, log_compute, low, high, head)


def growth(form, centre, theta, geometry, grid, ends, head=False) -> np.ndarray:
    """Exponent s of x* ~ compute^s between the two computes `ends`, for each theta: [R, K]. head: compute counts it."""
    low, high = np.log(ends)
    if form.arms:
        num = len(form.arms)
        a, b = theta[:, 4 * num : 5 * num], theta[:, 5 * num : 6 * num]
        absent = (theta[:, :num] <= 0) | (theta[:, num : 2 * num] <= 0)
        return np.where(absent, 0.0, facing(form.arms) * theta[:, 6 * num :] / (a + b))
    at = [optimum_of(form, centre, theta, geometry, grid, t, head) for t in (low, high)]
    return (at[1] - at[0]) / (high - low)


def amplitudes(form, theta: np.ndarray) -> np.ndarray:
    """The size amplitude of each dimension [R, K], or the parameter count's; 0 = the loss does not depend on it."""
    if form.arms:
        return theta[:, : len(form.arms)]
    own = theta[:, [i for i, term in enumerate(form.terms) if term in DIMENSIONS]]
    return np.maximum(own, theta[:, [form.terms.index("num_params")]]) if "num_params" in form.terms else own


def exponents(form, centre, theta, draws, other, widen, geometry, grid, ends) -> tuple[dict, dict]:
    """`exponents` of law.json and the share of draws without each amplitude. theta [P]; draws, other [R, P] or None.

    widen: of the percentiles of draws (t / z) and of other (pairs).
    """
    names = list(grid)
    if ends[1] < MIN_SPAN * ends[0]:
        nothing = dict(estimate=None, low=None, high=None, pairs_low=None, pairs_high=None, status="unidentified")
        kind = "marginal" if form.arms else "joint"
        note = f"the rows span a factor {ends[1] / ends[0]:.3g} in compute; growth needs budgets further apart"
        return {name: nothing | dict(kind=kind, compute_range=list(ends), note=note) for name in names}, {}
    point = growth(form, centre, theta[None], geometry, grid, ends)[0]
    present = amplitudes(form, theta[None])[0] > 0
    top = optimum_of(form, centre, theta[None], geometry, grid, np.log(ends[1]))[0]
    middle = optimum_of(form, centre, theta[None], geometry, grid, np.log(ends).mean())[0]
    computes = np.sqrt(ends[0] * ends[1]), ends[1]
    out, shares = {}, {}
    kinds = {"": draws, "pairs_": other}
    many = {k: growth(form, centre, d, geometry, grid, ends) for k, d in kinds.items() if d is not None}
    for k, name in enumerate(names):
        sides: dict = dict(low=None, high=None, pairs_low=None, pairs_high=None)
        for kind, grown in many.items():
            sign = -1 if name in FALLING else 1  # the best patch shrinks as compute grows
            ends_of = interval(sign * grown[:, k], widen[kind != ""], EXPONENT_FLOOR)
            sides[kind + "low"], sides[kind + "high"] = sorted(sign * end for end in ends_of)
        status, note = "ok", ""
        for compute, x in zip(computes, np.exp([middle[k], top[k]])):
            low, high = min(grid[name]), max(grid[name])
            if not low < x < high:
                end = f"smallest value run ({low:g})" if x <= low else f"largest value run ({high:g})"
                note = f"at compute {compute:.3g} the optimum {x:.4g} is at or beyond the {end}; extend that arm"
                status = "edge"
        if not present[k]:
            status, note = "unidentified", "the fitted amplitude is 0: these data show no gain from this dimension"
        elif many:
            shares[name] = float((amplitudes(form, draws)[:, k] <= 0).mean())
            if shares[name] > MAX_ABSENT:
                status, note = "unidentified", f"no gain from this dimension in {shares[name]:.0%} of the draws"
            elif (ratio := max(sides["high"] / sides["low"], sides["low"] / sides["high"])) > MAX_RATIO:
                status, note = "unidentified", f"the interval spans a factor {ratio:.3g}, above {MAX_RATIO:g}"
        if not many:
            note = (note + "; " if note else "") + "no interval: fitted with bootstrap=0"
        estimate = None if status == "unidentified" else float(point[k])
        kind = "marginal" if form.arms else "joint"
        out[name] = dict(estimate=estimate, kind=kind, compute_range=list(ends), status=status, note=note) | sides
    return out, shares


def inside(form, centre, theta, geometry, grid: dict, ends, decades: float = 2.0) -> dict:
    """By dimension, where the optimum lies strictly between the values run: {at, low, high}.

    at: the optimum at the two computes `ends`. low, high: the ends of the stretch of compute, from `decades` below the
    runs to `decades` above them, over which it is inside; None where it is inside at no compute.
    """
    computes = np.geomspace(ends[0] / 10**decades, ends[1] * 10**decades, 161)
    every = np.log(np.concatenate([computes, ends]))
    *path, first, last = optimum_of(form, centre, np.tile(theta, (len(every), 1)), geometry, grid, every)
    out = {}
    for k, name in enumerate(grid):
        x = np.exp(np.array(path)[:, k])
        held = computes[(x > min(grid[name])) & (x < max(grid[name]))]
        low, high = (float(held.min()), float(held.max())) if len(held) else (None, None)
        out[name] = dict(at=[float(np.exp(first[k])), float(np.exp(last[k]))], low=low, high=high)
    return out


def seed_noise(table, y, index, solved) -> dict:
    """S.d. of ln y: pooled within rows of one shape and number of images in several trunks; else from the residuals.

    n: degrees of freedom between trunks (branches of one trunk share its seed); seeded trunks less seeded shapes.
    num_rows: the rows that the s.d. was read from.
    Where the fit was given a known part of the noise, `source` ends in "+support" and `support_sd` is that part (root
    mean square of ln y); `sd` holds it too, as what one measured row differs by from another.
    """
    known = None if solved.known_sd is None else float(np.sqrt((solved.known_sd**2).mean()))
    more, suffix = ({}, "") if known is None else (dict(support_sd=known), "+support")
    names = [n for n in (*DIMENSIONS, "head_dim", "pool", "num_registers", "num_params", "peak_lr") if n in table]
    shape = _groups([table[n] for n in names], len(y))
    group = _groups([shape, table["num_examples"] if "num_examples" in table else np.arange(len(y))], len(y))
    trunks = np.bincount(_distinct(group, index)[0])
    repeated = np.flatnonzero(trunks[group] > 1)
    if len(repeated):
        group, shape, index, values = group[repeated], shape[repeated], index[repeated], np.log(y[repeated])
        size = np.bincount(group)
        means = np.bincount(group, values) / np.maximum(size, 1)
        dof = len(group) - int((size > 0).sum())
        n = len(_distinct(shape, index)[0]) - len(np.unique(shape))
        sd = float(np.sqrt(((values - means[group]) ** 2).sum() / dof))
        return dict(sd=sd, source="seeds" + suffix, n=n, num_rows=len(group)) | more
    sd = float(np.hypot(np.hypot(solved.trunk_sd, solved.row_sd), known or 0.0))
    return dict(sd=sd, source="residuals" + suffix, n=int(round(solved.dof)), num_rows=len(y)) | more


def _groups(columns: list, num: int) -> np.ndarray:
    """Which rows [num] agree in all columns, as 0..G-1."""
    group = np.zeros(num, np.int64)
    for column in columns:
        values = column if column.dtype.kind in "iuf" else column.astype(str)
        place = np.unique(values, return_inverse=True)[1].ravel()
        group = np.unique(group * (int(place.max()) + 1) + place, return_inverse=True)[1].ravel()
    return group


def _distinct(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pairs of two columns of whole numbers."""
    return np.divmod(np.unique(a * (int(b.max()) + 1) + b), int(b.max()) + 1)


def compute_cut(compute: np.ndarray) -> float:
    """The cut of the extrapolation test, by CUT_RULE.

    Where runs stand on budget levels that gap lies below the largest level, which is then what is held out.
    """
    order = np.sort(np.log(compute))
    n = len(order)
    first, last = int(np.ceil(0.6 * n)), max(int(np.floor(0.9 * n)), int(np.ceil(0.6 * n)))
    gaps = [(order[i] - order[i - 1], i) for i in range(max(first, 1), min(last, n - 1) + 1)]
    i = max(gaps)[1]
    return float(np.exp((order[i] + order[i - 1]) / 2))


def extrapolation(form_name, table, y, dims, index, arms, options, cut=None) -> dict:
    """Fit below a compute cut, score above it; RMSE and signed bias of ln(predicted / measured), baselines beside it.

    `forms` holds {rmse, bias, n, rows, predicted} by form: the rows scored (each once) and their predicted losses; what
    cannot be scored has rmse None and a note. Where no test is possible: n = 0 and a note, and no cut.

    Baselines: `chinchilla` (size N and images, no shape), `compute_only` (E + A t^-a: constant proportions, all that
    matters is compute), `nearest` (the loss of the nearest run below the cut, which is what no law at all would say).
    """
    if "compute" not in table:
        return dict(n=0, note="no compute column")
    compute = positive(table, "compute")
    if compute.max() < MIN_SPAN * compute.min():
        return dict(
            n=0, note=f"the rows span a factor {compute.max() / compute.min():.3g} in compute, too little for one"
        )
    rule = "given" if cut else CUT_RULE
    cut = cut or compute_cut(compute)
    below, above = compute < cut, compute >= cut
    if not (below.any() and above.any()):
        return dict(n=0, note=f"no row is {'above' if below.any() else 'below'} the cut at compute {cut:.3g}")
    out = dict(cut=cut, rule=rule, n_fit=int(below.sum()), n=int(above.sum()), forms={})
    tries = {form_name: (form_name, options["terms"]), "compute_only": ("additive", ("compute",))}
    if {"num_params", "num_examples"} <= set(table):
        tries["chinchilla"] = "chinchilla", None
    for label, (name, terms) in tries.items():
        try:
            scored = _extrapolate(name, table, y, dims, index, arms, below, above, options | dict(terms=terms))
        except (UserError, np.linalg.LinAlgError) as error:
            scored = dict(rmse=None, bias=None, n=0, note=str(error))
        out["forms"][label] = scored
    near = (*dims, "num_examples") if dims or "num_examples" in table else ("compute",)
    logs = np.log(np.stack([positive(table, n) for n in near if n in table], 1))
    nearest = np.flatnonzero(below)[_nearest(logs[below], logs[above], logs.std(0))]
    out["forms"]["nearest"] = _score(y, np.flatnonzero(above), y[nearest])
    return out


def _nearest(run: np.ndarray, asked: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The first of the nearest rows of run [n, D] to each row of asked [m, D], in units of the spread [D]: [m]."""
    places, first = np.unique(run, axis=0, return_index=True)
    first = first[order := np.argsort(first)]
    places, (wanted, back) = places[order], np.unique(asked, axis=0, return_inverse=True)
    out = np.empty(len(wanted), int)
    size = max(1, 10**7 // len(places))
    for i in range(0, len(wanted), size):
        distance = (((wanted[i : i + size, None] - places) / (spread + 1e-12)) ** 2).sum(2)
        out[i : i + size] = first[distance.argmin(1)]
    return out[back.ravel()]


def _extrapolate(name, table, y, dims, index, arms, below, above, options) -> dict:
    parts = [{k: v[rows] for k, v in table.items()} for rows in (below, above)]
    keep = dict(zero_line=options["zero_line"], terms=options["terms"])
    train = prepare(name, parts[0], y[below], dims, arms=arms[below], **keep)
    trunk = train.trunks(index[below])
    known = options["known_sd"]
    known = None if known is None else known[below][train.source]
    fitted = solve(train.form, train.u, train.y, trunk, known_sd=known, **options["solver"])
    u, source = features(train.form, train.centre, parts[1], arms[above])
    if not len(source):
        return dict(rmse=None, bias=None, n=0, note="no row above the cut that the form describes")
    value = np.exp(train.form.evaluate(fitted.theta[None], u)[0][0])
    rows, place = np.unique(source, return_inverse=True)  # a row at the centre gets the mean of its arms
    return _score(y, np.flatnonzero(above)[rows], np.bincount(place, value) / np.bincount(place))


def _score(y, rows: np.ndarray, predicted: np.ndarray) -> dict:
    residual = np.log(predicted / y[rows])
    score = dict(rmse=float(np.sqrt((residual**2).mean())), bias=float(residual.mean()), n=len(rows))
    return score | dict(rows=rows.tolist(), predicted=predicted.tolist())


def features(form, centre, table, arms) -> tuple[np.ndarray, np.ndarray]:
    """Centred log columns of any rows and the rows they came from (a form by arm: rows on an arm or at the centre)."""
    if not form.arms:
        logs = np.log(np.stack([positive(table, n) for n in form.terms]))
        return logs - centre[:, None], np.arange(logs.shape[1])
    picks = [np.flatnonzero((arms == d) | (arms == "centre")) for d in form.terms]
    source, arm = np.concatenate(picks), np.repeat(np.arange(len(picks)), [len(p) for p in picks])
    own = np.log(np.concatenate([positive(table, d)[p] ** s for d, p, s in zip(form.terms, picks, facing(form.terms))]))
    t = np.log(positive(table, "compute")[source])
    return np.stack([own - centre[arm], t - centre[-1], arm.astype(float)]), source


def describe(rows: Rows, solved, noise: dict, table) -> dict:
    """Diagnostics of the point fit that need no draws; see law.json.

    `weakest` is the direction in which the rows say least: the least singular vector of the Jacobian with columns of
    unit norm, its two largest loadings, and the `step` of the centred parameters that is one standard error along it
    (rows taken for independent).
    """
    form, theta = rows.form, solved.theta
    value, jac = form.evaluate(theta[None], rows.u)
    residual, jac = value[0] - np.log(rows.y), jac[0]
    low, high = form.bounds
    bounds = {
        n: "lower" if t <= lo else "upper" for n, t, lo, hi in zip(form.names, theta, low, high) if t <= lo or t >= hi
    }
    free = free_columns(form, theta, jac)
    if not free.any():
        line = "" if form.zero_line is None else f" every loss is far above zero_line={form.zero_line:g}, or"
        raise UserError(f"no parameter moves the fit:{line} no column moves the loss; check the losses and their unit")
    unit = jac[free] / np.linalg.norm(jac[free], axis=1, keepdims=True)
    _, singular, right = np.linalg.svd(unit.T, full_matrices=False)
    names, weak = np.array(form.names)[free], right[-1]
    weak = weak * np.sign(weak[np.argmax(np.abs(weak))])  # a singular vector has no sign of its own
    top = np.argsort(-np.abs(weak), kind="stable")[:2]
    against = "against" if weak[top[0]] * weak[top[-1]] < 0 else "with"
    weakest = (
        (
            f"{names[top[0]]} {against} {names[top[1]]} (loadings {weak[top[0]]:+.2f}, {weak[top[1]]:+.2f});"
            f" singular values of the unit-norm Jacobian {singular[0]:.3g} to {singular[-1]:.3g}"
        )
        if len(top) > 1
        else "one free parameter"
    )
    rms = float(np.sqrt(residual @ residual / max(len(residual) - int(free.sum()), 1)))
    size = np.linalg.norm(jac[free], axis=1) * max(singular[-1], 1e-12)
    shift = dict(zip(names.tolist(), (weak * rms / size).tolist()))
    misfit = rms / noise["sd"] if noise["sd"] > 0 else None
    return dict(
        objective=solved.objective,
        iterations=solved.iterations,
        converged=solved.converged,
        objective_spread=solved.spread,
        starts_agreeing=solved.agreeing,
        num_starts=solved.num_starts,
        active_bounds=bounds,
        weakest_direction=weakest,
        weakest=dict(
            parameters=[str(names[i]) for i in top],
            loadings=[float(weak[i]) for i in top],
            singular_values=[float(singular[0]), float(singular[-1])],
            step=shift,
        ),
        trunk_sd=solved.trunk_sd,
        row_sd=solved.row_sd,
        nu=solved.dof,
        residual_rms=rms,
        lack_of_fit=_lack_of_fit(misfit, noise, solved.dof),
        residual_pattern=_pattern(residual, rows, table),
    )


def _lack_of_fit(misfit: float | None, noise: dict, dof: float) -> dict:
    """Residuals against the noise between seeds: p of the F test of their variances, by trunks on both sides."""
    from scipy.special import fdtrc  # not at import: prediction needs no scipy

    found = dict(residual_over_noise=misfit, noise_source=noise["source"], p=None)
    if not noise["source"].startswith("seeds") or misfit is None:
        words = "no repeated seeds: the noise is read from the residuals, so lack of fit cannot be told from noise"
        return found | dict(note=words)
    p = float(fdtrc(dof, noise["n"], misfit**2))
    more, same = "the form misses more than seed noise", "the residuals are of the size of seed noise"
    return found | dict(p=p, note=f"{more if p < SIGNIFICANT else same} (F test, p = {p:.2g})")


def _pattern(residual: np.ndarray, rows: Rows, table) -> dict:
    """Mean ln(predicted/measured) of small and large models at low and high compute, halves split at the medians."""
    if not {"compute", "num_examples"} <= set(table):
        return {}
    compute = positive(table, "compute")[rows.source]
    size = compute / positive(table, "num_examples")[rows.source]
    cells = {}
    for s, small in (("small", size <= np.median(size)), ("large", size > np.median(size))):
        for c, low in (("low", compute <= np.median(compute)), ("high", compute > np.median(compute))):
            cells[f"{s}_model_{c}_compute"] = float(residual[small & low].mean()) if (small & low).any() else None
    return cells
