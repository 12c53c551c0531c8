"""Each projector and each system beside its counterpart in transformers; run by hand it writes the two tables.

    python tests/bench/parity_table.py --out FOLDER    ->  FOLDER/vlm_parity.json, FOLDER/vlm_systems.json

The committed tables are in results.

nanoVLM is no package: its projector is written here once more, from what it does, with an index for every element.
"""

import argparse
import json
import re
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn

from sovit.vlm.projectors import build

TABLE = Path(__file__).resolve().parents[2] / "results" / "vlm_parity.json"
SYSTEMS_TABLE = TABLE.with_name("vlm_systems.json")
BATCH = 2


def text(model_type, width, **more):
    heads = dict(num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vocab_size=64)
    return dict(model_type=model_type, hidden_size=width, intermediate_size=3 * width, **heads) | more


def vision(model_type, width, grid):
    size = dict(image_size=7 * grid, patch_size=7, hidden_size=width, intermediate_size=2 * width)
    return dict(model_type=model_type, num_hidden_layers=1, num_attention_heads=2, **size)


def mllama(width_in, width_out, grid):
    from transformers.models.mllama.modeling_mllama import MllamaModel

    # its vision output is a concatenation: the final features and those of one layer between
    half = width_in // 2
    tower = dict(
        hidden_size=half, vision_output_dim=width_in, num_hidden_layers=1, num_global_layers=1, attention_heads=2
    )
    tower |= dict(intermediate_size=16, image_size=14, patch_size=7, intermediate_layers_indices=[0])
    words = dict(hidden_size=width_out, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    words |= dict(intermediate_size=16, vocab_size=64, cross_attention_layers=[0], pad_token_id=0)
    words |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
    config = transformers.MllamaConfig(vision_config=tower, text_config=words)
    return MllamaModel(config).multi_modal_projector


def llava(width_in, width_out, grid):
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower = vision("clip_vision_model", width_in, grid)
    return LlavaMultiModalProjector(transformers.LlavaConfig(vision_config=tower, text_config=text("llama", width_out)))


def idefics3(width_in, width_out, grid, factor):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    tower = vision("idefics3_vision", width_in, grid)
    words = text("llama", width_out)
    return Idefics3Connector(transformers.Idefics3Config(vision_config=tower, text_config=words, scale_factor=factor))


def smolvlm(width_in, width_out, grid, factor):
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    tower = vision("smolvlm_vision", width_in, grid)
    words = text("llama", width_out)
    return SmolVLMConnector(transformers.SmolVLMConfig(vision_config=tower, text_config=words, scale_factor=factor))


class NanoVlm(nn.Module):
    """nanoVLM's ModalityProjector, element by element: channel (r, c, d) of block (i, j) is channel d of token
    (i factor + r, j factor + c)."""

    def __init__(self, width_in, width_out, grid, factor):
        super().__init__()
        self.grid, self.factor = grid, factor
        self.proj = nn.Linear(factor * factor * width_in, width_out, bias=False)

    def forward(self, x):
        f, blocks = self.factor, range(self.grid // self.factor)
        rows = [
            torch.cat([x[:, (i * f + r) * self.grid + j * f + c] for r in range(f) for c in range(f)], -1)
            for i in blocks
            for j in blocks
        ]
        return torch.stack(rows, 1) @ self.proj.weight.T


class InternVl(nn.Module):
    """transformers shuffles in the model, before its projector; both, as `get_image_features` calls them."""

    def __init__(self, width_in, width_out, grid, factor):
        super().__init__()
        from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

        tower = vision("internvl_vision", width_in, grid) | dict(image_size=[7 * grid] * 2, patch_size=[7, 7])
        words = text("qwen2", width_out)
        config = transformers.InternVLConfig(vision_config=tower, text_config=words, downsample_ratio=1 / factor)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self.factor, self.grid, self.shuffle = factor, grid, InternVLModel.pixel_shuffle

    def forward(self, x):
        x = self.shuffle(self, x.view(len(x), self.grid, self.grid, -1), 1 / self.factor)
        return self.multi_modal_projector(x.flatten(1, 2))


class Idefics2(nn.Module):
    def __init__(self, width_in, width_out, grid, num_latents, depth, num_heads, head_dim, num_kv_heads, mlp_dim):
        super().__init__()
        from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

        latents = dict(hidden_size=width_out, resampler_n_latents=num_latents, resampler_depth=depth)
        latents |= dict(resampler_n_heads=num_heads, resampler_head_dim=head_dim, num_key_value_heads=num_kv_heads)
        words = text("mistral", width_out, intermediate_size=mlp_dim)
        tower = vision("idefics2_vision", width_in, grid)
        config = transformers.Idefics2Config(vision_config=tower, perceiver_config=latents, text_config=words)
        self.connector = Idefics2Connector(config)

    def forward(self, x):
        return self.connector(x, torch.ones(x.shape[:2], dtype=torch.bool))


def gemma3(width_in, width_out, grid, factor):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    tower = vision("siglip_vision_model", width_in, grid)
    words = text("gemma3_text", width_out, head_dim=width_out // 2)
    tokens = (grid // factor) ** 2
    return Gemma3MultiModalProjector(
        transformers.Gemma3Config(vision_config=tower, text_config=words, mm_tokens_per_image=tokens)
    )


SIZES = [(16, 24, 4), (12, 20, 6), (40, 16, 12)]  # width in, width out, tokens a side
SHUFFLES = [(16, 24, 4, 2), (16, 24, 8, 4), (12, 20, 6, 3), (40, 16, 12, 1)]
LATENTS = [  # grid 4: 16 tokens
    dict(num_latents=4, depth=2, num_heads=4, head_dim=6, num_kv_heads=2, mlp_dim=48),
    dict(num_latents=7, depth=1, num_heads=3, head_dim=8, num_kv_heads=1, mlp_dim=32),
    dict(num_latents=2, depth=3, num_heads=2, head_dim=12, num_kv_heads=2, mlp_dim=96),
]


def _cases(oracle, sizes):
    return [(oracle, dict(width_in=a, width_out=b, grid=g)) for a, b, g in sizes]


def _shuffles(oracle, sizes=SHUFFLES):
    return [(oracle, dict(width_in=a, width_out=b, grid=g, factor=f)) for a, b, g, f in sizes]


CASES = {  # (projector, system, oracle's class) -> [(oracle, arguments)]
    ("linear", "Llama 3.2 Vision", "MllamaModel.multi_modal_projector"): _cases(mllama, SIZES),
    ("mlp2x_gelu", "LLaVA-1.5", "LlavaMultiModalProjector"): _cases(llava, SIZES),
    ("pixel_shuffle_linear", "Idefics3", "Idefics3Connector"): _shuffles(idefics3),
    ("pixel_shuffle_linear", "SmolVLM", "SmolVLMConnector"): _shuffles(smolvlm),
    ("pixel_shuffle_linear", "nanoVLM", "element by element"): _shuffles(NanoVlm),
    ("pixel_shuffle_mlp", "InternVL 2.5, 3", "InternVLModel.pixel_shuffle, InternVLMultiModalProjector"): _shuffles(
        InternVl,
        [s for s in SHUFFLES if s[3] != 3],  # it takes the inverse, and refuses 1/3 of any grid
    ),
    ("perceiver", "Idefics2", "Idefics2Connector"): [
        (Idefics2, dict(width_in=16, width_out=24, grid=4) | more) for more in LATENTS
    ],
    ("avgpool_rms_linear", "Gemma 3", "Gemma3MultiModalProjector"): _shuffles(gemma3),
}


def compare(projector, oracle, arguments):
    """Ours and the oracle on the same weights and tokens -> (our output, its output), both [B, M, width_out]."""
    generator = torch.Generator().manual_seed(0)
    reference = oracle(**arguments).eval()
    with torch.no_grad():
        for p in reference.parameters():  # every weight, also those that start at zero or one
            p.normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0, generator=generator)
    options = {k: v for k, v in arguments.items() if k not in ("width_in", "width_out", "grid")}
    num_tokens = arguments["grid"] ** 2
    ours = build(projector, arguments["width_in"], arguments["width_out"], num_tokens=num_tokens, **options)
    prefix = (
        r"^(connector|multi_modal_projector|modality_projection(?=\.proj\.))\."  # of the classes that hold a projector
    )
    ours.load_state_dict({re.sub(prefix, "", key): value for key, value in reference.state_dict().items()})
    x = torch.randn(BATCH, num_tokens, arguments["width_in"], generator=generator)
    with torch.no_grad():
        return ours(x), reference(x)


@cache
def table():
    """One row a projector and oracle: cases compared, largest output, largest difference."""
    rows = []
    for (projector, system, oracle), cases in CASES.items():
        pairs = [compare(projector, *case) for case in cases]
        rows.append(
            dict(
                projector=projector,
                system=system,
                oracle=oracle,
                num_cases=len(pairs),
                max_output=max(theirs.abs().max().item() for _, theirs in pairs),
                max_difference=max((ours - theirs).abs().max().item() for ours, theirs in pairs),
            )
        )
    return rows


def systems_row(found):
    """Of what `sovit vlm show SYSTEM --json` prints: parameters by part, and the independent count of the whole."""
    reference = found["reference"] or {"total": None, "by": None}
    encoder_by = found["encoder_counted_by"]
    return dict(
        system=found["system"], title=found["title"], **found["num_params"], encoder_counted_by=encoder_by,
        reference=reference["total"], reference_by=reference["by"],
    )  # fmt: skip


if __name__ == "__main__":
    from sovit.vlm.systems import compare as compare_systems
    from sovit.vlm.systems import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the two tables")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = table()
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    (out / TABLE.name).write_text(json.dumps(dict(versions=versions, rows=rows), indent=2) + "\n")
    for r in rows:
        print(f"{r['projector']:21} {r['system']:17} {r['num_cases']} cases  {r['max_difference']:.1e}  {r['oracle']}")
    systems = [systems_row(describe(row["system"])) for row in compare_systems()]
    (out / SYSTEMS_TABLE.name).write_text(json.dumps(dict(versions=versions, rows=systems), indent=1) + "\n")
