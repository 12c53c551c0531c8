"""Which shapes to run: designs as pure functions of a centre shape and values by dimension.

star     the centre, and one dimension at a time moved off it (SoViT's sweep, arXiv 2305.13035 section 3.1);
         with corners, a few cheap shapes off every axis, without which no interaction can be seen
grid     every combination of the values
isoflop  one dimension swept, the rest fixed or in proportion, so that a curve of it stands at each compute budget (of
         size: arXiv 2203.15556)
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sovit import UserError
from sovit.spec.run import Recipe, Run, budgets_for
from sovit.spec.shape import DIMENSIONS, Shape


def star(
    centre: Shape, arms: Mapping[str, Sequence[int]], corners: bool = True, fits: Callable[[Shape], bool] | None = None
) -> list[Shape]:
    """The centre first, then each arm in turn, then the corners. `arms`: dimension -> values.

    Corners take, in each dimension, the lower or upper quartile of the values run, the centre's included, so that a
    corner may stand at the centre in one dimension; each is off it in two at least. With three arms or more they are
    the half fraction of the factorial (an even number of low values): 4 for three arms.

    What cannot be built is left out, with a warning: a patch_size that does not divide the image_size, and what `fits`
    says no to (such as patches that straddle the labels of the data). Raises UserError where nothing is left of an arm.

    >>> centre = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> [shape.label for shape in sovit.star(centre, {"width": (16, 64), "depth": (1, 4)}, corners=False)]
    ['32x2x128', '16x2x128', '64x2x128', '32x1x128', '32x4x128']
    """
    _check(arms)
    shapes = [centre]
    if fits is not None and not fits(centre):
        raise UserError(f"the centre {centre.label} does not fit the data; choose one that does")
    for name, values in arms.items():
        arm = _built(centre, [{name: value} for value in values], fits)
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
        shapes += _built(centre, off, fits)
    return list(dict.fromkeys(shapes))


def grid(
    centre: Shape, values: Mapping[str, Sequence[int]], fits: Callable[[Shape], bool] | None = None
) -> list[Shape]:
    """Every combination of the values; what is not named stays as in `centre`, what cannot be built is left out, as in
    `star`.

    >>> centre = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> [shape.label for shape in sovit.grid(centre, {"width": (16, 32), "depth": (1, 2)})]
    ['16x1x128', '16x2x128', '32x1x128', '32x2x128']
    """
    _check(values)
    every = [dict(zip(values, combination)) for combination in itertools.product(*values.values())]
    return _built(centre, every, fits)


def isoflop(
    base: Shape,
    values: Sequence[int],
    dimension: str = "width",
    proportional: Sequence[str] | None = None,
    fits: Callable[[Shape], bool] | None = None,
) -> list[Shape]:
    """`base` with one dimension at each of the values, those named `proportional` in proportion, the rest as they are.

    proportional None: depth and mlp_dim for width (a curve of size), nothing for any other dimension. Together with
    `to_runs` each stands at the same compute budgets. What goes along is rounded to what can be built: at least 1, width
    to a multiple of head_dim, image_size to one of patch_size. What cannot be built is left out, as in `star`.

    >>> base = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> [shape.label for shape in sovit.isoflop(base, (16, 32, 64))]
    ['16x1x64', '32x2x128', '64x4x256']
    """
    if proportional is None:
        proportional = ("depth", "mlp_dim") if dimension == "width" else ()
    _check({dimension: values} | {name: (1,) for name in proportional})
    if dimension in proportional:
        raise UserError(f"{dimension!r} cannot go in proportion to itself; leave it out of proportional")
    changes = []
    for value in values:
        changed = {dimension: value}
        for name in sorted(proportional, key=lambda n: n == "image_size"):  # after the patch that divides it
            step = base.head_dim if name == "width" else 1
            step = changed.get("patch_size", base.patch_size) if name == "image_size" else step
            changed[name] = step * max(1, round(getattr(base, name) * value / getattr(base, dimension) / step))
        changes.append(changed)
    return _built(base, changes, fits)


def _built(base: Shape, changes: Sequence[Mapping[str, int]], fits: Callable[[Shape], bool] | None) -> list[Shape]:
    """`base` with each of the changes that can be built; a warning names the others."""
    shapes, left_out = [], []
    for changed in changes:
        sizes = dict(patch_size=base.patch_size, image_size=base.image_size) | dict(changed)
        said = ", ".join(f"{name}={value}" for name, value in changed.items())
        if sizes["patch_size"] > 0 and sizes["image_size"] % sizes["patch_size"]:
            left_out.append(f"{said} (patch {sizes['patch_size']} does not divide {sizes['image_size']} pixels)")
            continue
        shape = base.replace(**changed)
        if fits is None or fits(shape):
            shapes.append(shape)
        else:
            left_out.append(f"{said} (does not fit the data)")
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
    """One run for each shape and seed, cooled down wherever it has spent one of the `train_flops`.

    `recipe(shape) -> Recipe`; `seeds`: shape -> how many seeds (1 where not named): seed s is init_seed s and
    data_seed s, and all shapes share the data order of equal data_seed (common random numbers). Budgets that leave a
    shape fewer than `min_steps` steps, or that whole batches miss by more than 1 %, are left out.
    """
    runs = []
    for shape in shapes:
        r: Recipe = recipe(shape)
        cost = shape.train_flops_per_image(num_classes)
        kept = []
        for flops in sorted(train_flops):
            (n,) = budgets_for(shape, [flops], num_classes, r.batch_size)
            if n >= min_steps * r.batch_size and abs(n * cost / flops - 1) < 0.01:
                kept.append(n)
        if kept:
            for seed in range((seeds or {}).get(shape, 1)):
                runs.append(Run(shape, r, tuple(kept), init_seed=seed, data_seed=seed, **run_fields))
    if not runs:
        raise UserError(f"no shape reaches {min_steps} steps within {max(train_flops):.3g} FLOPs; raise the budgets")
    return runs


def geometric(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from low to high in equal ratios, both ends included, to 4 digits."""
    return [float(f"{low * (high / low) ** (i / (count - 1)):.4g}") for i in range(count)] if count > 1 else [low]


def _check(values: Mapping[str, Sequence[int]]) -> None:
    for name, ladder in values.items():
        if name not in DIMENSIONS:
            raise UserError(f"{name!r} is not a dimension of a design; choose from {', '.join(DIMENSIONS)}")
        if not ladder:
            raise UserError(f"the design gives no values of {name}; name at least one")
    if not values or math.prod(map(len, values.values())) > 100_000:
        raise UserError("a design needs one dimension at least, and at most 100,000 shapes")
