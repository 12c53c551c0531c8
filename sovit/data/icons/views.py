"""Views of icons: pose, colours and background drawn anew for every sample, on the device of the batch.

    legend: B images, C cells of an image, S = B * C tiles, T pixels a side of a tile, M of an icon's mask

What a view is made of is a pure function of (seed, index) through an integer hash, the same on every device; the
floating-point work after it differs between devices in the last bits only. `draw` chooses, in plain numbers that a
question can ask about; `render` makes the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sovit.data.stream.world import hash_uniform

RECIPE = 1  # part of a data set's key: raise it when anything here changes what is drawn

# The eleven basic colour terms of English (Berlin & Kay, 1969) and what they look like here, RGB from 0 to 1
COLOURS = {
    "black": (0.06, 0.06, 0.06),
    "white": (0.96, 0.96, 0.96),
    "grey": (0.50, 0.50, 0.50),
    "red": (0.85, 0.10, 0.10),
    "orange": (0.95, 0.50, 0.06),
    "yellow": (0.94, 0.86, 0.10),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.12, 0.30, 0.88),
    "purple": (0.50, 0.14, 0.66),
    "pink": (0.94, 0.62, 0.76),
    "brown": (0.44, 0.27, 0.12),
}
NAMES = tuple(COLOURS)
LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709
CONTRAST = 0.2  # least difference in luma between an icon's ink and any pixel of its background, noise apart
JITTER = 0.04  # of each channel of a colour, either way
TEXTURE = 0.1  # of a background, all channels alike, either way

NUM_DRAWS = 21  # uniform numbers a tile
NOISE_SIZE, TEXTURE_SIDE, TABLE_SEED = 1 << 20, 128, 2305_13035


@dataclass(frozen=True)
class Views:
    """How far views of one icon differ; lengths in sides of a tile.

    The icon is turned by up to `rotation` degrees either way, drawn at a size between `scale[0]` and `scale[1]` and
    stretched by up to a factor of 1 + `stretch`; its square leaves the tile by `outside` at most, turning apart.
    `mirror`: half of the icons that mean the same in a mirror are mirrored. Without `colour`: white on black.

    A view goes to a share of these limits only, the power `gentle` of a uniform number: at 2 a third of the views are
    nearly straight, which is the easy end that a small model begins with, at 0 none is.
    """

    rotation: float = 20.0
    scale: tuple[float, float] = (0.7, 1.05)
    stretch: float = 0.15
    outside: float = 0.05
    mirror: bool = True
    colour: bool = True
    gentle: float = 1.0


class Tables(NamedTuple):
    """What all views share: Gaussian noise [NOISE_SIZE + values of an image] and a cloudy texture [1, 1, side, side]."""

    noise: Tensor
    texture: Tensor


def tables(num_values: int, device: str) -> Tables:
    """The fixed tables for images of `num_values` values. Made on the CPU, so that every device has the same bits."""
    generator = torch.Generator().manual_seed(TABLE_SEED)
    noise = torch.randn(NOISE_SIZE + num_values, generator=generator)
    frequency = torch.fft.fftfreq(TEXTURE_SIDE)
    power = 1 / (frequency[:, None] ** 2 + frequency**2).sqrt().clamp_min(1 / TEXTURE_SIDE)  # 1/f amplitude
    spectrum = torch.fft.fft2(torch.randn(TEXTURE_SIDE, TEXTURE_SIDE, generator=generator)) * power
    texture = torch.fft.ifft2(spectrum).real
    texture = ((texture - texture.mean()) / (2 * texture.std())).clamp(-1, 1)
    return Tables(noise.to(device), texture[None, None].to(device))


def draw(views: Views, seed: int, index: Tensor, cells: int) -> dict[str, Tensor]:
    """What images number `index` [B] of sequence `seed` are made of: name -> [B, C], one value a tile.

    `icon` and `mirrored`: uniform numbers in [0, 1) that are yet to choose an icon and whether it is mirrored. rotation:
    degrees, positive clockwise. size in tiles, stretch = width / height, x and y of the icon's middle in tiles from the
    tile's own, rightwards and downwards. ink, background: indices of NAMES; ink_rgb, background_rgb [B, C, channels],
    one channel where there are no colours. ramp, texture: strengths, 0 to 1, of which one at least is 0; ramp_angle in
    degrees; texture_x, texture_y: a place in the texture. noise_at [B]: a place in the noise.
    """
    u = hash_uniform(seed, index, cells * NUM_DRAWS + 1)  # float64
    noise_at, u = (u[:, 0] * NOISE_SIZE).long(), u[:, 1:].view(len(index), cells, NUM_DRAWS)
    share = u[..., 7] ** views.gentle  # of the way to the limits
    smallest, largest = views.scale
    size = (smallest * (largest / smallest) ** u[..., 2]) ** share
    room = share * ((1 - size) / 2 + views.outside).clamp_min(0)  # between the middles of the icon and of its tile
    pose = {
        "icon": u[..., 0],
        "rotation": share * views.rotation * (2 * u[..., 1] - 1),
        "size": size,
        "stretch": (1 + views.stretch) ** (share * (2 * u[..., 3] - 1)),
        "x": room * (2 * u[..., 4] - 1),
        "y": room * (2 * u[..., 5] - 1),
        "mirrored": u[..., 6],
    }
    return pose | (_colours(u[..., 8:]) if views.colour else _white_on_black(u)) | {"noise_at": noise_at}


def _colours(u: Tensor) -> dict[str, Tensor]:
    """u [B, C, 13]. Any colour of ink; of backgrounds, one of those that are far enough from it in luma."""
    rgb = torch.tensor(list(COLOURS.values()), dtype=u.dtype, device=u.device)  # [K, 3]
    luma = rgb @ torch.tensor(LUMA, dtype=u.dtype, device=u.device)
    # what jitter and texture can take away comes on top of what must remain
    apart = (luma[:, None] - luma).abs() >= CONTRAST + 2 * JITTER + TEXTURE  # [K, K]
    partners = torch.argsort((~apart).int(), dim=1, stable=True)  # [K, K]: backgrounds that will do come first
    ink = (u[..., 0] * len(NAMES)).long()
    background = partners[ink, (u[..., 1] * apart.sum(1)[ink]).long()]
    kind, strength = (3 * u[..., 8]).long(), u[..., 9]  # plain, shaded from one side to the other, or textured
    return {
        "ink": ink,
        "background": background,
        "ink_rgb": (rgb[ink] + JITTER * (2 * u[..., 2:5] - 1)).clamp(0, 1),
        "background_rgb": (rgb[background] + JITTER * (2 * u[..., 5:8] - 1)).clamp(0, 1),
        "ramp": strength * (kind == 1),
        "ramp_angle": 360 * u[..., 10],
        "texture": strength * (kind == 2),
        "texture_x": u[..., 11],
        "texture_y": u[..., 12],
    }


def _white_on_black(u: Tensor) -> dict[str, Tensor]:
    nothing = torch.zeros_like(u[..., 0])  # [B, C]
    return {
        "ink": torch.full_like(nothing, NAMES.index("white"), dtype=torch.int64),
        "background": torch.full_like(nothing, NAMES.index("black"), dtype=torch.int64),
        "ink_rgb": nothing[..., None] + 1,
        "background_rgb": nothing[..., None],
        **dict.fromkeys(("ramp", "ramp_angle", "texture", "texture_x", "texture_y"), nothing),
    }


def render(masks: Tensor, drawn: dict[str, Tensor], tile: int, noise: float, shared: Tables) -> Tensor:
    """Images [B, channels, H, W] float32 in [0, 1], noise apart, of icons [B, C, M, M] uint8 (255 = ink).

    `drawn` is what `draw` chose, with `mirrored` decided ([B, C] bool); `tile` pixels a side of a tile, `noise` the
    standard deviation of the noise. M may be larger than `tile`: twice as many pixels keep turned edges sharp.
    """
    num_images, num_cells, side, _ = masks.shape
    side_cells = round(num_cells**0.5)
    flat = {k: v.flatten(0, 1).float()[:, None, None] for k, v in drawn.items() if v.ndim == 2}  # [S, 1, 1]
    steps = (2 * torch.arange(tile, device=masks.device) + 1) / tile - 1  # middles of the pixels, -1 .. 1
    right, down = steps[None, None, :], steps[None, :, None]
    # the place in its mask at which a pixel of the tile looks: pose, undone in the opposite order
    x, y = right - 2 * flat["x"], down - 2 * flat["y"]  # [S, T, T]
    angle = flat["rotation"] * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    width, height = flat["size"] * flat["stretch"].sqrt(), flat["size"] / flat["stretch"].sqrt()
    mask_x = (cos * x + sin * y) / (width * (1 - 2 * flat["mirrored"]))
    mask_y = (cos * y - sin * x) / height
    at = torch.stack((mask_x, mask_y), -1)  # [S, T, T, 2]
    ink = F.grid_sample(masks.view(-1, 1, side, side).float(), at, align_corners=False) / 255  # [S, 1, T, T]

    ink_rgb, background = (drawn[k].flatten(0, 1).float()[:, :, None, None] for k in ("ink_rgb", "background_rgb"))
    images = background.expand(-1, -1, tile, tile)  # [S, channels, T, T]
    if images.shape[1] > 1:
        images = images + TEXTURE * _shade(flat, right, down, shared.texture)[:, None]
    images = torch.lerp(images, ink_rgb, ink)
    square = images.view(num_images, side_cells, side_cells, -1, tile, tile).permute(0, 3, 1, 4, 2, 5)
    images = square.reshape(num_images, -1, side_cells * tile, side_cells * tile)
    values = shared.noise.unfold(0, images[0].numel(), 1)[drawn["noise_at"]]  # [B, channels * H * W]
    return images + noise * values.view_as(images)


def _shade(flat: dict[str, Tensor], right: Tensor, down: Tensor, texture: Tensor) -> Tensor:
    """[S, T, T], -1 to 1: light that falls off to one side, or a quarter of the texture's side, or nothing."""
    angle = flat["ramp_angle"] * (math.pi / 180)
    shade = flat["ramp"] * (angle.cos() * right + angle.sin() * down) / 2**0.5  # [S, T, T]
    rows = flat["texture"].flatten().nonzero().flatten()
    if not len(rows):
        return shade
    x, y = ((0.75 * (2 * flat[k][rows] - 1)) + 0.25 * step for k, step in (("texture_x", right), ("texture_y", down)))
    at = torch.stack(torch.broadcast_tensors(x, y), -1)  # [s, T, T, 2]
    tile = at.shape[1]
    clouds = F.grid_sample(texture, at.view(1, -1, tile, 2), align_corners=False).view(-1, tile, tile)
    return shade.index_add(0, rows, flat["texture"][rows] * clouds)
