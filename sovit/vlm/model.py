"""A vision-language model in plain PyTorch: patch tokens of any Encoder, a projector, any Hugging Face causal LM.

An image enters as M placeholder tokens in the text, whose embeddings are replaced by the projected patch tokens (LLaVA,
arXiv 2304.08485). Which of the encoder's blocks is read, and whether through its final norm, is an option.

    legend: B rows or prompts, T tokens, I images a row, M tokens an image, D width of the language model, V its vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit import UserError
from sovit.encoder.open import Encoder
from sovit.spec.vlm_run import VlmRun
from sovit.vlm.language_model import LanguageModel
from sovit.vlm.packing import NO_LABEL, Document, Packed, check_lengths, pack, visible
from sovit.vlm.projectors import build as build_projector
from sovit.vlm.projectors import parse
from sovit.vlm.questions.questions import Question

# before the image, between image or exchange and the question, between question and answer
TEMPLATES = {
    "chat": ("<|im_start|>user\n", "\n{question}<|im_end|>\n<|im_start|>assistant\n", "{answer}"),
    "short": ("", "\n{question}", " {answer}"),
    "plain": ("", "\nQuestion: {question} Answer:", " {answer}"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # of Gemma 2, Granite, Cohere


@dataclass(frozen=True)
class ModelOptions:
    """How encoder and language model are joined.

    projector: a name of sovit.vlm.projectors.PROJECTORS, with options as in pixel_shuffle_linear?factor=2. layer: block of
    the encoder that is read; norm: through its final norm. template: of TEMPLATES. layout: "flat", or "rows" where each row
    of image tokens is announced in words. seed: of the projector's weights.
    """

    projector: str = "mlp2x_gelu"
    layer: int = -1
    norm: bool = True
    template: str = "chat"
    layout: str = "flat"
    seed: int = 0

    @classmethod
    def of(cls, run: VlmRun) -> ModelOptions:
        return cls(run.projector, run.layer, run.norm, run.template, run.layout, run.init_seed)


class LearnedTokens(nn.Module):
    """What stands for the image in a text-only baseline: M vectors, learned, the same for every image."""

    def __init__(self, num_tokens: int, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens_out = num_tokens
        self.tokens = nn.Parameter(torch.randn(num_tokens, width, generator=generator) * width**-0.5)

    def forward(self, num_images: int) -> Tensor:
        return self.tokens.expand(num_images, -1, -1)  # [B, M, D]


class VisionLanguageModel(nn.Module):
    """encoder: an Encoder, or the number of learned tokens of a text-only baseline. Raises UserError for unfit options."""

    def __init__(self, encoder: Encoder | int, language_model: LanguageModel, options: ModelOptions = ModelOptions()):
        super().__init__()
        self.language_model, self.options = language_model, options
        self.lm: Any = language_model.model
        width = self.lm.get_input_embeddings().weight.shape[1]  # D
        self.projector: Any
        if isinstance(encoder, int):
            self.encoder, self.vision = None, None
            self.projector = LearnedTokens(encoder, width, options.seed)
        else:
            self.encoder, self.vision = encoder, encoder.module
            name, given = parse(options.projector)
            sizes = dict(num_tokens=encoder.grid**2, seed=options.seed)
            self.projector = build_projector(name, encoder.width, width, **sizes, **given)
        self.num_image_tokens: int = self.projector.num_tokens_out
        if options.layout == "rows" and math.isqrt(self.num_image_tokens) ** 2 != self.num_image_tokens:
            raise UserError(
                f"layout=rows needs a square of image tokens, not {self.num_image_tokens}; take layout=flat"
            )

    # text ----------------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        ids = self.language_model.tokenizer.encode(text, add_special_tokens=False)
        if self.language_model.image_token_id in ids:
            word = self.language_model.tokenizer.decode([self.language_model.image_token_id])
            raise UserError(f"the text {text[:60]!r} holds {word!r}, which stands for image tokens; leave it out")
        return ids

    def document(self, exchanges: Iterable[tuple[str, str]], with_image: bool = True) -> Document:
        """An image, if any, and (question, answer) pairs about it, as token ids; an answer ends with the end token."""
        before, question, answer = TEMPLATES[self.options.template]
        prefix = self.encode(before) + (self._image() if with_image else [])
        end = [self.language_model.eos_token_id]
        pairs = [
            (self.encode(question.format(question=asked)), self.encode(answer.format(answer=said)) + end)
            for asked, said in exchanges
        ]
        return Document(prefix, pairs)

    def document_of(self, asked: Iterable[Question]) -> Document:
        """An image and the questions about it with their answers."""
        return self.document([(q.question, q.answer) for q in asked])

    def _image(self) -> list[int]:
        """Placeholders of an image: all in one line, or row by row, each announced in words as SmolVLM announces tiles."""
        token = self.language_model.image_token_id
        if self.options.layout == "flat":
            return [token] * self.num_image_tokens
        side = math.isqrt(self.num_image_tokens)
        numbers = [NUMBERS[row] if row < len(NUMBERS) else str(row) for row in range(1, side + 1)]
        rows = [self.encode(f"Row {number}:") + [token] * side for number in numbers]
        newline = self.encode("\n")
        return [i for row in rows[:-1] for i in row + newline] + rows[-1]

    # forward -------------------------------------------------------------------------------------------------------------

    def image_tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> what the language model reads of them, [B, M, D]."""
        if self.encoder is None:
            return self.projector(len(images))
        frozen = not any(p.requires_grad for p in self.encoder.module.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            # [B, N, D_vision]
            seen = self.encoder.tokens(self.encoder.preprocess(images), self.options.layer, self.options.norm)
        return self.projector(seen)

    def embed(self, ids: Tensor, images: Tensor | None) -> Tensor:
        """Token ids [B, T] -> [B, T, D], the placeholders of images [n, 3, H, W] filled in order."""
        x = self.lm.get_input_embeddings()(ids)
        if images is None:
            return x
        seen = self.image_tokens(images).flatten(0, 1).to(x.dtype)  # [n M, D]
        places = (ids == self.language_model.image_token_id).nonzero(as_tuple=True)
        return x.index_put(places, seen)

    def forward(self, batch: Packed) -> Tensor:
        """Logits [L, V] at the labelled tokens of packed rows, in the order of labels[labels != NO_LABEL].

        The vocabulary is far wider than the model: only those tokens go through its head. Raises UserError where packed
        documents would see each other.
        """
        images = batch.images[batch.image >= 0] if batch.images.numel() else None  # [n, 3, S, S], row by row
        x, mask, wanted = self.embed(batch.ids, images), visible(batch), batch.labels != NO_LABEL
        config = self.lm.config
        implementation = config.get_text_config()._attn_implementation
        if implementation == "eager":  # it adds the mask to the scores: True would add one and hide nothing
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        elif implementation != "sdpa":
            raise UserError(
                f"{self.language_model.name} computes its attention by {implementation}, which is not known to keep packed"
                ' documents apart; set "attn_implementation": "sdpa" or "eager" in its config.json'
            )
        arguments = dict(inputs_embeds=x, attention_mask=mask, position_ids=batch.positions, use_cache=False)
        if any(getattr(config, name, None) for name in SCALED_LOGITS):
            return self.lm(**arguments).logits[wanted]
        return self.lm.get_output_embeddings()(self.lm.get_decoder()(**arguments).last_hidden_state[wanted])

    # answers -------------------------------------------------------------------------------------------------------------

    def check_lengths(self, documents: Iterable[Document], max_length: int) -> None:
        """Raise UserError where one is longer than a row: of `max_length`, or of what the language model reads."""
        check_lengths(
            [document.num_tokens for document in documents], min(max_length, self.language_model.context_length)
        )

    def batch(self, documents: Sequence[Document], images: Tensor | None, max_length: int) -> Packed:
        """Pack documents, of which number d shows image number d of `images` [n, 3, S, S], or none."""
        reads = self.language_model
        packed = pack(documents, min(max_length, reads.context_length), reads.pad_token_id)
        if images is not None:
            packed = packed._replace(images=images[packed.image.clamp_min(0)])
        return Packed(*(t.to(self.lm.device) for t in packed))

    @torch.no_grad()
    def score(self, images: Tensor | None, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Tensor]:
        """Log-probability (nats) of each candidate answer, its end token included, given image and prompt: [candidates].

        images [B, 3, H, W] in [0, 1], one a prompt, or None for none. Raises UserError where a prompt has no answers, or
        the two do not fit into the context.
        """
        if any(not candidates for candidates in answers):
            raise UserError("score: a prompt has no candidate answers; give at least one")
        documents = [
            self.document([(prompt, answer) for answer in candidates], images is not None)
            for prompt, candidates in zip(prompts, answers, strict=True)
        ]
        batch = self.batch(documents, images, self.language_model.context_length)
        logits = self(batch)
        told = batch.labels != NO_LABEL
        of_token = -F.cross_entropy(logits.float(), batch.labels[told], reduction="none")
        total = torch.zeros(sum(map(len, answers)), device=of_token.device)
        total.index_add_(0, batch.source[told], of_token)
        return list(total.split([len(candidates) for candidates in answers]))

    @torch.no_grad()
    def generate(
        self, images: Tensor | None, prompts: Sequence[str], max_new_tokens: int = 32, use_cache: bool = True
    ) -> list[str]:
        """Greedy answers to prompts about images [B, 3, H, W] in [0, 1] (None: about none), one image a prompt.

        use_cache=False reads the whole text again for every token: slow, and what the cached path must equal.
        """
        ends, pad = self.language_model.eos_token_id, self.language_model.pad_token_id
        rows = [self.document([(prompt, "")], images is not None) for prompt in prompts]
        lines = [document.prefix + document.exchanges[0][0] for document in rows]  # no answer yet
        longest = max(map(len, lines))
        if longest + max_new_tokens > self.language_model.context_length:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the"
                f" {self.language_model.context_length} that {self.language_model.name} reads; shorten it"
            )
        device = self.lm.device
        ids = torch.tensor([[pad] * (longest - len(line)) + line for line in lines], device=device)  # padded left
        mask = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in lines], device=device)
        x = self.embed(ids, None if images is None else images.to(device))
        cache, said = None, torch.empty(len(lines), 0, dtype=torch.int64, device=device)
        done = torch.zeros(len(lines), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -x.shape[1] :]
            out = self.lm(
                inputs_embeds=x,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=use_cache,
                logits_to_keep=1,
            )
            chosen = out.logits[:, -1].argmax(-1).masked_fill(done, ends)  # [B]
            said = torch.cat((said, chosen[:, None]), 1)
            done = done | (chosen == ends)
            if done.all():
                break
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            new = self.lm.get_input_embeddings()(chosen[:, None])
            cache, x = out.past_key_values, new if use_cache else torch.cat((x, new), 1)
        return [self._text(line) for line in said.tolist()]

    def _text(self, ids: list[int]) -> str:
        end = ids.index(self.language_model.eos_token_id) if self.language_model.eos_token_id in ids else len(ids)
        return self.language_model.tokenizer.decode(ids[:end]).strip()
