"""Export: what another library builds from our files is what was trained, or what was counted."""

import json

import pytest
import timm
import torch

from sovit import UserError
from sovit.cli.main import main
from sovit.encoder.export import export_encoder, write_config
from sovit.encoder.export.formats import FORMATS, config_of
from sovit.encoder.from_timm import load_timm_base
from sovit.encoder.open import load_encoder
from sovit.encoder.resize import at_patch_size
from sovit.encoder.trained import load_branch
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.train.trainer import train

TINY = Shape(16, 1, 24, head_dim=8, patch_size=4, image_size=16, pool="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("runs")
    run = Run(TINY, Recipe(0.01, warmup_examples=32), budgets=(160,))
    train(run, runs_dir)
    return run.run_ids[0], runs_dir


def test_timm_folder_gives_the_trained_outputs_bit_for_bit(trained, tmp_path):
    run_id, runs_dir = trained
    report = export_encoder(run_id, runs_dir, tmp_path / "encoder")
    assert report["tokens_max_difference"] < 1e-9 and report["pooled_max_difference"] < 1e-9
    model, _ = load_branch(run_id, runs_dir)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        reloaded = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in reloaded.state_dict().items())
        torch.testing.assert_close(reloaded(images), model(images))
        features = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0).eval()
        torch.testing.assert_close(features(images), model.forward_features(images))
    assert tuple(reloaded.pretrained_cfg["mean"]) == (0.4,) * 3  # the stream's own normalisation
    assert reloaded.pretrained_cfg["tag"] == "sovit"  # no false pedigree from the entry point


def test_transformers_automodel_gives_the_same_tokens(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    run_id, runs_dir = trained
    export_encoder(run_id, runs_dir, tmp_path / "encoder")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()(pixel_values=images)
        expected = load_branch(run_id, runs_dir)[0].forward_features(images)
    torch.testing.assert_close(tokens.last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "encoder").num_labels == 16


def test_export_replaces_an_old_export_but_nothing_else(trained, tmp_path):
    run_id, runs_dir = trained
    out = tmp_path / "encoder"
    export_encoder(run_id, runs_dir, out)
    export_encoder(run_id, runs_dir, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds mine.txt, which no export wrote"):
        export_encoder(run_id, runs_dir, out)
    assert (out / "mine.txt").read_text() == "precious"
    foreign = tmp_path / "hub_model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="holds something else"):
        export_encoder(run_id, runs_dir, foreign)
    assert (foreign / "config.json").read_text() == '{"model_type": "vit"}'
    (foreign / "config.json").unlink()
    foreign.rmdir()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        export_encoder(run_id, runs_dir, other)
    assert (other / "cat.jpg").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "photos"]


def test_a_link_is_followed_and_the_folder_one_is_in_is_refused(trained, tmp_path, monkeypatch):
    run_id, runs_dir = trained
    (tmp_path / "disk").mkdir()
    (tmp_path / "encoder").symlink_to("disk")
    for _ in range(2):
        assert export_encoder(run_id, runs_dir, tmp_path / "encoder")["out"] == str(tmp_path / "encoder")
    assert (tmp_path / "encoder").is_symlink() and (tmp_path / "disk" / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "encoder"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="is the folder that you are in"):
        export_encoder(run_id, runs_dir, ".")


def test_an_old_export_is_whole_until_the_new_one_stands_in_its_place(trained, tmp_path, monkeypatch):
    run_id, runs_dir = trained
    out = tmp_path / "encoder"
    export_encoder(run_id, runs_dir, out)
    names = {p.name for p in out.iterdir()}
    deleted = []
    monkeypatch.setattr(
        "sovit.encoder.export.shutil.rmtree", lambda path, **_: deleted.append((path, {p.name for p in out.iterdir()}))
    )
    export_encoder(run_id, runs_dir, out)
    assert deleted and all(path != out and found == names for path, found in deleted)


def test_a_run_that_is_not_there_is_refused(trained, tmp_path):
    run_id, runs_dir = trained
    with pytest.raises(UserError, match=run_id):  # names one that is
        export_encoder("0123456789-160", runs_dir, tmp_path / "encoder")


@pytest.mark.parametrize("sizes", [(32, 4), (12, 4), (20, 4), (16, 8), (16, 2), (32, 8), (15, 3)])
def test_an_export_at_another_size_is_what_timm_makes_of_the_native_one(trained, tmp_path, sizes):
    """timm resizes what it loads, too: an oracle for positions and kernel that shares no code with ours."""
    run_id, runs_dir = trained
    image_size, patch_size = sizes
    export_encoder(run_id, runs_dir, tmp_path / "native")
    export_encoder(run_id, runs_dir, tmp_path / "resized", image_size, patch_size)
    images = torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = timm.create_model(f"local-dir:{tmp_path / 'resized'}", pretrained=True).eval()
        theirs = timm.create_model(
            f"local-dir:{tmp_path / 'native'}", pretrained=True, img_size=image_size, patch_size=patch_size
        ).eval()
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        assert (ours(images) - ours(images).mean(0)).abs().max() > 0.01  # what is compared depends on the images
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'resized'}")
    assert (encoder.preprocess.image_size, encoder.grid) == (image_size, image_size // patch_size)
    card = (tmp_path / "resized" / "README.md").read_text()
    assert f"trained at 16 px, patch 4 and resized to {image_size} px, patch {patch_size}, without any training" in card
    assert "resized" not in (tmp_path / "native" / "README.md").read_text()


def test_a_resized_export_through_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    run_id, runs_dir = trained
    report = export_encoder(run_id, runs_dir, tmp_path / "out", image_size=32)
    assert report["tokens_max_difference"] < 1e-9
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.data_config["input_size"] == (3, 32, 32)


def test_sizes_that_cannot_be_are_refused_and_write_nothing(trained, tmp_path, capsys):
    run_id, runs_dir = trained
    command = ["export", run_id, "--runs", str(runs_dir), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--image-size", "18"], "image_size=18 is not a multiple of patch_size=4; the nearest image_size is 16"),
        (["--patch-size", "5"], "image_size=16 is not a multiple of patch_size=5; the nearest image_size is 15"),
        (["--image-size", "0"], "image_size=0 must be at least 1"),
        (["--image-size", "32x48"], "'32x48' is not a whole number of pixels; images are square, give one side"),
        (["--patch-size", "-4"], "'-4' is not a whole number of pixels"),
        (["--config-only", "--train-flops", "1e12", "--image-size", "32"], "--image-size resizes a trained run"),
    ):
        try:
            status = main([*command, *more])
        except SystemExit as stop:  # argparse's own way out
            status = stop.code
        said = capsys.readouterr().err
        assert status == 2 and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def fine_tuned(trained):
    """From 16 px and patch 4 to 32 px and patch 8, the attention alone; and from that one on, the head alone."""
    run_id, runs_dir = trained
    recipe = Recipe(0.003, warmup_examples=32)
    first = Run(TINY.replace(image_size=32, patch_size=8), recipe, (160,), base=run_id, trained="attention")
    train(first, runs_dir)
    second = first.replace(shape=TINY.replace(image_size=32, patch_size=4), base=first.run_ids[0], trained="head")
    train(second, runs_dir)
    return [first.run_ids[0], second.run_ids[0]], runs_dir


def test_a_fine_tuned_branch_is_exported_at_its_new_size_with_its_whole_descent(trained, fine_tuned, tmp_path):
    base, (first, second), runs_dir = trained[0], *fine_tuned
    images = torch.randn(3, 3, 32, 32)
    for run_id, grid in ((first, 4), (second, 8)):
        report = export_encoder(run_id, runs_dir, tmp_path / run_id)
        assert report["tokens_max_difference"] < 1e-9
        model, _ = load_branch(run_id, runs_dir)
        with torch.no_grad():
            reloaded = timm.create_model(f"local-dir:{tmp_path / run_id}", pretrained=True).eval()
            torch.testing.assert_close(reloaded(images), model(images))
            assert reloaded.patch_embed.grid_size == (grid, grid)
    card = (tmp_path / second / "README.md").read_text()
    assert f"Run `{second}` is a fine-tuning of `{first}` (32 px, patch 8) to 32 px, patch 4" in card
    assert "the task head trained, all else frozen, 160 examples" in card
    assert f"Run `{first}` is a fine-tuning of `{base}` (16 px, patch 4) to 32 px, patch 8" in card
    assert "the attention's projections, the positions and the task head trained" in card
    export_encoder(base, runs_dir, tmp_path / "base")
    assert "fine-tuning" not in (tmp_path / "base" / "README.md").read_text()


def test_a_timm_base_is_named_with_the_digest_of_its_weights(trained, tmp_path):
    run_id, runs_dir = trained
    export_encoder(run_id, runs_dir, tmp_path / "hub")
    name = f"timm:local-dir:{tmp_path / 'hub'}"
    digest = load_timm_base(name).sha256
    run = Run(TINY.replace(image_size=32, patch_size=8), Recipe(0.003, warmup_examples=32), (160,), base=name)
    run = run.replace(base_sha256=digest, trained="mlp")
    train(run, runs_dir)
    export_encoder(run.run_ids[0], runs_dir, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"a fine-tuning of `{name}` (16 px, patch 4) to 32 px" in card and digest in card and "the MLPs" in card


def test_a_flexi_trunk_is_exported_at_each_patch_size_as_it_was_validated(tmp_path):
    shape = TINY.replace(image_size=16, patch_size=4)
    run = Run(shape, Recipe(0.01, warmup_examples=32, patch_sizes=(2, 4)), budgets=(160,))
    train(run, tmp_path / "runs")
    model, _ = load_branch(run.run_ids[0], tmp_path / "runs")
    export_encoder(run.run_ids[0], tmp_path / "runs", tmp_path / "out", patch_size=2)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = at_patch_size(model, shape, 2)(images)
        reloaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(reloaded(images), expected, rtol=1e-5, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "drawn by batch in training, from 2, 4 pixels" in card and "resize (linear)" in card


SO400M = Shape(1152, 27, 4304, head_dim=72, patch_size=14, image_size=224, pool="map")


def test_timm_config_builds_the_counted_model(tmp_path):
    write_config(SO400M, "timm", tmp_path)
    with torch.device("meta"):
        model = timm.create_model(f"local-dir:{tmp_path}")
    assert sum(p.numel() for p in model.parameters()) == SO400M.num_params


def test_siglip_config_builds_the_counted_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_config(SO400M, "siglip", tmp_path)
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == SO400M.num_params


def test_nanovlm_config_has_the_vision_fields_of_its_vlmconfig():
    config = config_of(SO400M.replace(pool="none"), "nanovlm")
    assert (config["vit_hidden_dim"], config["vit_inter_dim"], config["vit_n_heads"], config["vit_n_blocks"]) == (
        1152,
        4304,
        16,
        27,
    )
    assert config["vit_img_size"] % config["vit_patch_size"] == 0 and config["vit_cls_flag"] is False
    json.dumps(config)


@pytest.mark.parametrize("name", ["siglip", "nanovlm"])
def test_what_a_format_cannot_say_is_refused(name):
    with pytest.raises(UserError, match="use --format timm"):
        config_of(SO400M.replace(pool="token"), name)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(UserError, match=", ".join(FORMATS)):
        config_of(SO400M, "onnx")
