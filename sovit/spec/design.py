"""Which shapes to run: designs as pure functions of a centre shape and values by dimension."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sovit import UserError
from sovit.spec.run import Recipe, Run, budgets_for
from sovit.spec.shape import DIMENSIONS, Shape


def star(centre: Shape, arms: Mapping[str, Sequence[int]], corners: bool = True) -> list[Shape]:
    """List the centre, then each arm (dimension -> values) in turn, then the corners (arXiv 2305.13035, section 3.1).

    Corners, without which no interaction is seen, take in each dimension the lower or upper quartile of the values run,
    the centre's included; each is off the centre in two at least. With three arms or more they are the half fraction of
    the factorial (an even number of low values): 4 for three arms. A patch_size that does not divide the image_size is
    left out, with a warning. Raises UserError where nothing is left of an arm.

    >>> centre = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> [shape.label for shape in sovit.star(centre, {"width": (16, 64), "depth": (1, 4)}, corners=False)]
    ['32x2x128', '16x2x128', '64x2x128', '32x1x128', '32x4x128']
    """
    _check(arms)
    shapes = [centre]
    for name, values in arms.items():
        arm = _built(centre, [{name: value} for value in values])
        if not arm:
            raise UserError(f"no value of {name} in {tuple(values)} can be built about the centre; name others")
        shapes += arm
    if corners and len(arms) >= 2:
        ladder = {name: sorted({*values, getattr(centre, name)}) for name, values in arms.items()}
        ends = {name: (v[len(v) // 4], v[(3 * len(v)) // 4]) for name, v in ladder.items()}
        off = []
        for picks in itertools.product((0, 1), repeat=len(arms)):
            if len(arms) == 2 or sum(1 - p for p in picks) % 2 == 0:
                moved = {name: ends[name][p] for name, p in zip(arms, picks) if ends[name][p] != getattr(centre, name)}
                if len(moved) >= 2:  # on an axis no interaction is seen
                    off.append(moved)
        shapes += _built(centre, off)
    return list(dict.fromkeys(shapes))


def grid(centre: Shape, values: Mapping[str, Sequence[int]]) -> list[Shape]:
    """List every combination of the values; what is not named stays as in `centre`. What cannot be built is left out.

    >>> centre = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> [shape.label for shape in sovit.grid(centre, {"width": (16, 32), "depth": (1, 2)})]
    ['16x1x128', '16x2x128', '32x1x128', '32x2x128']
    """
    _check(values)
    return _built(centre, [dict(zip(values, combination)) for combination in itertools.product(*values.values())])


def isoflop(base: Shape, widths: Sequence[int]) -> list[Shape]:
    """List `base` at each of the widths, depth and mlp_dim in proportion (at least 1): a curve of size.

    Together with `to_runs` each stands at the same compute budgets.

    >>> base = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> [shape.label for shape in sovit.isoflop(base, (16, 32, 64))]
    ['16x1x64', '32x2x128', '64x4x256']
    """
    if not widths:
        raise UserError("the design gives no values of width; name some")
    return [
        base.replace(
            width=width,
            depth=max(1, round(base.depth * width / base.width)),
            mlp_dim=max(1, round(base.mlp_dim * width / base.width)),
        )
        for width in widths
    ]


def _built(base: Shape, changes: Sequence[Mapping[str, int]]) -> list[Shape]:
    """`base` with each of the changes that can be built; a warning names the others."""
    shapes, left_out = [], []
    for changed in changes:
        sizes = dict(patch_size=base.patch_size, image_size=base.image_size) | dict(changed)
        if sizes["patch_size"] > 0 and sizes["image_size"] % sizes["patch_size"]:
            said = ", ".join(f"{name}={value}" for name, value in changed.items())
            left_out.append(f"{said} (patch {sizes['patch_size']} does not divide {sizes['image_size']} pixels)")
        else:
            shapes.append(base.replace(**changed))
    if left_out:
        warnings.warn(f"left out of the design: {'; '.join(left_out)}", stacklevel=3)
    return shapes


def to_runs(
    shapes: Iterable[Shape],
    train_flops: Sequence[float],
    num_classes: int,
    recipe: Callable[[Shape], Recipe],
    seeds: Mapping[Shape, int] | None = None,
    min_steps: int = 100,
    **run_fields: Any,
) -> list[Run]:
    """Make one run for each shape and seed, cooled down wherever it has spent one of the `train_flops`.

    `seeds`: shape -> how many seeds (1 where not named): seed s is init_seed s and
    data_seed s, and all shapes share the data order of equal data_seed (common random numbers). Budgets that leave a
    shape fewer than `min_steps` steps, or that whole batches miss by more than 1 %, are left out.
    """
    runs = []
    for shape in shapes:
        r, cost = recipe(shape), shape.train_flops_per_image(num_classes)
        wanted = [(flops, budgets_for(shape, [flops], num_classes, r.batch_size)[0]) for flops in sorted(train_flops)]
        kept = [n for flops, n in wanted if n >= min_steps * r.batch_size and abs(n * cost / flops - 1) < 0.01]
        if kept:
            for seed in range((seeds or {}).get(shape, 1)):
                runs.append(Run(shape, r, tuple(kept), init_seed=seed, data_seed=seed, **run_fields))
    if not runs:
        raise UserError(f"no shape reaches {min_steps} steps within {max(train_flops):.3g} FLOPs; raise the budgets")
    return runs


def _check(values: Mapping[str, Sequence[int]]) -> None:
    for name, ladder in values.items():
        if name not in DIMENSIONS:
            raise UserError(f"{name!r} is not a dimension of a design; choose from {', '.join(DIMENSIONS)}")
        if not ladder:
            raise UserError(f"the design gives no values of {name}; name at least one")
    if not values or math.prod(map(len, values.values())) > 100_000:
        raise UserError("a design needs one dimension at least, and at most 100,000 shapes")
