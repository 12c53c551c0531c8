"""Shape: the dimensions of a Vision Transformer, with exact parameter and FLOP counts in closed form.

FLOPs everywhere: matrix products only, one multiply-add = 2, attention's n^2 products, patch embedding and pooling head
included, forward pass of one image, task heads apart; a training step costs 3 x that. Tests hold every count to the unit.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from sovit import UserError
from sovit.spec.config import Count, Whole, check

DIMENSIONS = ("width", "depth", "mlp_dim", "patch_size", "image_size")  # what a design can sweep and a law can hold
Pool = Literal["avg", "map", "token", "none"]  # "none": no pooling, the head reads every patch token
Trained = Literal["full", "attention", "mlp", "head"]  # what a training moves, as `finetune.freeze` says
POOLS: tuple[Pool, ...] = typing.get_args(Pool)
TRAINED: tuple[Trained, ...] = typing.get_args(Trained)


@dataclass(frozen=True)
class Shape:
    """The dimensions of one plain pre-norm ViT.

    Lengths are in units of features (`width`, `mlp_dim`, `head_dim`), blocks (`depth`) and pixels (`patch_size`,
    `image_size`, both square). Raises UserError for a shape that cannot be built.

    >>> shape = sovit.Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> shape.label, shape.num_params, shape.forward_flops
    ('32x2x128', 27552, 901120)
    """

    width: Count
    depth: Count
    mlp_dim: Count
    head_dim: Count = 64
    patch_size: Count = 16
    image_size: Count = 224
    pool: Pool = "avg"
    num_registers: Whole = 0
    qkv_bias: bool = True
    layer_scale: bool = False

    def __post_init__(self) -> None:
        check(self)
        for name, step in (("width", "head_dim"), ("image_size", "patch_size")):
            value, unit = getattr(self, name), getattr(self, step)
            if value % unit:
                near = max(1, round(value / unit)) * unit
                raise UserError(f"{name}={value} is not a multiple of {step}={unit}; the nearest {name} is {near}")

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Class token (pool="token") and registers, which stand before the patch tokens."""
        return self.num_registers + (self.pool == "token")

    @property
    def num_tokens(self) -> int:
        return self.num_patches + self.num_prefix_tokens

    @property
    def num_params(self) -> int:
        """Parameters of the encoder, task head apart."""
        return encoder_params(*self._sizes, self.qkv_bias, self.layer_scale)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the encoder's forward pass on one image, task head apart."""
        return encoder_flops(*self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, int, int, int, int, str]:
        patches, prefix = self.num_patches, self.num_prefix_tokens
        return self.width, self.depth, self.mlp_dim, patches, prefix, self.patch_size, self.pool

    def head_params(self, num_classes: int) -> int:
        return self.width * num_classes + num_classes

    def head_flops(self, num_classes: int) -> int:
        """FLOPs of the linear task head on one image: one product, or one a patch where nothing is pooled."""
        return 2 * self.width * num_classes * (self.num_patches if self.pool == "none" else 1)

    def train_flops_per_image(self, num_classes: int = 0) -> int:
        return 3 * (self.forward_flops + self.head_flops(num_classes))

    def counts(self, num_classes: int = 0) -> dict[str, int]:
        """Count what the shape costs, by name; a linear task head of `num_classes` apart (0: none)."""
        return {
            "num_heads": self.num_heads,
            "num_tokens": self.num_tokens,
            "num_params": self.num_params,
            "head_params": self.head_params(num_classes) if num_classes else 0,
            "forward_flops": self.forward_flops,
            "head_flops": self.head_flops(num_classes),
            "train_flops_per_image": self.train_flops_per_image(num_classes),
        }

    def step_flops(self, num_classes: int = 0, trained: str = "full") -> int:
        """FLOPs that a training step really computes for one image where only a part is `trained` (see TRAINED).

        A product y = x W costs its forward pass once more for the gradient of W, if W is trained, and once more for that
        of x, if anything before it is. The images get none, so that "full" is 3 x the forward pass less one patch
        embedding; frozen MLPs save their weights' gradients and still hand gradients through.
        """
        w, m, n, t = self.width, self.mlp_dim, self.num_patches, self.num_tokens
        head, forward = self.head_flops(num_classes), self.forward_flops
        if trained == "head":
            return forward + 2 * head
        projections, mlp = self.depth * 8 * t * w * w, self.depth * 4 * t * w * m
        products = self.depth * 4 * t * t * w  # each has two inputs, and no weight
        backward = projections + mlp + 2 * products + 2 * head
        weights = {"full": projections + mlp + 2 * n * 3 * self.patch_size**2 * w, "attention": projections, "mlp": mlp}
        if self.pool == "map":
            kv, query, out, attend, probe_mlp = 4 * n * w * w, 2 * w * w, 2 * w * w, 4 * n * w, 4 * w * m
            # the probe itself is trained by "full" alone, and without its projection needs no gradient through n products
            through_probe = {"full": 2 * attend + query, "attention": 2 * attend, "mlp": 3 * attend // 2}
            backward += kv + out + probe_mlp + through_probe[trained]
            weights["full"] += kv + query + out + probe_mlp
            weights["attention"] += kv + query + out
            weights["mlp"] += probe_mlp
        return forward + head + backward + weights[trained]

    def trained_params(self, num_classes: int = 0, trained: str = "full") -> int:
        """Parameters that are trained, task head included; what one more resolution has to store."""
        w, m, head = self.width, self.mlp_dim, self.head_params(num_classes) if num_classes else 0
        if trained == "full":
            return self.num_params + head
        if trained == "head":
            return head
        positions = self.num_tokens * w
        if trained == "mlp":
            return head + positions + (self.depth + (self.pool == "map")) * (2 * w * m + m + w)
        projections = 4 * w * w + w  # of a block, and of a MAP head, whose biases are always there
        blocks = self.depth * (projections + 3 * w * self.qkv_bias) + (self.pool == "map") * (projections + 3 * w)
        return head + positions + blocks

    def replace(self, **changes: Any) -> Shape:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def timm_kwargs(self) -> dict:
        """The arguments of timm's VisionTransformer; plain JSON values."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.num_heads,
            # timm truncates width * mlp_ratio; mlp_dim / width would lose one unit to rounding for some pairs
            "mlp_ratio": (self.mlp_dim + 0.5) / self.width,
            "qkv_bias": self.qkv_bias,
            "init_values": 1e-5 if self.layer_scale else None,
            "class_token": self.pool == "token",
            "reg_tokens": self.num_registers,
            "global_pool": "" if self.pool == "none" else self.pool,
        }

    @property
    def label(self) -> str:
        """Short name for plots and progress lines: width x depth x mlp_dim."""
        return f"{self.width}x{self.depth}x{self.mlp_dim}"


Real = Any  # a number or an array of them: the law's optimum is real


def encoder_flops(  # noqa: PLR0913 - the variables of one closed form
    width: Real,
    depth: Real,
    mlp_dim: Real,
    num_patches: Real,
    num_prefix_tokens: int,
    patch_size: Real,
    pool: str,
) -> Real:
    """Forward FLOPs of one image, in closed form; arguments may be real numbers or arrays (the law's optimum is real).

    With w = width, m = mlp_dim, n patches, t = n + prefix tokens:
        patch embedding   2 n (3 p^2) w
        one block         2 t (3w^2 + w^2)      qkv and output projection
                        + 2 (2 t^2 w)           q k^T and attention x v, all heads together
                        + 2 t (2 w m)           MLP
        MAP head          2 (2 w^2)             query and output projection of the one probe
                        + 2 n (2 w^2)           keys and values
                        + 2 (2 n w) + 2 (2 w m) attention and MLP of the probe
    """
    w, m, n, t = width, mlp_dim, num_patches, num_patches + num_prefix_tokens
    embed = 2 * n * 3 * patch_size**2 * w
    block = 8 * t * w * w + 4 * t * t * w + 4 * t * w * m
    map_head = 4 * w * w + 4 * n * w * w + 4 * n * w + 4 * w * m if pool == "map" else 0
    return embed + depth * block + map_head


def encoder_params(  # noqa: PLR0913 - the variables of one closed form
    width: Real,
    depth: Real,
    mlp_dim: Real,
    num_patches: Real,
    num_prefix_tokens: int,
    patch_size: Real,
    pool: str,
    qkv_bias: bool = True,
    layer_scale: bool = False,
) -> Real:
    """Parameters of the encoder, task head apart, in closed form; arguments may be real numbers or arrays."""
    w, m = width, mlp_dim
    qkv = 3 * w * w + 3 * w * qkv_bias
    block = 4 * w + qkv + (w * w + w) + (w * m + m) + (m * w + w) + 2 * w * layer_scale
    embed = (3 * patch_size**2 * w + w) + (num_patches + num_prefix_tokens) * w + num_prefix_tokens * w
    # latent + q + kv + projection + norm + MLP
    map_head = w + (w * w + w) + (2 * w * w + 2 * w) + (w * w + w) + 2 * w + (w * m + m) + (m * w + w)
    return embed + depth * block + 2 * w + map_head * (pool == "map")
