"""A law of transfer: the loss at a resolution after n0 images of pre-training at a lower one and n1 of fine-tuning.

From scratch at the target L = E + B n^-c, bounded by the zero line as the form `bounded` is. Pre-training counts as
images seen at the target, after Hernandez et al. (2102.01293), whose effective data transferred, k D^a N^b, are a power
of the fine-tuning data and of the size of the model; here the model stays and the pre-training varies, so that n0 takes the
place of N. KINDS has that form, simpler and richer ones, and the product of Mikami et al. (2108.11018) and Barnett
(2408.16947). Which one is used, for each mode, is decided by rows that it was not fitted to.

One fit holds a shape and a target resolution: the scratch curve, and one set of parameters for each mode of fine-tuning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.resolution.curves import SCRATCH, Curve, Study
from sovit import UserError
from sovit.law.bootstrap import interval, random_effects, stretch
from sovit.law.fitter import Solved, polish, solve
from sovit.law.form import BOUND_POWER

MODES = ("attention", "full")  # the modes that a law is fitted to
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Kind:
    """names: parameters of one mode; k, m, J, A and G as logarithms at the middle of the data.

    value: (p, v0, x1, law) -> loss; p holds a column [R, n] a name, v0 = ln n0 and x1 = ln n1 centred, law: ln n_eff ->
    E + B n_eff^-c, and E for None.
    """

    formula: str
    names: tuple[str, ...]
    value: Callable
    bounds: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, ...], ...]


def _log_sum(a, b):
    return np.log(np.exp(a) + np.exp(b))


K, G = (-9.0, 9.0), (0.0, 3.0)
K_STARTS, G_STARTS = (-2.0, 0.0, 2.0), (0.4, 1.0)
KINDS = {
    "effective": Kind(
        "n_eff = n1 + k n0^g",
        ("ln_k", "g"),
        lambda p, v0, x1, law: law(_log_sum(x1, p[0] + p[1] * v0)),
        (K, G),
        (K_STARTS, G_STARTS),
    ),
    "rate": Kind(
        "n_eff = m n1 + k n0^g",
        ("ln_k", "g", "ln_m"),
        lambda p, v0, x1, law: law(_log_sum(p[2] + x1, p[0] + p[1] * v0)),
        (K, G, (-6.0, 4.0)),
        (K_STARTS, G_STARTS, (-0.7,)),
    ),
    "hernandez": Kind(
        "n_eff = n1 + k n0^g n1^h",
        ("ln_k", "g", "h"),
        lambda p, v0, x1, law: law(_log_sum(x1, p[0] + p[1] * v0 + p[2] * x1)),
        (K, G, (0.0, 1.5)),  # below 0 an infinite number would be transferred to no fine-tuning at all
        (K_STARTS, G_STARTS, (0.2,)),
    ),
    "limit": Kind(
        "n_eff = n1 + k n0^g; and + J n0^-j, what stays frozen",
        ("ln_k", "g", "ln_J", "j"),
        lambda p, v0, x1, law: law(_log_sum(x1, p[0] + p[1] * v0)) + np.exp(p[2] - p[3] * v0),
        (K, G, (-12.0, 2.0), (0.0, 3.0)),
        (K_STARTS, G_STARTS, (-3.0,), (0.3,)),
    ),
    "product": Kind(
        "L = E + (A n0^-a + G) n1^-b",
        ("ln_A", "a", "ln_G", "b"),
        lambda p, v0, x1, law: law(None) + (np.exp(p[0] - p[1] * v0) + np.exp(p[2])) * np.exp(-p[3] * x1),
        ((-9.0, 3.0), (0.0, 3.0), (-12.0, 3.0), (0.0, 3.0)),
        ((-1.0, 0.0), (0.3,), (-2.0,), (0.1, 0.4)),
    ),
}


@dataclass(frozen=True)
class TransferForm:
    """A form for `fitter.solve`: theta = ln B, c, E, then the parameters of each mode's kind.

    u [3, n]: x1, v0, mode (-1: scratch). floor: whether E is fitted; else it is 0.
    """

    kinds: tuple[str, ...]  # one a mode
    zero_line: float | None = None
    floor: bool = True
    arms: tuple = ()
    shared: tuple = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        return ("ln_B", "c", "E", *(f"{n}_{m}" for m, kind in enumerate(self.kinds) for n in KINDS[kind].names))

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        ends = [(-12.0, 6.0), (0.02, 3.0), (0.0, np.inf if self.floor else 0.0)]
        ends += [end for kind in self.kinds for end in KINDS[kind].bounds]
        return np.array([low for low, _ in ends]), np.array([high for _, high in ends])

    def value(self, theta: np.ndarray, u: np.ndarray) -> np.ndarray:
        """ln loss [R, n]; theta [R, P] may be complex."""
        x1, v0, mode = u
        ln_b, c, floor = (theta[:, i, None] for i in range(3))

        def law(log_n):
            return floor if log_n is None else floor + np.exp(ln_b - c * log_n)

        loss, place = np.array(np.broadcast_to(law(x1), (len(theta), len(x1)))), 3
        for m, kind in enumerate(KINDS[name] for name in self.kinds):
            mine = mode == m
            own = [theta[:, place + i, None] for i in range(len(kind.names))]
            loss[:, mine] = kind.value(own, v0[mine], x1[mine], law)
            place += len(kind.names)
        if self.zero_line is None:
            return np.log(loss)
        return np.log(self.zero_line**-BOUND_POWER + np.exp(-BOUND_POWER * np.log(loss))) / -BOUND_POWER

    def evaluate(self, theta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln loss [R, n] and its derivatives [R, P, n], exact to rounding by complex steps."""
        num, size = theta.shape
        step = 1e-30
        moved = self.value((theta[:, None, :] + 1j * step * np.eye(size)).reshape(num * size, size), u)
        moved = moved.reshape(num, size, -1)
        return moved[:, 0].real, moved.imag / step

    def starts(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
        """c and E on a grid, B through the rows from scratch, every mode's own starts side by side."""
        loss = y
        if self.zero_line is not None:
            capped = np.minimum(y, 0.98 * self.zero_line)
            loss = (capped**-BOUND_POWER - self.zero_line**-BOUND_POWER) ** (-1 / BOUND_POWER)
        scratch, out = u[2] < 0, []
        scratch = scratch if scratch.any() else ~scratch
        own = [list(itertools.product(*KINDS[kind].starts)) for kind in self.kinds]
        for c, share in itertools.product((0.15, 0.4, 0.9), (0.0, 0.6) if self.floor else (0.0,)):
            floor = share * float(loss.min())
            ln_b = float((np.log(loss[scratch] - floor) + c * u[0][scratch]).mean())
            for i in range(max((len(starts) for starts in own), default=1)):
                out.append([ln_b, c, floor, *(x for starts in own for x in starts[i % len(starts)])])
        return np.clip(np.array(out), *self.bounds)


@dataclass(frozen=True)
class Cell:
    """Rows of one network at one target: [n] each. mode: -1 from scratch, else place in `modes`."""

    network: tuple
    patch_size: int
    image_size: int
    base_image_size: int
    modes: tuple[str, ...]
    mode: np.ndarray
    n0: np.ndarray
    n1: np.ndarray
    y: np.ndarray
    trunk: np.ndarray
    seed: np.ndarray
    zero_line: float | None
    flops_per_image: dict  # "base", scratch and each mode: of one training step

    @property
    def label(self) -> str:
        return "x".join(map(str, self.network[:3]))

    @property
    def centre(self) -> tuple[float, float]:
        """(ln n1, ln n0) at the middle of the fine-tunings."""
        tuned = self.mode >= 0
        return float(np.log(self.n1[tuned]).mean()), float(np.log(self.n0[tuned]).mean())

    def u(self, n0, n1, mode) -> np.ndarray:
        x1, v0 = self.centre
        n0 = np.where(np.asarray(mode) < 0, math.exp(v0), np.asarray(n0, float))
        return np.stack(np.broadcast_arrays(np.log(n1) - x1, np.log(n0) - v0, np.asarray(mode, float)))

    def take(self, keep: np.ndarray) -> Cell:
        names = ("mode", "n0", "n1", "y", "seed")
        trunk = np.unique(self.trunk[keep], return_inverse=True)[1]
        return dataclasses.replace(self, trunk=trunk, **{name: getattr(self, name)[keep] for name in names})


def cells_of(study: Study, metric: str = "val_loss", modes: Sequence[str] = MODES) -> tuple[list[Cell], list[str]]:
    """What a law can be fitted to, and a line for each target that it cannot."""
    out, notes = [], []
    for network, patch_size, image_size in study.targets():
        mine = [c for c in study.curves if c.arm.network == network]
        here = [c for c in mine if (c.arm.patch_size, c.arm.image_size) == (patch_size, image_size)]
        scratch = [c for c in here if c.arm.mode == SCRATCH]
        tuned = [c for c in here if c.arm.mode in modes]
        bases = sorted({(c.arm.base_patch_size, c.arm.base_image_size) for c in tuned})
        label = "x".join(map(str, network[:3]))
        where = f"{label} at {image_size} px, patch {patch_size}"
        base = [c for c in mine if c.arm.mode == SCRATCH and (c.arm.patch_size, c.arm.image_size) in bases]
        if len(bases) != 1:
            notes.append(f"{where}: fine-tuned from {len(bases)} base resolutions; a law needs one")
        elif len({n for c in scratch for n in c.examples}) < 2:
            notes.append(f"{where}: fewer than 2 budgets from scratch, too few for the law of the target")
        elif len({c.arm.base_examples for c in tuned}) < 2:
            notes.append(
                f"{where}: fewer than 2 lengths of pre-training; what one more image of it is worth is not known"
            )
        elif not base:
            notes.append(f"{where}: no row of the base at {bases[0][1]} px, so that its cost per image is not known")
        else:
            out.append(_cell(network, patch_size, image_size, bases[0][1], scratch, tuned, base[0], metric, modes))
    return out, notes


def _cell(network, patch_size, image_size, base_image_size, scratch, tuned, base, metric, modes) -> Cell:
    present = tuple(mode for mode in modes if any(c.arm.mode == mode for c in tuned))
    curves: list[Curve] = [*scratch, *tuned]
    seeds = sorted({c.seed for c in curves})
    columns: dict = {name: [] for name in ("mode", "n0", "n1", "y", "trunk", "seed")}
    for g, c in enumerate(curves):
        for n, y in zip(c.examples, c.metrics[metric]):
            place = -1 if c.arm.mode == SCRATCH else present.index(c.arm.mode)
            row = (place, c.arm.base_examples, n, y, g, seeds.index(c.seed))
            for name, value in zip(columns, row):
                columns[name].append(value)
    if not all(y > 0 for y in columns["y"]):
        raise UserError(
            f"{scratch[0].arm.label} at {image_size} px has a row without {metric}, or with one of 0; a power law needs it"
            " above 0"
        )
    per_image = {"base": base.flops_per_image, SCRATCH: scratch[0].flops_per_image}
    per_image |= {mode: next(c for c in tuned if c.arm.mode == mode).flops_per_image for mode in present}
    lines = {c.zero_line for c in curves}
    zero_line = lines.pop() if len(lines) == 1 and metric == "val_loss" else None
    arrays = {name: np.array(column, float if name in ("n0", "n1", "y") else int) for name, column in columns.items()}
    return Cell(
        network,
        patch_size,
        image_size,
        base_image_size,
        present,
        **arrays,
        zero_line=zero_line,
        flops_per_image=per_image,
    )


@dataclass(frozen=True)
class TransferFit:
    """theta [P] and its draws {random_effects, seeds} -> [R, P]; widen: what stretches the percentiles of each."""

    cell: Cell
    kinds: dict[str, str]  # mode -> kind
    form: TransferForm
    solved: Solved
    draws: dict
    widen: dict

    def loss(self, n0, n1, mode: str, theta: np.ndarray | None = None) -> np.ndarray:
        """Predicted loss [R, ...] at images n0 and n1 (broadcast); mode "scratch" reads n1 alone."""
        place = -1 if mode == SCRATCH else self.cell.modes.index(mode)
        n0, n1 = np.broadcast_arrays(np.asarray(n0, float), np.asarray(n1, float))
        theta = self.solved.theta[None] if theta is None else theta
        u = self.cell.u(np.maximum(n0.ravel(), 1e-9), n1.ravel(), np.full(n1.size, place))
        return np.exp(self.form.value(theta, u)).reshape(len(theta), *n1.shape)

    def interval(self, quantity: Callable, floor: float | None = None) -> dict:
        """{estimate, low, high, seeds_low, seeds_high} of quantity(theta [R, P]) -> [R]; ends None without draws."""
        out: dict = {"estimate": float(quantity(self.solved.theta[None])[0])}
        for name, prefix in (("random_effects", ""), ("seeds", "seeds_")):
            ends: tuple = (None, None)
            if name in self.draws:
                ends = interval(quantity(self.draws[name]), self.widen[name], floor)
            out |= {f"{prefix}low": ends[0], f"{prefix}high": ends[1]}
        return out


def fit_cell(cell: Cell, kinds: str | Mapping[str, str], bootstrap: int = 0, seed: int = 0) -> TransferFit:
    """Fit one cell, every mode by its kind. E is 0 where only two budgets were run from scratch: they cannot tell it.

    Two bootstraps: from trunk and row errors (headline), and of seeds, which all arms share. With three seeds the second
    knows little: its percentiles are stretched by t and sqrt(S / (S - 1)). Over 100 planted sets of three seeds the first
    holds worth, g, loss, best share and loss against scratch in 87 to 94 %, the second in 86 to 93 %; where a seed has an
    error in common to all its trunks, as large as the noise, the first holds a level of loss in 74 % only, the second in 87
    (tests/analysis/test_transfer.py says how to count it again). Raises UserError for an unknown
    kind, or one with more parameters than its mode has pairs of n0 and n1.
    """
    chosen = {mode: kinds if isinstance(kinds, str) else kinds[mode] for mode in cell.modes}
    for m, (mode, kind) in enumerate(chosen.items()):
        if kind not in KINDS:
            raise UserError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
        pairs = len(set(zip(cell.n0[cell.mode == m], cell.n1[cell.mode == m])))
        if pairs < len(KINDS[kind].names):
            raise UserError(
                f"{pairs} pairs of pre-training and fine-tuning of {cell.label} ({mode}) cannot determine the"
                f" {len(KINDS[kind].names)} parameters of {kind!r}"
            )
    floor = len(np.unique(cell.n1[cell.mode < 0])) > 2
    form = TransferForm(tuple(chosen.values()), cell.zero_line, floor)
    u = cell.u(cell.n0, cell.n1, cell.mode)
    solved = solve(form, u, cell.y, cell.trunk)
    draws, widen = {}, {}
    if bootstrap:
        rng = np.random.default_rng(seed)
        draws["random_effects"] = random_effects(form, u, solved, bootstrap, rng, np.arange(len(cell.y))).theta
        widen["random_effects"] = stretch(solved.dof)
        num = int(cell.seed.max()) + 1
        if num >= 3:
            weights = rng.multinomial(num, np.full(num, 1 / num), bootstrap)[:, cell.seed].astype(float)
            start = np.tile(solved.theta, (bootstrap, 1))
            found = polish(form, u, start, np.log(cell.y), weights=weights, groups=solved.groups, delta=solved.delta)
            draws["seeds"], widen["seeds"] = found.theta, math.sqrt(num / (num - 1)) * stretch(num - 1)
    return TransferFit(cell, chosen, form, solved, draws, widen)


def parameters(fit: TransferFit) -> dict:
    """Parameters in images and losses, with their intervals, and what a pre-training image is worth.

    worth: images at the target that one image of pre-training counts for, at the longest pre-training and the middle
    length of fine-tuning (kinds with k).
    status: `edge` where what it is made of stands on a bound of the fit, so that its interval means nothing; else `ok`.
    """
    cell, names = fit.cell, fit.form.names
    on_bound = (fit.solved.theta <= fit.form.bounds[0]) | (fit.solved.theta >= fit.form.bounds[1])

    def status(*used: str) -> dict:
        return {"status": "edge" if any(on_bound[names.index(name)] for name in used) else "ok"}

    def plain(name: str) -> dict:
        """A parameter as it is, its stretched interval within its bounds."""
        low, high = (float(end[names.index(name)]) for end in fit.form.bounds)
        found = fit.interval(column(name)) | status(name)
        return {k: min(max(v, low), high) if isinstance(v, float) else v for k, v in found.items()}

    x1, v0 = cell.centre

    def column(name: str) -> Callable:
        return lambda theta: theta[:, names.index(name)]

    out: dict = {
        "B": fit.interval(lambda t: np.exp(column("ln_B")(t) + column("c")(t) * x1), 1e-300) | status("ln_B", "c"),
        "c": plain("c"),
        "E": plain("E"),
    }
    for m, mode in enumerate(cell.modes):
        mine = KINDS[fit.kinds[mode]].names
        own = {n: plain(f"{n}_{m}") for n in mine if not n.startswith("ln_")}
        if "ln_m" in mine:
            own["m"] = fit.interval(lambda t, m=m: np.exp(column(f"ln_m_{m}")(t)), 1e-300) | status(f"ln_m_{m}")
        if "ln_k" in mine:
            longest = float(cell.n0[cell.mode == m].max())
            v = math.log(longest) - v0

            def worth(t, m=m, v=v, longest=longest):
                return np.exp(column(f"ln_k_{m}")(t) + column(f"g_{m}")(t) * v + x1) / longest

            own["worth"] = fit.interval(worth, 1e-300) | status(f"ln_k_{m}") | {"at_examples": int(longest)}
        out[mode] = own
    return out


def misfit(fit: TransferFit) -> dict:
    """Residuals against the noise between seeds, F test of their variances by trunks on both sides."""
    from scipy.special import fdtrc

    cell, n = fit.cell, len(fit.cell.y)
    residual = fit.form.value(fit.solved.theta[None], cell.u(cell.n0, cell.n1, cell.mode))[0] - np.log(cell.y)
    groups = np.unique(np.stack([cell.mode, cell.n0, cell.n1], 1), axis=0, return_inverse=True)[1].ravel()
    size = np.bincount(groups)
    log_y = np.log(cell.y)
    within = log_y - (np.bincount(groups, log_y) / size)[groups]
    dof = n - len(size)
    rms = math.sqrt(float(residual @ residual) / max(n - len(fit.form.names), 1))
    sd = math.sqrt(float(within @ within) / dof) if dof else None
    arms = len(np.unique(np.stack([cell.mode, cell.n0], 1), axis=0))
    trunks = len(np.unique(cell.trunk)) - arms
    p = float(fdtrc(max(fit.solved.dof, 1.0), trunks, (rms / sd) ** 2)) if sd and trunks > 0 else None
    return dict(
        residual_rms=rms,
        noise_sd=sd,
        noise_n=trunks,
        p=p,
        trunk_sd=fit.solved.trunk_sd,
        row_sd=fit.solved.row_sd,
        misses=None if p is None else p < SIGNIFICANT,
    )


# which form: rows that it was not fitted to --------------------------------------------------------------------------------


def held_out(cell: Cell) -> list[tuple[str, np.ndarray]]:
    """(what was held out, rows): the longest fine-tuning of each trunk; the longest pre-training; the longest of both.

    Where some leave three pairs of n0 and n1, what all but the richest forms need, those that leave fewer are not judged by.
    """
    tuned, out = cell.mode >= 0, []
    lengths = sorted({float(n) for n in cell.n0[tuned]}), sorted({float(n) for n in cell.n1[tuned]})
    if len(lengths[1]) > 1:
        last = np.zeros(len(cell.y), bool)
        for trunk in np.unique(cell.trunk[tuned]):
            mine = np.flatnonzero(cell.trunk == trunk)
            last[mine[cell.n1[mine].argmax()]] = len(mine) > 1
        out.append(("longest fine-tuning", last))
        longest = tuned & (cell.n0 == lengths[0][-1])  # its own longest fine-tuning: other bases may have a longer one
        out.append(("longest of both", longest & (cell.n1 == cell.n1[longest].max())))
    if len(lengths[0]) > 2:
        out.append(("longest pre-training", tuned & (cell.n0 == lengths[0][-1])))
    left = [len(set(zip(cell.n0[tuned & ~rows], cell.n1[tuned & ~rows]))) for _, rows in out]
    return [split for split, pairs in zip(out, left) if pairs >= min(3, max(left))]


def score(cells: Sequence[Cell], mode: str, kinds: Sequence[str] = tuple(KINDS)) -> dict:
    """Error of each kind in one mode on held-out rows, and of the nearest run; chosen: the best, or a simpler one as good.

    As good: RMSE within 5 %. {kinds: {name: {rmse, bias, n, splits: {name: rmse}}}, chosen}. A kind that some part of the
    rows cannot determine is not judged. Raises UserError where none can be.
    """
    misses: dict = {name: [] for name in (*kinds, "nearest run")}
    cases = 0
    for cell in (only(cell, mode) for cell in cells if mode in cell.modes):
        for split, rows in held_out(cell):
            kept = cell.take(~rows)
            able = {}
            for kind in kinds:
                with contextlib.suppress(UserError):
                    fit = fit_cell(kept, kind)
                    u = kept.u(cell.n0, cell.n1, cell.mode)[:, rows]
                    able[kind] = fit.form.value(fit.solved.theta[None], u)[0]
            if able:
                cases += 1
                for name, predicted in (*able.items(), ("nearest run", _nearest(cell, rows))):
                    misses[name].append((split, predicted - np.log(cell.y[rows])))
    found: dict[str, dict] = {}
    for name, parts in misses.items():
        if cases and len(parts) == cases:
            every = np.concatenate([m for _, m in parts])
            by_split = {s: np.concatenate([m for t, m in parts if t == s]) for s, _ in parts}
            found[name] = dict(
                rmse=float(np.sqrt((every**2).mean())),
                bias=float(every.mean()),
                n=len(every),
                splits={s: float(np.sqrt((m**2).mean())) for s, m in by_split.items()},
            )
    ours = [name for name in kinds if name in found]
    if not ours:
        raise UserError(f"{mode}: no form can be judged by held-out rows; run more budgets or lengths of pre-training")
    best = min(found[name]["rmse"] for name in ours)
    chosen = min((name for name in ours if found[name]["rmse"] <= 1.05 * best), key=lambda name: len(KINDS[name].names))
    return dict(kinds=found, chosen=chosen)


def only(cell: Cell, mode: str) -> Cell:
    """The rows from scratch and those of one mode."""
    place = cell.modes.index(mode)
    kept = cell.take((cell.mode < 0) | (cell.mode == place))
    return dataclasses.replace(kept, modes=(mode,), mode=np.where(kept.mode < 0, -1, 0))


def _nearest(cell: Cell, rows: np.ndarray) -> np.ndarray:
    """ln loss of the nearest row that was kept, of the same mode and seed, by the distance in ln n0 and ln n1."""
    out = []
    kept = np.flatnonzero(~rows)
    for i in np.flatnonzero(rows):
        same = kept[(cell.mode[kept] == cell.mode[i]) & (cell.seed[kept] == cell.seed[i])]
        same = same if len(same) else kept
        far = np.hypot(np.log(cell.n0[same] / cell.n0[i]), np.log(cell.n1[same] / cell.n1[i]))
        out.append(math.log(cell.y[same[far.argmin()]]))
    return np.array(out)
