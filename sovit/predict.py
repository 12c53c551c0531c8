"""A fitted law and a budget -> the best shape that can be built, how sure that is, and what is as good. Numpy only.

    recommendation = best_shape(Fit.from_json(text), train_flops=1e15)

Budget: train_flops = 3 (forward_flops + head_flops) x num_examples. A law's compute is forward_flops x num_examples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.allocate import Geometry, law_columns
from sovit.bootstrap import interval
from sovit.diagnose import amplitudes, optimum_of
from sovit.forms import LAWS
from sovit.law import Fit
from sovit.shape import DIMENSIONS, Shape

FAR_DECADES = 2.0  # extrapolation beyond which the recommendation carries a warning
MAX_DECADES = 6.0  # budgets further than this from the data are refused
SEARCH = 8.0  # the search for feasible shapes spans this factor below and above the real optimum
NEAR_STEPS = 64  # unit steps from the survey to the best shape before they double
LATTICE = dict(width=32, depth=32, mlp_dim=48)  # most values a dimension in the survey of the flat region
MAX_LISTED = 50  # shapes of the flat region that are listed
PROPORTIONS = (768, 12, 3072)  # ViT-B: width, depth, mlp_dim


@dataclass(frozen=True)
class Recommendation:
    """What to train at a budget. Losses are predictions of the law; intervals are at `level`.

    shape: the best feasible integers. optimum: by dimension of the law {estimate, low, high, pairs_low, pairs_high,
    status, note, grid}: the real-valued optimum. flat_region: surveyed shapes (a thinned lattice of the feasible ones)
    within one noise s.d. of the best. proportional: the usual proportions at that budget, see `proportional_shape`.
    difference: {estimate, low, high} of ln loss(shape) - ln loss(proportional), see `predicted_difference`.
    rounding_regret: relative excess of the loss of `shape` over the real optimum's. regret: excess of `shape` over
    the best shape if a bootstrap draw were the truth (median, high). decades: of compute from the
    largest run, negative below it.
    """

    form: str
    train_flops: float
    level: float
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
    optimum_loss: float
    rounding_regret: float
    regret: dict | None
    flat_region: dict
    proportional: dict
    difference: dict
    decades: float
    warnings: list

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def best_shape(fit: Fit, train_flops: float, *, head_dim: int | None = None, mlp_multiple: int = 8) -> Recommendation:
    """The best shape for a training budget in FLOPs, head included.

    Width is a multiple of head_dim (None = that of the data), mlp_dim of mlp_multiple; patch and image size are
    values that were run. Raises UserError for a law that cannot rank shapes, for a budget without one image, and for
    one more than MAX_DECADES from the budgets run.
    """
    geometry = _geometry(fit, train_flops)
    head_dim = head_dim or geometry.head_dim
    if head_dim < 1 or mlp_multiple < 1:
        raise UserError(f"head_dim={head_dim}, mlp_multiple={mlp_multiple}: both must be at least 1")
    names = fit.model["dims"]
    log_budget = np.log(train_flops / 3)
    floors = _floors(fit, head_dim, mlp_multiple)
    real = np.exp(_optimum(fit, fit.theta[None], geometry, log_budget)[0])
    real = np.maximum(real, [min(fit.data["grid"][n]) if n in _absent(fit) else 0 for n in names])
    real_table = dict(zip(names, real[:, None]))
    real_loss = float(_loss(fit, real_table, geometry, log_budget)[0])

    values = _lattice(fit, dict(zip(names, real)), geometry, floors)
    table = {n: grid.ravel() for n, grid in zip(values, np.meshgrid(*values.values(), indexing="ij"))}
    table = _buildable(table, geometry)
    loss = _loss(fit, table, geometry, log_budget)
    best, best_loss = _descend(fit, table, loss, geometry, log_budget, floors)
    shape = _shape(best, geometry, head_dim)
    affordable = geometry.flops(_columns([shape]), head=True)[0] * 3
    num_examples = int(train_flops // affordable)
    if num_examples < 1:
        raise UserError(
            f"train_flops={train_flops:g} does not pay for one image of the smallest shape ({affordable:.3g} FLOPs)"
        )

    optimum, regret = _uncertainty(fit, geometry, log_budget, names, real, best)
    ends = {kind: _loss_interval(fit, kind, best, geometry, log_budget) for kind in fit.draws}
    (low, high), (pairs_low, pairs_high) = (ends.get(k, (None, None)) for k in ("random_effects", "pairs"))
    decades = float(np.log10(train_flops / _budgets_run(fit)[1]))
    proportional = proportional_shape(fit, train_flops, head_dim=head_dim, reference=best_loss)
    return Recommendation(
        form=fit.form,
        train_flops=float(train_flops),
        level=fit.level,
        shape=shape.to_dict(),
        num_params=shape.num_params,
        forward_flops=shape.forward_flops,
        num_examples=num_examples,
        loss=best_loss,
        loss_low=low,
        loss_high=high,
        loss_pairs_low=pairs_low,
        loss_pairs_high=pairs_high,
        optimum=optimum,
        optimum_loss=real_loss,
        rounding_regret=best_loss / real_loss - 1,
        regret=regret,
        flat_region=_flat_region(fit, table, loss, best, best_loss, names),
        proportional=proportional,
        difference=predicted_difference(fit, shape, Shape(**proportional["shape"]), train_flops),
        decades=decades,
        warnings=_warnings(fit, optimum, decades),
    )


def predicted_loss(fit: Fit, shapes: Sequence[Shape], train_flops: float) -> np.ndarray:
    """Predicted loss [S] of shapes trained for the same budget, each on as many images as it pays for."""
    geometry = _geometry(fit, train_flops)
    return _loss(fit, _columns(shapes), geometry, np.log(train_flops / 3))


def predicted_difference(fit: Fit, shape_a: Shape, shape_b: Shape, train_flops: float) -> dict:
    """{estimate, low, high} of ln loss(a) - ln loss(b), both trained for the same budget; negative = a is better.

    The headline interval, at `fit.level`, of the expected losses' difference: draw by draw, so that what both shapes
    share cancels. low and high are None for a law fitted without draws.
    """
    geometry, log_budget = _geometry(fit, train_flops), np.log(train_flops / 3)
    table = _columns([shape_a, shape_b])
    first, second = np.log(_loss(fit, table, geometry, log_budget))
    low = high = None
    if "random_effects" in fit.draws:
        theta, widen = _draws(fit, "random_effects")
        many = np.log(_loss(fit, table, geometry, log_budget, theta))  # [R, 2]
        low, high = interval(many[:, 0] - many[:, 1], widen, floor=None)
    return dict(estimate=float(first - second), low=low, high=high)


def proportional_shape(fit: Fit, train_flops: float, *, head_dim: int | None = None, reference: float | None = None):
    """The best shape of ViT-B's proportions (width w, depth w/64 rounded and at least 1, mlp_dim 4w) at a budget.

    w is the multiple of head_dim that the law itself thinks best at that budget: the strongest opponent that constant
    proportions allow. Returns {shape, num_examples, loss, loss_low, loss_high, loss_excess, note}; the interval is
    the headline one (None without draws), loss_excess is relative to `reference`.
    """
    geometry = _geometry(fit, train_flops)
    head_dim = head_dim or geometry.head_dim
    widths = head_dim * np.unique(np.geomspace(1, 512, 200).round().astype(int))
    width, depth, mlp_dim = PROPORTIONS
    table = dict(width=widths, depth=np.maximum(1, np.round(widths * depth / width)), mlp_dim=widths * mlp_dim // width)
    fixed = dict(patch_size=_fixed(fit, geometry, "patch_size"), image_size=_fixed(fit, geometry, "image_size"))
    table |= {n: np.full(len(widths), float(v)) for n, v in fixed.items()}
    loss = _loss(fit, table, geometry, np.log(train_flops / 3))
    i = int(loss.argmin())
    chosen = {n: float(column[i]) for n, column in table.items()}
    shape = _shape(chosen, geometry, head_dim)
    low = high = None
    if "random_effects" in fit.draws:
        low, high = _loss_interval(fit, "random_effects", chosen, geometry, np.log(train_flops / 3))
    images = int(train_flops // (3 * geometry.flops(_columns([shape]), head=True)[0]))
    excess = None if reference is None else float(loss[i] / reference - 1)
    blind = [n for n in ("width", "depth", "mlp_dim") if n not in fit.model["dims"]]
    note = f"the law knows nothing of {', '.join(blind)}" if blind else ""
    return dict(
        shape=shape.to_dict(),
        num_examples=images,
        loss=float(loss[i]),
        loss_low=low,
        loss_high=high,
        loss_excess=excess,
        note=note,
    )


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


def _geometry(fit: Fit, train_flops: float) -> Geometry:
    if not (LAWS[fit.form].ranks_shapes and fit.model["dims"]):
        raise UserError(f"form={fit.form!r} cannot rank whole shapes; fit 'joint' or 'bounded' to the same rows")
    if fit.geometry is None:
        raise UserError("the law does not know patch_size and image_size; fit it with geometry={'patch_size': ...}")
    if "compute_range" not in fit.data:
        raise UserError("the law was fitted to rows without forward_flops or compute; give the rows one of them")
    if not (np.isfinite(train_flops) and train_flops > 0):
        raise UserError(f"train_flops={train_flops!r} is not a positive number; give FLOPs, such as 1e15")
    low, high = _budgets_run(fit)
    if not low / 10**MAX_DECADES <= train_flops <= high * 10**MAX_DECADES:
        raise UserError(
            f"train_flops={train_flops:g} is more than {MAX_DECADES:g} decades from the budgets run, {low:.3g} to"
            f" {high:.3g}; name one nearer to them"
        )
    return Geometry(**fit.geometry)


def _absent(fit: Fit) -> list[str]:
    """Dimensions whose amplitude is 0: the law has nothing to say for them, so they stay within the values run."""
    present = amplitudes(fit.shape_form, fit.theta[None])[0] > 0
    return [n for n, known in zip(fit.model["dims"], present) if not known]


def _floors(fit: Fit, head_dim: int, mlp_multiple: int) -> dict[str, tuple[int, int]]:
    """Step and least value of each dimension that is searched."""
    out = {}
    for name, step in (("width", head_dim), ("depth", 1), ("mlp_dim", mlp_multiple)):
        least = min(fit.data["grid"][name]) if name in _absent(fit) else step
        out[name] = step, step * max(1, int(np.ceil(least / step)))
    return out


def _fixed(fit: Fit, geometry: Geometry, name: str) -> float:
    return fit.data["centre"].get(name, getattr(geometry, name))


def _optimum(fit, theta, geometry, log_budget) -> np.ndarray:
    centre = np.array(fit.model["centres"])
    return optimum_of(fit.shape_form, centre, theta, geometry, fit.data["grid"], log_budget, head=True)


def _loss(fit, table: Mapping, geometry, log_budget, theta=None) -> np.ndarray:
    """Loss of real or whole shapes at the budget, [S], or [R, S] for theta [R, P]."""
    images = np.exp(log_budget) / geometry.flops(table, head=True)
    form = fit.shape_form
    logs = law_columns(form.terms, table, images, geometry)
    value = form.evaluate(fit.theta[None] if theta is None else theta, logs - np.array(fit.model["centres"])[:, None])[
        0
    ]
    return np.exp(value[0] if theta is None else value)


def _lattice(fit, real: Mapping, geometry, floors) -> dict[str, np.ndarray]:
    """Whole values of each dimension around the real optimum, thinned to LATTICE values on a log scale."""
    values = {}
    for name, (step, least) in floors.items():
        if name in real:
            low, high = (max(least // step, round(real[name] * factor / step)) for factor in (1 / SEARCH, SEARCH))
            values[name] = step * np.unique(np.geomspace(low, high, LATTICE[name]).round().astype(int))
        else:
            values[name] = np.array([step * max(1, round(getattr(geometry, name) / step))])
    for name in ("patch_size", "image_size"):
        values[name] = np.array(fit.data["grid"].get(name, [getattr(geometry, name)])).round().astype(int)
    return values


def _buildable(table: dict, geometry) -> dict:
    whole = table["image_size"] % table["patch_size"] == 0
    if not whole.any():
        raise UserError("no image_size that was run is a multiple of a patch_size that was run; run a pair that is")
    return {n: column[whole] for n, column in table.items()}


def _descend(fit, table, loss, geometry, log_budget, floors) -> tuple[dict, float]:
    """From the best of the survey to the best of the full lattice: +-1 and +-2 steps in all three dimensions at once.

    The loss is convex in the log dimensions (allocate), so that a local best of this neighbourhood is taken for global;
    a test compares with brute force. Steps grow where the best is far away, as under a law that is nearly flat.
    """
    steps = {n: floor for n, floor in floors.items() if n in fit.model["dims"]}
    best = {n: int(column[loss.argmin()]) for n, column in table.items()}
    best_loss = float(loss.min())
    offsets = np.stack(np.meshgrid(*[np.arange(-2, 3)] * len(steps), indexing="ij"), -1).reshape(-1, len(steps))
    stride, taken = 1, 0
    while steps:
        near = {n: np.full(len(offsets), value) for n, value in best.items()}
        for k, (n, (step, least)) in enumerate(steps.items()):
            near[n] = np.maximum(least, best[n] + stride * step * offsets[:, k])
        around = _loss(fit, near, geometry, log_budget)
        if around.min() < best_loss:
            best = {n: int(column[around.argmin()]) for n, column in near.items()}
            best_loss, taken = float(around.min()), taken + 1
            stride *= 2 if taken % NEAR_STEPS == 0 else 1
        elif stride == 1:
            break
        else:
            stride //= 2
    return best, best_loss


def _shape(values: Mapping, geometry, head_dim) -> Shape:
    width, depth, mlp_dim, patch_size, image_size = (int(values[n]) for n in DIMENSIONS)
    return Shape(
        width,
        depth,
        mlp_dim,
        head_dim,
        patch_size,
        image_size,
        pool=geometry.pool,
        num_registers=geometry.num_prefix_tokens - (geometry.pool == "token"),
    )


def _columns(shapes: Sequence[Shape]) -> dict[str, np.ndarray]:
    return {n: np.array([getattr(s, n) for s in shapes], float) for n in DIMENSIONS}


def _draws(fit: Fit, kind: str) -> tuple[np.ndarray, float]:
    return np.array(fit.draws[kind]), fit.diagnostics["draws"]["t_over_z"] if kind == "random_effects" else 1.0


def _uncertainty(fit, geometry, log_budget, names, real, best) -> tuple[dict, dict | None]:
    """The optimum by dimension with both intervals, and the regret of `best` over the headline draws."""
    grid = fit.data["grid"]
    out = {
        n: dict(
            estimate=float(x),
            low=None,
            high=None,
            pairs_low=None,
            pairs_high=None,
            status=fit.exponents[n]["status"],
            note=fit.exponents[n]["note"],
            grid="below" if x <= min(grid[n]) else "above" if x >= max(grid[n]) else "inside",
        )
        for n, x in zip(names, real)
    }
    regret = None
    for kind in fit.draws:
        theta, widen = _draws(fit, kind)
        v = _optimum(fit, theta, geometry, log_budget)
        prefix = "" if kind == "random_effects" else "pairs_"
        for k, n in enumerate(names):
            out[n][prefix + "low"], out[n][prefix + "high"] = interval(np.exp(v[:, k]), widen)
        if kind == "random_effects":
            chosen = _loss(fit, {n: np.array([x]) for n, x in best.items()}, geometry, log_budget, theta)[:, 0]
            least = _loss_at(fit, v, geometry, log_budget, theta)
            excess = chosen / least - 1
            regret = dict(median=float(np.median(excess)), high=float(np.quantile(excess, 0.95)))
    return out, regret


def _loss_at(fit, v, geometry, log_budget, theta) -> np.ndarray:
    """Loss of each theta [R, P] at its own ln x [R, K]: [R]."""
    form, table = fit.shape_form, dict(zip(fit.model["dims"], np.exp(v.T)))
    logs = law_columns(form.terms, table, np.exp(log_budget) / geometry.flops(table, head=True), geometry)
    return np.exp(form.evaluate(theta, (logs.T - np.array(fit.model["centres"]))[:, :, None])[0][:, 0])


def _loss_interval(fit, kind, best, geometry, log_budget) -> tuple[float, float]:
    """Interval of the expected loss at the recommended shape (the law's uncertainty, one run's own noise apart)."""
    theta, widen = _draws(fit, kind)
    return interval(_loss(fit, {n: np.array([x]) for n, x in best.items()}, geometry, log_budget, theta)[:, 0], widen)


def _flat_region(fit, table, loss, best, best_loss, names) -> dict:
    """All surveyed shapes, and the best, whose ln loss is within one noise s.d. of the best's."""
    inside = np.log(loss / best_loss) <= fit.noise["sd"]
    order = np.flatnonzero(inside)[np.argsort(loss[inside], kind="stable")]
    rows = [dict(best, regret=0.0)]
    for i in order:
        row = {n: int(column[i]) for n, column in table.items()}
        if row != best:
            rows.append(row | dict(regret=float(loss[i] / best_loss - 1)))
    ranges = {n: [min(r[n] for r in rows), max(r[n] for r in rows)] for n in names}
    ends = {n: [int(table[n].min()), int(table[n].max())] for n in names}
    cut = [n for n in names if n in LATTICE and ranges[n][1] >= ends[n][1]]
    return dict(
        within=fit.noise["sd"],
        noise_source=fit.noise["source"],
        count=len(rows),
        surveyed=len(loss),
        ranges=ranges,
        open_above=cut,
        shapes=rows[:MAX_LISTED],
    )


def _budgets_run(fit) -> tuple[float, float]:
    """Least and largest training FLOPs in the data; from its compute where the rows do not carry train_flops."""
    if "train_flops_range" in fit.data:
        return tuple(fit.data["train_flops_range"])
    low, high = fit.data["compute_range"]
    return 3 * low, 3 * high


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
