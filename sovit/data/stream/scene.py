"""The procedural stream: a grid of question marks, one answer a patch token, an endless supply of exact labels.

Every cell of a `grid x grid` image shows an object (a glyph in a colour) and, in its margin, the mark of a question.
Each patch token of the cell must answer that question. Questions are Zipf-distributed and of seven families
(templates), from reading one glyph to comparing a glyph with the histogram of the whole scene, so that at any budget some
families are learned and some are not yet: that is what makes the loss a smooth function of shape and compute.

    legend: B images, G grid cells a side, C = G^2 cells, N patch tokens

Latents are a pure function of (seed, index) through an integer hash, the same on every device. The scene is drawn from
latents at any multiple of the preset's native size: `render(latents, 2 s)` has finer glyph detail than `render(latents, s)`
and averages to it exactly, so a higher resolution shows more of the same scene and is never an upsample.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from sovit import UserError
from sovit.data import Batch, pieces
from sovit.data.stream.world import (
    CHUNK,
    COLOURS,
    COLUMNS,
    NUM_ANSWERS,
    VAL_SEED,
    WORLD_SEED,
    World,
    hash_uniform,
    tiled,
    zipf,
)


class Scene(dict):
    """Latents of a batch: question, glyph, colour, each int64 [B, C], and index [B]."""


class Stream:
    """An opened stream (see sovit.data.Source) at `image_size` pixels, read by patches of `patch_size`."""

    columns_of = COLUMNS
    readout = "tokens"
    num_classes = NUM_ANSWERS
    class_names = tuple(str(a) for a in range(NUM_ANSWERS))

    def __init__(self, world: World, image_size: int, patch_size: int, data_seed: int, device: str):
        cell = self._cell(world, image_size)
        if patch_size < 1 or cell % patch_size:
            raise UserError(
                f"patch_size={patch_size} does not divide the {cell}-pixel cells of this preset at"
                f" image_size={image_size}; choose a divisor of {cell}"
            )
        self.world, self.image_size, self.data_seed, self.device = world, image_size, data_seed, torch.device(device)
        self.patches_per_cell = cell // patch_size  # a side
        self.skills = tuple(dict.fromkeys(world.cycle))
        self.num_val, self.label_grid = world.num_val, world.grid
        self.content_key = hashlib.sha256(f"{WORLD_SEED} {world}".encode()).hexdigest()[:16]
        self._chunks: dict[int, tuple[int, Batch]] = {}  # seed -> (chunk number, samples): the last one drawn

        generator = torch.Generator().manual_seed(WORLD_SEED)
        w, glyph_side = world, world.cell - world.cell // 4
        if glyph_side**2 <= 12:  # few enough patterns to draw without replacement
            code = torch.randperm(1 << glyph_side**2, generator=generator)[: w.num_glyphs]
            bits = (code[:, None] >> torch.arange(glyph_side**2)) & 1
        else:
            bits = torch.randint(0, 2, (w.num_glyphs, glyph_side**2), generator=generator)
        glyph = bits.view(w.num_glyphs, glyph_side, glyph_side).float()  # [K, s, s]
        palette = torch.tensor([[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)], dtype=torch.float32)
        palette[0] = 0.5  # grey stands in for black, on which a glyph would not show
        palette = torch.cat([palette, 0.25 + 0.5 * palette])[: w.num_colours]  # [c, 3]
        self.palette = palette.to(self.device)
        self.colour_names = (COLOURS + tuple(f"pale-{name}" for name in COLOURS))[: w.num_colours]
        mark = torch.randint(0, 2, (w.num_questions, w.cell, w.cell, 3), generator=generator).float()
        columns = max(f(w) for f in self.columns_of.values())
        table = torch.randint(0, NUM_ANSWERS, (w.num_questions, columns), generator=generator)
        probe = torch.randint(0, w.num_colours, (w.num_questions,), generator=generator)
        template = torch.tensor([self.skills.index(w.cycle[q % len(w.cycle)]) for q in range(w.num_questions)])
        self._draw_tables(glyph, mark, generator)
        self.table, self.probe = table.to(self.device), probe.to(self.device)
        self.template = template.to(self.device)
        self.cdf = [zipf(count, power).cumsum(0).to(self.device) for count, power in w.ranks.values()]
        self.zero_line, self.blind = self._baselines()

    def _cell(self, world: World, image_size: int) -> int:
        """Pixels a side of a cell. Raises UserError for a size that cannot be drawn."""
        scale, rest = divmod(image_size, world.image_size)
        if rest or scale & (scale - 1) or not scale:
            raise UserError(
                f"image_size={image_size} cannot be drawn; this preset draws {world.image_size} times a power of two"
            )
        return world.cell * scale

    def _draw_tables(self, glyph: Tensor, mark: Tensor, generator: torch.Generator) -> None:
        """glyph [K, s, s] and mark [Q, cell, cell, 3] as they look at this size."""
        scale = self.image_size // self.world.image_size
        # finer octaves: detail of zero mean, so that averaging returns the coarser
        for _ in range(int(math.log2(scale))):
            glyph = glyph.repeat_interleave(2, 1).repeat_interleave(2, 2)
            half = torch.rand(glyph[:, ::2, ::2].shape, generator=generator) - 0.5
            for y, x, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
                glyph[:, y::2, x::2] += 0.5 * sign * half
        self.glyph = glyph.to(self.device)  # [K, s, s]
        self.mark = mark.repeat_interleave(scale, 1).repeat_interleave(scale, 2).to(self.device)  # [Q, cell, cell, 3]

    # samples -----------------------------------------------------------------------------------------------------------

    def train(self, start: int, count: int) -> Batch:
        return self._samples(self.data_seed, start, count)

    def val(self, start: int, count: int) -> Batch:
        if start + count > self.num_val:
            raise IndexError(f"validation has {self.num_val} images, asked for {start} .. {start + count}")
        return self._samples(VAL_SEED, start, count)

    def _samples(self, seed: int, start: int, count: int) -> Batch:
        parts = []
        for chunk, rows in pieces(start, count, CHUNK):
            if self._chunks.get(seed, (None,))[0] != chunk:
                self._chunks[seed] = (chunk, self._draw_chunk(seed, chunk))
            parts.append(Batch(*(t[rows] for t in self._chunks[seed][1])))
        return parts[0] if len(parts) == 1 else Batch(*(torch.cat(column) for column in zip(*parts)))

    def _draw_chunk(self, seed: int, chunk: int) -> Batch:
        index = torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK, device=self.device)
        scene = self.latents(seed, index)
        images = self.render(scene, noise_seed=(seed * 1_000_003 + chunk) % (1 << 63))
        labels = self.answers(scene, seed)
        skills = self.template[scene["question"]]
        return Batch(images, self._per_token(labels), self._per_token(skills))

    def _per_token(self, per_cell: Tensor) -> Tensor:
        """[B, C] -> [B, N]: every patch of a cell carries the cell's value, in raster order of patches."""
        g, k = self.world.grid, self.patches_per_cell
        square = per_cell.view(-1, g, g).repeat_interleave(k, 1).repeat_interleave(k, 2)
        return square.flatten(1)

    # the world ---------------------------------------------------------------------------------------------------------

    def latents(self, seed: int, index: Tensor) -> Scene:
        """Draw the scenes number `index` [B] of sequence `seed`."""
        cells, ranks = self.world.grid**2, self.world.ranks
        u = hash_uniform(seed, index, len(ranks) * cells).view(-1, len(ranks), cells)  # [B, 3, C]
        draw = (torch.searchsorted(cdf, u[:, i].contiguous(), right=True) for i, cdf in enumerate(self.cdf))
        return Scene(zip(ranks, (d.clamp(max=len(cdf) - 1) for d, cdf in zip(draw, self.cdf))), index=index)

    def render(self, scene: Scene, noise_seed: int | None = None) -> Tensor:
        """Draw scenes as float32 [B, 3, H, W], centred near 0; pixel noise where a seed is given."""
        image = self._paint(scene)
        w = self.world
        if noise_seed is not None and w.pixel_noise:
            generator = torch.Generator(self.device).manual_seed(noise_seed)
            noise = torch.empty(image.shape, device=self.device).normal_(0, w.pixel_noise, generator=generator)
            image = image + noise
        return 2 * (image - 0.4)

    def _paint(self, scene: Scene) -> Tensor:
        """The scene in [0, 1], [B, 3, H, W]."""
        margin = self.image_size // self.world.grid // 4
        cells = self.mark[scene["question"]]  # [B, C, c, c, 3]; the glyph is painted over the lower right part
        ink = 0.2 + 0.8 * self.glyph[scene["glyph"]]  # [B, C, s, s]
        cells[:, :, margin:, margin:] = self.palette[scene["colour"]][:, :, None, None] * ink[..., None]
        return tiled(cells)

    def facts(self, scene: Scene) -> dict[str, Tensor]:
        """Plain facts of every cell, int64 [B, C] each: what a question can ask about, before answers are hashed."""
        w = self.world
        glyph, colour = scene["glyph"], scene["colour"]
        histogram = self._count(scene, colour, w.num_colours)  # [B, colours]
        kind = glyph % 8
        kinds = self._count(scene, kind, 8)  # [B, 8]
        probe = self.probe[scene["question"]]
        square = colour.view(-1, w.grid, w.grid)
        return {
            "glyph": glyph,
            "colour": colour,
            "others_of_my_colour": histogram.gather(1, colour) - 1,
            "probe_colour": probe,
            "cells_of_probe_colour": histogram.gather(1, probe),
            "major_colour": histogram.argmax(1, keepdim=True).expand_as(colour),  # ties: the lowest
            "kind": kind,
            "others_of_my_kind": kinds.gather(1, kind) - 1,
            "colour_to_the_right": square.roll(-1, 2).flatten(1),  # the last column looks at the first
        }

    def _count(self, scene: Scene, values: Tensor, num: int) -> Tensor:
        """How many cells of each image have each value, [B, C] -> [B, num]."""
        return torch.nn.functional.one_hot(values, num).sum(1)

    def columns(self, scene: Scene) -> Tensor:
        """The column of the answer table that each cell's question reads, int64 [B, C]."""
        reading = self._readings(self.facts(scene))
        stacked = torch.stack([reading[name] for name in self.skills])  # [skills, B, C]
        return stacked.gather(0, self.template[scene["question"]][None])[0]

    def _readings(self, f: dict[str, Tensor]) -> dict[str, Tensor]:
        """Template -> the column that it reads, given the facts of the cells."""
        w = self.world
        return {
            "attr": f["glyph"],
            "fact": f["glyph"] * w.num_colours + f["colour"],
            "same": f["others_of_my_colour"].clamp(max=7),
            "hist": 4 * f["colour"] + f["cells_of_probe_colour"].clamp(max=3),
            "major": w.num_colours * f["colour"] + f["major_colour"],
            "group": 8 * f["kind"] + f["others_of_my_kind"].clamp(max=7),
            "right": f["colour_to_the_right"],
        }

    def answers(self, scene: Scene, seed: int) -> Tensor:
        """The label of every cell, int64 [B, C]; a share `label_flip` of them replaced by a uniform answer."""
        answer = self.table[scene["question"], self.columns(scene)]
        if self.world.label_flip:
            u = hash_uniform(seed ^ 0x5EED, scene["index"], 2 * answer.shape[1]).view(-1, 2, answer.shape[1])
            random_answer = (u[:, 1] * NUM_ANSWERS).long()
            answer = torch.where(u[:, 0] < self.world.label_flip, random_answer, answer)
        return answer

    # what can be had without looking -----------------------------------------------------------------------------------

    def _baselines(self) -> tuple[float, dict[str, float]]:
        """Cross-entropy (nats) of the best answer that sees nothing, and by family of one that knows the question.

        Counted over 2^18 cells of a key of its own. For each question the distribution over columns is estimated within
        its family, and for `hist` within its probe colour (no other reading depends on the question), which keeps the
        estimate from being too optimistic for rare questions.
        """
        w = self.world
        scene = self.latents(VAL_SEED + 1, torch.arange(2**18 // w.grid**2, device=self.device))
        column, question = self.columns(scene).flatten(), scene["question"].flatten()
        share = zipf(w.num_questions, w.question_power).to(self.device)
        entropy: dict[str, list] = {}
        marginal = torch.zeros(NUM_ANSWERS, dtype=torch.float64, device=self.device)
        for s, name in enumerate(self.skills):
            probes = range(w.num_colours) if name == "hist" else (None,)
            entropy[name] = []
            for probe in probes:
                asked = (self.template == s) & (self.probe == probe if probe is not None else True)  # [Q]
                ours = torch.nonzero(asked).flatten()
                frequency = torch.bincount(column[asked[question]], minlength=self.columns_of[name](w)).double()
                answer = self.table[ours, : len(frequency)]  # [q, columns]
                p = torch.zeros(len(ours), NUM_ANSWERS, dtype=torch.float64, device=self.device)
                p.scatter_add_(1, answer, (frequency / frequency.sum()).expand(len(ours), -1))
                p = (1 - w.label_flip) * p + w.label_flip / NUM_ANSWERS
                entropy[name].append((share[ours], -(p * p.clamp_min(1e-300).log()).sum(1)))
                marginal += (share[ours, None] * p).sum(0)
        blind = {}
        for name, parts in entropy.items():
            weight, nats = (torch.cat(column) for column in zip(*parts))
            blind[name] = float((weight * nats).sum() / weight.sum())
        return float(-(marginal * marginal.log()).sum()), blind

    @property
    def floor(self) -> float:
        """Entropy (nats) of the label flips alone: the loss of a perfect eye, pixel noise apart."""
        e = self.world.label_flip
        wrong = e * (1 - 1 / NUM_ANSWERS)
        return 0.0 if not e else -(1 - wrong) * math.log(1 - wrong) - wrong * math.log(e / NUM_ANSWERS)
