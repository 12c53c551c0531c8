"""Projectors of released vision-language models: patch tokens [B, N, width_in] -> [B, M, width_out] for the language model.

    linear                one matrix and a bias (LLaVA, arXiv 2304.08485; Llama 3.2's projector)
    mlp2x_gelu            Linear, GELU (erf), Linear (LLaVA-1.5, arXiv 2310.03744)
    pixel_shuffle_linear  factor² neighbours to channels, one matrix without bias (Idefics3, arXiv 2408.12637; nanoVLM)
    pixel_shuffle_mlp     the same shuffle, LayerNorm, Linear, GELU, Linear (InternVL 2.5 and 3, arXiv 2412.05271)
    perceiver             gated MLP to the text's width, then latents that attend to it (Idefics2, arXiv 2405.02246)
    avgpool_rms_linear    mean of factor² neighbours, RMSNorm with 1 + weight, one matrix (Gemma 3, arXiv 2503.19786)

Attributes bear the names of the released weights; each module equals its counterpart in transformers on the same weights
(results/vlm_parity.json, held by tests).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit import UserError


def build(name: str, width_in: int, width_out: int, *, num_tokens: int, seed: int = 0, **options: Any) -> nn.Module:
    """A new projector of the table PROJECTORS: [B, num_tokens, width_in] -> [B, module.num_tokens_out, width_out].

    Tokens are patches in raster order without prefix tokens. Weights are a function of `seed` alone (the global generator
    is left as it was): matrices ~ N(0, 1 / fan_in), biases 0, norms at rest. Two released habits are not followed: Gemma 3's
    matrix starts at zero, Idefics2's latents at one, which makes all of them alike. Under `torch.device("meta")` nothing is
    allocated. Raises UserError for an unknown name or option, and for sizes that do not fit.
    """
    if name not in PROJECTORS:
        raise UserError(f"unknown projector {name!r}; choose one of {', '.join(PROJECTORS)}")
    known = options_of(name)
    for option in options.keys() - known.keys():
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"projector {name} has no option {option!r}; {has}")
    for what, value in dict(width_in=width_in, width_out=width_out, num_tokens=num_tokens, **options).items():
        if type(value) is not int or value < 1:
            raise UserError(f"{what}={value!r} of projector {name} does not fit; give a whole number of at least 1")
    options = known | options
    if "factor" in options:
        num_tokens = (grid_side(num_tokens, options["factor"]) // options["factor"]) ** 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = PROJECTORS[name](width_in, width_out, **options)
        initialise(module)
    module.num_tokens_out = options.get("num_latents", num_tokens)
    return module


def parse(projector: str) -> tuple[str, dict[str, int]]:
    """(name, options) of a text such as pixel_shuffle_linear?factor=2. Raises UserError for what is no option."""
    name, _, options = projector.partition("?")
    given = {}
    for option in filter(None, options.split("&")):
        key, equals, value = option.partition("=")
        if not equals or not value.isdecimal():
            raise UserError(f"projector={projector!r}: {option!r} is no option; give such as factor=2")
        given[key] = int(value)
    return name, given


def options_of(name: str) -> dict[str, Any]:
    """The options of a projector with their defaults."""
    return OPTIONS.get(name, {})


def initialise(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, Resampler):
            nn.init.normal_(m.latents)
        elif isinstance(m, AvgpoolRmsLinear):
            nn.init.normal_(m.mm_input_projection_weight, std=m.mm_input_projection_weight.shape[0] ** -0.5)


# one matrix, or two -------------------------------------------------------------------------------------------------


def linear(width_in: int, width_out: int) -> nn.Module:
    return nn.Linear(width_in, width_out)


def mlp2x_gelu(width_in: int, width_out: int) -> nn.Module:
    layers = dict(linear_1=nn.Linear(width_in, width_out), act=nn.GELU(), linear_2=nn.Linear(width_out, width_out))
    return nn.Sequential(OrderedDict(layers))


# neighbours to channels -----------------------------------------------------------------------------------------------


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """[B, N, D] of a square grid -> [B, N / factor², factor² D], both in raster order.

    Within a block: row, column, channel, the channel fastest, as in Idefics3, SmolVLM, nanoVLM, Llama 4 and InternVL's
    second version.
    """
    batch, num_tokens, width = x.shape
    side = grid_side(num_tokens, factor) // factor
    x = x.reshape(batch, side, factor, side, factor, width).transpose(2, 3)  # [B, rows, columns, row, column, D]
    return x.reshape(batch, side * side, factor * factor * width)


def grid_side(num_tokens: int, factor: int) -> int:
    """Tokens a side. Raises UserError where they make no square, or `factor` does not divide it."""
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise UserError(
            f"num_tokens={num_tokens} is no square grid; give patch tokens alone, such as {side * side} ({side} x {side})"
        )
    if side % factor:
        divisors = ", ".join(str(d) for d in range(1, side + 1) if side % d == 0)
        raise UserError(f"factor={factor} does not divide a grid of {side} x {side} tokens; choose one of {divisors}")
    return side


class PixelShuffle(nn.Module):
    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return space_to_depth(x, self.factor)


def pixel_shuffle_linear(width_in: int, width_out: int, factor: int) -> nn.Module:
    layers = dict(shuffle=PixelShuffle(factor), proj=nn.Linear(factor**2 * width_in, width_out, bias=False))
    return nn.Sequential(OrderedDict(layers))


def pixel_shuffle_mlp(width_in: int, width_out: int, factor: int) -> nn.Module:
    wide = factor**2 * width_in
    before = OrderedDict(shuffle=PixelShuffle(factor), layer_norm=nn.LayerNorm(wide))
    return nn.Sequential(before | dict(mlp2x_gelu(wide, width_out).named_children()))


class AvgpoolRmsLinear(nn.Module):
    def __init__(self, width_in: int, width_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.mm_input_projection_weight = nn.Parameter(torch.empty(width_in, width_out))
        self.mm_soft_emb_norm = OnePlusRmsNorm(width_in)

    def forward(self, x: Tensor) -> Tensor:
        batch, num_tokens, width = x.shape
        side = grid_side(num_tokens, self.factor)
        grid = x.transpose(1, 2).reshape(batch, width, side, side).contiguous()  # else pooling sums in another order
        pooled = F.avg_pool2d(grid, self.factor).flatten(2).transpose(1, 2)  # [B, M, width_in]
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight


class OnePlusRmsNorm(nn.Module):
    """Gemma's: x / rms(x) * (1 + weight), in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS)
        return (normed * (1 + self.weight.float())).type_as(x)


RMS_EPS = 1e-6  # of Gemma 3's and Idefics2's norms


# latents that attend ------------------------------------------------------------------------------------------------


class GatedMlp(nn.Module):
    def __init__(self, width_in: int, mlp_dim: int, width_out: int):
        super().__init__()
        self.gate_proj = nn.Linear(width_in, mlp_dim, bias=False)
        self.up_proj = nn.Linear(width_in, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Latents:
    """Of the perceiver, as released. `mlp_dim` is the language model's, None: 4 x width_out."""

    num_latents: int = 64
    depth: int = 3
    num_heads: int = 16
    head_dim: int = 96
    num_kv_heads: int = 4
    mlp_dim: int | None = None


class Resampler(nn.Module):
    def __init__(self, width: int, options: Latents):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(options.num_latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, options) for _ in range(options.depth))
        self.norm = nn.RMSNorm(width, RMS_EPS)

    def forward(self, context: Tensor) -> Tensor:
        latents = self.latents.expand(len(context), -1, -1)  # [B, M, D]
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)


class ResamplerLayer(nn.Module):
    def __init__(self, width: int, options: Latents):
        super().__init__()
        self.input_latents_norm = nn.RMSNorm(width, RMS_EPS)
        self.input_context_norm = nn.RMSNorm(width, RMS_EPS)
        self.self_attn = ResamplerAttention(width, options)
        self.post_attention_layernorm = nn.RMSNorm(width, RMS_EPS)
        self.mlp = GatedMlp(width, 4 * width, width)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        latents = latents + self.self_attn(self.input_latents_norm(latents), self.input_context_norm(context))
        return latents + self.mlp(self.post_attention_layernorm(latents))


class ResamplerAttention(nn.Module):
    """Latents ask; context and latents together answer."""

    def __init__(self, width: int, options: Latents):
        super().__init__()
        self.head_dim = options.head_dim
        inner, shared = options.num_heads * options.head_dim, options.num_kv_heads * options.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        seen = torch.cat((context, latents), 1)  # [B, N + M, D]
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, tokens, head_dim]
            for x in (self.q_proj(latents), self.k_proj(seen), self.v_proj(seen))
        )
        x = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


def perceiver(width_in: int, width_out: int, **given: Any) -> nn.Module:
    """Idefics2's connector."""
    options = Latents(**given)
    if options.num_heads % options.num_kv_heads:
        raise UserError(
            f"num_heads={options.num_heads} is not a multiple of num_kv_heads={options.num_kv_heads}; give one that is"
        )
    gated = GatedMlp(width_in, options.mlp_dim or 4 * width_out, width_out)
    layers = dict(modality_projection=gated, perceiver_resampler=Resampler(width_out, options))
    return nn.Sequential(OrderedDict(layers))


PROJECTORS: dict[str, Any] = {
    "linear": linear,
    "mlp2x_gelu": mlp2x_gelu,
    "pixel_shuffle_linear": pixel_shuffle_linear,
    "pixel_shuffle_mlp": pixel_shuffle_mlp,
    "perceiver": perceiver,
    "avgpool_rms_linear": AvgpoolRmsLinear,
}
FACTOR = {"factor": 2}  # tokens a side that become one
OPTIONS: dict[str, dict[str, Any]] = {
    "pixel_shuffle_linear": FACTOR,
    "pixel_shuffle_mlp": FACTOR,
    "avgpool_rms_linear": FACTOR,
    "perceiver": dataclasses.asdict(Latents()),
}
