"""A vision-language model: the patch tokens of a frozen encoder, a projector, a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sovit.encoder import Encoder


class VisionLanguageModel(nn.Module):
    """What is trained is `projector` and `language_model`; the encoder is frozen and no part of the state.

    `encoder=None` is the blind model: the same language model, which sees the question alone.
    """

    def __init__(self, encoder: Encoder | None, language_model: Any, layer: int = -1, norm: bool = True, seed: int = 0):
        super().__init__()
        self.encoder, self.layer, self.norm = encoder, layer, norm  # a dataclass: no submodule, no parameters
        self.language_model = language_model
        if encoder is not None:
            self.projector = mlp_projector(encoder.width, language_model.config.hidden_size, seed)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """images [B, 3, H, W], words [B, Q, T] -> logits [B, Q, T, V] of the word that follows each."""
        num_images, num_questions, num_words = words.shape
        x = self.language_model.get_input_embeddings()(words.flatten(0, 1))  # [BQ, T, D]
        if self.encoder is not None:
            with torch.no_grad():
                seen = self.encoder.tokens(images, self.layer, self.norm)  # [B, N, encoder width]
            seen = self.projector(seen).repeat_interleave(num_questions, 0)  # [BQ, N, D]
            x = torch.cat((seen, x), 1)
        logits = self.language_model(inputs_embeds=x, logits_to_keep=num_words, use_cache=False).logits  # [BQ, T, V]
        return logits.view(num_images, num_questions, num_words, -1)

    def no_weight_decay(self) -> set[str]:
        return {"language_model.model.embed_tokens.weight"}


def mlp_projector(width_in: int, width_out: int, seed: int) -> nn.Module:
    """LLaVA-1.5's (arXiv 2310.03744): Linear, GELU, Linear; [..., width_in] -> [..., width_out]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


def small_language_model(num_words: int, width: int, depth: int, seed: int) -> Any:
    """A new Llama of `depth` layers over a vocabulary of `num_words` words, its weights a function of `seed`."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=num_words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
        max_position_embeddings=512,
        initializer_range=width**-0.5,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)
