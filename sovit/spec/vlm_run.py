"""VlmRun: one vision-language model to train, said completely. Encoder + projector + language model + questions + stages.

It has the attributes of sovit.spec.run.Run that sweeps, ledgers and displays use, so that they treat both alike; its only
budget is the sum of its stages. `kind: vlm` tells its JSON and its rows from an encoder's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sovit import UserError
from sovit.spec.config import AtLeast0, Count, Decay, Positive, Seed, Share, changed, check, digest, from_dict
from sovit.spec.run import Precision

PARTS = ("vision", "projector", "language_model")


@dataclass(frozen=True)
class Part:
    """How one part of the model is treated in a stage. `warmup`: share of the stage's examples."""

    mode: Literal["frozen", "full", "lora"] = "frozen"
    peak_lr: AtLeast0 = 0.0
    warmup: Decay = 0.03
    weight_decay: AtLeast0 = 0.0  # AdamW's; on matrices only

    def __post_init__(self) -> None:
        check(self)
        if (self.mode == "frozen") != (self.peak_lr == 0.0):
            raise UserError(
                f"mode={self.mode} with peak_lr={self.peak_lr:g}: what is trained needs a rate, frozen none"
            )


@dataclass(frozen=True)
class Stage:
    """Training on `num_examples` images, each with its questions."""

    num_examples: int
    vision: Part = Part()
    projector: Part = Part("full", 1e-3)
    language_model: Part = Part()

    def __post_init__(self) -> None:
        check(self)
        if self.projector.mode == "lora":
            raise UserError("projector.mode=lora: a projector is small; train it in full")
        if not self.trained:
            raise UserError("a stage with every part frozen trains nothing; give one a mode and a peak_lr")

    @property
    def parts(self) -> dict[str, Part]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def trained(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if part.mode != "frozen"}

    @property
    def words(self) -> str:
        trained = ", ".join(f"{name} {part.mode} {part.peak_lr:g}" for name, part in self.trained.items())
        return f"{trained}: {self.num_examples:,} images"


@dataclass(frozen=True)
class VlmRun:
    """What is trained. Durations are in images; an image comes with a question of each family."""

    encoder: str  # a name of sovit.encoder.open.load_encoder; blind:M: M learned tokens in its place, which see nothing
    stages: tuple[Stage, ...]
    language_model: str = "smollm2"  # a name of sovit.vlm.language_model.open_language_model
    projector: str = "mlp2x_gelu"  # of sovit.vlm.projectors; options as in pixel_shuffle_linear?factor=2
    layer: int = -1  # the encoder's block that is read
    norm: bool = True  # through the encoder's final norm
    data: str = "stream"
    preset: str = "cpu"
    image_size: Count = 16  # pixels at which the questions' images are drawn
    families: tuple[str, ...] = ()  # of questions trained on, () for all; all are evaluated
    template: Literal["chat", "plain", "short"] = "chat"
    layout: Literal["flat", "rows"] = "flat"  # of the image's tokens: flat, or rows announced in words
    max_length: Count = 256  # tokens of a packed row
    batch_size: Count = 8  # images
    num_val: Count = 256  # validation images
    schedule: Literal["cosine", "cooldown"] = "cooldown"  # or constant, then (1 - sqrt) to nothing
    final_lr: Decay = 0.0  # share of the peak at which `cosine` ends: a tenth (nanoVLM) or nothing (LLaVA)
    cooldown: Share = 0.2  # share of each stage
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    clip_norm: Positive = 1.0
    lora_rank: Count = 8
    lora_alpha: Count = 16
    precision: Precision = "float32"  # of the language model in training; a frozen one is held in it
    init_seed: Seed = 0
    data_seed: Seed = 0
    study: str = ""  # not part of any id

    def __post_init__(self) -> None:
        check(self)
        if not self.stages:
            raise UserError("stages=[] trains nothing; give at least one stage")
        for stage in self.stages:
            if stage.num_examples % self.batch_size or stage.num_examples < 5 * self.batch_size:
                raise UserError(
                    f"stage of {stage.num_examples} images is no multiple of the batch of {self.batch_size}, or under"
                    f" {5 * self.batch_size}"
                )
        if len(set(self.families)) < len(self.families):
            raise UserError(f"families={list(self.families)} name one twice; remove the repeat")
        if self.control == "blind":
            if not self.encoder[6:].isdecimal() or not int(self.encoder[6:]):
                raise UserError(f"encoder={self.encoder!r} names no number of learned tokens; give such as blind:16")
            for stage in self.stages:
                if list(stage.trained) == ["vision"]:
                    raise UserError(f"a stage trains {stage.words}, and {self.encoder} has no vision; leave it out")

    @property
    def control(self) -> str:
        """What the run is a control for: "blind", "random" (an encoder before training), or "none"."""
        kind = self.encoder.partition(":")[0]
        return kind if kind in ("blind", "random") else "none"

    @property
    def num_examples(self) -> int:
        return sum(stage.num_examples for stage in self.stages)

    @property
    def kind(self) -> Literal["vlm"]:
        return "vlm"

    @functools.cached_property
    def trunk_id(self) -> str:
        identity = {k: v for k, v in changed(self).items() if k != "study"}
        identity["stages"] = [
            {"num_examples": stage.num_examples} | {name: changed(part) for name, part in stage.trained.items()}
            for stage in self.stages
        ]
        return digest({"vlm": identity})

    def run_id(self, num_examples: int) -> str:
        return f"{self.trunk_id}-{num_examples}"

    @property
    def budgets(self) -> tuple[int, ...]:
        return (self.num_examples,)

    @property
    def run_ids(self) -> tuple[str, ...]:
        return (self.run_id(self.num_examples),)

    @property
    def base(self) -> str:
        """The trained branch whose weights, or whose shape, this needs; "" where it needs none of sovit's."""
        kind, _, rest = self.encoder.rpartition(":")
        return rest if kind in ("", "random") else ""

    @property
    def probe(self) -> str:
        return ""

    @property
    def numbers(self) -> dict[str, int | float | str]:
        """What tables and plots of a study show of the run. A rate of 0.0: frozen."""
        values: dict[str, int | float | str] = {"image_size": self.image_size, "num_examples": self.num_examples}
        values |= {"init_seed": self.init_seed, "data_seed": self.data_seed}
        for i, stage in enumerate(self.stages, 1):
            values[f"stage{i}_num_examples"] = stage.num_examples
            values |= {f"stage{i}_{part}_lr": how.peak_lr for part, how in stage.parts.items()}
        return values

    @property
    def parts(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("encoder", "language_model", "projector")}

    @property
    def total_examples(self) -> int:
        return self.num_examples

    def new_examples(self, num_examples: int) -> int:
        return num_examples

    def on_base(self, run_id: str) -> VlmRun:
        """The same run with another encoder, trained or not as this one is."""
        return self.replace(encoder=self.encoder.removesuffix(self.base) + run_id)

    def with_budgets(self, budgets: Sequence[int]) -> VlmRun:
        return self

    @property
    def label(self) -> str:
        """Short name for progress lines: the encoder and the language model."""
        return f"{self.encoder} {self.language_model}"

    def to_dict(self) -> dict:
        return {"kind": "vlm", **dataclasses.asdict(self)}

    @property
    def columns(self) -> dict:
        """What a row says of the run, flat: `stages` in words, and stages.0.num_examples, stages.0.projector.peak_lr ... of
        each part that is not frozen, under the names that overrides have."""
        flat = {name: value for name, value in self.to_dict().items() if name != "stages"}
        flat |= {"families": list(self.families), "stages": "; ".join(stage.words for stage in self.stages)}
        for i, stage in enumerate(self.stages):
            flat[f"stages.{i}.num_examples"] = stage.num_examples
            for name, part in stage.trained.items():
                flat |= {f"stages.{i}.{name}.{key}": value for key, value in vars(part).items()}
        return flat

    @classmethod
    def from_dict(cls, d: dict) -> VlmRun:
        """Read what `to_dict` wrote (or its JSON). Raises UserError for unknown, missing or wrongly typed fields."""
        return from_dict(cls, {k: v for k, v in d.items() if k != "kind"}, "VLM run")

    def replace(self, **changes: object) -> VlmRun:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def preset_run(name: str, encoder: str, num_examples: int, batch_size: int = 2, **more: Any) -> VlmRun:
    """Make a run on `num_examples` images as a known system is trained.

    projector: the projector alone, between a frozen encoder and a frozen language model, as in studies/vlm_transfer.py.
    llava15: LLaVA-1.5's two stages (arXiv 2310.03744), the images in the proportion of its 558k and 665k: the projector
    alone, then with the language model; cosine to nothing; the last block but one, not normed. nanovlm: all parts in one
    stage, cosine to a tenth. Raises UserError for an unknown preset and what VlmRun refuses.
    """
    if name == "projector":
        stages = [Stage(num_examples, projector=Part("full", 0.01, warmup=0.05))]
        more = {"layout": "rows", "template": "short"} | more
    elif name == "llava15":
        if num_examples % batch_size or num_examples < 10 * batch_size:
            raise UserError(f"{num_examples} images are no multiple of the batch of {batch_size}, or under ten batches")
        align = max(5, round(558 / (558 + 665) * num_examples / batch_size)) * batch_size
        second = Stage(num_examples - align, projector=Part("full", 2e-5), language_model=Part("full", 2e-5))
        stages = [Stage(align, projector=Part("full", 1e-3)), second]
        more = {"projector": "mlp2x_gelu", "layer": -2, "norm": False, "schedule": "cosine"} | more
    elif name == "nanovlm":
        decay = 0.01  # AdamW's default in PyTorch, which nanoVLM leaves as it is
        backbone, projector = (Part("full", rate, weight_decay=decay) for rate in (5e-5, 5.12e-3))
        stages = [Stage(num_examples, backbone, projector, backbone)]
        more = {"projector": "pixel_shuffle_linear?factor=2", "schedule": "cosine", "final_lr": 0.1} | more
    else:
        raise UserError(f"preset {name!r} is unknown; choose one of projector, llava15, nanovlm")
    return VlmRun(encoder, tuple(stages), batch_size=batch_size, **more)
