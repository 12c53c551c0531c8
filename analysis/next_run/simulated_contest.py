"""Strategies of choosing runs against each other on planted laws, judged by the regret of what they recommend. Numpy only.

An episode: the same pilot for all, then runs as the strategy picks them; at CHECKPOINTS of the compute spent (in units of
what SoViT's whole star costs, 6.4e21 FLOPs) the rows so far are fitted and the true regret of the shape
recommended at 10 and 100 times the star's largest run is noted. The noise of a run is a function of the seed of the
episode and of the run, so that strategies that make the same run measure the same loss.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from sovit.law.checks import simulate as planted
from sovit.law.compute_optimum import Family
from sovit.law.design_matrix import prepare_fit
from sovit.law.exponents import optimum_of
from sovit.law.options import LawOptions
from sovit.predict.belief import Belief, BeliefOptions, learn
from sovit.predict.candidates import Candidate, Search, candidates
from sovit.predict.next_run import CHECK_EVERY, Checks, check_pick, choose
from sovit.spec.shape import Shape

BASE = Shape(608, 10, 928, head_dim=16, patch_size=14, pool="map")
VALUES = dict(width=(416, 608, 880, 1280, 1840), depth=(6, 10, 16, 26, 40), mlp_dim=(608, 1088, 1936, 3456, 6144))
LEVELS = (32e6, 64e6, 128e6, 256e6)  # images
# seven trunks, .9 % of the star: the middle, the half fraction of its corners, one wider and one with a larger MLP
PILOT = ((608, 10, 928), (416, 6, 1360), (416, 16, 608), (880, 6, 608), (880, 16, 1360), (608, 10, 2176), (928, 8, 928))
PILOT_LEVELS = (32e6, 128e6)
NOISE_SD, RHO = 0.005, 0.5
TRUTHS: dict[str, dict] = {
    "joint": dict(kind="joint"),
    "weak": dict(kind="weak"),
    "inter .4": dict(kind="inter", frac=0.4),
    "inter .8": dict(kind="inter", frac=0.8),
    "eq3": dict(kind="eq3"),
    "bounded": dict(kind="bounded"),
}
RIGHT = ("joint", "weak")  # truths that `joint` and `joint_n` can express; inter only joint_n; eq3, bounded neither
CHECKPOINTS = (0.0095, 0.014, 0.02, 0.03, 0.044, 0.066, 0.1, 0.15, 0.22, 0.33, 0.5, 1.02)
COOLDOWN = 0.2
CHECK_SHARE = 0.1


def _cost(shape: Shape, budgets) -> float:
    """Training FLOPs of one trunk with branches to rising budgets."""
    left = sum(n - max(((1 - COOLDOWN) * b for b in budgets if b < n), default=0) for n in budgets)
    return float(left * shape.train_flops_per_image())


def star_shapes() -> list[Shape]:
    arms = [(k, v) for k, values in zip(planted.DIMS, planted.ARMS) for v in values]
    centre = BASE.replace(**dict(zip(planted.DIMS, planted.CENTRE)))
    return [centre.replace(**{k: v}) for k, v in arms]


STAR_COST = sum(_cost(s, planted.IMAGES) for s in star_shapes())
LARGEST = max(s.train_flops_per_image() * planted.IMAGES[-1] for s in star_shapes())  # training FLOPs of one run
MAX_COST = max(_cost(s, planted.IMAGES) for s in star_shapes())
SEARCH = Search(num_examples=LEVELS, max_cost=MAX_COST)
TARGETS = {"10x": 10 * LARGEST, "100x": 100 * LARGEST}
REACHABLE = {d: (*VALUES[d], *arm) for d, arm in zip(planted.DIMS, planted.ARMS)}


@dataclass
class World:
    """One planted law and what was measured of it so far."""

    truth_name: str
    seed: int
    rows: list = field(default_factory=list)
    spent: float = 0.0  # training FLOPs
    belief: Belief | None = None  # of the judge, at the last checkpoint

    def __post_init__(self) -> None:
        self.truth = planted.truth(**TRUTHS[self.truth_name])
        for values in PILOT:
            shape = BASE.replace(**dict(zip(planted.DIMS, values)))
            budgets = tuple(int(n) for n in PILOT_LEVELS)
            self.measure(Candidate(shape, budgets, "trunk", _cost(shape, budgets)))

    def measure(self, run: Candidate) -> list[float]:
        """Losses at the budgets of a run, which is thereby paid for."""
        shape = run.shape
        name = run.trunk_id or f"{shape.label}-{run.init_seed}"
        values = [shape.width, shape.depth, shape.mlp_dim]
        trunk = np.random.default_rng([self.seed, *values, run.init_seed]).standard_normal()
        losses = []
        for n in run.budgets:
            row = np.random.default_rng([self.seed, *values, run.init_seed, n]).standard_normal()
            error = NOISE_SD * (np.sqrt(RHO) * trunk + np.sqrt(1 - RHO) * row)
            losses.append(float(self.truth.loss(np.array(values, float), float(n)) * np.exp(error)))
            made = dict(zip(planted.DIMS, values)) | dict(trunk_id=name, num_examples=n, init_seed=run.init_seed)
            counts = dict(num_params=shape.num_params, forward_flops=shape.forward_flops, loss=losses[-1])
            self.rows.append(made | counts | dict(train_flops=shape.train_flops_per_image() * n))
        self.spent += run.cost
        return losses

    @property
    def columns(self) -> dict:
        names = (*planted.DIMS, "num_examples", "num_params", "forward_flops")
        table = {n: np.array([row[n] for row in self.rows], float) for n in names}
        return table | dict(trunk_id=np.array([row["trunk_id"] for row in self.rows]))

    @property
    def y(self) -> np.ndarray:
        return np.array([row["loss"] for row in self.rows])

    def regret(self, shape, multiple: str) -> float:
        """True relative excess of the loss of `shape` [3] at a target of TARGETS."""
        compute = TARGETS[multiple] / 3
        return float(self.truth.loss_at(np.asarray(shape), compute) / _least(self.truth_name, multiple) - 1)

    def pool(self) -> list[Candidate]:
        """All that can be run next, nothing dearer than the star's dearest trunk."""
        taken = {tuple(row[d] for d in planted.DIMS) for row in self.rows}
        new = [c for c in _new_trunks() if (c.shape.width, c.shape.depth, c.shape.mlp_dim) not in taken]
        return new + candidates(BASE, {}, SEARCH, self.rows)


@cache
def _new_trunks() -> tuple[Candidate, ...]:
    return tuple(candidates(BASE, VALUES, SEARCH))


@cache
def _least(truth_name: str, multiple: str) -> float:
    truth, compute = planted.truth(**TRUTHS[truth_name]), TARGETS[multiple] / 3
    return float(truth.loss_at(truth.optimum(compute), compute))


# What is recommended -------------------------------------------------------------------------------------------------------


GEOMETRY = dict(patch_size=14, image_size=224, pool="map", head_dim=16)
JUDGE = BeliefOptions(geometry=GEOMETRY, reachable=REACHABLE)
HELD = dataclasses.replace(JUDGE, discrepancy_dof=np.inf)


def regrets(world: World) -> dict[str, float]:
    """True regrets at both targets by two estimators: the prior-weighted joint_n of `belief.learn`, and plain `joint`."""
    belief = world.belief
    for _ in range(2 if belief else 1):  # from the belief of the last checkpoint, noise and target settle in two rounds
        belief = learn(world.columns, world.y, TARGETS["10x"], JUDGE, belief)
    assert belief is not None
    world.belief = belief
    shapes = {"10x": list(belief.shape.values()), "100x": list(belief.shape_at(TARGETS["100x"]).values())}
    out = {f"regret_{m}": world.regret(shape, m) for m, shape in shapes.items()}
    plain = joint_shapes(world)
    return out | {f"joint_regret_{m}": world.regret(plain[m], m) for m in TARGETS}


def joint_shapes(world: World) -> dict[str, np.ndarray]:
    """Shapes [3] that plain `joint` recommends at both targets: whitened Huber, no prior, no weights for its form."""
    from sovit.law.solver.fitter import solve

    rows = prepare_fit("joint", world.columns, world.y, LawOptions(dims=planted.DIMS)).rows
    theta = solve(rows).theta[None]
    family = Family(rows.form, rows.centre, planted.SOVIT, {d: list(REACHABLE[d]) for d in planted.DIMS})
    where = {m: np.log(t / 3) for m, t in TARGETS.items()}
    return {m: np.exp(optimum_of(family, theta, t)[0]) for m, t in where.items()}


# Strategies ----------------------------------------------------------------------------------------------------------------


def star(world: World, rng) -> Iterator[Candidate]:
    """SoViT's star, 18 trunks of three branches, in random order."""
    budgets = tuple(int(n) for n in planted.IMAGES)
    for i in rng.permutation(18):
        shape = star_shapes()[i]
        yield Candidate(shape, budgets, "trunk", _cost(shape, budgets))


def random(world: World, rng, power: float = 0.0) -> Iterator[Candidate]:
    """New trunks drawn from the pool, with probability ~ cost^-power."""
    while True:
        pool = [c for c in world.pool() if c.kind == "trunk"]
        weight = np.array([c.cost for c in pool]) ** -power
        yield pool[rng.choice(len(pool), p=weight / weight.sum())]


def cost_random(world: World, rng) -> Iterator[Candidate]:
    return random(world, rng, power=1.0)


def isoflop(world: World, rng) -> Iterator[Candidate]:
    """Sizes of the pilot's proportions at rising budgets of training FLOPs, as for Chinchilla, in random order a level."""
    widths = tuple(range(240, 2000, 128))
    shapes = [BASE.replace(width=w, depth=max(1, round(w * 10 / 608)), mlp_dim=round(w * 928 / 608)) for w in widths]
    for budget in np.geomspace(4e18, 4e20, 7):
        for i in rng.permutation(len(shapes)):
            n = int(budget / shapes[i].train_flops_per_image())
            if LEVELS[0] <= n <= LEVELS[-1]:
                yield Candidate(shapes[i], (n,), "trunk", _cost(shapes[i], (n,)))


def next_run(world: World, rng) -> Iterator[Candidate]:
    """`sovit.predict.next_run`; checks cost up to CHECK_SHARE of what was spent."""
    belief, checks = None, Checks(noise_sd=NOISE_SD)
    for num_made in itertools.count():
        belief, pool = learn(world.columns, world.y, TARGETS["10x"], HELD, belief), world.pool()
        near = [c for c in pool if c.kind != "branch" and c.cost <= CHECK_SHARE * world.spent]
        if near and (num_made + 1) % CHECK_EVERY == 0:
            pick = check_pick(belief, near)
        else:
            (pick,) = choose(belief, pool, num_made=num_made, checks=checks)
        yield pick.candidate
        if pick.is_check:  # measured by now
            test = dict(predicted=pick.predicted[-1], measured=world.rows[-1]["loss"])
            checks = dataclasses.replace(checks, made=[*checks.made, test])


def v_optimal(world: World, rng) -> Iterator[Candidate]:
    """The warning: the same criterion under `joint`, which is trusted to be right, and never checked."""
    belief, options = None, dataclasses.replace(HELD, form="joint", discrepancy=0.0)
    while True:
        belief = learn(world.columns, world.y, TARGETS["10x"], options, belief)
        yield choose(belief, world.pool())[0].candidate


@dataclass(frozen=True)
class Strategy:
    pick: Callable
    until: float  # compute at which the episode ends, in stars


STRATEGIES = {
    "next_run": Strategy(next_run, 0.22),
    "cost_random": Strategy(cost_random, 0.22),
    "random": Strategy(random, 0.33),
    "star": Strategy(star, 1.02),
    "isoflop": Strategy(isoflop, 0.22),
    "v_optimal": Strategy(v_optimal, 0.066),
}


def episode(truth_name: str, strategy: str, seed: int) -> dict:
    """{truth, strategy, seed, curve}: curve of {level, compute (stars), train_flops, num_trunks, num_rows, regret_...}."""
    world, kind = World(truth_name, seed), STRATEGIES[strategy]
    rng = np.random.default_rng([seed, sorted(STRATEGIES).index(strategy)])
    picks = kind.pick(world, rng)
    pending, curve = next(picks), []
    judged: tuple[int, dict] = 0, {}
    for level in [c for c in CHECKPOINTS if c <= kind.until]:
        while pending is not None and world.spent + pending.cost <= level * STAR_COST:
            world.measure(pending)
            pending = next(picks, None)
        if judged[0] != len(world.rows):
            judged = len(world.rows), regrets(world)
        counts = dict(num_trunks=len({row["trunk_id"] for row in world.rows}), num_rows=len(world.rows))
        curve.append(dict(level=level, compute=world.spent / STAR_COST, train_flops=world.spent, **counts, **judged[1]))
    return dict(truth=truth_name, strategy=strategy, seed=seed, curve=curve)
