"""The stream with more to see at a higher resolution, and things seen at two scales: preset `detail`.

Every cell has a ground (its question), a glyph in a colour, and over both a texture of two octaves. A cell is drawn on a
fine grid and averaged over the area of each pixel, so that a scene is the same scene at every size: with cells of 4 px
(images of 16) a texture leaves nothing, with 8 px its coarser octave shows, with 12 px (48) and more both do. Some
questions ask for the texture, and no eye can answer them below that size: `floor` says how much that costs.

Of the quadrants of a scene each shows, with probability `zoom_share`, one cell at double size in place of four, as
photographs show one thing at several scales: what was learned of large things at a low resolution is what small ones
look like at a higher one. A zoomed cell stands for its four places, and counts once. Its label stands at the tokens of
all four, so the metrics of cells (`val_cell_error`) judge each place by itself.

What was asked of the preset before it was chosen: that resolution is worth something to networks from scratch, and that
training at a low one and fine-tuning all weights at a higher one is at least competitive with training there at the same
FLOPs. Without zoomed cells fine-tuning was far behind. With them, at 1e11 to 6e11 FLOPs: 16, 32 and 64 px cut into 16
patches each give 2.00, 1.63 and 1.44 nats (results/patch_star.jsonl), and full fine-tuning from 32 px ends 2.4 % above
training at 64 px and 3.9 % below at 96 px (results/resolution_finetune.jsonl). What it does not show: patches smaller
than a cell, which is what a higher resolution comes to at the same patch size, cost more than they bring, for what a
cell shows must first be brought together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sovit import UserError
from sovit.data.stream.scene import Scene, Stream
from sovit.data.stream.world import COLUMNS, NUM_ANSWERS, Detail, World, hash_uniform, tiled, zipf

COARSE = 4  # pixels a side of a cell at which all but its texture shows
PLAIN, WAVES = (1.0, 1.0, 1.0, 1.0), ((1.0, 1.0, -1.0, -1.0), (1.0, -1.0, 1.0, -1.0))  # quarters of a coarse pixel


class DetailStream(Stream):
    """An opened preset (see sovit.data.Source) at any multiple of 16 px."""

    world: Detail
    columns_of = {name: COLUMNS[name] for name in ("attr", "hist", "major", "group")} | {
        "fact": lambda w: w.num_glyphs * w.num_textures,
        "cloth": lambda w: w.num_colours * w.num_textures,
        "weave": lambda w: w.num_textures**2,
    }

    def _cell(self, world: World, image_size: int) -> int:
        step = world.grid * COARSE
        if image_size < step or image_size % step:
            raise UserError(f"image_size={image_size} cannot be drawn; this preset draws multiples of {step}")
        return image_size // world.grid

    def _draw_tables(self, glyph: Tensor, mark: Tensor, generator: torch.Generator) -> None:
        """Grounds, and glyphs and textures at the sizes of a cell and of a zoomed one."""
        w, g = self.world, self.world.grid
        corners = torch.tensor([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)], dtype=torch.float32)
        order = torch.randperm(16, generator=generator)[: w.num_questions]
        self._ground = w.ground * torch.cat((corners, 0.5 * corners))[order].to(self.device)  # [Q, 3]
        code = torch.randperm(36, generator=generator)[: w.num_glyphs]
        digits = torch.stack((code // 6, code % 6, code % 6, code // 6), 1)  # [K, 4], one for each quadrant
        halves = torch.tensor([[[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]], dtype=torch.float32)
        pattern = torch.cat((halves, -halves))[digits].view(-1, 2, 2, 2, 2)  # [K, 2, 2, 2, 2], each of zero mean
        coarse = pattern.transpose(2, 3).reshape(-1, COARSE, COARSE)  # [K, 4, 4]
        self._looks = []  # (glyphs [K, c, c], textures [T^2, c, c]) at c pixels a cell
        for cell in (self.image_size // g, 2 * self.image_size // g):
            m = cell // COARSE
            glyphs = coarse.repeat_interleave(m, 1).repeat_interleave(m, 2)
            self._looks.append((glyphs.to(self.device), self._textures(m).repeat(1, COARSE, COARSE).to(self.device)))
        place = torch.arange(g * g).view(g, g)
        first = place[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
        self._first = first.flatten().to(self.device)  # [C]: the upper left cell of each cell's quadrant

    def _textures(self, m: int) -> Tensor:
        """Textures within a coarse pixel, averaged over the area of its m x m pixels: [T^2, m, m], of zero mean."""
        octaves = []
        for wave in WAVES:
            plain, waved = (_averaged(torch.tensor(w), m) for w in (PLAIN, wave))  # [m] each
            kinds = torch.stack((waved[:, None] * plain, plain[:, None] * waved, waved[:, None] * waved))
            octaves.append(torch.cat((kinds, -kinds))[: self.world.num_textures])  # [T, m, m]
        return (octaves[0][:, None] + octaves[1]).flatten(0, 1)

    def latents(self, seed: int, index: Tensor) -> Scene:
        scene = super().latents(seed, index)
        u = hash_uniform(seed ^ 0x200D, index, self.world.grid**2)
        zoomed = (u < self.world.zoom_share).gather(1, self._first.expand(len(u), -1))  # [B, C]
        for name in self.world.ranks:
            scene[name] = torch.where(zoomed, scene[name][:, self._first], scene[name])
        return Scene(scene, zoomed=zoomed)

    def _paint(self, scene: Scene) -> Tensor:
        w, g, cell = self.world, self.world.grid, self.image_size // self.world.grid
        images = []
        for step, (glyphs, textures) in zip((1, 2), self._looks):
            places = torch.arange(g * g, device=self.device).view(g, g)[::step, ::step].flatten()
            question, glyph, colour, texture = (scene[name][:, places] for name in w.ranks)
            ink = w.ink * glyphs[glyph][..., None] * self.palette[colour][:, :, None, None]  # [B, C, c, c, 3]
            ground = 0.4 + self._ground[question][:, :, None, None]
            images.append(tiled(ground + ink + w.contrast * textures[texture][..., None]))
        zoomed = scene["zoomed"].view(-1, 1, g, g).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        return torch.where(zoomed, images[1], images[0])

    def _count(self, scene: Scene, values: Tensor, num: int) -> Tensor:
        ones = torch.nn.functional.one_hot(values, num)  # [B, C, num]
        return (ones * torch.where(scene["zoomed"], 1, 4)[..., None]).sum(1) // 4  # a zoomed cell stands in four places

    def facts(self, scene: Scene) -> dict[str, Tensor]:
        facts = super().facts(scene) | {name: scene[name] for name in ("texture", "zoomed")}
        del facts["colour_to_the_right"]  # beside a zoomed cell there may be two
        return facts

    def _readings(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        w = self.world
        return {
            "attr": f["glyph"],
            "hist": 4 * f["colour"] + f["cells_of_probe_colour"].clamp(max=3),
            "major": w.num_colours * f["colour"] + f["major_colour"],
            "group": 8 * f["kind"] + f["others_of_my_kind"].clamp(max=7),
        } | self._cloth_readings(f)

    def _cloth_readings(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those that need the texture, and nothing but their own cell."""
        n = self.world.num_textures
        return {
            "weave": f["texture"],
            "cloth": f["colour"] * n + f["texture"] % n,
            "fact": f["glyph"] * n + f["texture"] // n,
        }

    @property
    def floor(self) -> float:
        """Mean entropy (nats) of an answer to an eye that sees all that is drawn at this size, pixel noise apart.

        Textures that are drawn alike cannot be told apart; all else shows at every size. Exact: every kind of cell is
        counted with its probability.
        """
        w = self.world
        chance = {name: zipf(*rank) for name, rank in w.ranks.items()}
        names = ("glyph", "colour", "texture")
        ways = dict(zip(names, torch.cartesian_prod(*(torch.arange(len(chance[name])) for name in names)).T))  # [W]
        probability = torch.stack([chance[name][ways[name]] for name in names]).prod(0)
        column = self._cloth_readings(ways)
        floor = 0.0
        for (_, textures), share in zip(self._looks, (1 - w.zoom_share, w.zoom_share)):
            difference = (textures[:, None] - textures).abs().flatten(2).amax(2).cpu()  # [T^2, T^2]
            looks = (difference < 1e-6).int().argmax(1)  # [T^2]: the first texture that is drawn like this one
            seen = (ways["glyph"] * w.num_colours + ways["colour"]) * len(looks) + looks[ways["texture"]]
            for question in range(w.num_questions):
                skill = self.skills[self.template[question]]
                if skill in column:
                    outcome = seen * NUM_ANSWERS + self.table[question, column[skill]].cpu()  # [W]
                    p = torch.bincount(outcome, probability, NUM_ANSWERS * len(seen)).view(-1, NUM_ANSWERS)
                    entropy = torch.special.entr(p).sum() - torch.special.entr(p.sum(1)).sum()
                    floor += float(share * chance["question"][question] * entropy)
        return floor


def _averaged(wave: Tensor, pixels: int) -> Tensor:
    """Area average of a piecewise constant [n] over equal `pixels`: [pixels]."""
    return wave.repeat_interleave(pixels).view(pixels, -1).mean(1)
