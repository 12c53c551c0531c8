"""The preset `detail`: one scene at every size, less of it at a lower one, and cells of two sizes."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import baselines, open_data
from sovit.data.stream.scene import Scene
from sovit.data.stream.world import NUM_ANSWERS, VAL_SEED
from sovit.train.evaluate import cells

SIZES = (16, 32, 48, 64)


def opened(image_size=32, patch_size=4, data_seed=0):
    return open_data("stream", "detail", image_size, patch_size, data_seed)


@pytest.fixture(scope="module")
def sources():
    return {size: opened(size) for size in SIZES}


@pytest.fixture(scope="module")
def scene(sources):
    return sources[32].latents(0, torch.arange(2000))


def digest(*tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:12]


def test_golden_samples(sources):
    """If this fails, records made before do not mean the same any more."""
    labels = {16: "c3593ecdd378", 32: "251c58f96135", 48: "62399d9c7c63"}
    for size, expected in labels.items():
        source = opened(size, data_seed=3)
        assert digest(source.train(0, 64).labels.byte()) == expected
        assert source.content_key == "a492164fdf29dd9b"
    batch = opened(64, 8, data_seed=3).train(0, 64)
    assert batch.images.double().abs().sum().item() == pytest.approx(294217.598504, rel=1e-6)


# drawing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_lower_size_is_the_area_average_of_a_higher_one(scene, sources, size):
    """Of 192 px, which every size divides; a pixel is the mean of the square that it covers there."""
    few = Scene({name: value[:8] for name, value in scene.items()})
    finest = opened(192).render(few)
    assert torch.allclose(F.avg_pool2d(finest, 192 // size), sources[size].render(few), atol=1e-5)


def test_a_higher_size_shows_what_a_lower_one_cannot(scene, sources):
    """Scenes that differ in their textures alone: one drawing at 16 px where nothing is zoomed, and another at 32."""
    few = Scene({name: value[:8] for name, value in scene.items()})
    still = ~few["zoomed"]
    other = Scene(few, texture=(few["texture"] + 7) % 36)  # 7 = 6 + 1: both octaves are others
    finer = Scene(few, texture=few["texture"] // 6 * 6 + (few["texture"] + 1) % 6)  # the finer one alone
    for changed, first_size in ((other, 32), (finer, 48)):
        for size, source in sources.items():
            difference = (source.render(changed) - source.render(few)).abs().amax(1)  # [B, H, W]
            per_place = F.max_pool2d(difference, size // 4).flatten(1)  # [B, C]
            assert ((per_place[still] > 0.02) == (size >= first_size)).all()
            assert ((per_place[~still] > 0.02) == (2 * size >= first_size)).all()  # seen at half the size


def test_a_zoomed_cell_looks_as_a_common_one_does_at_twice_the_size(scene, sources):
    few = Scene({name: value[:64] for name, value in scene.items()})
    zoomed = Scene(few, zoomed=torch.ones_like(few["zoomed"]))
    large = sources[32].render(zoomed)[:, :, :16, :16]
    plain = sources[64].render(Scene(few, zoomed=torch.zeros_like(few["zoomed"])))[:, :, :16, :16]
    assert torch.allclose(large, plain, atol=1e-6)


# labels --------------------------------------------------------------------------------------------------------------


def test_labels_agree_with_a_slow_reader(scene, sources):
    """Answers by plain loops over the cells that can be seen, from the latents and the tables alone."""
    source, world = sources[32], sources[32].world
    batch = source.train(0, 150)
    for b in range(150):
        q, glyph, colour, texture = (scene[name][b].tolist() for name in ("question", "glyph", "colour", "texture"))
        zoomed = scene["zoomed"][b].tolist()
        # places of the cells in sight: all, but of a zoomed quadrant the upper left one
        seen = [p for p in range(16) if not zoomed[p] or (p // 4 % 2 == 0 and p % 2 == 0)]
        for place in range(16):
            row, column = divmod(place, 4)
            own = (row // 2 * 2) * 4 + column // 2 * 2 if zoomed[place] else place
            k, c, t = glyph[own], colour[own], texture[own]
            counts = [sum(colour[p] == other for p in seen) for other in range(8)]
            reading = {
                "weave": t,
                "attr": k,
                "cloth": 6 * c + t % 6,
                "hist": 4 * c + min(3, counts[int(source.probe[q[own]])]),
                "fact": 6 * k + t // 6,
                "major": 8 * c + counts.index(max(counts)),
                "group": 8 * (k % 8) + min(7, sum(glyph[p] % 8 == k % 8 for p in seen if p != own)),
            }[world.cycle[q[own] % 8]]
            tokens = batch.labels[b].view(8, 8)[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert (tokens == source.table[q[own], reading]).all()


def test_labels_are_those_of_the_scene_at_every_size(sources):
    by_place = {size: cells(s.train(0, 20).labels[..., None], 4)[..., 0] for size, s in sources.items()}  # [B, C, k]
    for labels in by_place.values():
        assert (labels == by_place[16]).all()


def test_half_of_the_quadrants_are_zoomed(scene):
    quadrants = scene["zoomed"].view(-1, 2, 2, 2, 2)  # [B, row, in row, column, in column]
    assert (quadrants == quadrants[:, :, :1, :, :1]).all()
    assert quadrants[:, :, 0, :, 0].float().mean().item() == pytest.approx(0.5, abs=4 * (0.25 / 8000) ** 0.5)
    for name in ("question", "glyph", "colour", "texture"):
        one = scene[name].view(-1, 2, 2, 2, 2)
        assert ((one == one[:, :, :1, :, :1]) | ~quadrants).all()


# what can be had -----------------------------------------------------------------------------------------------------


def zipf(count, power):
    p = np.arange(1, count + 1) ** -float(power)
    return p / p.sum()


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def entropy_of_an_answer(source):
    """Nats, of who sees a cell that is not zoomed: every kind of cell is drawn, and those of equal pixels put together."""
    glyph, colour, texture = (n.ravel() for n in np.meshgrid(np.arange(36), np.arange(8), np.arange(36), indexing="ij"))
    latents = {
        name: torch.tensor(n).view(-1, 16) for name, n in dict(glyph=glyph, colour=colour, texture=texture).items()
    }
    plain = torch.zeros_like(latents["glyph"])
    images = source.render(Scene(latents, question=plain, zoomed=plain.bool()))
    side = source.image_size // 4
    drawn = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).reshape(len(glyph), -1)
    look = np.unique((drawn * 1000).round().int().numpy(), axis=0, return_inverse=True)[1].ravel()
    chance = zipf(36, 1.0)[glyph] * zipf(8, 0.5)[colour] / 36
    readings = {"weave": texture, "cloth": 6 * colour + texture % 6, "fact": 6 * glyph + texture // 6, "attr": glyph}
    total = 0.0
    for q, share in enumerate(zipf(16, 0.5)):
        skill = source.world.cycle[q % 8]
        if skill in readings:
            joint = np.zeros((look.max() + 1, NUM_ANSWERS))
            np.add.at(joint, (look, source.table[q].numpy()[readings[skill]]), chance)
            total += share * (entropy(joint) - entropy(joint.sum(1)))
    return total


def test_the_floor_is_what_a_count_over_drawn_cells_says(sources):
    found = {size: entropy_of_an_answer(sources[size]) for size in (16, 32, 64)}
    assert found[16] > found[32] + 0.3 > 0.6 and found[64] == pytest.approx(0, abs=1e-9)
    for size in (16, 32):
        assert sources[size].floor == pytest.approx((found[size] + found[2 * size]) / 2, abs=1e-9)
    assert sources[48].floor == pytest.approx(0, abs=1e-9) and sources[64].floor == pytest.approx(0, abs=1e-9)
    assert f"floor {sources[32].floor:.4f};" in baselines(sources[32]) and "floor" not in baselines(sources[64])


def test_baselines_agree_with_an_independent_count(sources):
    """Of the questions that one cell answers, in closed form; the zero line against validation labels.

    The stream counts 2^18 places; where four show one cell that leaves about 2e4 cells a skill, 0.006 nats of error.
    """
    source = sources[32]
    glyph, colour, even = zipf(36, 1.0), zipf(8, 0.5), np.full(6, 1 / 6)
    reading = {
        "attr": glyph,
        "weave": np.full(36, 1 / 36),
        "cloth": np.outer(colour, even).ravel(),
        "fact": np.outer(glyph, even).ravel(),
    }
    share = zipf(16, 0.5)
    for skill, p in reading.items():
        asked = [q for q in range(16) if source.world.cycle[q % 8] == skill]
        nats = [entropy(np.bincount(source.table[q, : len(p)], weights=p, minlength=16)) for q in asked]
        assert source.blind[skill] == pytest.approx(np.average(nats, weights=share[asked]), abs=0.02), skill
    labels = source.val(0, source.num_val).labels.flatten().numpy()
    assert entropy(np.bincount(labels, minlength=16) / len(labels)) == pytest.approx(source.zero_line, abs=0.006)
    assert all(source.zero_line == other.zero_line and source.blind == other.blind for other in sources.values())


@pytest.mark.parametrize("skill", ["hist", "major", "group"])
def test_blind_baselines_of_scene_questions_agree_with_scenes_of_another_key(sources, skill):
    source = sources[16]
    scene = source.latents(VAL_SEED + 7, torch.arange(2**14))
    column, question = source.columns(scene), scene["question"]
    asked = [q for q in range(16) if source.world.cycle[q % 8] == skill]
    answers = [source.table[q, column[question == q]].numpy() for q in asked]
    nats = [entropy(np.bincount(answer, minlength=16) / len(answer)) for answer in answers]
    assert source.blind[skill] == pytest.approx(np.average(nats, weights=zipf(16, 0.5)[asked]), abs=0.02)


# sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "patch_size"), [(16, 2), (32, 2), (32, 8), (48, 12), (48, 6), (80, 4), (96, 8)])
def test_sizes_that_open(image_size, patch_size):
    batch = opened(image_size, patch_size).train(0, 3)
    assert batch.images.shape == (3, 3, image_size, image_size)
    assert batch.labels.shape == (3, (image_size // patch_size) ** 2)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        (24, 4, "image_size=24 cannot be drawn; this preset draws multiples of 16"),
        (40, 4, "image_size=40 cannot be drawn; this preset draws multiples of 16"),
        (0, 4, "image_size=0 cannot be drawn"),
        (
            32,
            16,
            "patch_size=16 does not divide the 8-pixel cells of this preset at image_size=32; choose a divisor of 8",
        ),
        (48, 8, "patch_size=8 does not divide the 12-pixel cells"),
        (32, 0, "patch_size=0 does not divide the 8-pixel cells"),
    ],
)
def test_sizes_that_cannot_be_drawn_say_so(image_size, patch_size, message):
    with pytest.raises(UserError, match=message):
        opened(image_size, patch_size)
