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


def candidates(
    base: Shape,
    values: Mapping[str, Sequence[int]],
    *,
    num_examples: Sequence[float] | None = None,
    train_flops: Sequence[float] | None = None,
    rows: Sequence[Mapping] = (),
    max_cost: float = np.inf,
    num_classes: int = 0,
    batch_size: int = 1,
    cooldown: float = 0.2,
    seeds: int = 3,
    min_examples: int = 1,
) -> list[Candidate]:
    """Every run worth weighing: new trunks on a lattice of shapes, branches of the trunks in `rows`, further seeds.

    values: dimension -> its lattice (a value that no shape can take, such as a width that is no multiple of head_dim, is
    an error; none = no new shapes); the rest is as in `base`. Budgets are levels of images or of training FLOPs, give
    one of the two. A new trunk is offered to each level alone and with all lower ones as branches. rows: ledger rows,
    for trunk_id, shape, num_examples, init_seed and status, those that did not end well included: they are not offered
    again, nor are other branches of a trunk that diverged. A shape may have `seeds` seeds in all. Raises UserError.
    """
    if (num_examples is None) == (train_flops is None):
        raise UserError("candidates need budgets: give num_examples=(...) or train_flops=(...), one of the two")
    unknown = [name for name in values if name not in DIMENSIONS]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a dimension of a shape; choose from {', '.join(DIMENSIONS)}")

    def levels(shape: Shape) -> tuple[int, ...]:
        if train_flops is not None:
            found = budgets_for(shape, train_flops, num_classes, batch_size)
        else:
            found = tuple(sorted({max(5, round(n / batch_size)) * batch_size for n in num_examples or ()}))
        return tuple(n for n in found if n >= min_examples)

    def trunk_examples(n: int) -> int:
        return n - max(1, round(cooldown * n / batch_size)) * batch_size

    def cost_of(shape: Shape, new: Sequence[int], old: Sequence[int] = ()) -> float:
        """As Run.new_examples: each branch goes on from the last point where a shorter one left."""
        budgets = sorted({*new, *old})
        images = sum(n - max((trunk_examples(b) for b in budgets if b < n), default=0) for n in new)
        return float(images * shape.train_flops_per_image(num_classes))

    def ladders(shape: Shape) -> list[tuple[int, ...]]:
        steps = levels(shape)
        return [(n,) for n in steps] + [steps[: i + 1] for i in range(1, len(steps))]

    existing: dict[str, tuple[Shape, int, set[int]]] = {}
    spoilt = set()
    for row in rows:
        shape = base.replace(**{name: int(row[name]) for name in DIMENSIONS if name in row})
        held = existing.setdefault(str(row["trunk_id"]), (shape, int(row.get("init_seed") or 0), set()))
        held[2].add(int(row["num_examples"]))
        if row.get("status") == "diverged":
            spoilt.add(str(row["trunk_id"]))
    taken: dict[Shape, set[int]] = {}
    for shape, seed, _ in existing.values():
        taken.setdefault(shape, set()).add(seed)

    pool = []
    for combination in itertools.product(*values.values()) if values else ():
        shape = base.replace(**dict(zip(values, combination)))
        if shape not in taken:
            pool += [Candidate(shape, b, "trunk", cost_of(shape, b)) for b in ladders(shape)]
    for trunk_id, (shape, seed, done) in existing.items():
        for n in levels(shape):
            if n not in done and trunk_id not in spoilt:
                pool.append(Candidate(shape, (n,), "branch", cost_of(shape, (n,), sorted(done)), trunk_id, seed))
    for shape, used in taken.items():
        if len(used) < seeds:
            seed = next(s for s in itertools.count() if s not in used)
            pool += [Candidate(shape, b, "seed", cost_of(shape, b), None, seed) for b in ladders(shape)]
    pool = [c for c in pool if c.cost <= max_cost]
    if not pool:
        raise UserError(
            f"no candidate costs {max_cost:.3g} training FLOPs or less; raise max_cost or lower the budgets"
        )
    return pool
