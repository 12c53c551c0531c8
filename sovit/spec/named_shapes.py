"""Published shapes by name: B/16, So400m/14, timm's names."""

from __future__ import annotations

import difflib
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


def named_shape(name: str, **changes: Any) -> Shape:
    """Look up `B/16`, `So400m/14@378` (variant/patch@image size) or a timm model name; `changes` override fields.

    Raises UserError, with the nearest known names, for a name that is not in the tables.

    >>> sovit.named_shape("So400m/14").label, sovit.named_shape("B/16").num_params
    ('1152x27x4304', 85797120)
    """
    if name in TIMM_SHAPES:
        return TIMM_SHAPES[name].replace(**changes)
    variant, slash, rest = name.partition("/")
    patch, at, size = rest.partition("@")
    if variant in VARIANTS and slash and patch.isdecimal() and (size.isdecimal() or not at):
        width, depth, mlp_dim, num_heads, pool = VARIANTS[variant]
        fields: dict = dict(width=width, depth=depth, mlp_dim=mlp_dim, head_dim=width // num_heads, pool=pool)
        fields |= dict(patch_size=int(patch), image_size=int(size) if at else 224)
        return Shape(**fields | changes)
    known = [f"{v}/{p}" for v in VARIANTS for p in (14, 16)] + list(TIMM_SHAPES)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    raise UserError(f"unknown shape {name!r}; write VARIANT/PATCH[@SIZE] or a timm name, such as {', '.join(near)}")
