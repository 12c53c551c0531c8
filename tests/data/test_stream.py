"""The stream: pure samples, labels that a slow reader of the same scene agrees with, and honest baselines."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.data import PRESETS as ALL_PRESETS
from sovit.data import SOURCES, open_data
from sovit.data.stream.stream import open_source
from sovit.data.stream.world import CHUNK, CYCLE, NUM_ANSWERS, POINTING_CYCLE, PRESETS, VAL_SEED, hash_uniform

NATIVE = {name: (world.image_size, world.cell) for name, world in PRESETS.items()}


@pytest.fixture(scope="module")
def cpu():
    return open_source("cpu", 16, 4, data_seed=0)


def opened(preset, scale=1, data_seed=0):
    image_size, patch_size = NATIVE[preset]
    return open_source(preset, image_size * scale, patch_size, data_seed)


# purity --------------------------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_how_it_is_asked_for(cpu):
    whole = cpu.train(0, 3 * CHUNK)
    rng = np.random.default_rng(0)
    for _ in range(20):
        start = int(rng.integers(0, 3 * CHUNK - 1))
        count = int(rng.integers(1, 3 * CHUNK - start + 1))
        fresh = opened("cpu") if count % 2 else cpu
        for part, full in zip(fresh.train(start, count), whole):
            assert torch.equal(part, full[start : start + count])


def test_batches_join_over_the_edge_of_a_chunk(cpu):
    across = cpu.train(CHUNK - 3, 7)
    assert across.images.shape == (7, 3, 16, 16)
    for i in range(7):
        for part, one in zip(across, cpu.train(CHUNK - 3 + i, 1)):
            assert torch.equal(part[i : i + 1], one)


def test_samples_do_not_depend_on_the_global_generator(cpu):
    torch.manual_seed(1)
    first = opened("cpu").train(5, 9)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, opened("cpu").train(5, 9)))


def test_types_and_ranges(cpu):
    batch = cpu.train(0, 64)
    assert batch.images.dtype == torch.float32
    assert batch.labels.shape == batch.skills.shape == (64, 16)
    assert batch.labels.dtype == batch.skills.dtype == torch.int64
    assert batch.labels.min() >= 0 and batch.labels.max() < cpu.num_classes == NUM_ANSWERS
    assert abs(batch.images.mean().item()) < 0.15
    assert cpu.readout == "tokens"


def test_golden_labels():
    """Labels of the first scenes, by preset. If this fails, records made before do not mean the same any more."""
    pinned = {"cpu": "c67ab33d1ec9", "small": "5a9b78b0c3f8", "gpu": "86ccf56df437"}
    found = {name: digest(opened(name).train(0, 64).labels) for name in pinned}
    assert found == pinned


def digest(labels):
    return hashlib.sha256(labels.to(torch.uint8).numpy().tobytes()).hexdigest()[:12]


# the slow reader -----------------------------------------------------------------------------------------------------


def read_slowly(source, question, glyph, colour):
    """Answers of one scene by plain loops, from the description in the module's docstring and the tables alone."""
    world, answers = source.world, []
    cells = range(world.grid**2)
    for i in cells:
        q, k, c = question[i], glyph[i], colour[i]
        probe = int(source.probe[q])
        counts = [sum(colour[j] == other for j in cells) for other in range(world.num_colours)]
        row, column = divmod(i, world.grid)
        right = row * world.grid + (column + 1) % world.grid
        reading = {
            "attr": k,
            "fact": world.num_colours * k + c,
            "same": min(7, sum(colour[j] == c for j in cells if j != i)),
            "hist": 4 * c + min(3, counts[probe]),
            "major": world.num_colours * c + counts.index(max(counts)),
            "group": 8 * (k % 8) + min(7, sum(glyph[j] % 8 == k % 8 for j in cells if j != i)),
            "right": colour[right],
        }[world.cycle[q % len(world.cycle)]]
        answers.append(int(source.table[q, reading]))
    return answers


@pytest.mark.parametrize(("preset", "count"), [("cpu", 200), ("small", 200), ("gpu", 20)])
def test_labels_agree_with_a_slow_reader(preset, count):
    source = opened(preset)
    scene = source.latents(0, torch.arange(count))
    question, glyph, colour = (scene[k].tolist() for k in ("question", "glyph", "colour"))
    expected = [read_slowly(source, *latents) for latents in zip(question, glyph, colour)]
    batch = source.train(0, count)
    assert batch.labels.tolist() == expected
    assert set(batch.skills.flatten().tolist()) == set(range(len(source.skills)))  # every template was read
    names = [[source.world.cycle[q % len(source.world.cycle)] for q in image] for image in question]
    assert [[source.skills[s] for s in image] for image in batch.skills.tolist()] == names


def test_facts_are_those_of_the_scene(cpu):
    scene = cpu.latents(3, torch.arange(50))
    facts = cpu.facts(scene)
    for b, colour in enumerate(scene["colour"].tolist()):
        counts = Counter(colour)
        assert facts["others_of_my_colour"][b].tolist() == [counts[c] - 1 for c in colour]
        assert facts["major_colour"][b, 0] == min(counts, key=lambda c: (-counts[c], c))
        probes = facts["probe_colour"][b].tolist()
        assert facts["cells_of_probe_colour"][b].tolist() == [counts[p] for p in probes]


def test_labels_are_one_a_patch_in_raster_order():
    coarse, fine = open_source("cpu", 16, 4, 0), open_source("cpu", 32, 4, 0)
    cells, patches = coarse.train(0, 8), fine.train(0, 8)
    assert patches.labels.shape == (8, 64)
    for token in range(64):
        y, x = divmod(token, 8)  # 8 patches a side, 2 x 2 of them a cell
        assert torch.equal(patches.labels[:, token], cells.labels[:, (y // 2) * 4 + x // 2])
        assert torch.equal(patches.skills[:, token], cells.skills[:, (y // 2) * 4 + x // 2])


def test_a_patch_of_the_image_shows_the_cell_of_its_label(cpu):
    """Token t reads pixels of cell t: changing the glyph of one cell changes that patch and no other."""
    scene = cpu.latents(0, torch.arange(1))
    before = cpu.render(scene)
    scene["glyph"] = scene["glyph"].clone()
    scene["glyph"][0, 6] += 1
    patches = F.unfold(cpu.render(scene) - before, 4, stride=4)[0]  # [3 p p, N]
    assert (patches != 0).any(0).nonzero().flatten().tolist() == [6]


# statistics ----------------------------------------------------------------------------------------------------------


def zipf(count, power):
    p = np.arange(1, count + 1) ** -float(power)
    return p / p.sum()


def test_shares_of_templates_and_latents(cpu):
    batch = cpu.train(0, 4096)
    p = zipf(256, 0.9)
    measured = torch.bincount(batch.skills.flatten(), minlength=6) / batch.skills.numel()
    for s, name in enumerate(cpu.skills):
        expected = sum(p[q] for q in range(256) if CYCLE[q % 8] == name)
        assert measured[s].item() == pytest.approx(expected, abs=0.008)
    scene = cpu.latents(0, torch.arange(4096))
    for name, expected in (("glyph", zipf(128, 1.0)), ("colour", zipf(8, 0.5)), ("question", p)):
        share = np.bincount(scene[name].flatten().numpy(), minlength=len(expected)) / 65536
        assert abs(share - expected).max() < 0.005
        chi2 = 65536 * ((share - expected) ** 2 / expected).sum()
        assert abs(chi2 - len(expected)) < 5 * math.sqrt(2 * len(expected))


def test_one_question_in_64_points():
    assert len(POINTING_CYCLE) == 64 and POINTING_CYCLE.count("right") == 1
    assert set(CYCLE) <= set(POINTING_CYCLE)


def binomial(n, p):
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def capped(p, cap):
    return np.append(p[:cap], p[cap:].sum())


def readings(source, template, question):
    """Probability of each column of the answer table, in closed form (`major`: by an own simulation)."""
    w = source.world
    glyph, colour, others = zipf(w.num_glyphs, 1.0), zipf(w.num_colours, 0.5), w.grid**2 - 1
    if template == "attr":
        return glyph
    if template == "fact":
        return np.outer(glyph, colour).ravel()
    if template == "same":
        return sum(p * capped(binomial(others, p), 7) for p in colour)
    if template == "hist":
        probe = int(source.probe[question])
        elsewhere = binomial(others, colour[probe])
        rows = [p * capped(np.append(0, elsewhere) if c == probe else elsewhere, 3) for c, p in enumerate(colour)]
        return np.concatenate(rows)
    if template == "group":
        kinds = [glyph[k::8].sum() for k in range(8)]
        return np.concatenate([p * capped(binomial(others, p), 7) for p in kinds])
    rng = np.random.default_rng(0)
    scenes = rng.choice(w.num_colours, p=colour, size=(40_000, others + 1))
    major = (scenes[:, :, None] == np.arange(w.num_colours)).sum(1).argmax(1)
    joint = np.bincount((w.num_colours * scenes + major[:, None]).ravel(), minlength=w.num_colours**2)
    return joint / joint.sum()


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def test_baselines_agree_with_an_independent_count(cpu):
    share = zipf(256, 0.9)
    marginal = np.zeros(NUM_ANSWERS)
    by_template = {name: [] for name in cpu.skills}
    table, major = cpu.table.numpy(), readings(cpu, "major", 0)
    for q in range(256):
        name = CYCLE[q % 8]
        p = major if name == "major" else readings(cpu, name, q)
        answers = np.bincount(table[q, : len(p)], weights=p, minlength=NUM_ANSWERS)
        marginal += share[q] * answers
        by_template[name].append((share[q], entropy(answers)))
    assert cpu.zero_line == pytest.approx(entropy(marginal), abs=2e-4)
    assert cpu.zero_line == pytest.approx(2.7672, abs=1e-4)
    for name, pairs in by_template.items():
        weights, values = np.array(pairs).T
        assert cpu.blind[name] == pytest.approx(np.average(values, weights=weights), abs=0.005), name
    assert all(0 < value < cpu.zero_line for value in cpu.blind.values())


def test_the_zero_line_is_the_entropy_of_validation_labels(cpu):
    labels = cpu.val(0, cpu.num_val).labels.flatten().numpy()
    assert entropy(np.bincount(labels, minlength=NUM_ANSWERS) / len(labels)) == pytest.approx(cpu.zero_line, abs=0.003)


@pytest.mark.parametrize("preset", ["cpu", "small"])
def test_answers_are_exact_where_nothing_is_flipped(preset):
    assert opened(preset).floor == 0.0


def test_label_flips_have_the_stated_rate_and_floor(cpu):
    flipped = opened("cpu-flip")
    a, b = cpu.train(0, 4096), flipped.train(0, 4096)
    assert torch.equal(a.images, b.images)
    disagreement = (a.labels != b.labels).double().mean().item()
    expected = 0.05 * 15 / 16  # one flip in 16 gives the same answer again
    assert disagreement == pytest.approx(expected, abs=4 * math.sqrt(expected / 65536))
    assert flipped.floor == pytest.approx(0.316, abs=5e-4)
    q = np.full(NUM_ANSWERS, 0.05 / 16)
    q[3] += 0.95
    assert flipped.floor == pytest.approx(entropy(q), rel=1e-12)
    replaced = b.labels[a.labels != b.labels]
    assert torch.bincount(replaced, minlength=16).double().std() / len(replaced) < 0.01
    assert (flipped.val(0, 64).labels != cpu.val(0, 64).labels).any()
    assert flipped.zero_line > cpu.zero_line


def test_hash_is_splitmix64():
    """Against the same mixing in Python's unbounded integers."""
    mask = (1 << 64) - 1

    def reference(seed, index, salt):
        x = (index * 0xD1342543DE82EF95 + salt * 0x9E3779B97F4A7C15) & mask
        x ^= (seed * 0xA24BAED4963EE407 + 0x9FB21C651E98DF25) & mask
        for _ in range(2):
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x ^= x >> 31
        return (x >> 11) / (1 << 53)

    for seed in (0, 1, 0x5EED, (1 << 32) - 1, VAL_SEED, VAL_SEED + 1):
        index = torch.tensor([0, 1, 255, 10**6, 1 << 40])
        expected = [[reference(seed, i, salt) for salt in (1, 2, 3)] for i in index.tolist()]
        assert hash_uniform(seed, index, 3).tolist() == expected


def test_hash_is_uniform_and_uncorrelated():
    u = torch.cat([hash_uniform(seed, torch.arange(2000), 8) for seed in (0, 1, 2, VAL_SEED)], 1).numpy()  # [2000, 32]
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 64, (0, 1))[0]
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 63) < 5 * math.sqrt(126)
    correlation = np.corrcoef(u.T) - np.eye(32)
    assert abs(correlation).max() < 5 / math.sqrt(2000)
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 5 / math.sqrt(2000)


# seeds ---------------------------------------------------------------------------------------------------------------


def scenes(source, seed, count):
    scene = source.latents(seed, torch.arange(count))
    joined = torch.cat([scene["question"], scene["glyph"], scene["colour"]], 1)
    return set(map(tuple, joined.tolist()))


def test_training_and_validation_share_no_scene(cpu):
    training = scenes(cpu, 0, 8192) | scenes(cpu, 1, 8192)
    assert len(training) == 2 * 8192
    assert not training & scenes(cpu, VAL_SEED, cpu.num_val)
    assert not scenes(cpu, VAL_SEED, cpu.num_val) & scenes(cpu, VAL_SEED + 1, cpu.num_val)


def test_another_data_seed_is_another_order_of_the_same_world(cpu):
    other = opened("cpu", data_seed=1)
    assert not torch.equal(other.train(0, 16).labels, cpu.train(0, 16).labels)
    assert torch.equal(other.table, cpu.table) and torch.equal(other.glyph, cpu.glyph)
    assert all(torch.equal(a, b) for a, b in zip(other.val(7, 9), cpu.val(7, 9)))
    assert other.zero_line == cpu.zero_line


def test_validation_ends(cpu):
    assert cpu.val(cpu.num_val - 2, 2).images.shape[0] == 2
    with pytest.raises(IndexError, match="validation has 4096 images"):
        cpu.val(cpu.num_val - 2, 3)


# drawing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "count"), [("cpu", 32), ("small", 16), ("gpu", 4)])
def test_a_higher_resolution_averages_to_the_lower_and_is_no_upsample(preset, count):
    sources = [opened(preset, scale) for scale in (1, 2, 4)]
    images = [s.render(s.latents(0, torch.arange(count))) for s in sources]
    for low, high in zip(images, images[1:]):
        assert high.shape[-1] == 2 * low.shape[-1]
        assert torch.allclose(F.avg_pool2d(high, 2), low, atol=1e-6)
        upsampled = F.interpolate(low, scale_factor=2, mode="nearest")
        assert (high - upsampled).abs().mean() > 0.02
    labels = [s.answers(s.latents(0, torch.arange(count)), 0) for s in sources]
    assert torch.equal(labels[0], labels[1]) and torch.equal(labels[0], labels[2])


def test_glyphs_and_marks_can_be_told_apart(cpu):
    assert len(torch.unique(cpu.glyph.flatten(1), dim=0)) == 128
    margin = torch.ones(4, 4, dtype=torch.bool)
    margin[1:, 1:] = False
    # 21 random bits for 256 questions: numbers 37 and 86, 0.7 % of the answers, got the same mark
    assert len(torch.unique(cpu.mark[:, margin].flatten(1), dim=0)) == 255
    assert torch.equal(cpu.mark[37][margin], cpu.mark[86][margin])
    assert len(torch.unique(cpu.palette, dim=0)) == 8


def test_pixel_noise_is_a_tenth_of_the_range_and_fresh_for_every_sample(cpu):
    noise = cpu.train(0, 512).images - cpu.render(cpu.latents(0, torch.arange(512)))
    assert noise.std().item() == pytest.approx(2 * 0.1, rel=0.01)  # images are 2 (x - 0.4)
    flat = noise.flatten(1)
    assert abs(torch.corrcoef(flat[[0, 1, 255, 256, 257]]) - torch.eye(5)).max() < 5 / math.sqrt(768)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        (24, 4, "image_size=24 cannot be drawn; this preset draws 16 times a power of two"),
        (48, 4, "image_size=48 cannot be drawn"),
        (8, 4, "image_size=8 cannot be drawn"),
        (16, 3, "patch_size=3 does not divide the 4-pixel cells"),
        (
            16,
            8,
            "patch_size=8 does not divide the 4-pixel cells of this preset at image_size=16; choose a divisor of 4",
        ),
        (32, 16, "patch_size=16 does not divide the 8-pixel cells"),
    ],
)
def test_sizes_that_cannot_be_drawn_say_so(image_size, patch_size, message):
    with pytest.raises(UserError, match=message):
        open_data("stream", "cpu", image_size, patch_size, 0)


def test_the_table_of_presets_is_that_of_the_stream():
    assert {name: size for name, (size, _) in ALL_PRESETS["stream"].items()} == {
        n: w.image_size for n, w in PRESETS.items()
    }


def test_unknown_sources_and_presets_say_so():
    with pytest.raises(UserError, match="data='imagenet' is unknown; choose one of " + ", ".join(SOURCES)):
        open_data("imagenet", "cpu", 16, 4, 0)
    with pytest.raises(UserError, match="preset='tpu' is unknown to stream; choose one of cpu, "):
        open_data("stream", "tpu", 16, 4, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: that latents and labels are the same there")
def test_scenes_do_not_depend_on_the_device(cpu):
    there = open_source("gpu", 64, 8, 0, "cuda").train(0, 256)
    here = open_source("gpu", 64, 8, 0).train(0, 256)
    assert torch.equal(there.labels.cpu(), here.labels)
    assert torch.equal(there.skills.cpu(), here.skills)
