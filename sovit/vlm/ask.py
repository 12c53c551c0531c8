"""One image, questions, and what a trained vision-language model answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sovit import UserError
from sovit.vlm.pictures import open_picture, to_tensor
from sovit.vlm.questions.questions import open_questions
from sovit.vlm.trained import open_vlm, read_run


def ask(
    run_id: str,
    questions: Sequence[str] = (),
    image: Path | None = None,
    val: int = 0,
    max_new_tokens: int = 32,
    runs_dir: Path | str = "runs",
    device: str = "cpu",
) -> tuple[dict, Tensor]:
    """What `run_id` answers to `questions` about an image file, or about validation image number `val` of its data.

    Without questions it is asked those of its data, whose right answers are told beside its own. Returns a dict with
    `image` and `answers` (question, answer, right where known), and the image [3, H, W] in [0, 1]. Raises UserError for a
    model or image that is not there.
    """
    run = read_run(run_id, runs_dir)
    right: dict[str, str] = {}
    model = open_vlm(run_id, runs_dir, device)
    if image is not None:
        if model.encoder is None:
            raise UserError(f"{run_id} has no eye; ask one that has")
        if not questions:
            raise UserError("an image file has no questions of its own; write one behind the run_id")
        pixels = to_tensor(open_picture(image), model.encoder.preprocess)
        shown = str(image)
    else:
        source = open_questions(run.data, run.preset, run.image_size, run.data_seed)
        if not 0 <= val < source.num_val:
            raise UserError(f"--val {val} does not exist; give 0 to {source.num_val - 1}")
        pixels = source.images("val", val, 1)[0]
        shown = f"{run.data}:{run.preset}, validation image {val}"
        if not questions:
            right = {q.question: q.answer for q in source.ask("val", val, 1)[0]}
    asked = list(questions or right)
    said = model.generate(pixels.expand(len(asked), -1, -1, -1), asked, max_new_tokens)
    answers = [
        {"question": question, "answer": answer} | ({"right": right[question]} if question in right else {})
        for question, answer in zip(asked, said, strict=True)
    ]
    return {"run_id": run_id, "image": shown, "answers": answers}, pixels


def answers_text(found: dict) -> str:
    lines = []
    for a in found["answers"]:
        mark = "" if "right" not in a else "  (right)" if a["right"] == a["answer"] else f"  (it is: {a['right']})"
        lines.append(f"{a['question']} {a['answer']}{mark}")
    return "\n".join(lines)
