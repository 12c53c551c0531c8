"""Captions: true of what the latents say, counted one by one, and functions of (seed, index) alone."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from icon_package import small_package, write_package

from sovit import UserError
from sovit.data import open_data
from sovit.data.captions import encode, open_captions
from sovit.data.icons import labels
from sovit.data.icons.text import STYLES
from sovit.data.stream.world import VAL_SEED


def text_of(captions, words):
    """Word numbers [T] as text."""
    return " ".join(captions.words[i] for i in words if i)


TOPIC = {"cells": "colour", "glyphs": "kind", "answers": "answer"}


@functools.cache
def stream(preset="cpu", size=16, seed=3):
    source = open_data("stream", preset, size, 4, seed)
    return source, open_captions("stream", source)


@pytest.fixture
def icon_captions(tmp_path_factory, monkeypatch):
    """preset -> an opened preset of the small package and its captions."""
    pytest.importorskip("resvg_py", reason="rendering needs the extra `icons`")
    folder = tmp_path_factory.getbasetemp() / "caption_icons"
    if not folder.exists():
        folder.mkdir()
        write_package(folder / "iconify.tgz", small_package())
    monkeypatch.setenv("SOVIT_ICONIFY", str(folder / "iconify.tgz"))
    monkeypatch.setenv("SOVIT_CACHE", str(folder / "cache"))
    monkeypatch.setattr(labels, "VAL_FAMILY_SHARE", 1.0)

    def opened(preset):
        source = open_data("icons", preset, 32, 4, 3)
        return source, open_captions("icons", source)

    return opened


# truth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "size"), [("cpu", 16), ("detail", 32), ("gpu", 64)])
@pytest.mark.parametrize("val", [False, True])
def test_captions_of_the_stream_are_true(preset, size, val):
    source, captions = stream(preset, size)
    seed, start, count = VAL_SEED if val else 3, 50, 40
    scene = source.latents(seed, torch.arange(start, start + count))
    answers = source.answers(scene, seed)
    topics = Counter()
    for i, words in enumerate((captions.val if val else captions.train)(start, count)):
        told = text_of(captions, words).split()
        topic = TOPIC[told[1]]
        topics[topic] += 1
        cells = []
        for c in range(source.world.grid**2):
            names = {
                "colour": source.colour_names[scene["colour"][i, c]],
                "kind": f"kind-{scene['glyph'][i, c] % 8}",
                "answer": f"answer-{answers[i, c]}",
            }
            cells.append(names[topic])
        assert told[0] == "most" and told[2] == "are" and told[4] == ":"
        assert told[5:] == cells[:16]
        assert cells.count(told[3]) == max(Counter(cells).values())
    assert len(topics) == 3 and min(topics.values()) >= 5


def test_prompts_are_true_of_the_scenes_that_zero_shot_says():
    source, captions = stream()
    for topic, (prompts, true) in captions.zero_shot().items():
        assert true.shape == (source.num_val, len(prompts)) and true.any(1).all()
        texts = [text_of(captions, words) for words in prompts]
        assert len(set(texts)) == len(texts)
        for words, row in zip(captions.val(0, 60), true):
            told = text_of(captions, words)
            if TOPIC[told.split()[1]] == topic:  # where the caption tells this topic, it begins with a true prompt
                assert row[texts.index(" ".join(told.split()[:4]))]
    majority = captions.zero_shot()["colour"][1].double().mean(0).max().item()
    assert majority == pytest.approx(0.54, abs=0.02)


@pytest.mark.parametrize("preset", ["mosaic", "single40"])
@pytest.mark.parametrize("val", [False, True])
def test_captions_of_icons_are_true(icon_captions, preset, val):
    source, captions = icon_captions(preset)
    shown = source.shown(5, 30, val)
    cells = source.preset.grid**2
    for i, words in enumerate((captions.val if val else captions.train)(5, 30)):
        for c, told in enumerate(words.view(cells, -1)):
            icon, told = source.texts[shown[i, c]], text_of(captions, told).split()
            assert icon["concept"] in told
            assert set(told) <= {icon["concept"], *icon["caption"].split(), *icon["style"]}
            if icon["style"]:
                assert told[0] == icon["style"][0] in STYLES


@pytest.mark.parametrize("preset", ["mosaic", "single40"])
def test_prompts_of_icons_are_true_of_what_is_shown(icon_captions, preset):
    source, captions = icon_captions(preset)
    found = captions.zero_shot()
    shown = source.classes[source.shown(0, source.num_val, val=True)]
    prompts, true = found["concept"]
    assert [text_of(captions, words) for words in prompts] == list(source.class_names)
    for i in range(0, source.num_val, 97):
        assert set(np.flatnonzero(true[i])) == set(shown[i])


# functions of (seed, index) ----------------------------------------------------------------------------------------------


def slices(captions):
    whole = captions.train(200, 120)
    assert whole.shape == (120, captions.num_words) and whole.dtype == torch.int64
    assert torch.equal(torch.cat([captions.train(200, 7), captions.train(207, 100), captions.train(307, 13)]), whole)
    assert torch.equal(captions.train(200, 120), whole)
    assert not torch.equal(captions.train(201, 120), whole) and not torch.equal(captions.val(0, 120), whole)
    assert 0 < whole.max() < len(captions.words) == len(set(captions.words))
    return whole


def test_captions_of_the_stream_depend_on_seed_and_index_alone():
    whole = slices(stream()[1])
    assert torch.equal(stream.__wrapped__()[1].train(200, 120), whole)
    assert not torch.equal(stream(seed=4)[1].train(200, 120), whole)
    assert torch.equal(stream(seed=4)[1].val(0, 50), stream()[1].val(0, 50))


def test_captions_of_icons_depend_on_seed_and_index_alone(icon_captions):
    assert torch.equal(slices(icon_captions("mosaic")[1]), icon_captions("mosaic")[1].train(200, 120))


def test_a_scene_has_the_same_caption_at_any_size():
    assert torch.equal(stream(size=16)[1].train(0, 50), stream(size=32)[1].train(0, 50))


def test_hardly_two_captions_of_a_batch_are_equal():
    _, captions = stream()
    for start in range(0, 640, 64):
        assert len(captions.train(start, 64).unique(dim=0)) == 64


# words ---------------------------------------------------------------------------------------------------------------


def test_words_and_texts_are_each_others_inverse():
    _, captions = stream()
    for words in captions.val(0, 20):
        assert torch.equal(encode(captions, text_of(captions, words)), words)
    with pytest.raises(UserError, match="'purple' is no word of these captions"):
        encode(captions, "most cells are purple")
    with pytest.raises(UserError, match="22 words are too many; they have up to 21"):
        encode(captions, "red " * 22)


def test_a_source_without_captions_says_so():
    with pytest.raises(UserError, match="data='hub' has no captions; objective=siglip needs stream or icons"):
        open_captions("hub", None)
