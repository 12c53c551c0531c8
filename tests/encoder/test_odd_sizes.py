"""Sizes that are multiples of the patch but no powers of two, all the way; sizes that are not square, refused everywhere."""

import json

import numpy as np
import pytest
import timm
import timm.models
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.cli.main import main
from sovit.encoder.export import export_encoder
from sovit.encoder.from_timm import load_timm_base
from sovit.encoder.model import build
from sovit.encoder.open import load_encoder
from sovit.encoder.probe import compare
from sovit.encoder.trained import load_branch
from sovit.ledger.records import read_record
from sovit.spec.config import override
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.train.trainer import train

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of two classes, light above and light below, 36 x 36 px."""
    root = tmp_path_factory.mktemp("odd") / "pictures"
    random = np.random.default_rng(0)
    for name, above in (("above", True), ("below", False)):
        (root / name).mkdir(parents=True)
        for i in range(40):
            pixels = random.normal(100, 20, (36, 36, 3))
            pixels[:18] += 50 if above else -50
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def cache(pictures, monkeypatch):
    monkeypatch.setenv("SOVIT_CACHE", str(pictures.parent / "cache"))


@pytest.mark.parametrize("sizes", [(20, 4), (56, 14)], ids=str)
def test_an_odd_size_is_counted_built_trained_validated_probed_and_exported(pictures, cache, tmp_path, capsys, sizes):
    image_size, patch_size = sizes
    side = image_size // patch_size
    shape = Shape(16, 1, 24, head_dim=8, patch_size=patch_size, image_size=image_size, pool="map")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        untrained = build(shape)
        untrained(torch.empty(1, 3, image_size, image_size))
    assert shape.forward_flops == counter.get_total_flops()
    assert shape.num_params == sum(p.numel() for p in untrained.parameters())
    counted = ["count", *f"--width 16 --depth 1 --mlp-dim 24 --head-dim 8 --pool map --image-size {image_size}".split()]
    assert main([*counted, "--patch-size", str(patch_size), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forward_flops"] == shape.forward_flops

    run = Run(shape, Recipe(0.003, warmup_examples=32), (320,), data="hub", preset=f"{pictures}?flip=0")
    train(run, tmp_path)
    run_id = run.run_ids[0]
    row = read_record(tmp_path, run.trunk_id, run_id)
    assert row["status"] == "ok" and row["val_loss"] < row["zero_line"]
    assert (row["image_size"], row["patch_size"]) == sizes
    images = torch.randn(1, 3, image_size, image_size)
    assert load_encoder(run_id, tmp_path).tokens(images).shape == (1, side**2, 16)

    export_encoder(run_id, tmp_path, tmp_path / "out")
    larger = 2 * image_size
    export_encoder(run_id, tmp_path, tmp_path / "larger", image_size=larger)
    model, _ = load_branch(run_id, tmp_path)
    native = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    at_twice = timm.create_model(f"local-dir:{tmp_path / 'larger'}", pretrained=True).eval()
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=larger).eval()
    images = torch.randn(2, 3, larger, larger)
    with torch.no_grad():
        assert torch.equal(native(images[..., :image_size, :image_size]), model(images[..., :image_size, :image_size]))
        torch.testing.assert_close(at_twice(images), by_timm(images), rtol=1e-4, atol=1e-5)

    finer = run.replace(shape=shape.replace(image_size=larger), base=run_id, trained="attention")
    train(finer, tmp_path)
    assert read_record(tmp_path, finer.trunk_id, finer.run_ids[0])["val_loss"] < row["zero_line"]


@pytest.mark.parametrize("sizes", [(20, 4), (21, 7)], ids=str)
def test_an_odd_size_is_probed(pictures, cache, tmp_path, sizes, monkeypatch):
    from sovit.encoder import probe

    monkeypatch.setattr(probe, "SHOTS", (1, 5))
    monkeypatch.setattr(probe, "SUPPORT_SEEDS", (0, 1))
    shape = Shape(16, 1, 24, head_dim=8, patch_size=sizes[1], image_size=sizes[0])
    model = build(shape, 2, "fan_in", seed=0)
    timm.models.save_for_hf(model, str(tmp_path), model_args=shape.timm_kwargs, safe_serialization=True)
    found = compare([f"timm:local-dir:{tmp_path}", f"pixels:{sizes[0]}"], f"hub:{pictures}?flip=0")
    assert found["encoders"][0]["image_size"] == sizes[0]
    assert found["encoders"][0]["shots"][5]["error"] < 0.2  # light above or below: a random network tells them apart


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("count B/16 --image-size 32x48", "'32x48' is not a whole number of pixels; images are square, give one side"),
        ("count B/16 --patch-size 4x8", "'4x8' is not a whole number of pixels"),
        ("count B/16@32x48", "unknown shape 'B/16@32x48'; write VARIANT/PATCH[@SIZE]"),
        (
            "count B/16 --image-size 100",
            "image_size=100 is not a multiple of patch_size=16; the nearest image_size is 96",
        ),
        ("profile B/16 --image-size 32x48", "'32x48' is not a whole number of pixels"),
        ("data show stream:cpu --image-size 32x48", "'32x48' is not a whole number of pixels"),
        ("data show stream:cpu --image-size 20", "image_size=20 cannot be drawn"),
        ("finetune 0123456789-160 --image-size 32x48", "'32x48' is not a whole number of pixels"),
        ("export 0123456789-160 --out x --image-size 32x48", "'32x48' is not a whole number of pixels"),
    ],
)
def test_the_command_line_refuses_other_sizes_in_one_line(command, message, capsys):
    try:
        status = main(command.split())
    except SystemExit as stop:  # argparse's own way out
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and message in said and said.count("\n") == 1, said


def test_shapes_and_runs_refuse_what_is_not_square():
    run = Run(Shape(16, 1, 24, head_dim=8, patch_size=4, image_size=16), Recipe(0.01), (160,))
    tall = run.to_dict() | {"shape": run.shape.to_dict() | {"image_size": [32, 48]}}
    for call, message in (
        (lambda: run.shape.replace(image_size=(32, 48)), r"image_size=\(32, 48\) must be of type int"),
        (lambda: Run.from_dict(tall), r"image_size=\[32, 48\] must be of type int"),
        (lambda: override(run, ["shape.image_size=32x48"]), "shape.image_size='32x48' is not a value"),
        (lambda: override(run, ["shape.image_size=[32, 48]"]), r"\[32, 48\] must be of type int"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_timm_model_that_is_not_square_is_refused_as_encoder_and_as_base(tmp_path, capsys):
    args = dict(embed_dim=16, depth=1, num_heads=2, patch_size=8, img_size=(32, 48))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    timm.models.save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    name = f"timm:local-dir:{tmp_path}"
    message = "reads images of 32 x 48; only square ones are read here, open it as such"
    for call in (load_encoder, load_timm_base, lambda n: compare([n], "icons:single40")):
        with pytest.raises(UserError, match=message):
            call(name)
    for command in (
        ["finetune", name, "--image-size", "48", "--data", "icons:single40"],
        ["probe", name, "--data", "icons:single40"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
