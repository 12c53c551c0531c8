"""Decoding into a folder that grows: streams of local files and of a hub over HTTP, kills, subsets of what is there."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_hub
import torch
from PIL import Image

from sovit import UserError
from sovit.data import open_data
from sovit.data.hub import decoding

datasets = pytest.importorskip("datasets")

NAMES = ["blue", "green", "red"]


def picture(i: int) -> Image.Image:
    """A different picture for each number, and a channel that tells number % 3."""
    pixels = np.random.default_rng(i).integers(0, 120, (20, 24, 3))
    pixels[..., 2 - i % 3] += 120
    return Image.fromarray(pixels.astype(np.uint8))


def told(images: torch.Tensor) -> torch.Tensor:
    return 2 - images.mean((2, 3)).argmax(1)


def write_parquet(path: Path, numbers, labels=None) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [picture(i) for i in numbers], "label": labels or [i % 3 for i in numbers]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """120 training images in three files, 18 of a test split; the validation split keeps its labels back."""
    folder = tmp_path_factory.mktemp("parquet")
    for k in range(3):
        write_parquet(folder / f"train-{k}.parquet", range(40 * k, 40 * k + 40))
    write_parquet(folder / "validation-0.parquet", range(500, 506), [-1] * 6)
    write_parquet(folder / "test-0.parquet", range(1000, 1018))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache that the tests of this module share."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SOVIT_CACHE", str(folder))
        yield folder


@pytest.fixture
def decoded_rows(monkeypatch):
    """How many images were decoded, counted in the place where it is done."""
    count = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda row, size: count.append(1) or decode(row, size))
    return count


def images_of(source, name="_train_rows") -> list[bytes]:
    return [source._images[row].tobytes() for row in getattr(source, name)]


def opened(preset, size=8, patch=4, seed=0):
    return open_data("hub", str(preset), size, patch, seed)


def check(preset, message: str, size=8) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(preset, size)
    assert "\n" not in str(caught.value)


# streams


def test_a_stream_holds_what_a_download_holds(parquet):
    whole, streamed = opened(parquet), opened(f"{parquet}?stream=all")
    assert streamed.content_key != whole.content_key
    assert (streamed.info["num_train"], streamed.num_val) == (120, 18) == (whole.info["num_train"], whole.num_val)
    assert streamed.info["splits"] == ["train", "test"] and list(streamed.class_names) == NAMES
    assert images_of(streamed) == images_of(whole)
    assert sorted(images_of(streamed, "_val_rows")) == sorted(images_of(whole, "_val_rows"))
    assert torch.equal(streamed.train(0, 200).images, whole.train(0, 200).images)
    assert torch.equal(told(streamed.train(0, 120).images), streamed.train(0, 120).labels)
    assert streamed.zero_line == whole.zero_line


def test_a_stream_is_read_so_far_and_then_further(parquet, decoded_rows):
    part = opened(f"{parquet}?stream=30", 12)
    assert len(decoded_rows) == 30 + 18 and (part.info["num_train"], part.num_val) == (30, 18)
    more = opened(f"{parquet}?stream=100", 12)
    assert len(decoded_rows) == 100 + 18  # nothing twice
    assert images_of(more)[:30] == images_of(part)
    again = opened(f"{parquet}?stream=30", 12)
    assert len(decoded_rows) == 118 and again.content_key == part.content_key != more.content_key
    assert torch.equal(again.train(0, 64).images, part.train(0, 64).images) and again.zero_line == part.zero_line
    every = opened(f"{parquet}?stream=all", 12)
    assert len(decoded_rows) == 138 and images_of(every) == images_of(opened(parquet, 12))
    check(f"{parquet}?stream=121", r"has 120 training images; give \?stream=all, or fewer", 12)


def test_a_stream_without_a_validation_split_holds_images_out(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", range(200))
    small, large = opened(f"{tmp_path}?stream=60"), opened(f"{tmp_path}?stream=all")
    assert small.info["num_train"] == 60 and 0 < small.num_val < 20
    assert large.info["num_train"] + large.num_val == 200 and 8 < large.num_val < 35
    assert set(images_of(small)) <= set(images_of(large))
    assert set(images_of(small, "_val_rows")) <= set(images_of(large, "_val_rows"))
    assert not set(images_of(large)) & set(images_of(large, "_val_rows"))


def test_webdataset(tmp_path):
    for k in range(2):
        with tarfile.open(tmp_path / f"train-{k:04d}.tar", "w") as archive:
            for i in range(30 * k, 30 * k + 30):
                for name, data in ((f"{i:04d}.png", png(i)), (f"{i:04d}.cls", str(i % 3 + 7).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    whole, streamed = opened(tmp_path), opened(f"{tmp_path}?stream=all")
    for source in (whole, streamed):
        assert list(source.class_names) == ["7", "8", "9"]  # untyped: sorted as numbers
        assert torch.equal(told(source.train(0, 50).images), source.train(0, 50).labels)
    assert torch.equal(told(streamed.val(0, streamed.num_val).images), streamed.val(0, streamed.num_val).labels)
    single = opened(f"{tmp_path}/train-0001.tar?stream=all")
    assert single.info["num_train"] + single.num_val == 30


def png(i: int) -> bytes:
    stream = io.BytesIO()
    picture(i).save(stream, "PNG")
    return stream.getvalue()


def test_names_as_labels_are_numbered_as_if_read_at_once(tmp_path):
    names = [["owl", "cat", "ape"][i % 3] if i < 60 else "bee" for i in range(90)]
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(90)], "kind": names}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    few = opened(f"{tmp_path}?label=kind&stream=40")
    assert list(few.class_names) == ["ape", "cat", "owl"]
    every = opened(f"{tmp_path}?label=kind&stream=all")
    assert list(every.class_names) == ["ape", "bee", "cat", "owl"] == list(opened(f"{tmp_path}?label=kind").class_names)
    assert [every.class_names[label] for label in every._labels] == names
    assert list(opened(f"{tmp_path}?label=kind&stream=40").class_names) == ["ape", "cat", "owl"]


def test_a_folder_of_classes_says_that_its_first_images_are_no_sample(tmp_path, capfd):
    for i in range(30):
        (tmp_path / NAMES[i // 10]).mkdir(exist_ok=True)
        picture(i).save(tmp_path / NAMES[i // 10] / f"{i}.png")
    (tmp_path / "blue" / "no.png").write_bytes(b"this is text")
    source = opened(f"{tmp_path}?stream=15")
    assert source.info["num_train"] == 15 and source.info["broken"] == 1
    assert "of 3 classes 2 came by in training and" in capfd.readouterr().err
    check(f"{tmp_path}?stream=5", "5 training images of fewer than two classes are left")
    check(f"{tmp_path}?stream=5", "fewer than two classes of readable images; read more of the stream", 12)


# kills


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.slow
def test_killed_decoding_goes_on_where_it_was(parquet, cache, tmp_path, monkeypatch, decoded_rows, streamed):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    preset = f"{parquet}?stream=all" if streamed else str(parquet)
    script = Path(__file__).parents[1] / "helpers" / "killed_decoding.py"
    command = [sys.executable, str(script), str(parquet), str(streamed), "8", "10"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = [p for p in (tmp_path / "hub").iterdir() if p.is_dir() and not p.name.startswith(".arrow")]
    kept = decoding.progress(folder)["num_rows"]
    assert 60 < kept < 100 and not (folder / "info.json").exists()
    with open(folder / "images.raw", "ab") as file:
        file.write(b"half a row that nobody counted")
    source = opened(preset)
    assert len(decoded_rows) == 138 - kept
    monkeypatch.setenv("SOVIT_CACHE", str(cache))
    whole = opened(preset)
    assert images_of(source) == images_of(whole) and np.array_equal(source._labels, whole._labels)
    assert images_of(source, "_val_rows") == images_of(whole, "_val_rows")
    assert source.content_key == whole.content_key and source.info == whole.info


@pytest.mark.parametrize(
    "owner, name, error, message",
    [
        (
            decoding.Part,
            "take",
            ConnectionError("gone"),
            r"cannot be read after \d+ images \(gone\); they are kept: run",
        ),
        (
            decoding,
            "_append",
            OSError(errno.ENOSPC, "full"),
            r"the disk of .* is full after \d+ images; free some",
        ),
    ],
    ids=["network", "disk"],
)
def test_what_breaks_off_is_gone_on_with(parquet, tmp_path, monkeypatch, owner, name, error, message):
    preset, wanted = f"{parquet}?stream=all", images_of(opened(f"{parquet}?stream=all"))
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(decoding, "BLOCK", 16)
    monkeypatch.setattr(decoding, "SAVE_SECONDS", 0.0)
    left, work = [7], getattr(owner, name)

    def fail_once(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return work(*arguments)

    monkeypatch.setattr(owner, name, fail_once)
    check(preset, message)
    left[0] = 10**6
    assert images_of(opened(preset)) == wanted


def test_a_set_that_does_not_fit_the_disk(parquet, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    check(parquet, r"138 images of 24 px take 0.0 GB, and .* has 0.0 GB left; read fewer with \?stream=NUMBER", 24)


# subsets


def test_subsets_are_nested_and_cost_no_decoding(parquet, decoded_rows):
    whole = opened(parquet)
    decoded_rows.clear()
    sets = {n: opened(f"{parquet}?num_train={n}", seed=n) for n in (10, 40, 120)}
    shown = {n: set(images_of(source)) for n, source in sets.items()}
    assert [len(s) for s in shown.values()] == [10, 40, 120] and shown[10] < shown[40] < shown[120]
    assert shown[120] == set(images_of(whole)) and not decoded_rows
    assert len({whole.content_key, *(s.content_key for s in sets.values())}) == 4
    epoch = sets[10].train(0, 10)
    assert len({image.numpy().tobytes() for image in epoch.images}) == 10
    assert torch.equal(told(epoch.images), epoch.labels) and sets[10].num_val == 18


def test_class_balanced_subsets(parquet, tmp_path):
    labels = [0] * 30 + [1] * 20 + [2] * 10
    write_parquet(tmp_path / "train.parquet", range(60), labels)
    write_parquet(tmp_path / "test.parquet", range(100, 112), [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    small, large = opened(f"{tmp_path}?per_class=4"), opened(f"{tmp_path}?per_class=10")
    for source, n in ((small, 4), (large, 10)):
        assert np.bincount(source._labels[source._train_rows]).tolist() == [n] * 3
        assert source.zero_line == pytest.approx(np.log(3))  # a balanced prior prices every validation label alike
    assert set(images_of(small)) < set(images_of(large))
    check(f"{tmp_path}?per_class=11", "per_class=11: class 'red' has 10 training images; give at most that")
    two = opened(f"{tmp_path}?classes=2&per_class=20")
    assert list(two.class_names) == ["blue", "green"] and two.num_val == 9 and two.num_classes == 2
    assert len(two._train_rows) == 40 and two.val(0, 9).labels.max() == 1
    prior = np.array([31, 21]) / 52  # with one pseudo-count a class
    assert opened(f"{tmp_path}?classes=2").zero_line == pytest.approx(-(np.log(prior) * [5 / 9, 4 / 9]).sum())
    check(f"{tmp_path}?classes=4", "classes=4 is more than the 3 classes")
    check(f"{tmp_path}?num_train=61", "num_train=61 is more than the 60 training images")
    check(f"{tmp_path}?num_train=1", "fewer than two classes are left")
    check(f"{tmp_path}?num_train=6&per_class=2", "gives per_class and num_train; give one of them")
    write_parquet(tmp_path / "test.parquet", range(100, 103), [2, 2, 2])
    check(f"{tmp_path}?classes=2", "no validation image is among those chosen; .* take more classes")


def test_classes_of_equal_size_are_chosen_at_random_but_nested(tmp_path):
    names = [f"c{i:02d}" for i in range(12)]
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        for k in range(4):
            picture(10 * i + k).save(tmp_path / name / f"{k}.png")
    (tmp_path / "c07" / "4.png").write_bytes(png(9999))
    (tmp_path / "c07" / "5.png").write_bytes(png(9998))
    chosen = [opened(f"{tmp_path}?classes={n}").class_names for n in (2, 5, 11)]
    for few, more in zip(chosen, chosen[1:], strict=False):
        assert set(few) < set(more) and list(few) == sorted(few)
    assert chosen[0] != tuple(names[:2])


def test_bad_options(parquet):
    for option in ("crop=a", "stream=some", "per_class=-1", "x"):
        check(f"{parquet}?{option}", f"unknown option; the options are .* given: {option}")
    for option, least in {"num_train=0": "1$", "per_class=0": "1$", "stream=0": "1$", "classes=1": "2$"}.items():
        check(f"{parquet}?{option}", f": {option} must be at least {least}")
    for option in ("crop=0", "crop=1.2"):
        check(f"{parquet}?{option}", f": {option} must be at least 1e-09 and at most 1$")
    check(f"{parquet}?cache_size=4", "cache_size=4 is under image_size=8")


# a hub over HTTP

ASK = """
import json, math, sys
from sovit import UserError
from sovit.data.hub.splits import Location
from sovit.data.hub.decoding import decoded
from sovit.data.hub.pixel_cache import read_table
for name, limit, streamed in (("team/colours", 20, True), ("gated/imagenet", 20, True), ("gated/imagenet", math.inf, False)):
    try:
        location = Location(name, None, name, streamed=streamed)
        table = read_table(decoded(location, 8, limit), location, limit)
        print(json.dumps([int((~table.is_val).sum()), table.info["revision"], table.classes]))
    except UserError as error:
        print(error)
"""


def test_a_hub_over_http_is_read_in_parts_and_a_gated_set_names_the_remedy(tmp_path):
    (tmp_path / "files").mkdir()
    for k in range(3):
        write_parquet(tmp_path / "files" / f"train-{k}.parquet", range(40 * k, 40 * k + 40))
    with tiny_hub.serve(tmp_path / "files") as (address, sent):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "SOVIT_CACHE": str(tmp_path / "cache"),
        }
        asked = subprocess.run(
            [sys.executable, "-c", ASK], env=os.environ | environment, capture_output=True, text=True
        )
    assert asked.returncode == 0, asked.stderr
    opened_, *refused = asked.stdout.splitlines()
    assert json.loads(opened_) == [20, tiny_hub.SHA, NAMES]
    assert sent and {name for name, _ in sent} == {"train-0.parquet"}  # the others were never asked for
    assert len(refused) == 2
    for line in refused:
        assert "accept its terms at https://huggingface.co/datasets/gated/imagenet, then run: hf auth login" in line


ASK_FOLDER = """
import hashlib
from sovit import UserError
from sovit.data import open_data
try:
    source = open_data("hub", "team/colours?stream=all&flip=0", 8, 4, 0)
    print(source.info["broken"], source.num_train + source.num_val, hashlib.sha256(source._images.tobytes()).hexdigest())
except UserError as error:
    print(error)
"""


def test_a_streamed_folder_of_images_over_http(tmp_path):
    """Loose images are fetched one by one; one that cannot be had is not a broken image."""
    (tmp_path / "files").mkdir()
    for i in range(30):
        (tmp_path / "files" / f"{i:02}.png").write_bytes(png(i))
    (tmp_path / "files" / "05.png").write_bytes(b"this is text")
    table = "".join(f"{i:02}.png,{NAMES[i % 3]}\n" for i in range(30))
    (tmp_path / "files" / "metadata.csv").write_text("file_name,label\n" + table)
    answers = []
    with tiny_hub.serve(tmp_path / "files") as (address, sent):
        for home, refused in (("refused", {"07.png"}), ("whole", set())):
            tiny_hub.REFUSED = refused
            environment = {
                "HF_ENDPOINT": address,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / home),
                "SOVIT_CACHE": str(tmp_path / "cache"),
            }
            asked = subprocess.run(
                [sys.executable, "-c", ASK_FOLDER], env=os.environ | environment, capture_output=True, text=True
            )
            assert asked.returncode == 0, asked.stderr
            answers.append(asked.stdout.strip())
    local = opened(f"{tmp_path / 'files'}?stream=all&flip=0")
    wanted = hashlib.sha256(local._images.tobytes()).hexdigest()
    assert "cannot be read after 0 images" in answers[0] and "\n" not in answers[0]
    assert answers[1] == f"1 29 {wanted}"


def test_a_parquet_file_may_not_name_a_file_of_this_machine(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "set").mkdir()
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)})
    images = [{"bytes": png(i), "path": None} for i in range(30)]
    images += [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 3
    rows = {"image": images, "label": [i % 3 for i in range(33)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "set" / "train-0.parquet")
    for option in ("", "?stream=all"):
        assert opened(f"{tmp_path / 'set'}{option}").info["broken"] == 3
