"""The runs that a study may make next."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sovit import UserError
from sovit.spec.run import budgets_for
from sovit.spec.shape import DIMENSIONS, Shape

SEEDS = 3  # of one shape, in all


@dataclass(frozen=True)
class Candidate:
    """A run that could be made: a new trunk (or a new seed of a shape that was run), or a branch of a trunk there is.

    budgets: images seen at the end of each branch that it adds, rising. cost: training FLOPs that it would still take,
    task head included: of a branch, the cooldown and the way from the last point where another branch left the trunk.
    """

    shape: Shape
    budgets: tuple[int, ...]
    kind: str  # trunk | branch | seed
    cost: float
    trunk_id: str | None = None  # of the trunk that a branch leaves
    init_seed: int = 0

    @property
    def num_examples(self) -> int:
        return self.budgets[-1]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | dict(num_examples=self.num_examples)


@dataclass(frozen=True)
class Search:
    """Which runs may be asked for.

    train_flops: the levels of the budgets, in training FLOPs. max_cost: training FLOPs of one run at most. cooldown: its
    share of a branch.
    """

    train_flops: Sequence[float]
    max_cost: float = np.inf
    num_classes: int = 0
    batch_size: int = 1
    cooldown: float = 0.2
    min_examples: int = 1

    def levels(self, shape: Shape) -> tuple[int, ...]:
        """Budgets of a shape in images, rising."""
        found = budgets_for(shape, self.train_flops, self.num_classes, self.batch_size)
        return tuple(n for n in found if n >= self.min_examples)

    def ladders(self, shape: Shape) -> list[tuple[int, ...]]:
        """The branches that a new trunk may have: each level alone, and with all lower ones."""
        steps = self.levels(shape)
        return [(n,) for n in steps] + [steps[: i + 1] for i in range(1, len(steps))]

    def cost(self, shape: Shape, new: Sequence[int], old: Sequence[int] = ()) -> float:
        """As Run.new_examples: each branch goes on from the last point where a shorter one left."""
        left = {b: b - max(1, round(self.cooldown * b / self.batch_size)) * self.batch_size for b in (*new, *old)}
        images = sum(n - max((left[b] for b in left if b < n), default=0) for n in new)
        return float(images * shape.train_flops_per_image(self.num_classes))


def candidates(
    base: Shape, values: Mapping[str, Sequence[int]], search: Search, rows: Sequence[Mapping] = ()
) -> list[Candidate]:
    """Every run worth weighing: new trunks on a lattice of shapes, branches of the trunks in `rows`, further seeds.

    values: dimension -> its lattice (a value that no shape can take, such as a width that is no multiple of head_dim, is
    an error); the rest is as in `base`. rows: ledger rows, for trunk_id, shape, num_examples, init_seed and status, those
    that did not end well included: they are not offered again, nor are other branches of a trunk that diverged. Raises
    UserError where no run is within max_cost.
    """
    existing: dict[str, tuple[Shape, int, set[int]]] = {}
    diverged = {str(row["trunk_id"]) for row in rows if row.get("status") == "diverged"}
    taken: dict[Shape, set[int]] = {}
    for row in rows:
        shape = base.replace(**{name: int(row[name]) for name in DIMENSIONS if name in row})
        seed = int(row.get("init_seed") or 0)
        existing.setdefault(str(row["trunk_id"]), (shape, seed, set()))[2].add(int(row["num_examples"]))
        taken.setdefault(shape, set()).add(seed)
    pool = []
    for combination in itertools.product(*values.values()):
        shape = base.replace(**dict(zip(values, combination)))
        if shape not in taken:
            pool += [Candidate(shape, b, "trunk", search.cost(shape, b)) for b in search.ladders(shape)]
    for trunk_id, (shape, seed, done) in existing.items():
        for n in search.levels(shape) if trunk_id not in diverged else ():
            if n not in done:
                pool.append(Candidate(shape, (n,), "branch", search.cost(shape, (n,), sorted(done)), trunk_id, seed))
    for shape, used in taken.items():
        if len(used) < SEEDS:
            seed = next(s for s in itertools.count() if s not in used)
            pool += [Candidate(shape, b, "seed", search.cost(shape, b), None, seed) for b in search.ladders(shape)]
    pool = [c for c in pool if c.cost <= search.max_cost]
    if not pool:
        raise UserError(
            f"no candidate costs {search.max_cost:.3g} training FLOPs or less; raise max_cost or lower the budgets"
        )
    return pool
