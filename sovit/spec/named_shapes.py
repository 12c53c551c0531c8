"""Published shapes by name: B/16, So400m/14, 192x12x768, timm's names and open_clip's."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from sovit import UserError
from sovit.spec.shape import Shape

# width, depth, mlp_dim, num_heads, pool. big_vision models/vit.py decode_variant; SoViT: arXiv 2305.13035 Table 1, App. B
VARIANTS = {
    "mu": (32, 1, 128, 2, "avg"),
    "Ti": (192, 12, 768, 3, "avg"),
    "S": (384, 12, 1536, 6, "avg"),
    "M": (512, 12, 2048, 8, "avg"),
    "B": (768, 12, 3072, 12, "avg"),
    "L": (1024, 24, 4096, 16, "map"),
    "So150m": (880, 18, 2320, 16, "map"),  # as printed; 16 heads give a head_dim of 55
    "So400m": (1152, 27, 4304, 16, "map"),
    "H": (1280, 32, 5120, 16, "avg"),
    "g": (1408, 40, 6144, 16, "map"),
    "g-opt": (1536, 40, 6144, 16, "map"),
    "G": (1664, 48, 8192, 16, "map"),
    "G-opt": (1536, 48, 8192, 16, "map"),
    "e": (1792, 56, 15360, 16, "map"),
}


def _timm(width: int, depth: int, mlp_dim: int, num_heads: int, patch: int, *rest: Any) -> Shape:
    return Shape(width, depth, mlp_dim, width // num_heads, patch, *rest)


# timm 1.0.31 names, so that counting needs neither torch nor timm; a test builds each with timm and compares
TIMM_SHAPES = {
    "vit_tiny_patch16_224": _timm(192, 12, 768, 3, 16, 224, "token"),
    "vit_tiny_patch16_384": _timm(192, 12, 768, 3, 16, 384, "token"),
    "vit_small_patch32_224": _timm(384, 12, 1536, 6, 32, 224, "token"),
    "vit_small_patch16_224": _timm(384, 12, 1536, 6, 16, 224, "token"),
    "vit_small_patch16_384": _timm(384, 12, 1536, 6, 16, 384, "token"),
    "vit_small_patch8_224": _timm(384, 12, 1536, 6, 8, 224, "token"),
    "vit_base_patch32_224": _timm(768, 12, 3072, 12, 32, 224, "token"),
    "vit_base_patch16_224": _timm(768, 12, 3072, 12, 16, 224, "token"),
    "vit_base_patch16_384": _timm(768, 12, 3072, 12, 16, 384, "token"),
    "vit_base_patch8_224": _timm(768, 12, 3072, 12, 8, 224, "token"),
    "vit_large_patch16_224": _timm(1024, 24, 4096, 16, 16, 224, "token"),
    "vit_large_patch16_384": _timm(1024, 24, 4096, 16, 16, 384, "token"),
    "vit_large_patch14_224": _timm(1024, 24, 4096, 16, 14, 224, "token"),
    "vit_huge_patch14_224": _timm(1280, 32, 5120, 16, 14, 224, "token"),
    "vit_giant_patch14_224": _timm(1408, 40, 6144, 16, 14, 224, "token"),
    "vit_gigantic_patch14_224": _timm(1664, 48, 8192, 16, 14, 224, "token"),
    "vit_base_patch16_siglip_224": _timm(768, 12, 3072, 12, 16, 224, "map"),
    "vit_base_patch16_siglip_384": _timm(768, 12, 3072, 12, 16, 384, "map"),
    "vit_large_patch16_siglip_256": _timm(1024, 24, 4096, 16, 16, 256, "map"),
    "vit_large_patch16_siglip_384": _timm(1024, 24, 4096, 16, 16, 384, "map"),
    "vit_so400m_patch14_siglip_224": _timm(1152, 27, 4304, 16, 14, 224, "map"),
    "vit_so400m_patch14_siglip_384": _timm(1152, 27, 4304, 16, 14, 378, "map"),
    "vit_so400m_patch16_siglip_256": _timm(1152, 27, 4304, 16, 16, 256, "map"),
    "vit_so400m_patch14_siglip_gap_224": _timm(1152, 27, 4304, 16, 14, 224, "avg"),
    "vit_so150m_patch16_reg4_map_256": _timm(896, 18, 2304, 14, 16, 256, "map", 4),
    "vit_so150m_patch16_reg4_gap_256": _timm(896, 18, 2304, 14, 16, 256, "avg", 4),
    "vit_so150m2_patch16_reg1_gap_256": _timm(832, 21, 2176, 13, 16, 256, "avg", 1, False, True),
}


# the sizes in open_clip's names ViT-SIZE-PATCH[-KIND][-IMAGE_SIZE] -> variant (open_clip model_configs/*.json)
OPEN_CLIP = {
    "SO400M": "So400m",
    "bigG": "G",
    "gopt": "g-opt",
    **{size: size for size in ("S", "M", "B", "L", "H", "g", "e")},
}
OPEN_CLIP_NAME = re.compile(
    r"ViT-(\w+)-([1-9]\d*)(?:-(SigLIP2?|CLIPA))?(?:-i18n|-worldwide)?(?:-(\d+))?(?:-quickgelu)?"  # the others count alike
)


class UnknownShape(UserError):
    """A name that stands in no table here."""


@dataclass(frozen=True)
class Named:
    """What a name stands for: a shape, and what its network has beside the plain ViT of that shape, with a word on it."""

    shape: Shape
    more_params: int = 0
    note: str = ""

    def counts(self, num_classes: int = 0) -> dict[str, int]:
        """Count as `Shape.counts` does, with the parameters of this very network."""
        return self.shape.counts(num_classes) | {"num_params": self.shape.num_params + self.more_params}


def named_shape(name: str, **changes: Any) -> Shape:
    """Look up the plain ViT of a name; see `named`. Raises UserError for a name of another network.

    >>> sovit.named_shape("So400m/14").label, sovit.named_shape("B/16").num_params
    ('1152x27x4304', 85797120)
    """
    found = named(name, **changes)
    if found.more_params:
        raise UserError(f"{name} is no plain ViT ({found.note}), only counted; give a plain one, such as B/16")
    return found.shape


def named(name: str, **changes: Any) -> Named:
    """Look up `B/16`, `So400m/14@378` (variant/patch@image size), `192x12x768[x64]` (width, depth, mlp_dim, head_dim), or a
    name of timm or open_clip, which may say whose weights it means; `changes` override fields.

    Raises UnknownShape, with the nearest known names, for a name that is not in the tables, UserError for a shape that
    cannot be built.
    """
    if shape := TIMM_SHAPES.get(name.partition(".")[0]):  # behind the dot: which weights, all of one shape
        said = int(name.partition(".")[0].rpartition("_")[2])
        return Named(shape.replace(**changes), note=_unread(said, shape) if "image_size" not in changes else "")
    if re.fullmatch(r"\d+(x\d+){2,3}", name):
        sizes: dict = dict(zip(("width", "depth", "mlp_dim", "head_dim"), map(int, name.split("x"))))
        try:
            return Named(Shape(**sizes | changes))
        except UserError as error:
            raise UserError(f"shape {name!r}, WIDTHxDEPTHxMLP_DIM[xHEAD_DIM], cannot be built: {error}") from None
    if (clip := OPEN_CLIP_NAME.fullmatch(name)) and clip[1] in OPEN_CLIP:
        return _open_clip(*clip.groups(), **changes)
    variant, slash, rest = name.partition("/")
    patch, at, size = rest.partition("@")
    if variant in VARIANTS and slash and patch.isdecimal() and (size.isdecimal() or not at):
        fields = dict(patch_size=int(patch), image_size=int(size) if at else 224)
        return Named(_variant(variant, **fields | changes))
    known = [f"{v}/{p}" for v in VARIANTS for p in (14, 16)] + list(TIMM_SHAPES) + ["ViT-B-16", "ViT-L-14-336"]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    forms = "VARIANT/PATCH[@SIZE], WIDTHxDEPTHxMLP_DIM, a timm or an open_clip name"
    raise UnknownShape(f"unknown shape {name!r}; write {forms}, such as {', '.join(near)}")


def _variant(name: str, **fields: Any) -> Shape:
    width, depth, mlp_dim, num_heads, pool = VARIANTS[name]
    own: dict = dict(width=width, depth=depth, mlp_dim=mlp_dim, head_dim=width // num_heads, pool=pool)
    return Shape(**own | fields)


def _open_clip(variant: str, patch: str, kind: str | None, size: str | None, **changes: Any) -> Named:
    """The image side of an open_clip model; its projection to the words' space is a head, and apart."""
    patch_size, image_size = changes.get("patch_size", int(patch)), int(size or 224)
    siglip = (kind or "").startswith("SigLIP")
    fields: dict = dict(patch_size=patch_size, pool="map" if siglip else "token")
    shape = _variant(OPEN_CLIP[variant], **fields | {"image_size": image_size // patch_size * patch_size} | changes)
    note = "" if "image_size" in changes else _unread(image_size, shape)
    if siglip:
        return Named(shape, note=note)
    words = "no patch bias" if kind == "CLIPA" else "no patch bias, a norm before the blocks"
    return Named(shape, -shape.width if kind == "CLIPA" else shape.width, f"{words}; {note}".removesuffix("; "))


def _unread(image_size: int, shape: Shape) -> str:
    """What a patch that does not divide the image leaves of it."""
    return "" if image_size == shape.image_size else f"its patches read {shape.image_size} of {image_size} px"
