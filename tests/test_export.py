"""Export: what another library builds from our files is what was trained, or what was counted."""

import json

import pytest
import timm
import torch

from sovit import UserError
from sovit.branches import load_branch
from sovit.export import CONFIGS, config_of, export_timm, write_config
from sovit.run import Recipe, Run
from sovit.shape import Shape
from sovit.train import train

TINY = Shape(16, 1, 24, head_dim=8, patch_size=4, image_size=16, pool="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("runs")
    run = Run(TINY, Recipe(0.01, warmup_examples=32), budgets=(160,))
    train(run, runs_dir)
    return run.run_ids[0], runs_dir


def test_timm_folder_gives_the_trained_outputs_bit_for_bit(trained, tmp_path):
    run_id, runs_dir = trained
    report = export_timm(run_id, runs_dir, tmp_path / "encoder")
    assert report["timm_max_difference"] == 0.0
    model, _ = load_branch(run_id, runs_dir)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        reloaded = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
        assert torch.equal(reloaded(images), model(images))
        features = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0).eval()
        assert torch.equal(features(images), model.forward_features(images))
    assert tuple(reloaded.pretrained_cfg["mean"]) == (0.4,) * 3  # the stream's own normalisation
    assert reloaded.pretrained_cfg["tag"] == "sovit"  # no false pedigree from the entry point


def test_transformers_automodel_gives_the_same_tokens(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    run_id, runs_dir = trained
    report = export_timm(run_id, runs_dir, tmp_path / "encoder")
    assert report["transformers_max_difference"] <= 1e-6
    assert transformers.AutoConfig.from_pretrained(tmp_path / "encoder").num_labels == 16


def test_export_replaces_an_old_export_but_nothing_else(trained, tmp_path):
    run_id, runs_dir = trained
    out = tmp_path / "encoder"
    export_timm(run_id, runs_dir, out)
    export_timm(run_id, runs_dir, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]
    foreign = tmp_path / "hub_model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="holds something else"):
        export_timm(run_id, runs_dir, foreign)
    assert (foreign / "config.json").read_text() == '{"model_type": "vit"}'
    (foreign / "config.json").unlink()
    foreign.rmdir()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        export_timm(run_id, runs_dir, other)
    assert (other / "cat.jpg").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "photos"]


def test_a_run_that_is_not_there_is_refused(trained, tmp_path):
    run_id, runs_dir = trained
    with pytest.raises(UserError, match=run_id):  # names one that is
        export_timm("0123456789-160", runs_dir, tmp_path / "encoder")


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
    with pytest.raises(UserError, match=", ".join(CONFIGS)):
        config_of(SO400M, "onnx")
