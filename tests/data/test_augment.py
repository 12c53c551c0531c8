"""Random crops against torchvision: the boxes' distribution, the pixels for given boxes; and the samples of a set."""

import numpy as np
import pytest
import torch
from photographs import crop, write_folder
from PIL import Image

from sovit.data import open_data
from sovit.data.hub import augment
from sovit.data.hub.augment import crop_boxes, resized_crop

pytest.importorskip("datasets")
transforms = pytest.importorskip("torchvision.transforms")


def photos(side: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(crop(i, side, side)) for i in range(count)]))  # [B, S, S, 3]


def resized(images: torch.Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: int) -> torch.Tensor:
    """Ours on a CPU, in 0 .. 255, the images asked for in another order than they lie."""
    rows = np.arange(len(images))[::-1]
    pixels = resized_crop(images.numpy(), rows, boxes[::-1], mirrored[::-1], size, "cpu")
    return (pixels.flip(0) + 1) * 127.5


def reference(images: torch.Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: int) -> torch.Tensor:
    """torchvision's own, through Pillow, one by one: [B, 3, size, size]."""
    out = []
    for image, box, flip in zip(images, boxes.tolist(), mirrored, strict=True):
        pixels = transforms.functional.resized_crop(Image.fromarray(image.numpy()), *box, [size, size])
        out.append(
            torch.from_numpy(np.array(pixels)).permute(2, 0, 1).flip(-1)
            if flip
            else transforms.functional.pil_to_tensor(pixels)
        )
    return torch.stack(out).float()


# boxes


@pytest.mark.parametrize("min_area", [0.05, 0.5])
def test_boxes_are_distributed_as_torchvisions(min_area):
    side, count = 256, 6000
    torch.manual_seed(0)
    image = torch.empty(3, side, side)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, [min_area, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    ours = crop_boxes(7, 0, count, side, min_area)
    assert ours.min() >= 0 and (ours[:, :2] + ours[:, 2:]).max() <= side
    for what in (
        lambda b: b[:, 2] * b[:, 3] / side**2,  # area
        lambda b: b[:, 3] / b[:, 2],  # ratio
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
    ):
        a, b = np.sort(what(ours)), np.sort(what(theirs))
        steps = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, steps, "right") - np.searchsorted(b, steps, "right")).max() / count
        assert gap < 2.23 * (2 / count) ** 0.5  # Kolmogorov-Smirnov at 0.01 %: there are twelve of these


def test_a_box_depends_on_seed_and_index_alone():
    whole = crop_boxes(3, 200, 700, 64, 0.05)  # of four streams of random numbers
    for size in (1, 7, 256, 600):
        parts = [crop_boxes(3, 200 + k, min(size, 700 - k), 64, 0.05) for k in range(0, 700, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert (crop_boxes(4, 200, 700, 64, 0.05) != whole).any(1).mean() > 0.95
    assert len(np.unique(whole, axis=0)) > 650
    assert (crop_boxes(0, 0, 50, 64, 1.0)[:, 2:] == 64).mean() > 0.9  # a full box of another ratio never fits


# pixels


@pytest.mark.parametrize("side, size", [(256, 224), (73, 64), (128, 32), (37, 32)])
def test_crops_on_a_cpu_are_torchvisions(side, size):
    images = photos(side, 12)
    boxes, mirrored = crop_boxes(0, 0, 12, side, 0.05), np.arange(12) % 2 == 1
    ours = resized(images, boxes, mirrored, size)
    assert ours.shape == (12, 3, size, size) and ours.dtype == torch.float32
    assert (ours - reference(images, boxes, mirrored, size)).abs().max() <= 2  # of 255: Pillow rounds twice


def in_batches(images: torch.Tensor, rows: np.ndarray, boxes: np.ndarray, size: int, mirrored=None) -> torch.Tensor:
    """The code of a GPU, run on this CPU, in 0 .. 255."""
    mirrored = np.zeros(len(rows), bool) if mirrored is None else mirrored
    out = torch.empty(len(rows), 3, size, size)
    augment._in_batches(images.numpy(), rows, boxes, mirrored, np.argsort(rows), out)
    return (out + 1) * 127.5


@pytest.mark.parametrize("side, size, mean", [(256, 224, 0.6), (73, 64, 1.0), (128, 64, 1.5), (256, 64, 2.5)])
def test_crops_in_batches_are_close_to_torchvisions(side, size, mean):
    images, boxes = photos(side, 12), crop_boxes(0, 0, 12, side, 0.05)
    wanted = reference(images, boxes, np.zeros(12, bool), size)
    assert (in_batches(images, np.arange(12), boxes, size) - wanted).abs().mean() < mean


def test_batches_on_a_device_are_the_same_samples(monkeypatch):
    """Same samples in the same places, whatever is asked for together."""
    images = photos(73, 20)
    rows, boxes = np.random.default_rng(0).permutation(20), crop_boxes(0, 0, 20, 73, 0.3)
    mirrored = np.arange(20) % 3 == 1
    monkeypatch.setattr(augment, "AT_ONCE", 8)
    batched = in_batches(images, rows, boxes, 64, mirrored)
    one_by_one = (resized_crop(images.numpy(), rows, boxes, mirrored, 64, "cpu") + 1) * 127.5
    assert ((one_by_one - batched).abs().mean((1, 2, 3)) < 2).all()
    monkeypatch.setattr(augment, "AT_ONCE", 3)
    assert torch.equal(in_batches(images, rows, boxes, 64, mirrored), batched)


def test_a_box_of_the_wanted_size_is_copied():
    images = photos(40, 3)
    box = np.tile([3, 5, 32, 32], (3, 1))
    there = images[:, 3:35, 5:37].permute(0, 3, 1, 2).float()
    assert torch.allclose(in_batches(images, np.arange(3), box, 32), there, atol=1e-2)
    ours = resized(images, box, np.array([False, True, False]), 32)
    assert torch.allclose(ours[0::2], there[0::2], atol=1e-2)
    assert torch.allclose(ours[1], there[1].flip(-1), atol=1e-2)


# the samples of a set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "set", 45, 100, 75)
    return root / "set"


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("SOVIT_CACHE", str(folder.parent / "cache"))


def opened(preset: str, size: int = 32, seed: int = 0):
    return open_data("hub", preset, size, 8, seed)


def test_cropped_samples_are_pure_functions_of_seed_and_index(folder):
    preset = f"{folder}?crop=0.1"
    whole = opened(preset).train(30, 100)  # crosses three epochs
    again = opened(preset)
    for size in (1, 33, 64):
        parts = [again.train(30 + k, min(size, 100 - k)) for k in range(0, 100, size)]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    assert not torch.equal(opened(preset, seed=1).train(30, 100).images, whole.images)
    assert torch.equal(opened(preset, seed=1).val(0, 4).images, again.val(0, 4).images)


def test_crops_are_cut_from_a_larger_cache(folder):
    plain, cropped = opened(f"{folder}?flip=0"), opened(f"{folder}?flip=0&crop=0.05")
    assert plain._images.shape[1] == 32 and cropped._images.shape[1] == 37  # 32 of 8/7
    assert plain.content_key != cropped.content_key != opened(f"{folder}?crop=0.1").content_key
    assert opened(f"{folder}?crop=0.1&cache_size=64")._images.shape[1] == 64
    first = cropped.train(0, 40)
    assert torch.equal(first.labels, plain.train(0, 40).labels)  # the order is that of the whole images
    rows = cropped._epoch_order(0)[0]
    boxes = crop_boxes(0, 0, 40, 37, 0.05)
    shown = resized_crop(cropped._images, rows[:40], boxes, np.zeros(40, bool), 32, "cpu")
    assert torch.equal(first.images, shown)
    middle = torch.from_numpy(cropped._images[cropped._val_rows][:, 2:34, 2:34]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(cropped.val(0, cropped.num_val).images, middle, atol=1e-6)  # as decoded, not resampled
    assert cropped.zero_line == plain.zero_line


def test_a_larger_cache_alone_is_shown_whole(folder):
    large, small = opened(f"{folder}?cache_size=96"), opened(str(folder))
    difference = (large.train(0, 40).images - small.train(0, 40).images).abs()
    assert 0 < difference.mean() < 0.06  # another filter, not another picture
    assert large.content_key != small.content_key


def test_mirrored_crops_mirror(folder):
    plain, mirrored = opened(f"{folder}?flip=0&crop=0.3"), opened(f"{folder}?crop=0.3")
    a, b = plain.train(0, 40).images, mirrored.train(0, 40).images
    flipped = (a != b).any((1, 2, 3))
    assert 8 < flipped.sum() < 32 and torch.equal(b[flipped], a[flipped].flip(-1))
