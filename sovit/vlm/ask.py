"""One image, questions, and what a trained vision-language model answers. Image files of any kind become what it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sovit import UserError, reason
from sovit.data.hub.decode import MAX_PIXELS, to_rgb
from sovit.encoder.open import Preprocess
from sovit.vlm.model import VisionLanguageModel
from sovit.vlm.questions.questions import open_questions
from sovit.vlm.trained import open_vlm, read_run


@dataclass(frozen=True)
class Asked:
    """Questions (none: those of its data) about an image file, or about validation image number `val` of its data."""

    questions: tuple[str, ...] = ()
    image: Path | None = None
    val: int = 0
    max_new_tokens: int = 32


def ask(run_id: str, asked: Asked, runs_dir: Path | str = "runs", device: str = "cpu") -> tuple[dict, Tensor]:
    """Ask the model `run_id`, and tell the right answers beside its own where its data has them.

    Returns a dict with `image` and `answers` (question, answer, right where known), and the image [3, H, W] in [0, 1].
    Raises UserError for a model or image that is not there.
    """
    run, model = read_run(run_id, runs_dir), open_vlm(run_id, runs_dir, device)
    right: dict[str, str] = {}
    if asked.image is not None:
        pixels, shown = _read(run_id, model, asked), str(asked.image)
    else:
        source = open_questions(run.data, run.preset, run.image_size, run.data_seed)
        if not 0 <= asked.val < source.num_val:
            raise UserError(f"val={asked.val} does not exist; give 0 to {source.num_val - 1}")
        pixels = source.images("val", asked.val, 1)[0]
        shown = f"{run.data}:{run.preset}, validation image {asked.val}"
        if not asked.questions:
            right = {q.question: q.answer for q in source.ask("val", asked.val, 1)[0]}
    questions = list(asked.questions or right)
    said = model.generate(pixels.expand(len(questions), -1, -1, -1), questions, asked.max_new_tokens)
    answers = [
        {"question": question, "answer": answer} | ({"right": right[question]} if question in right else {})
        for question, answer in zip(questions, said, strict=True)
    ]
    return {"run_id": run_id, "image": shown, "answers": answers}, pixels


def _read(run_id: str, model: VisionLanguageModel, asked: Asked) -> Tensor:
    if model.encoder is None:
        raise UserError(f"{run_id} is a text-only baseline and has no encoder; ask a model that has one")
    if not asked.questions:
        raise UserError("an image file has no questions of its own; give one")
    assert asked.image is not None
    return to_tensor(open_picture(asked.image), model.encoder.preprocess)


def answers_text(found: dict) -> str:
    lines = []
    for a in found["answers"]:
        mark = "" if "right" not in a else "  (right)" if a["right"] == a["answer"] else f"  (it is: {a['right']})"
        lines.append(f"{a['question']} {a['answer']}{mark}")
    return "\n".join(lines)


# image files ---------------------------------------------------------------------------------------------------------


def open_picture(path: Path) -> Any:
    """Read a Pillow RGB image: upright by its EXIF data, transparency on white. Raises UserError where there is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            size = file.width, file.height
            image = to_rgb(ImageOps.exif_transpose(file)) if math.prod(size) <= MAX_PIXELS else None
    except Exception as error:  # whatever Pillow's forty decoders raise on damaged files
        raise UserError(f"the image {path} cannot be read ({reason(error)}); give another file") from None
    if image is None:
        raise UserError(f"the image {path} has {size[0]} x {size[1]} pixels, more than {MAX_PIXELS:,}; make it smaller")
    return image


def to_tensor(image: Any, preprocess: Preprocess) -> Tensor:
    """Make a Pillow RGB image of any shape square, as the tower was shown its images: [3, S, S] in [0, 1].

    squash: both sides resized; center: the short side, and the middle cut out. Both leave crop_pct of the resized side.
    Rounded to 8 bits and by the half pixel as torchvision does it, which timm's own transforms are made of. Raises
    UserError for an image so long that its resized form has no room.
    """
    from PIL import Image

    side = preprocess.image_size
    larger = math.floor(side / preprocess.crop_pct + 1e-6)  # pixels
    if preprocess.crop == "squash":
        width, height = larger, larger
    else:
        short = min(image.size)
        width, height = (larger if n == short else int(larger * n / short) for n in image.size)
    kind = Image.Resampling.BILINEAR if preprocess.resample == "bilinear" else Image.Resampling.BICUBIC
    if width * height > MAX_PIXELS:  # a strip of 1 x 10^6 pixels grows on the way
        raise UserError(
            f"an image of {image.width} x {image.height} pixels is too long to be resized to {side} pixels; crop it"
        )
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), kind).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
