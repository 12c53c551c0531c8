"""What a step of a vision-language run costs, tried out before anything is trained: for the plan of a study.

The step is a real one but for what it starts from: an encoder of sovit stands there as it was before training, which costs
the same. Low-rank adapters, the optimiser's step and validation are left out: their part is small.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sovit.encoder.model import build
from sovit.encoder.open import Encoder, load_encoder, timm_encoder
from sovit.spec.any_run import AnyRun
from sovit.spec.run import Run
from sovit.spec.vlm_run import PARTS, Stage, VlmRun
from sovit.vlm.language_model import LanguageModel, open_language_model
from sovit.vlm.model import ModelOptions, VisionLanguageModel
from sovit.vlm.packing import NO_LABEL
from sovit.vlm.questions.questions import open_questions
from sovit.vlm.trained import MODULES

LARGE = (
    10_000_000  # parameters of a language model above which one image is tried, not a batch, and one encoder for all
)
SHORT = 2.0  # seconds


class Trials:
    """Tries each kind of step once, whichever of a study's runs ask for it."""

    def __init__(self, runs: Mapping[str, AnyRun], runs_dir: Path, device: str):
        self.runs, self.runs_dir, self.device = runs, runs_dir, device
        self.words: dict[str, LanguageModel] = {}
        self.known: dict[tuple, tuple[float, float]] = {}

    def costs(self, run: VlmRun) -> list[tuple[float, float]]:
        """(training FLOPs of an image, seconds of an image) in each stage. Raises UserError for a part that is not there."""
        if run.language_model not in self.words:
            self.words = {run.language_model: open_language_model(run.language_model)}  # one at a time: they are large
        words = self.words[run.language_model]
        large = sum(p.numel() for p in words.model.parameters()) > LARGE
        model = VisionLanguageModel(self._encoder(run), words, ModelOptions.of(run)).to(self.device)
        num_images = 1 if large else run.batch_size
        shape = (model.encoder.width, model.encoder.depth) if model.encoder and not large else ()
        asked = (run.data, run.preset, run.image_size, run.families, run.template, run.layout, run.max_length)
        found = []
        for stage in run.stages:
            modes = tuple(stage.parts[part].mode for part in PARTS)
            key = (run.language_model, *asked, model.num_image_tokens, *shape, num_images, run.precision, *modes)
            if key not in self.known:
                self.known[key] = try_step(model, run, stage, num_images)
            found.append(self.known[key])
        return found

    def _encoder(self, run: VlmRun) -> Encoder | int:
        if run.control == "blind":
            return int(run.encoder.partition(":")[2])
        planned = self.runs.get(run.base.rpartition("-")[0])
        if isinstance(planned, Run):
            return timm_encoder(run.encoder, build(planned.shape, 16))
        return load_encoder(run.encoder, self.runs_dir, self.device)


def try_step(model: VisionLanguageModel, run: VlmRun, stage: Stage, num_images: int) -> tuple[float, float]:
    """FLOPs and seconds of an image; the FLOPs as the run's own bill counts them. A short step is timed twice more."""
    questions = open_questions(run.data, run.preset, run.image_size, run.data_seed, families=run.families)
    device = model.lm.device

    def step() -> float:
        start = time.perf_counter()
        model.zero_grad()
        documents = [model.document_of(asked) for asked in questions.ask("train", 0, num_images)]
        batch = model.batch(documents, questions.images("train", 0, num_images), run.max_length)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
            logits = model(batch)
        F.cross_entropy(logits.float(), batch.labels[batch.labels != NO_LABEL]).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    model.requires_grad_(False)
    for part in PARTS:
        module = getattr(model, MODULES[part])
        if module is not None:
            module.requires_grad_(stage.parts[part].mode == "full")
    if stage.parts["language_model"].mode == "lora":  # gradients go through it from its first block on
        model.lm.get_input_embeddings().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        seconds = step()
    if seconds < SHORT:  # what is done once, and counting, weigh there
        seconds = min(step(), step())
    model.requires_grad_(False).zero_grad()
    return counter.get_total_flops() / num_images, seconds / num_images
