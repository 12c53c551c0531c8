"""A trained vision-language model in lmms-eval, which has the public benchmarks, their readers and their rules.

    pip install lmms-eval
    lmms-eval --model sovit --model_args run_id=RUN_ID,runs=runs --tasks pope,mmstar,vqav2_val --batch_size 16

lmms-eval finds the model by the entry point `lmms_eval.models` of this package. Checked with lmms-eval 0.7.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from torch import Tensor

from sovit import UserError
from sovit.vlm.ask import to_tensor
from sovit.vlm.trained import open_vlm


def manifest() -> Any:
    """Tell lmms-eval the name of the model and of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="sovit", simple_class_path="sovit.vlm.lmms_eval.SovitModel")


class SovitModel(lmms):
    """run_id: of `sovit vlm train`; runs: the folder with its weights; batch_size: questions at a time."""

    def __init__(self, run_id: str, runs: str = "runs", batch_size: int | str = 1, device: str = "cpu", **_: Any):
        super().__init__()
        self.model = open_vlm(run_id, runs, device)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request (context, generation options, doc_to_visual, doc_id, task, split) greedily, in their order."""
        said = {}
        for with_image, batch in self._batches(requests):
            options = [r.args[1] for r in batch]
            images = self._images(batch) if with_image else None
            longest = max(o.get("max_new_tokens", 32) for o in options)
            texts = self.model.generate(images, [r.args[0] for r in batch], longest)
            for request, text, option in zip(batch, texts, options, strict=True):
                said[id(request)] = cut(text, option.get("until") or ())
        return [said[id(r)] for r in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Score each request (context, answer, doc_to_visual, doc_id, task, split).

        Returns of each the loss of the answer, its end token included (nats, summed), and whether the model writes just that
        answer. A loss and not a log-probability: lmms-eval takes the smallest of a question's choices. Each pair is wrapped:
        lmms-eval 0.7.3 turns a bare one into text, which its multiple choice cannot read.
        """
        found = {}
        for with_image, batch in self._batches(requests):
            images = self._images(batch) if with_image else None
            prompts, answers = [r.args[0] for r in batch], [self._answer(r) for r in batch]
            log_probs = self.model.score(images, prompts, [[answer] for answer in answers])
            longest = max(len(self.model.encode(answer)) for answer in answers) + 2
            texts = self.model.generate(images, prompts, longest)
            for request, log_prob, text, answer in zip(batch, log_probs, texts, answers, strict=True):
                found[id(request)] = (-float(log_prob), text == answer)
        return [GenerationResult(found[id(r)]) for r in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("conversations of several rounds are not answered here; give tasks of single questions")

    def _document(self, request: Any) -> Any:
        return self.task_dict[request.args[4]][request.args[5]][request.args[3]]

    def _answer(self, request: Any) -> str:
        answer = request.args[1]
        return (answer if isinstance(answer, str) else answer(self._document(request))).strip()

    def _shown(self, request: Any) -> list[Any]:
        shown = request.args[2](self._document(request)) if request.args[2] else []
        if len(shown or ()) > 1:
            raise UserError(f"question {request.args[3]} of {request.args[4]} has {len(shown)} images; one is read")
        return list(shown or ())

    def _batches(self, requests: Sequence[Any]) -> list[tuple[bool, list[Any]]]:
        """Split requests with an image from those without, each in batches."""
        parts: dict[bool, list[Any]] = {True: [], False: []}
        for request in requests:
            parts[bool(self._shown(request))].append(request)
        size = self.batch_size
        return [(kind, of[i : i + size]) for kind, of in parts.items() for i in range(0, len(of), size)]

    def _images(self, requests: Sequence[Any]) -> Tensor:
        """[B, 3, S, S] in [0, 1]; a text-only baseline has no encoder and looks at none."""
        if self.model.encoder is None:
            return torch.zeros(len(requests), 3, 1, 1)
        preprocess = self.model.encoder.preprocess
        return torch.stack([to_tensor(self._shown(r)[0].convert("RGB"), preprocess) for r in requests])


def cut(text: str, until: str | Sequence[str]) -> str:
    """Drop what follows the first of the texts that end an answer."""
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text
