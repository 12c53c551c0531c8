"""Run: one trunk to train, said completely. Shape + Recipe + data + seeds, and the budgets it is cooled down at.

Only fields that differ from their default enter `trunk_id`, so a field added later leaves old ids alone; the price is that
a default, once used, never changes. A test pins golden ids.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sovit import UserError
from sovit.spec.config import AtLeast0, Count, Decay, Positive, Seed, Share, Whole, changed, check, digest, from_dict
from sovit.spec.shape import Shape, Trained
from sovit.spec.siglip_costs import NUM_WORDS, pair_flops, text_flops

Precision = Literal["float32", "bfloat16"]
Objective = Literal["classification", "siglip"]


@dataclass(frozen=True)
class Recipe:
    """How to train. Durations are in examples; they become steps in one place, the properties of Run.

    >>> sovit.Recipe(peak_lr=0.008).batch_size
    16
    """

    peak_lr: Positive
    batch_size: Count = 16
    weight_decay: AtLeast0 = 0.05  # AdamW's, multiplied by the learning rate; on matrices only
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    clip_norm: Positive = 1.0
    warmup_examples: Whole = 800
    schedule: Literal["constant", "rsqrt"] = "constant"
    rsqrt_examples: Count = 160_000  # timescale of the rsqrt trunk
    cooldown: Share = 0.2  # share of a budget spent in the (1 - sqrt) cooldown, arXiv 2405.18392
    parametrisation: Literal["fan_in", "timm"] = "fan_in"
    precision: Precision = "float32"  # of matrix products in training; weights, optimiser, validation stay in float32
    patch_sizes: tuple[Count, ...] = ()  # drawn by batch (FlexiViT, arXiv 2212.08013); weights stay at the shape's size
    objective: Objective = "classification"  # or siglip: the sigmoid image-text loss on captions, sovit.train.siglip

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.patch_sizes)) != len(self.patch_sizes):
            raise UserError(f"patch_sizes={list(self.patch_sizes)} must be different sizes")
        if self.schedule == "rsqrt" and self.rsqrt_examples < self.batch_size:
            raise UserError(f"rsqrt_examples={self.rsqrt_examples} is under one batch of {self.batch_size}; give more")


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
    init_seed: Seed = 0
    data_seed: Seed = 0
    study: str = ""  # not part of any id
    probe: str = ""  # labelled data, such as icons:single40, on which each branch is probed; not part of any id
    base: str = ""  # where the weights start: a run_id, or timm:NAME; shape is then the shape at the new size
    base_sha256: str = ""  # of the weights of a timm base, whose name does not tell them
    trained: Trained = "full"  # what of a base is trained: see sovit.train.finetune

    def __post_init__(self) -> None:
        check(self)
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
    def kind(self) -> Literal["encoder"]:
        return "encoder"

    @functools.cached_property
    def trunk_id(self) -> str:
        """Hash of everything but budgets, study and probe."""
        identity = {k: v for k, v in changed(self).items() if k not in ("budgets", "study", "probe")}
        return digest(identity | {"shape": changed(self.shape), "recipe": changed(self.recipe)})

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

    def with_budgets(self, budgets: Sequence[int]) -> Run:
        """The same trunk with some of its branches."""
        return self.replace(budgets=tuple(budgets))

    def replace(self, **changes: object) -> Run:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> Run:
        """Read what `to_dict` wrote (or its JSON). Raises UserError for unknown, missing or wrongly typed fields."""
        return from_dict(cls, d, "run")


def task_flops(shape: Shape, recipe: Recipe, data: str, num_classes: int = 0) -> int:
    """Forward FLOPs of an image beside the encoder: of its task head, or of its pairs and its caption."""
    if recipe.objective == "siglip":
        return pair_flops(shape.width, recipe.batch_size) + text_flops(NUM_WORDS[data])
    return shape.head_flops(num_classes)


def budgets_for(
    shape: Shape, train_flops: Iterable[float], num_classes: int, batch_size: int, beside: int | None = None
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
