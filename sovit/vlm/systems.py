"""Released vision-language models built from their dimensions (systems.toml) on the meta device: no download, no memory.

A system is an encoder (a sovit Shape), a projector of sovit.vlm.projectors, and a causal language model of transformers.
Where our encoder's parameters are those of the released tower (SigLIP and its descendants) the tower is built by us;
CLIP (a norm before the blocks, no bias in the patch embedding) and InternViT (no final norm) are transformers' classes.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sovit import UserError
from sovit.encoder.model import build as build_encoder
from sovit.encoder.open import timm_encoder
from sovit.spec.named_shapes import named_shape
from sovit.spec.shape import Shape
from sovit.tables import text_table
from sovit.vlm.projectors import build as build_projector
from sovit.vlm.projectors import options_of

OUR_TOWERS = {"siglip_vision_model", "idefics2_vision", "idefics3_vision", "smolvlm_vision"}
ENCODERS = {"clip_vision_model": "CLIP", "internvl_vision": "InternViT"}  # all else here is SigLIP's
NUM_WORDS = 32  # of text beside the image, in a trace
PARTS = {"vision": "vision encoder", "projector": "projector", "language_model": "language model"}
TABLES = tomllib.loads(Path(__file__).with_name("systems.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class System:
    """One released system.

    family, tower: transformers' `model_type` of the whole and of the encoder. shape.pool: "token" where a class token, which
    is dropped, stands before the patches, else "none". feature_layer: block that is read (-1 the last); feature_norm:
    whether through the final norm. text: arguments of the language model's config. entry: how the image's tokens reach it.
    max_tiles: views of an image, that of the whole included. whole: further arguments of the config of the whole, None
    where transformers has no class of it; stated_params: what its authors count then.
    """

    family: str
    title: str
    source: str
    tower: str
    shape: Shape
    projector: str
    text: dict[str, Any]
    preprocess: str
    options: dict[str, int] = field(default_factory=dict)
    feature_layer: int = -1
    feature_norm: bool = True
    entry: str = "replace placeholders among"
    max_tiles: int = 1
    whole: dict[str, Any] | None = None
    stated_params: int | None = None


def _system(own: dict[str, Any]) -> System:
    family = TABLES["families"][own["family"]]
    fields = family | own
    sizes = zip(TABLES["dimensions"], fields.pop("dimensions"), strict=True)
    text = family["text"] | dict(sizes) | own.get("text", {})
    return System(**fields | dict(shape=named_shape(**fields["shape"]), text=text))


SYSTEMS = {name: _system(own) for name, own in TABLES["systems"].items()}


def find(name: str) -> System:
    """Look up a system. Raises UserError for a name that is not in the table."""
    if name not in SYSTEMS:
        raise UserError(f"unknown system {name!r}; choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


# built on the meta device --------------------------------------------------------------------------------------------


def build(system: System) -> nn.ModuleDict:
    """{"vision", "projector", "language_model"} on the meta device: every tensor has a shape and no memory."""
    transformers, shape = _transformers(), system.shape
    vision_config, text_config = _configs(system)
    with torch.device("meta"):
        ours = system.tower in OUR_TOWERS
        vision = build_encoder(shape) if ours else transformers.AutoModel.from_config(vision_config)
        text = transformers.AutoModelForCausalLM.from_config(text_config)
        width = system.text["hidden_size"]
        projector = build_projector(
            system.projector, shape.width, width, num_tokens=shape.num_patches, **system.options
        )
    return nn.ModuleDict(dict(vision=vision, projector=projector, language_model=text)).eval()


def build_reference(system: System) -> nn.Module | None:
    """transformers' own class of the whole system on the meta device, from its config; None where it has none."""
    if system.whole is None:
        return None
    transformers = _transformers()
    vision, text = (config.to_dict() for config in _configs(system))
    tied = system.text["tie_word_embeddings"]
    config = transformers.AutoConfig.for_model(
        system.family, vision_config=vision, text_config=text, tie_word_embeddings=tied, **system.whole
    )
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def _configs(system: System) -> tuple[Any, Any]:
    """transformers' configs of the encoder and of the language model."""
    make, shape = _transformers().AutoConfig.for_model, system.shape
    more = {"siglip_vision_model": {"vision_use_head": False}, "internvl_vision": {"attention_bias": shape.qkv_bias}}
    sizes = dict(zip(TABLES["dimensions"], (shape.width, shape.depth, shape.mlp_dim, shape.num_heads)))
    sizes |= dict(patch_size=shape.patch_size, image_size=shape.image_size)
    return make(system.tower, **sizes, **more.get(system.tower, {})), make(**system.text)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("systems are built with transformers; run: pip install 'sovit[vlm]'") from None
    transformers.logging.set_verbosity_error()  # token ids of tokenizers that are not here
    return transformers


def num_params(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def trace(system: System, modules: nn.ModuleDict) -> dict[str, tuple[int, ...]]:
    """The shape of one image's tensors behind each stage, with NUM_WORDS of text, as the modules give them."""
    size, patch, text = system.shape.image_size, system.shape.patch_size, cast(Any, modules["language_model"])
    with torch.device("meta"):
        image = torch.empty(1, 3, size, size)
        found = {"image": image, "patches": F.unfold(image, patch, stride=patch).transpose(1, 2)}  # [1, N, 3 p²]
        found["encoder"], found["features"] = _features(system, modules["vision"], image)
        found["projector"] = modules["projector"](found["features"])
        words = text.get_input_embeddings()(torch.empty(1, NUM_WORDS, dtype=torch.long))
        found["sequence"] = torch.cat((found["projector"], words), 1)
        n = found["sequence"].shape[1]
        mask = torch.empty(1, 1, n, n, dtype=torch.bool)  # in full: what transformers makes itself, it reads values of
        found["logits"] = text(inputs_embeds=found["sequence"], attention_mask=mask, use_cache=False).logits
    return {stage: tuple(tensor.shape) for stage, tensor in found.items()}


def _features(system: System, vision: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """(what the block hands on [1, prefix + N, D], patch tokens [1, N, D]) of the system's feature layer."""
    layer = system.feature_layer
    if system.tower in OUR_TOWERS:
        encoder = timm_encoder(system.title, vision)
        return encoder.hidden(image, layer % encoder.depth), encoder.tokens(image, layer, system.feature_norm)
    hidden = vision(image, output_hidden_states=True).hidden_states[layer]
    return hidden, hidden[:, system.shape.num_prefix_tokens :]


# sovit vlm show ----------------------------------------------------------------------------------------------------------


def compare() -> list[dict[str, Any]]:
    """One row a system, from the smallest to the largest; everything counted on modules, nothing typed in."""
    rows = [_row(name, build(system)) for name, system in SYSTEMS.items()]
    return sorted(rows, key=lambda row: row["num_params"]["total"])


def describe(name: str) -> dict[str, Any]:
    """A system's row, the shapes of its stages, its module tree, and the count of an independent build of it.

    Raises UserError for an unknown system.
    """
    system = find(name)
    modules, whole = build(system), build_reference(system)
    row, total, by = _row(name, modules), system.stated_params, "as its authors state"
    if whole is not None:
        total, by = num_params(whole), f"transformers {type(whole).__name__}"
    return row | dict(
        reference=None if total is None else dict(total=total, by=by, equal=total == row["num_params"]["total"]),
        stages={stage: list(shape) for stage, shape in trace(system, modules).items()},
        tree=[node._asdict() for part in PARTS for node in tree(modules[part], part)],
    )


def _row(name: str, modules: nn.ModuleDict) -> dict[str, Any]:
    system, total = SYSTEMS[name], num_params(modules)
    params = {part: num_params(modules[part]) for part in PARTS}
    ours = system.tower in OUR_TOWERS
    same = ("title", "source", "preprocess", "feature_layer", "feature_norm", "projector", "entry", "max_tiles")
    return dict(
        system=name,
        **{field: getattr(system, field) for field in same},
        encoder=system.shape.to_dict() | dict(tower=system.tower),
        encoder_counted_by="sovit" if ours else f"transformers {type(modules['vision']).__name__}",
        dropped_tokens=system.shape.num_prefix_tokens,
        options=options_of(system.projector) | system.options,
        language_model=system.text,
        num_patches=system.shape.num_patches,
        tokens_per_tile=modules["projector"].num_tokens_out,
        num_params=params | dict(total=total),
        projector_share=params["projector"] / total,
    )


class Node(NamedTuple):
    """A line of a module tree. `what`: the sizes of one; `params`: of all repeats of it and of what it is in."""

    level: int
    name: str
    repeats: int
    what: str
    params: int


def tree(module: nn.Module, name: str, level: int = 0, times: int = 1, seen: set[int] | None = None) -> list[Node]:
    """The modules that hold parameters: equal neighbours in a list once, a module of plain layers in one line.

    times: how often this one stands in the whole; seen: ids of the parameters of the lines before.
    """
    children, own = _children(module), list(module.named_parameters(recurse=False))
    seen = set() if seen is None else seen
    if len(children) == 1 and not own:  # a wrapper of one: patch_embed.proj
        return tree(children[0][1], f"{name}.{children[0][0]}", level, times, seen)
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({str(m) for _, m in children}) == 1:
        first, *rest = tree(children[0][1], name, level, times * len(children), seen)
        return [first._replace(repeats=len(children)), *rest]
    kind, params = type(module).__name__, times * num_params(module)
    if children and not own and not any(_children(m) for _, m in children):  # plain layers
        layers = groupby(children, lambda child: _sizes(child[1]))
        what = ", ".join(f"{' '.join(n.removesuffix('_proj') for n, _ in like)} {size}" for size, like in layers)
        return [Node(level, name, 1, what, params)]
    tied = bool(own) and seen >= {id(p) for _, p in own}  # a language model's head that is its embedding
    seen |= {id(p) for _, p in own}
    if not children:
        what = f"{kind} {_sizes(module)}" + ", tied to the embedding" * tied
        return [Node(level, name, 1, what, 0 if tied else params)]
    nodes = [Node(level, name, 1, kind, params)]
    nodes += [Node(level + 1, n, 1, f"Parameter {_times(p.shape)}", times * p.numel()) for n, p in own]
    return nodes + [node for n, m in children for node in tree(m, n, level + 1, times, seen)]


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_children() if num_params(m)]


def _sizes(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.in_features} → {module.out_features}"
    return _times(next(module.parameters()).shape)


def _times(sizes: Any) -> str:
    return " x ".join(map(str, sizes))


def compare_text(rows: list[dict[str, Any]]) -> str:
    """Write what each system is made of, and what its parts weigh."""
    columns = TABLES["columns"].values()
    tables = [text_table(list(c), [_fill(c, row) for row in rows], TABLES["left"]) for c in columns]
    return "\n\n".join([*tables, TABLES["notes"]])


def describe_text(found: dict[str, Any]) -> str:
    """Write what `describe` has found: stages, module tree, parts."""
    words = _fill(TABLES["stages"], found)
    stages = [[name, _times(["B", *shape[1:]]), w] for (name, shape), w in zip(found["stages"].items(), words)]
    nodes = []
    for node in (Node(**node) for node in found["tree"]):
        what = f"{node.repeats} x {node.what}" if node.repeats > 1 else node.what
        nodes.append(["  " * node.level + node.name, what, f"{node.params:,}" if node.params else "counted above"])
    counts, whole = found["num_params"], found["reference"]
    by = dict(vision=found["encoder_counted_by"], projector="sovit", language_model="transformers", total="")
    parts = [[PARTS.get(p, p), f"{n:,}", f"{n / counts['total']:.2%}", by[p]] for p, n in counts.items()]
    if whole is not None:
        parts.append(["the whole", f"{whole['total']:,}", "equal" if whole["equal"] else "NOT EQUAL", whole["by"]])
    tables = (
        text_table(["stage", "shape", "what"], stages, ("stage", "shape", "what")),
        text_table(["module", "what", "parameters"], nodes, ("module", "what")),
        text_table(["part", "parameters", "share", "counted by"], parts, ("part", "counted by")),
    )
    return "\n\n".join([f"{found['title']}, {found['source']}", *tables])


def _fill(templates: dict[str, str], row: dict[str, Any]) -> list[str]:
    """Put a system's row into templates of systems.toml."""
    projects = TABLES["projectors"][row["projector"]].format(**row)
    kind = ENCODERS.get(row["encoder"]["tower"], "SigLIP")
    more = dict(encoder_kind=kind, normed="yes" if row["feature_norm"] else "no", projects=projects)
    return [template.format(**row, **more, num_words=NUM_WORDS) for template in templates.values()]
