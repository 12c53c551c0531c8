"""The icon source on a small package of hand-written drawings (see icon_package)."""

import hashlib
import json
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from icon_package import CONCEPTS, small_package, write_package

from sovit import UserError
from sovit.data import NORMALISATION, PRESETS, assets, open_data
from sovit.data.icons import icons, labels, render
from sovit.train.evaluate import cells


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "iconify.tgz"
    write_package(path, small_package())
    return path


@pytest.fixture
def cache(package, tmp_path_factory, monkeypatch, request):
    """The small package in place of the asset, and a cache that the tests of this module share."""
    pytest.importorskip("resvg_py", reason="rendering needs the extra `icons`")
    folder = package.parent / "cache"
    monkeypatch.setenv("SOVIT_ICONIFY", str(package))
    monkeypatch.setenv("SOVIT_CACHE", str(folder))
    monkeypatch.setattr(labels, "VAL_FAMILY_SHARE", 1.0)  # one of a dozen families is a large share
    return folder


@pytest.fixture(scope="module")
def pinned():
    """All icons of the pinned package that may be drawn."""
    try:
        package = assets.path("iconify")
    except UserError as error:
        pytest.skip(str(error))
    return render.read_icons(package)


def mosaic(seed=0, image_size=32, patch_size=4) -> icons.Icons:
    return open_data("icons", "mosaic", image_size, patch_size, seed)


def same(a, b) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_choice_of_the_pinned_package_is_frozen(pinned):
    """Cached masks and committed results rest on it. Where a choice has to change, labels.RECIPE must too."""
    chosen, classes = labels.choose(pinned, 40)
    digest = hashlib.sha256(repr([(icon.title, icon.concept) for icon in chosen]).encode()).hexdigest()
    assert (len(classes), len(chosen), digest[:12]) == (40, 50_648, "15be724ae92f")


# samples


def test_samples_are_pure_functions_of_seed_and_index(cache):
    whole = mosaic().train(200, 600)
    again = mosaic()
    for size in (1, 16, 300):
        parts = [again.train(200 + k, min(size, 600 - k)) for k in range(0, 600, size)]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    assert not same(mosaic(1).train(200, 16), again.train(200, 16))
    far = again.train(10**10, 3)
    assert torch.equal(mosaic().train(10**10 - 1, 4).images[1:], far.images)


def test_validation_is_fixed_whatever_the_seed(cache):
    a, b = mosaic(seed=0), mosaic(seed=7)
    a.train(0, 16)
    assert same(a.val(100, 300), b.val(100, 300)) and a.num_val == 4096
    assert not torch.equal(a.val(0, 16).images, a.train(0, 16).images)
    for refused in (a.val, lambda start, count: a.shown(start, count, val=True)):
        with pytest.raises(UserError, match="num_val=4096"):
            refused(4090, 7)


def test_batch_has_the_promised_shapes(cache):
    source = mosaic()
    batch = source.train(0, 5)
    assert batch.images.shape == (5, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (5, 64) and batch.labels.dtype == torch.int64 and batch.skills is None
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    assert source.readout == "tokens" and source.num_classes == 40 and source.skills == () and source.blind == {}
    assert 0 < source.zero_line < 5
    single = open_data("icons", "single40", 24, 8, 0)
    assert single.readout == "pooled" and single.train(0, 5).labels.shape == (5,)
    assert single.train(0, 5).images.shape == (5, 3, 24, 24)
    assert single.num_val == np.load(single.folder / "is_val.npy").sum()  # every validation drawing once


def test_every_token_has_the_class_of_the_drawing_under_it(cache):
    source = mosaic()
    batch = source.val(0, 64)
    ink = batch.images[:, 0] / icons.GAIN + icons.CENTRE  # [B, 32, 32]
    # drawings are bars from the left edge, 4 + concept / 2 units of 24 high
    height = ink.reshape(64, 2, 16, 2, 16)[..., :7].mean(-1).sum(2) * 24 / 16  # [B, 2, 2]
    number = torch.tensor([CONCEPTS.index(name) for name in source.class_names])
    labels = batch.labels.reshape(64, 2, 4, 2, 4)
    assert (labels == labels[:, :, :1, :, :1]).all()
    told = 4 + number[labels[:, :, 0, :, 0]] / 2
    assert (height - told).abs().max() < 1.0
    assert torch.equal(tile_labels(source, batch.labels), labels[:, :, 0, :, 0].reshape(64, 4))


def test_it_is_told_which_icon_stands_where(cache):
    source = mosaic()
    for val, batch in ((False, source.train(250, 12)), (True, source.val(250, 12))):
        shown = source.shown(250, 12, val=val)  # across two chunks
        assert shown.shape == (12, 4)
        assert torch.equal(torch.from_numpy(source.classes[shown]), tile_labels(source, batch.labels))
        for icon in shown.flat:
            told = source.texts[icon]
            wanted = source.class_names[source.classes[icon]], "val" if val else "train"
            assert (told["concept"], told["split"]) == wanted


def test_images_undo_to_pixels_by_the_stated_normalisation(cache, monkeypatch):
    """What an exported encoder is told of mean and deviation brings images back into [0, 1]."""
    monkeypatch.setattr(icons, "NOISE", 0.0)
    mean, std = NORMALISATION["icons"]
    pixels = mosaic().train(0, 256).images * std + mean
    assert -1e-6 <= pixels.min() < 0.05 and 0.95 < pixels.max() <= 1 + 1e-6


def test_samples_of_the_first_presets_are_frozen(tmp_path):
    """Committed results speak of these samples: how icons, noise and cells are drawn may not change.

    Images to a sum: processors round differently.
    """
    random = np.random.default_rng(0)
    np.save(tmp_path / "classes.npy", random.integers(40, size=300))
    np.save(tmp_path / "masks.npy", random.integers(256, size=(300, 16, 16), dtype=np.uint8))
    np.save(tmp_path / "is_val.npy", np.arange(300) >= 250)
    (tmp_path / "info.json").write_text(json.dumps({"classes": [str(c) for c in range(40)]}))
    total, weighted = (
        {"mosaic": 585960.10935, "single40": 146531.15744},
        {"mosaic": 35.573907, "single40": 26.861727},
    )
    found = {}
    for preset in ("mosaic", "single40"):
        size = 16 * icons.PRESETS[preset].grid
        source = icons.Icons(icons.PRESETS[preset], tmp_path, size, 4, 3, "cpu")
        batches = source.train(200, 300), source.train(10**6, 2), source.val(0, 50)
        labels = hashlib.sha256(b"".join(batch.labels.numpy().tobytes() for batch in batches)).hexdigest()[:12]
        images = torch.cat([batch.images for batch in batches]).double()
        weights = torch.linspace(-1, 1, images.numel(), dtype=torch.float64).view_as(images)  # a moved pixel shows
        assert images.abs().sum().item() == pytest.approx(total[preset], rel=1e-6)
        assert (images * weights).sum().item() == pytest.approx(weighted[preset], abs=1e-3)
        found[preset] = labels, source.num_val
    assert found == {"mosaic": ("03bdb46f9e58", 4096), "single40": ("ec32d0fb214b", 50)}


def test_summed_tokens_of_a_tile_answer_for_its_icon(cache):
    source = mosaic()
    labels = source.val(0, 8).labels
    logits = torch.nn.functional.one_hot(labels, 40).float()
    summed = cells(logits, source.label_grid).sum(2)
    assert summed.shape == (8, 4, 40) and summed.max() == 16
    assert torch.equal(summed.argmax(-1), tile_labels(source, labels))


def tile_labels(source, labels):
    """The label of each tile, [B, N] -> [B, tiles]."""
    return cells(labels[..., None], source.label_grid)[:, :, 0, 0]


def test_a_larger_image_is_the_same_drawing_with_more_detail(cache):
    small, large = mosaic(), mosaic(image_size=64)
    assert large.train(0, 1).labels.shape == (1, 256)
    assert torch.equal(tile_labels(small, small.train(0, 64).labels), tile_labels(large, large.train(0, 64).labels))
    a = small.val(0, 64).images.mean(1)
    b = torch.nn.functional.avg_pool2d(large.val(0, 64).images, 2).mean(1)
    assert np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.95


# the cache


def test_training_and_validation_families_are_disjoint_and_credited(cache):
    folder = render.masks_folder(40, 16)
    rows = [line.split("\t") for line in (folder / "ATTRIBUTION.tsv").read_text().splitlines()]
    assert rows[0] == ["title", "concept", "licence", "author", "family", "split"]
    families = {split: {row[4] for row in rows[1:] if row[5] == split} for split in ("train", "val")}
    assert families["val"] and not families["train"] & families["val"]
    info = json.loads((folder / "info.json").read_text())
    classes, is_val = np.load(folder / "classes.npy"), np.load(folder / "is_val.npy")
    assert len(rows) - 1 == len(classes) == info["num_train"] + info["num_val"] and is_val.sum() == info["num_val"]
    assert [info["classes"][c] for c in classes] == [row[1] for row in rows[1:]]
    assert info["blank"] == 1 and info["broken"] == 1
    masks = np.load(folder / "masks.npy")[: len(classes)]
    assert not {m.tobytes() for m in masks[is_val]} & {m.tobytes() for m in masks[~is_val]}


def test_cache_is_reused(cache):
    folder = render.masks_folder(40, 16)
    before = (folder / "masks.npy").stat().st_mtime_ns
    mosaic()
    assert mosaic(seed=1).content_key == folder.name != mosaic(image_size=64).content_key
    assert render.masks_folder(40, 16) == folder and (folder / "masks.npy").stat().st_mtime_ns == before


def build(number: int) -> str:
    labels.VAL_FAMILY_SHARE = 1.0
    return str(render.masks_folder(40, 10))


def test_concurrent_builds_make_one_cache(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        folders = pool.map(build, range(2), chunksize=1)
    assert folders[0] == folders[1]
    left = sorted(os.listdir(tmp_path / "icons"))
    assert len(left) == 2 and left[0].endswith(".lock")  # the folder and its lock, nothing half built
    assert sum(np.load(f"{folders[0]}/masks.npy").any((1, 2))) == len(np.load(f"{folders[0]}/classes.npy"))


def test_rendered_masks_do_not_need_the_package(cache, monkeypatch, tmp_path):
    monkeypatch.delenv("SOVIT_ICONIFY")
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="run: sovit assets fetch iconify"):
        mosaic()
    assert [p for p in (tmp_path / "icons").iterdir() if p.suffix != ".lock"] == []
    monkeypatch.setattr(assets, "path", lambda name: cache.parent / "iconify.tgz")
    first = mosaic().val(0, 4)
    monkeypatch.undo()
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    assert same(mosaic().val(0, 4), first)


def test_cache_key_is_frozen(monkeypatch):
    """Masks that were rendered by an earlier version are found again, unless rules or the pinned package changed."""
    monkeypatch.delenv("SOVIT_ICONIFY", raising=False)
    monkeypatch.setattr(render, "build_once", lambda kind, key, build: f"{kind}/{key}")
    assert render.masks_folder(40, 16) == "icons/80d501b4a1b68b84"
    assert render.masks_folder(200, 32) == "icons/68e83d42993ae8c4"


@pytest.mark.parametrize("preset", PRESETS["icons"])
def test_listed_presets_work_at_their_listed_size(cache, monkeypatch, preset):
    image_size, what = PRESETS["icons"][preset]
    assert f"{icons.PRESETS[preset].num_classes:,} classes" in what
    monkeypatch.setitem(icons.PRESETS, preset, replace(icons.PRESETS[preset], num_classes=40))  # what the package has
    source = open_data("icons", preset, image_size, 4, 0)
    for batch in (source.train(0, 3), source.val(0, 3)):
        assert batch.images.shape == (3, 3, 32, 32)
        assert batch.labels.shape == ((3, 64) if source.readout == "tokens" else (3,))


def test_both_tables_of_presets_agree():
    assert PRESETS["icons"].keys() == icons.PRESETS.keys()


# errors


@pytest.mark.parametrize(
    ("preset", "image_size", "patch_size", "seed", "message"),
    [
        ("mosaics", 32, 4, 0, "preset='mosaics' is unknown to icons; choose one of mosaic"),
        ("mosaic", 33, 4, 0, "image_size=33 cannot hold 2 x 2 icons"),
        ("mosaic", 32, 5, 0, "patch_size=5 does not divide the 16 pixels"),
        ("mosaic", 32, 32, 0, "patch_size=32 does not divide the 16 pixels"),
        ("single40", 32, 5, 0, "patch_size=5 does not divide the 32 pixels"),
        ("mosaic", 32, 4, -1, "data_seed=-1 is negative"),
        ("single200", 32, 4, 0, "num_classes=200 is more than the 40 concepts found"),
    ],
)
def test_bad_input_is_said_in_one_line(cache, preset, image_size, patch_size, seed, message):
    with pytest.raises(UserError, match=message) as caught:
        open_data("icons", preset, image_size, patch_size, seed)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_package(cache, monkeypatch, tmp_path):
    wrong = tmp_path / "wrong.tgz"
    wrong.write_bytes(b"not an archive")
    monkeypatch.setenv("SOVIT_ICONIFY", str(wrong))
    with pytest.raises(UserError, match="is not an @iconify/json package"):
        mosaic()


def test_missing_renderer_names_the_extra(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'sovit\[icons\]'"):
        mosaic()
