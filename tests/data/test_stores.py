"""Decoding from archives and from a hub over HTTP, kills in the middle of it, and subsets of what was decoded."""

import errno
import io
import os
import signal
import subprocess
import sys
import tarfile
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


# archives


def test_webdataset(tmp_path):
    for k in range(2):
        with tarfile.open(tmp_path / f"train-{k:04d}.tar", "w") as archive:
            for i in range(30 * k, 30 * k + 30):
                for name, data in ((f"{i:04d}.png", png(i)), (f"{i:04d}.cls", str(i % 3 + 7).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    source = opened(tmp_path)
    assert list(source.class_names) == ["7", "8", "9"]  # untyped: sorted as numbers
    for batch in (source.train(0, 50), source.val(0, source.num_val)):
        assert torch.equal(told(batch.images), batch.labels)
    single = opened(f"{tmp_path}/train-0001.tar")
    assert single.info["num_train"] + single.num_val == 30


def write_archive(path, entries) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def test_an_archive_may_mix_kinds_of_images_and_of_labels(tmp_path):
    """Of several kinds `datasets` reads one, the others being broken to it, and no label but a whole number."""
    stream = io.BytesIO()
    picture(0).save(stream, "JPEG")
    jpg = stream.getvalue()
    mixed = [
        ("a.jpg", jpg),
        ("a.cls", b"0"),
        *((f"{n}.{k}", d) for n in "bcd" for k, d in (("png", png(1)), ("cls", b"1"))),
    ]
    write_archive(tmp_path / "mixed" / "x.tar", mixed)
    source = opened(tmp_path / "mixed")
    assert (source.info["found"], source.info["refused"], source.class_names) == (4, {}, ("0", "1"))
    named = [(f"s/{i}.{k}", d) for i in range(9) for k, d in (("jpg", jpg), ("cls", b"cat" if i % 2 else b"dog"))]
    write_archive(tmp_path / "named" / "x.tar", [*named, ("s/9.jpg", jpg)])
    source = opened(tmp_path / "named")
    assert source.class_names == ("cat", "dog") and source.info["refused"] == {"without a label": 1}
    told = [(f"{i}.{k}", d) for i in range(9) for k, d in (("jpg", jpg), ("json", b'{"label": %d, "w": 8}' % (i % 2)))]
    write_archive(tmp_path / "told" / "x.tar", told)
    assert opened(tmp_path / "told").class_names == ("0", "1")
    write_archive(tmp_path / "named" / "val-0.tar", named)
    check(tmp_path / "named", "names files after splits, but not x.tar")


def shard(label=lambda i: i % 2, count=8, extra=()) -> list[tuple[str, bytes]]:
    return [(f"{i}.{k}", d) for i in range(count) for k, d in (("png", png(i)), *extra, ("cls", b"%d" % label(i)))]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_splits_of_shards_are_whole_words_of_names_or_folders(tmp_path, kind):
    """`datasets` guesses them from any word of any name, and leaves the other files out without a word."""

    def write(name, count):
        path = tmp_path / f"{name}.{kind}"
        if kind == "tar":
            write_archive(path, shard(count=count))
            return
        path.parent.mkdir(exist_ok=True)
        rows = {
            "image": [{"bytes": png(i), "path": None} for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)

    for names in (("wds [1]/birds-Train-0", "wds [1]/birds-Validation-0"), ("folders/train/0", "folders/Val/0")):
        (tmp_path / names[0].split("/")[0]).mkdir()
        for name, count in zip(names, (6, 4), strict=True):
            write(name, count)
        source = opened(tmp_path / names[0].split("/")[0])
        assert (source.info["splits"][0], source.num_train, source.num_val, source.info["found"]) == ("train", 6, 4, 10)
    for name in ("plain/trained", "plain/latest"):
        write(name, 5)
    write_archive(tmp_path / "plain" / "OTHER.TAR", shard()) if kind == "tar" else None
    (tmp_path / "plain" / "notes.txt").write_text("no shard")
    source = opened(tmp_path / "plain")
    assert source.num_train + source.num_val == source.info["found"] - 1 == (18 if kind == "tar" else 10)
    assert source.info["refused"] == {"of a kind that is not read (.txt)": 1}
    for name in ("some/bullet_train", "some/cars"):
        write(name, 5)
    check(tmp_path / "some", f"names files after splits, but not cars.{kind}")


def test_an_archive_is_read_to_its_end_and_has_an_image_a_sample(tmp_path):
    write_archive(tmp_path / "masks" / "x.tar", shard(extra=[("seg.png", png(99))]))
    write_archive(tmp_path / "plain" / "x.tar", shard())
    masks, plain = (opened(tmp_path / name).train(0, 7) for name in ("masks", "plain"))
    assert torch.equal(masks.images, plain.images)  # 0.seg.png is no second image
    write_archive(tmp_path / "two" / "x.tar", shard(extra=[("webp", png(99))]))
    check(tmp_path / "two", "two/x.tar has two images of the name 0; keep one")
    whole = (tmp_path / "plain" / "x.tar").read_bytes()
    start = whole.index(b"4.png")
    for name, cut in (("cut", whole[:start]), ("spoilt", whole[:start] + bytes([7]) * 512 + whole[start + 512 :])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").write_bytes(cut)
        check(tmp_path / name, f"x.tar is cut off or damaged at byte {start:,}; copy it again")


def png(i: int) -> bytes:
    stream = io.BytesIO()
    picture(i).save(stream, "PNG")
    return stream.getvalue()


# kills


@pytest.mark.slow
def test_killed_decoding_goes_on_where_it_was(parquet, cache, tmp_path, monkeypatch, decoded_rows):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    script = Path(__file__).parents[1] / "helpers" / "killed_decoding.py"
    killed = subprocess.run([sys.executable, str(script), str(parquet), "8", "75"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((tmp_path / "hub").glob("*/info.json"))
    source = opened(parquet)
    assert 138 - 75 <= len(decoded_rows) <= 138 - 75 + 40  # what was on the way, in as many threads at most
    monkeypatch.setenv("SOVIT_CACHE", str(cache))
    whole = opened(parquet)
    assert images_of(source) == images_of(whole) and np.array_equal(source._labels, whole._labels)
    assert images_of(source, "_val_rows") == images_of(whole, "_val_rows")
    assert source.content_key == whole.content_key and source.info == whole.info


def test_a_set_that_does_not_fit_the_disk(parquet, cache, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    check(
        parquet, r"138 images of 24 px take 0.0 GB in .* \(No space left on device\); take a smaller \?cache_size", 24
    )
    assert not [p for p in (cache / "hub").iterdir() if p.name.startswith(".") and p.suffix != ".lock"]


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
    check(f"{tmp_path}?classes=2", "no validation image is among those chosen; take more classes")


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
    for option in ("crop=a", "stream=all", "per_class=-1", "x"):
        check(f"{parquet}?{option}", f"unknown option; the options are .* given: {option}")
    for option, least in {"num_train=0": "1$", "per_class=0": "1$", "classes=1": "2$"}.items():
        check(f"{parquet}?{option}", f": {option} must be at least {least}")
    for option in ("crop=0", "crop=1.2"):
        check(f"{parquet}?{option}", f": {option} must be at least 1e-09 and at most 1$")
    check(f"{parquet}?cache_size=4", "cache_size=4 is under image_size=8")


# a hub over HTTP

ASK = """
from sovit import UserError
from sovit.data import open_data
for name in ("team/colours", "gated/imagenet"):
    try:
        source = open_data("hub", name, 8, 4, 0)
        print(source.num_train + source.num_val, source.info["revision"], *source.class_names)
    except UserError as error:
        print(error)
"""


def test_a_hub_over_http_and_a_gated_set_that_names_the_remedy(tmp_path):
    (tmp_path / "files").mkdir()
    for k in range(3):
        write_parquet(tmp_path / "files" / f"train-{k}.parquet", range(40 * k, 40 * k + 40))
    with tiny_hub.serve(tmp_path / "files") as (address, _):
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
    opened_, refused = asked.stdout.splitlines()
    assert opened_.split() == ["120", tiny_hub.SHA, *NAMES]
    assert "accept its terms at https://huggingface.co/datasets/gated/imagenet, then run: hf auth login" in refused


def test_a_parquet_file_may_not_name_a_file_of_this_machine(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "set").mkdir()
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)})
    images = [{"bytes": png(i), "path": None} for i in range(30)]
    images += [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 3
    rows = {"image": images, "label": [i % 3 for i in range(33)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "set" / "train-0.parquet")
    assert opened(tmp_path / "set").info["refused"] == {"broken": 3}
