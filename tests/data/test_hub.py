"""The hub source on small sets of real files made here: folders, parquet, odd image modes, damaged files."""

import io
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from sovit import UserError
from sovit.data import open_data
from sovit.data.hub import decode

datasets = pytest.importorskip("datasets")

COLOURS = {"blue": (30, 40, 200), "green": (20, 180, 40), "red": (210, 30, 20)}


def photo(colour, number: int, size=(20, 16)) -> Image.Image:
    """A noisy picture of one colour, different for each number, with a dark left edge."""
    random = np.random.default_rng([number, *colour])
    pixels = np.array(colour) + random.normal(0, 8, (size[1], size[0], 3))
    pixels[:, : size[0] // 2] *= 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of three classes, no validation split, with two files that are no images."""
    root = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(20):
            photo(colour, i).save(root / name / f"{i:02d}.png")
    whole = io.BytesIO()
    photo(COLOURS["red"], 99, (200, 160)).save(whole, "JPEG")
    (root / "red" / "cut.jpg").write_bytes(whole.getvalue()[:900])
    (root / "blue" / "no.png").write_bytes(b"this is text")
    return root


@pytest.fixture
def cache(folder, monkeypatch):
    """A cache that the tests of this module share."""
    monkeypatch.setenv("SOVIT_CACHE", str(folder.parent / "cache"))
    return folder.parent / "cache" / "hub"


def rows_of(count: int) -> dict:
    names = sorted(COLOURS)
    labels = [i % 3 for i in range(count)]
    return {"picture": [photo(COLOURS[names[c]], i) for i, c in enumerate(labels)], "label": labels}


def typed(count: int):
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=sorted(COLOURS))})
    return datasets.Dataset.from_dict(rows_of(count), features=features)


def pixels(row: dict, size=8) -> np.ndarray:
    """The decoded pixels of a file, [S, S, 3]."""
    return decode.decode(row, size)[0]


def told_colour(images: torch.Tensor) -> torch.Tensor:
    """The class of each image by its strongest channel, [B, 3, H, W] -> [B] in the order blue, green, red."""
    return 2 - images.mean((2, 3)).argmax(1)


# samples


def test_folder_of_class_folders(cache, folder, capfd):
    source = open_data("hub", str(folder), 8, 4, 0)
    assert (
        list(source.class_names) == ["blue", "green", "red"] and source.readout == "pooled" and source.num_classes == 3
    )
    assert source.info["refused"] == {"broken": 2} and source.info["num_train"] == 54 and source.num_val == 6
    batch = source.train(0, 54)
    assert batch.images.shape == (54, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.labels.shape == (54,) and batch.labels.dtype == torch.int64 and batch.skills is None
    assert batch.images.min() >= -1 and batch.images.max() <= 1
    assert torch.equal(told_colour(batch.images), batch.labels)
    assert torch.equal(told_colour(source.val(0, 6).images), source.val(0, 6).labels)
    assert 0.8 < source.zero_line < 1.6
    assert "62 files or rows found = 60 images read + 2 refused (2 broken)" in capfd.readouterr().err
    with pytest.raises(UserError, match="num_val=6"):
        source.val(0, 7)


def test_training_and_validation_images_are_apart(cache, folder):
    source = open_data("hub", f"{folder}?flip=0", 8, 4, 0)
    train = {image.numpy().tobytes() for image in source.train(0, 54).images}
    val = {image.numpy().tobytes() for image in source.val(0, 6).images}
    assert len(train) == 54 and len(val) == 6 and not train & val


def test_samples_are_pure_functions_of_seed_and_index(cache, folder):
    whole = open_data("hub", str(folder), 8, 4, 0).train(40, 100)  # crosses two epochs
    again = open_data("hub", str(folder), 8, 4, 0)
    for size in (1, 16, 70):
        parts = [again.train(40 + k, min(size, 100 - k)) for k in range(0, 100, size)]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
    other = open_data("hub", str(folder), 8, 4, 1)
    assert not torch.equal(other.train(40, 100).images, whole.images)
    assert torch.equal(other.val(0, 6).images, again.val(0, 6).images)


def test_an_epoch_shows_every_image_once_and_half_of_them_mirrored(cache, folder):
    plain = open_data("hub", f"{folder}?flip=0", 8, 4, 0)
    mirrored = open_data("hub", str(folder), 8, 4, 0)
    for epoch in range(3):
        a, b = plain.train(54 * epoch, 54), mirrored.train(54 * epoch, 54)
        assert len({image.numpy().tobytes() for image in a.images}) == 54
        assert torch.equal(a.labels, b.labels)
        flipped = (a.images != b.images).any((1, 2, 3))
        assert 10 < flipped.sum() < 44
        assert torch.equal(b.images[flipped], a.images[flipped].flip(-1))
    assert not torch.equal(plain.train(0, 54).labels, plain.train(54, 54).labels)


# sources and splits


def test_a_folder_with_a_question_mark_in_its_name(cache, tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / "birds?flip=0" / name).mkdir(parents=True)
        for i in range(3):
            photo(colour, i).save(tmp_path / "birds?flip=0" / name / f"{i}.png")
    source = open_data("hub", str(tmp_path / "birds?flip=0"), 8, 4, 0)
    assert source.info["num_train"] + source.num_val == 9 and source.view.flip


def test_folder_with_train_and_test(cache, tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        for name, colour in COLOURS.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                photo(colour, i + 50 * (split == "test")).save(tmp_path / split / name / f"{i}.png")
    source = open_data("hub", str(tmp_path), 8, 8, 0)
    assert source.info["splits"] == ["train", "test"]
    assert (source.info["num_train"], source.num_val) == (15, 9)


def save_photos(folder, count: int, first: int = 0, colour=COLOURS["red"]) -> None:
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        photo(colour, i).save(folder / f"{i}.png")


def test_the_first_level_is_the_class_whatever_its_words(cache, tmp_path):
    save_photos(tmp_path / "test flight" / "2024", 6)
    save_photos(tmp_path / "train" / "val", 5, 6)
    save_photos(tmp_path / ".trash", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no image")
    source = open_data("hub", str(tmp_path), 8, 4, 0)
    assert list(source.class_names) == ["test flight", "train"]
    assert source.info["refused"] == {"of a kind that is not read (.txt)": 1}
    assert source.info["splits"] == ["train", "10% of train, held out"]
    assert np.bincount(source._labels).tolist() == [6, 5]


def test_a_first_level_of_split_names_in_any_case(cache, tmp_path):
    for split, count in (("Train", 5), ("VALID", 2), ("Test", 3)):
        for k, name in enumerate("abc"):
            save_photos(tmp_path / split / name, count, 10 * k)
    save_photos(tmp_path / "VALID" / "d", 2)  # no class of training
    source = open_data("hub", str(tmp_path), 8, 4, 0)
    assert source.info["splits"] == ["train", "valid"] and list(source.class_names) == ["a", "b", "c"]
    assert (source.num_train, source.num_val, source.info["found"]) == (15, 6, 32)
    assert source.info["refused"] == {"of class d, which training lacks": 2, "of split test, not used": 9}


def test_what_is_not_one_set_is_refused(cache, tmp_path):
    save_photos(tmp_path / "both" / "a", 3)
    typed(9).to_parquet(tmp_path / "both" / "train.parquet")
    check(str(tmp_path / "both"), "holds files of images and parquet; give a folder of one kind")
    for name in ("val", "test"):
        save_photos(tmp_path / "held" / name / "a", 3)
    check(str(tmp_path / "held"), "has the splits test, val, none for training; name one train")


def test_every_file_of_a_folder_is_read_or_refused_for_a_reason(cache, tmp_path, capfd):
    """Spaces, split words within names, days within classes, forgotten files, loose and unlabelled images."""
    for k, name in enumerate(("cat", "bullet_train", "my dog")):
        save_photos(tmp_path / name / "day0", 4, 10 * k)
        photo(COLOURS["red"], 200 + k).save(tmp_path / name / "my test.PNG")
    for name in ("old.zip", "backup.tar", "metadata.csv", "Thumbs.db", "cat/notes", "cat/raw.HEIC"):
        (tmp_path / name).write_bytes(b"x")
    photo(COLOURS["red"], 300).save(tmp_path / "cover.png")
    source = open_data("hub", str(tmp_path), 8, 4, 0)
    assert list(source.class_names) == ["bullet_train", "cat", "my dog"]
    assert (source.info["found"], source.num_train + source.num_val) == (22, 15)
    kinds = ("(.csv)", "(.db)", "(.heic)", "(.tar)", "(.zip)", "(no suffix)")
    unread = {f"of a kind that is not read {kind}": 1 for kind in kinds}
    assert source.info["refused"] == unread | {"in no class folder": 1}
    assert "22 files or rows found = 15 images read + 7 refused" in capfd.readouterr().err


def test_splits_beside_other_folders_and_twice_are_refused(cache, tmp_path):
    for name in ("train", "val", "misc"):
        save_photos(tmp_path / "mixed" / name / "a", 2)
    check(str(tmp_path / "mixed"), "has train and val beside misc: splits, or classes")
    for name in ("Train", "train"):
        save_photos(tmp_path / "twice" / name / "a", 2)
    check(str(tmp_path / "twice"), "has one split twice among Train, train")


def test_unlabelled_test_images_and_copies_between_splits_are_counted(cache, tmp_path):
    for k, name in enumerate("ab"):
        save_photos(tmp_path / "Train" / name, 4, 10 * k)
        save_photos(tmp_path / "VAL" / name, 2, 100 + 10 * k)
        photo(COLOURS["red"], 10 * k).save(tmp_path / "VAL" / name / "copy.bmp")
    save_photos(tmp_path / "Test", 3, 200)
    source = open_data("hub", str(tmp_path), 8, 4, 0)
    assert source.info["splits"] == ["train", "val"] and source.info["refused"] == {"in no class folder": 3}
    assert (source.num_train, source.num_val, source.info["near_duplicates_in_val"]) == (8, 6, 2)


def test_a_folder_with_a_table_of_labels(cache, tmp_path):
    save_photos(tmp_path / "pictures", 12)
    table = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(12))
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,label\n" + table)
    source = open_data("hub", str(tmp_path / "pictures"), 8, 4, 0)
    assert list(source.class_names) == ["a", "b"] and source.num_train + source.num_val == 12


def test_links(cache, folder, tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            photo(colour, i).save(tmp_path / "set" / name / f"{i}.png")
    whole = open_data("hub", str(tmp_path / "set"), 8, 4, 0)
    (tmp_path / "set" / "red" / "linked.png").symlink_to(folder / "red" / "05.png")
    (tmp_path / "set" / "red" / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "set" / "dead").symlink_to(tmp_path / "gone")
    source = open_data("hub", str(tmp_path / "set"), 8, 4, 0)
    assert source.info["refused"] == {"broken": 1, "of a kind that is not read (no suffix)": 1}
    assert source.info["num_train"] + source.num_val == 10
    assert source.content_key != whole.content_key
    (tmp_path / "set" / "train.parquet").symlink_to(tmp_path / "gone.parquet")
    check(str(tmp_path / "set"), "train.parquet is a link that leads nowhere; mend or remove it")
    (tmp_path / "set" / "grey").symlink_to(folder / "red")
    check(str(tmp_path / "set"), "grey is a link to a folder; put the folder itself there")


@pytest.mark.parametrize("single", [True, False], ids=["file", "folder"])
def test_parquet(cache, tmp_path, single):
    typed(30).to_parquet(tmp_path / "train-00000.parquet")
    if not single:
        typed(12).to_parquet(tmp_path / "test-00000.parquet")
    source = open_data("hub", str(tmp_path / "train-00000.parquet" if single else tmp_path), 8, 4, 0)
    assert list(source.class_names) == sorted(COLOURS) and source.num_val == (3 if single else 12)
    batch = source.train(0, 27)
    assert torch.equal(told_colour(batch.images), batch.labels)


def test_parquet_of_another_writer(cache, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = typed(30).cast_column("picture", datasets.Image(decode=False)).to_dict()
    names = [sorted(COLOURS)[c] if i else None for i, c in enumerate(table["label"])]
    raw = pa.table({"id": list(range(30)), "image": [p["bytes"] for p in table["picture"]], "kind": names})
    pq.write_table(raw, tmp_path / "birds.parquet")
    with pytest.raises(UserError, match=r"has no label column among id, image, kind; .*\?label=COLUMN"):
        open_data("hub", str(tmp_path / "birds.parquet"), 8, 4, 0)
    source = open_data("hub", f"{tmp_path}/birds.parquet?label=kind", 8, 4, 0)
    assert list(source.class_names) == sorted(COLOURS) and source.info["refused"] == {"without a label": 1}
    assert torch.equal(told_colour(source.train(0, 26).images), source.train(0, 26).labels)


def test_hub_name_with_revision_and_config(cache, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        test = typed(9)
        hidden = test.map(lambda row: {"label": -1})  # as on the hub, where a test split's labels are kept back
        return datasets.DatasetDict(train=typed(30), validation=hidden, test=test)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_data("hub", "team/colours@v2#small", 8, 4, 0)
    assert asked == [(("team/colours", "small"), {"revision": "v2"})]
    assert source.info["splits"] == ["train", "test"] and source.info["revision"] == "v2"
    open_data("hub", "team/colours@v2#small?flip=0", 8, 4, 0)
    assert len(asked) == 1  # decoded once; a mirrored image needs no second cache


# images


def saved(image: Image.Image, kind: str, **options) -> dict:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


def test_every_mode_becomes_rgb():
    grey = saved(Image.new("L", (20, 16), 90), "PNG")
    assert (pixels(grey) == 90).all()
    half = saved(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), "PNG")
    assert (pixels(half) == 255).all()  # transparent black is white paper
    cmyk = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert np.abs(pixels(cmyk).astype(int) - (255, 0, 0)).max() < 8
    palette = saved(photo(COLOURS["green"], 0).quantize(16), "PNG")
    assert pixels(palette).shape == (8, 8, 3) and pixels(palette).mean((0, 1)).argmax() == 1
    clear = Image.new("P", (16, 16), 1)
    clear.putpalette([0, 0, 0, 200, 10, 10])
    assert (pixels(saved(clear, "PNG", transparency=1)) == 255).all()
    deep = saved(Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "PNG")
    assert (pixels(deep) == 40_000 >> 8).all()
    assert pixels(saved(Image.new("1", (16, 16), 1), "PNG")).min() == 255


def test_images_that_are_not_rgb_are_counted(cache, tmp_path, capfd):
    for i, (name, colour) in enumerate(COLOURS.items()):
        (tmp_path / name).mkdir()
        for k, mode in enumerate(["RGB", "P", "L", "L", "RGBA", "CMYK"]):
            photo(colour, 10 * i + k).convert(mode).save(tmp_path / name / f"{k}.{'jpg' if mode == 'CMYK' else 'png'}")
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tmp_path / "red" / "deep.png")
    (tmp_path / "red" / "no.png").write_bytes(b"this is text")
    source = open_data("hub", str(tmp_path), 8, 4, 0)
    assert source.info["converted"] == {"L": 6, "P": 3, "RGBA": 3, "CMYK": 3, "I;16": 1}
    assert source.info["refused"] == {"broken": 1} and source.info["num_train"] + source.num_val == 19
    said = capfd.readouterr().err
    assert "(1 broken)" in said and "made RGB: 6 of mode L, 3 of mode" in said and "1 of mode I;16" in said


def test_no_image_of_another_mode_is_said_too(cache, folder):
    assert open_data("hub", str(folder), 8, 4, 0).info["converted"] == {}


def test_centre_square_is_kept():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (pixels(saved(Image.fromarray(wide), "PNG")) == 200).all()
    tall = saved(Image.fromarray(wide.swapaxes(0, 1)), "PNG")
    assert (pixels(tall) == 200).all()


def test_orientation_tag_is_obeyed():
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255  # bright on top
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by half a turn
    shown = pixels(saved(Image.fromarray(picture), "PNG", exif=exif), 16)
    assert shown[8:].mean() > 200 > 50 > shown[:8].mean()


def test_damaged_and_enormous_files_are_left_out(monkeypatch, tmp_path):
    whole = saved(photo(COLOURS["red"], 0, (200, 160)), "JPEG")
    assert decode.decode(whole, 8) is not None
    assert decode.decode({"bytes": whole["bytes"][:900], "path": None}, 8) is None
    assert decode.decode({"bytes": b"", "path": None}, 8) is None
    assert decode.decode({"bytes": None, "path": str(tmp_path / "gone.png")}, 8) is None
    assert decode.decode(None, 8) is None
    strip = saved(Image.new("L", (200_000, 1), 7), "PNG")
    assert (pixels(strip) == 7).all()
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)
    assert decode.decode(whole, 8) is None


# the cache


def test_cache_is_reused_until_the_folder_changes(cache, tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for i in range(3):
            photo(colour, i).save(tmp_path / name / f"{i}.png")
    before = set(cache.glob("*")) if cache.exists() else set()
    first = open_data("hub", str(tmp_path), 8, 4, 0)
    (made,) = [p for p in set(cache.glob("*")) - before if p.is_dir()]
    stamp = (made / "images.raw").stat().st_mtime_ns
    open_data("hub", str(tmp_path), 8, 4, 5)
    assert (made / "images.raw").stat().st_mtime_ns == stamp
    assert first.content_key == made.name == open_data("hub", f"{tmp_path}?flip=0", 8, 4, 0).content_key
    photo(COLOURS["red"], 9).save(tmp_path / "red" / "9.png")
    second = open_data("hub", str(tmp_path), 8, 4, 0)
    assert second.content_key != first.content_key
    assert second.info["num_train"] + second.info["num_val"] == first.info["num_train"] + first.info["num_val"] + 1


def build(folder: str) -> int:
    return open_data("hub", folder, 12, 4, 0).num_val


def test_concurrent_builds_make_one_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(build, [str(folder)] * 2, chunksize=1) == [6, 6]
    left = sorted(os.listdir(tmp_path / "hub"))
    assert len(left) == 2 and left[0].endswith(".lock")  # the folder and its lock, nothing half built


# errors


def check(preset: str, message: str, image_size=8, patch_size=4, seed=0) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_data("hub", preset, image_size, patch_size, seed)
    assert "\n" not in str(caught.value)


def test_bad_presets_are_said_in_one_line(cache, folder, tmp_path):
    check("", "needs a preset; name a folder of images, or a hub name")
    check("?flip=0", "needs a preset")  # not the current folder
    check("/no/such/folder", "preset='/no/such/folder' is neither a file or folder here nor a hub name")
    check("missing.parquet", "correct the path")
    check(f"{folder}?labels=x", r"unknown option; the options are \?label=COLUMN")
    check(f"{folder}?flip=no", "unknown option")
    check(f"{folder}?label=colour", "label='colour' is not a column")
    check(str(folder / "red" / "00.png"), "is a file of no known kind")
    check(str(folder), "patch_size=3 does not divide image_size=8", patch_size=3)
    check(str(folder), "data_seed=-1 is negative", seed=-1)
    (tmp_path / "empty").mkdir()
    check(str(tmp_path / "empty"), "holds no images and no parquet files")


def test_a_cache_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setenv("SOVIT_CACHE", str(folder / "red" / "00.png"))  # permission bits do not hold back root
    check(str(folder), "the cache folder .*00.png/hub cannot be written .*; set SOVIT_CACHE to a writable folder")


def test_sets_without_images_or_classes(cache, tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "text.parquet")
    check(str(tmp_path / "text.parquet"), "has no image column among text, label")
    typed(10).filter(lambda row: row["label"] == 0).to_parquet(tmp_path / "one.parquet")
    check(str(tmp_path / "one.parquet"), "has fewer than two classes in column 'label'")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    check(str(tmp_path / "bad.parquet"), "cannot be opened .*; check the files")
    (tmp_path / "flat").mkdir()
    for i in range(3):
        photo(COLOURS["red"], i).save(tmp_path / "flat" / f"{i}.png")
    check(str(tmp_path / "flat"), "has fewer than two classes .*; sort the images into a folder for each class")
    assert [p for p in cache.iterdir() if p.name.startswith(".") and p.suffix != ".lock"] == []


def test_unreachable_hub_suggests_a_local_folder(cache, monkeypatch):
    def refuse(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    check("team/unreachable", r"cannot be opened \(Couldn't reach the Hub second line\); .*give a local folder")
