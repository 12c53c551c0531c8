"""`sovit vlm show`: a system's stages with their shapes, its modules and what each weighs, from its table of dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sovit.vlm.projectors import options_of
from sovit.vlm.systems.systems import OUR_TOWERS, SYSTEMS, System, build, build_reference, find, num_params, trace

PARTS = {"vision": "vision encoder", "projector": "projector", "language_model": "language model"}
HOW = {  # what a projector does to the tokens
    "linear": "one matrix",
    "mlp2x_gelu": "Linear, GELU, Linear",
    "pixel_shuffle_linear": "{factor} x {factor} neighbours to channels, one matrix",
    "pixel_shuffle_mlp": "{factor} x {factor} neighbours to channels, LayerNorm, Linear, GELU, Linear",
    "perceiver": "gated MLP, then {num_latents} latents that attend to the tokens",
    "avgpool_rms_linear": "mean of {factor} x {factor} neighbours, RMSNorm, one matrix",
}
ENCODERS = {"clip_vision_model": "CLIP", "internvl_vision": "InternViT"}  # all else here is SigLIP's


def compare() -> list[dict[str, Any]]:
    """One row a system, from the smallest to the largest; everything counted on modules, nothing typed in."""
    rows = [_weigh(name)[2] for name in SYSTEMS]
    return sorted(rows, key=lambda row: row["num_params"]["total"])


def describe(name: str) -> dict[str, Any]:
    """A system's row, the shapes of its stages, its module tree, and the count of an independent build of it.

    Raises UserError for an unknown system.
    """
    system, modules, row = _weigh(name)
    reference = build_reference(system)
    total, by = system.stated_params, "as its authors state"
    if reference is not None:
        total, by = num_params(reference), f"transformers {type(reference).__name__}"
    return row | dict(
        reference=None if total is None else dict(total=total, by=by, equal=total == row["num_params"]["total"]),
        stages={stage: list(shape) for stage, shape in trace(system, modules).items()},
        tree=[vars(node) for part in PARTS for node in tree(modules[part], part)],
    )


def _weigh(name: str) -> tuple[System, nn.ModuleDict, dict[str, Any]]:
    """(the system, its modules on the meta device, its row of the comparison)."""
    system = find(name)
    modules = build(system)
    params = {part: num_params(modules[part]) for part in PARTS}
    ours = system.tower in OUR_TOWERS
    row = dict(
        system=name,
        title=system.title,
        source=system.source,
        preprocess=system.preprocess,
        encoder=system.shape.to_dict() | dict(tower=system.tower),
        encoder_counted_by="sovit" if ours else f"transformers {type(modules['vision']).__name__}",
        feature_layer=system.feature_layer,
        feature_norm=system.feature_norm,
        dropped_tokens=system.shape.num_prefix_tokens,
        projector=system.projector,
        options=options_of(system.projector) | system.options,
        entry=system.entry,
        language_model=system.text,
        num_patches=system.shape.num_patches,
        tokens_per_tile=modules["projector"].num_tokens_out,
        max_tiles=system.max_tiles,
        num_params=params | dict(total=num_params(modules)),
        projector_share=params["projector"] / num_params(modules),
    )
    return system, modules, row


# the module tree -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A line of a module tree. `what` has the sizes of one, `params` are those of all repeats of it and of what it is in."""

    level: int
    name: str
    repeats: int
    what: str
    params: int


def tree(module: nn.Module, name: str) -> list[Node]:
    """The modules that hold parameters: equal neighbours in a list once, a module of plain layers in one line."""
    return _tree(module, name, 0, 1, set())


def _tree(module: nn.Module, name: str, level: int, times: int, seen: set[int]) -> list[Node]:
    while len(_children(module)) == 1 and not _own(module):  # a wrapper of one: patch_embed.proj
        inner, module = _children(module)[0]
        name = f"{name}.{inner}"
    params, repeats = times * num_params(module), 1
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike(_children(module)):
        repeats, module = len(module), _children(module)[0][1]
        times *= repeats
    children, own, kind = _children(module), _own(module), type(module).__name__
    if not children:
        tied = all(id(p) in seen for _, p in own)  # a language model's head that is its embedding
        seen |= {id(p) for _, p in own}
        what = f"{kind} {_sizes(module)}" + ", tied to the embedding" * tied
        return [Node(level, name, repeats, what, 0 if tied else params)]
    if not own and all(isinstance(m, nn.Linear) or _is_norm(m) for _, m in children):
        return [Node(level, name, repeats, _layers(children), params)]
    lines = [Node(level, name, repeats, kind, params)]
    lines += [Node(level + 1, n, 1, f"Parameter {_times(p.shape)}", times * p.numel()) for n, p in own]
    for n, m in children:
        lines += _tree(m, n, level + 1, times, seen)
    return lines


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_children() if num_params(m)]


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _alike(children: list[tuple[str, nn.Module]]) -> bool:
    return len({tuple((n, p.shape) for n, p in m.named_parameters()) for _, m in children}) == 1


def _is_norm(module: nn.Module) -> bool:
    return not _children(module) and all(p.ndim == 1 for p in module.parameters())


def _layers(children: list[tuple[str, nn.Module]]) -> str:
    """`q 64 → 64, k v 64 → 16`: neighbours of one size together."""
    parts: list[tuple[list[str], str]] = []
    for name, module in children:
        if not parts or parts[-1][1] != _sizes(module):
            parts.append(([], _sizes(module)))
        parts[-1][0].append(name.removesuffix("_proj"))
    return ", ".join(f"{' '.join(names)} {sizes}" for names, sizes in parts)


def _sizes(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.in_features} → {module.out_features}"
    if isinstance(module, nn.Conv2d):
        return f"{module.in_channels} → {module.out_channels}, {_times(module.kernel_size)}"
    return _times(next(module.parameters()).shape)


def _times(sizes: Any) -> str:
    return " x ".join(str(size) for size in sizes)


# in words -------------------------------------------------------------------------------------------------------------


def compare_text(rows: list[dict[str, Any]]) -> str:
    made = [["system", "encoder", "block read", "patches", "projector", "tokens", "language model", "vocab"]]
    weights = [["parameters", *PARTS.values(), "total", "projector's share", "encoder counted by"]]
    for row in rows:
        e, text, params = row["encoder"], row["language_model"], row["num_params"]
        made.append(
            [
                row["system"],
                f"{ENCODERS.get(e['tower'], 'SigLIP')} {e['width']}x{e['depth']}/{e['patch_size']}@{e['image_size']}",
                str(row["feature_layer"]) + ", norm" * row["feature_norm"],
                str(row["num_patches"]),
                row["projector"] + (f" {row['options']['factor']}" if "factor" in row["options"] else ""),
                str(row["tokens_per_tile"]) + (f" x {row['max_tiles']}" if row["max_tiles"] > 1 else ""),
                f"{_family(text)} {text['hidden_size']}x{text['num_hidden_layers']}",
                str(text["vocab_size"]),
            ]
        )
        weights.append(
            [
                row["system"],
                *(f"{params[part]:,}" for part in (*PARTS, "total")),
                f"{100 * row['projector_share']:.2f} %",
                row["encoder_counted_by"].removeprefix("transformers "),
            ]
        )
    return "\n\n".join(
        [
            columns(made, left=(0, 1, 2, 4, 6)),
            columns(weights, left=(0, 6)),
            "Encoder: width x depth / patch @ pixels. Block read: -1 the last; norm: through the final norm.\n"
            "Tokens: of one view x the most views of an image. Language model: width x layers. Tied parameters count once.\n"
            "`sovit vlm show SYSTEM` takes one apart and holds its total to that of transformers' own class.",
        ]
    )


def describe_text(found: dict[str, Any]) -> str:
    return "\n\n".join([f"{found['title']}, {found['source']}", _stages(found), _modules(found), _parts(found)])


def _stages(found: dict[str, Any]) -> str:
    e, stages, text = found["encoder"], found["stages"], found["language_model"]
    side, num_out = e["image_size"] // e["patch_size"], found["tokens_per_tile"]
    views = f"; 1 to {found['max_tiles']} views an image" if found["max_tiles"] > 1 else ""
    norm = "through the final norm" if found["feature_norm"] else "no final norm"
    block = e["depth"] + found["feature_layer"] + 1
    words = {
        "image": found["preprocess"],
        "patches": f"{side} x {side} patches of {e['patch_size']} x {e['patch_size']} pixels in three colours",
        "encoder": f"{ENCODERS.get(e['tower'], 'SigLIP')}, {e['depth']} blocks, {e['width'] // e['head_dim']} heads",
        "features": f"behind block {block} of {e['depth']}, {norm}" + ", class token dropped" * found["dropped_tokens"],
        "projector": f"{found['projector']}: {HOW[found['projector']].format(**found['options'])}",
        "sequence": f"{num_out} tokens {found['entry']} {stages['sequence'][1] - num_out} words{views}",
        "logits": f"{_family(text)}, {text['num_hidden_layers']} layers",
    }
    rows = [[stage, _times(["B", *shape[1:]]), words[stage]] for stage, shape in stages.items()]
    return columns([["stage", "shape", ""], *rows], left=(0, 1, 2))


def _modules(found: dict[str, Any]) -> str:
    rows = [["module", "", "parameters"]]
    for node in (Node(**node) for node in found["tree"]):
        what = f"{node.repeats} x {node.what}" if node.repeats > 1 else node.what
        rows.append(["  " * node.level + node.name, what, f"{node.params:,}" if node.params else "counted above"])
    return columns(rows, left=(0, 1))


def _parts(found: dict[str, Any]) -> str:
    params, reference = found["num_params"], found["reference"]
    by = dict(zip(PARTS, (found["encoder_counted_by"], "sovit", "transformers")))
    rows = [["part", "parameters", "share", "counted by"]]
    for part, title in PARTS.items():
        rows.append([title, f"{params[part]:,}", f"{100 * params[part] / params['total']:.2f} %", by[part]])
    rows.append(["total", f"{params['total']:,}", "100 %", ""])
    if reference is not None:
        rows.append(
            ["the whole", f"{reference['total']:,}", "equal" if reference["equal"] else "NOT EQUAL", reference["by"]]
        )
    return columns(rows, left=(0, 3))


def _family(text: dict[str, Any]) -> str:
    return text["model_type"].removesuffix("_text")


def columns(rows: list[list[str]], left: tuple[int, ...]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )
