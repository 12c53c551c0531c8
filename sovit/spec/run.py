"""Run: one trunk to train, said completely. Shape + Recipe + data + seeds, and the budgets it is cooled down at.

`trunk_id` is a content hash of everything but the budgets; `run_id` adds the number of examples of one cooldown branch.
Only fields that differ from their default enter the hash, so a field added later leaves old ids alone; the price is that
a default, once used, never changes. A test pins golden ids.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import typing
from dataclasses import dataclass

from sovit import UserError
from sovit.spec.config import _check_types, _from_dict, _non_default
from sovit.spec.shape import TRAINED, Shape
from sovit.spec.siglip_costs import NUM_WORDS, OBJECTIVES, pair_flops, text_flops

SCHEDULES = ("constant", "rsqrt")
PARAMETRISATIONS = ("fan_in", "timm")
PRECISIONS = ("float32", "bfloat16")
NO_IDENTITY = ("budgets", "study", "probe")  # fields of Run that no id depends on


@dataclass(frozen=True)
class Recipe:
    """How to train. Durations are in examples; they become steps in one place, the properties of Run.

    >>> sovit.Recipe(peak_lr=0.008).batch_size
    16
    """

    peak_lr: float
    batch_size: int = 16
    weight_decay: float = 0.05  # AdamW's, multiplied by the learning rate; on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    warmup_examples: int = 800
    schedule: str = "constant"
    rsqrt_examples: int = 160_000  # timescale of the rsqrt trunk
    cooldown: float = 0.2  # share of a budget spent in the (1 - sqrt) cooldown, arXiv 2405.18392
    parametrisation: str = "fan_in"
    precision: str = "float32"  # of matrix products in training; weights, optimiser and validation stay in float32
    patch_sizes: tuple[
        int, ...
    ] = ()  # drawn by batch (FlexiViT, arXiv 2212.08013); weights stay at the shape's own size
    objective: str = "classification"  # or siglip: the sigmoid image-text loss on captions, see sovit.train.siglip

    def __post_init__(self) -> None:
        _check_types(self)
        if self.patch_sizes and (len(set(self.patch_sizes)) != len(self.patch_sizes) or min(self.patch_sizes) < 1):
            raise UserError(f"patch_sizes={list(self.patch_sizes)} must be different sizes of at least 1 pixel")
        for name in ("peak_lr", "batch_size", "clip_norm", "rsqrt_examples"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if self.schedule == "rsqrt" and self.rsqrt_examples < self.batch_size:
            raise UserError(f"rsqrt_examples={self.rsqrt_examples} is under one batch of {self.batch_size}; give more")
        if not 0 < self.cooldown < 1:
            raise UserError(f"cooldown={self.cooldown} is not a share; give a number between 0 and 1")
        if self.weight_decay < 0 or self.warmup_examples < 0:
            raise UserError("weight_decay and warmup_examples may not be negative")
        for name, known in (
            ("schedule", SCHEDULES),
            ("parametrisation", PARAMETRISATIONS),
            ("precision", PRECISIONS),
            ("objective", OBJECTIVES),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class Run:
    """One trunk and its cooldown branches. `budgets`: examples seen at the end of each branch, cooldown included.

    >>> shape = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> sovit.Run(shape, sovit.Recipe(peak_lr=0.008), budgets=(1600, 3200)).run_ids
    ('5a7d264457-1600', '5a7d264457-3200')
    """

    shape: Shape
    recipe: Recipe
    budgets: tuple[int, ...]
    data: str = "stream"
    preset: str = "cpu"
    init_seed: int = 0
    data_seed: int = 0
    study: str = ""  # not part of any id
    probe: str = ""  # labelled data, such as icons:single40, on which each branch is probed; not part of any id
    base: str = ""  # where the weights start: a run_id, or timm:NAME; shape is then the shape at the new size
    base_sha256: str = ""  # of the weights of a timm base, whose name does not tell them
    trained: str = "full"  # what of a base is trained: see sovit.train.finetune

    def __post_init__(self) -> None:
        _check_types(self)
        if self.trained not in TRAINED:
            raise UserError(f"trained={self.trained!r} is unknown; choose one of {', '.join(TRAINED)}")
        if self.trained != "full" and not self.base:
            raise UserError(f"trained={self.trained} without a base leaves the rest as it was drawn; name a base")
        for size in self.recipe.patch_sizes:
            if self.shape.image_size % size:
                raise UserError(f"patch_sizes: {size} does not divide image_size={self.shape.image_size}; leave it out")
        if self.recipe.patch_sizes and self.shape.patch_size not in self.recipe.patch_sizes:
            raise UserError(f"patch_sizes lack {self.shape.patch_size}, at which the weights are stored; add it")
        if self.recipe.objective == "siglip":
            self._check_siglip()
        if self.probe and not self.probe.partition(":")[2]:
            raise UserError(f"probe={self.probe!r} names no SOURCE:PRESET; give one, such as icons:single40")
        for name in ("init_seed", "data_seed"):
            if not 0 <= getattr(self, name) < 1 << 32:
                raise UserError(f"{name}={getattr(self, name)} is out of range; give a whole number from 0 to 2^32 - 1")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise UserError(f"budgets={self.budgets} must be examples in rising order, at least one")
        least = 5 * self.recipe.batch_size
        for n in self.budgets:
            if n % self.recipe.batch_size or n < least:
                raise UserError(
                    f"budget of {n} examples is not a multiple of the batch of {self.recipe.batch_size}, or under {least}"
                )

    def _check_siglip(self) -> None:
        if self.data not in NUM_WORDS:
            raise UserError(f"data={self.data!r} has no captions; objective=siglip needs data={' or '.join(NUM_WORDS)}")
        if self.recipe.batch_size < 2:
            raise UserError(
                "batch_size=1 has no pair to tell an image's caption from; objective=siglip needs 2 or more"
            )
        if self.base or self.recipe.patch_sizes:
            what = "a base" if self.base else "patch_sizes"
            raise UserError(f"objective=siglip trains from scratch at one patch size; leave {what} out")

    @property
    def kind(self) -> typing.Literal["encoder"]:
        return "encoder"

    @functools.cached_property
    def trunk_id(self) -> str:
        identity = {
            "shape": _non_default(self.shape),
            "recipe": _non_default(self.recipe),
            **{k: v for k, v in _non_default(self).items() if k not in NO_IDENTITY and k not in ("shape", "recipe")},
        }
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:10]

    def run_id(self, num_examples: int) -> str:
        return f"{self.trunk_id}-{num_examples}"

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(self.run_id(n) for n in self.budgets)

    def cooldown_examples(self, num_examples: int) -> int:
        batch = self.recipe.batch_size
        return max(1, round(self.recipe.cooldown * num_examples / batch)) * batch

    def trunk_examples(self, num_examples: int) -> int:
        return num_examples - self.cooldown_examples(num_examples)

    def new_examples(self, num_examples: int) -> int:
        """Examples that this branch adds to what the shorter branches have trained: its part of the trunk + cooldown."""
        before = [self.trunk_examples(n) for n in self.budgets if n < num_examples]
        return num_examples - max(before, default=0)

    @property
    def total_examples(self) -> int:
        """Examples trained for all branches together, the shared trunk counted once."""
        return sum(self.new_examples(n) for n in self.budgets)

    def patch_size_at(self, step: int) -> int:
        """The patch size of a batch: the shape's, or one of recipe.patch_sizes, each once in every so many steps."""
        sizes = self.recipe.patch_sizes
        if not sizes:
            return self.shape.patch_size
        cycle, place = divmod(step, len(sizes))
        return random.Random(f"{self.data_seed} {cycle}").sample(sizes, len(sizes))[place]

    def train_flops(self, num_examples: int, num_classes: int = 0) -> int:
        """FLOPs of training on the first `num_examples`: 3 x forward; of a fine-tuning, what its steps really compute."""
        if not self.recipe.patch_sizes:
            return num_examples * self._step_flops(self.shape.patch_size, num_classes)
        cost = {size: self._step_flops(size, num_classes) for size in self.recipe.patch_sizes}
        steps = num_examples // self.recipe.batch_size
        rest = range(steps - steps % len(cost), steps)
        total = (steps // len(cost)) * sum(cost.values()) + sum(cost[self.patch_size_at(step)] for step in rest)
        return total * self.recipe.batch_size

    def _step_flops(self, patch_size: int, num_classes: int) -> int:
        shape = self.shape.replace(patch_size=patch_size)
        if self.base:
            return shape.step_flops(num_classes, self.trained)
        return 3 * (shape.forward_flops + task_flops(shape, self.recipe, self.data, num_classes))

    def task_flops(self, num_classes: int = 0) -> int:
        """Forward FLOPs of an image beside the encoder: of its task head, or of its pairs and its caption."""
        return task_flops(self.shape, self.recipe, self.data, num_classes)

    def spent_flops(self, num_examples: int, num_classes: int = 0) -> int:
        """FLOPs of what this branch adds to the shorter ones; over all branches, the true bill of the run."""
        before = num_examples - self.new_examples(num_examples)
        return self.train_flops(num_examples, num_classes) - self.train_flops(before, num_classes)

    @property
    def label(self) -> str:
        """Short name for progress lines: the shape, of a fine-tuning what is trained and at how many pixels, too."""
        how = f" {self.trained} {self.shape.image_size} px" if self.base else ""
        sizes = f" patches {','.join(map(str, self.recipe.patch_sizes))}" if self.recipe.patch_sizes else ""
        return self.shape.label + how + sizes

    @property
    def numbers(self) -> dict[str, int | float | str]:
        """What tables and plots of a study show of the run."""
        dims = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size")
        values = {d: getattr(self.shape, d) for d in dims} | {"peak_lr": self.recipe.peak_lr}
        seeds = {"init_seed": self.init_seed, "data_seed": self.data_seed}
        return values | seeds | ({"trained": self.trained} if self.base else {})

    @property
    def parts(self) -> dict[str, str]:
        return {}

    @property
    def total_flops(self) -> int:
        """FLOPs of all branches together, task head apart."""
        return sum(self.spent_flops(n) for n in self.budgets)

    def on_base(self, run_id: str) -> Run:
        """The same fine-tuning, begun at another branch."""
        return self.replace(base=run_id)

    def with_budgets(self, budgets: typing.Sequence[int]) -> Run:
        """The same trunk with some of its branches."""
        return self.replace(budgets=tuple(budgets))

    def replace(self, **changes: object) -> Run:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> Run:
        """Read what `to_dict` wrote (or its JSON). Raises UserError for unknown, missing or wrongly typed fields."""
        return _from_dict(cls, d, "run")


def task_flops(shape: Shape, recipe: Recipe, data: str, num_classes: int = 0) -> int:
    """Forward FLOPs of an image beside the encoder: of its task head, or of its pairs and its caption."""
    if recipe.objective == "siglip":
        return pair_flops(shape.width, recipe.batch_size) + text_flops(NUM_WORDS[data])
    return shape.head_flops(num_classes)


def budgets_for(
    shape: Shape, train_flops: typing.Iterable[float], num_classes: int, batch_size: int, beside: int | None = None
) -> tuple[int, ...]:
    """Examples, rounded to whole batches, that spend each of the given training FLOPs on this shape.

    beside: forward FLOPs of an image beside the encoder, where they are not those of a head of `num_classes` (`task_flops`).
    """
    cost = 3 * (shape.forward_flops + (shape.head_flops(num_classes) if beside is None else beside))
    return tuple(dict.fromkeys(max(5, round(c / cost / batch_size)) * batch_size for c in sorted(train_flops)))


def learning_rate(shape: Shape, base: float = 0.008, width_power: float = 0.65, depth_power: float = 0.75) -> float:
    """The stated rule of a sweep: base x (32 / width)^width_power x (2 / depth)^depth_power, to 4 significant digits.

    `base` is the rate at width 32 and depth 2. The defaults are what studies/recipe_search.py measured on the stream
    (results/recipe.json, rounded); another data set or parametrisation wants its own.
    """
    rate = base * (32 / shape.width) ** width_power * (2 / shape.depth) ** depth_power
    return float(f"{rate:.4g}")


def recipe_by_rule(shape: Shape) -> Recipe:
    """The default recipe, its rate by the rule of `learning_rate`."""
    return Recipe(peak_lr=learning_rate(shape))
