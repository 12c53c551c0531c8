"""Encoder: the same tokens as the tower gives by itself, whoever made it; hooks on its blocks are the reference."""

import json

import pytest
import torch
from torch.testing import assert_close  # float32 to 1e-5: kernels, chosen by the processor, round differently

from sovit import UserError
from sovit.encoder.from_timm import timm_encoder
from sovit.encoder.from_transformers import TOWERS
from sovit.encoder.model import build
from sovit.encoder.open import load_encoder
from sovit.encoder.trained import load_branch
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.train.trainer import train

SHAPE = Shape(16, 2, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
IMAGES = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def block_outputs(blocks, forward):
    """Outputs of every block while `forward()` runs, by hooks: independent of how an Encoder reads them."""
    found = []
    hooks = [
        b.register_forward_hook(lambda m, i, out: found.append(out if torch.is_tensor(out) else out[0])) for b in blocks
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("pool", "registers", "prefix"), [("none", 0, 0), ("avg", 0, 0), ("avg", 2, 2), ("map", 0, 0), ("token", 1, 2)]
)
def test_tokens_of_a_vit_of_ours(pool, registers, prefix):
    shape = Shape(16, 3, 32, head_dim=8, patch_size=7, image_size=28, pool=pool, num_registers=registers)
    model = build(shape, 0, "fan_in", seed=0).eval()
    encoder = timm_encoder("ours", model)
    assert (encoder.width, encoder.depth, encoder.grid, encoder.num_prefix_tokens) == (16, 3, 4, prefix)
    assert encoder.num_params == shape.num_params
    outputs = block_outputs(model.blocks, lambda: model(IMAGES))
    for layer in (0, 1, 2, -1, -3):
        assert_close(encoder.tokens(IMAGES, layer, norm=False), outputs[layer][:, prefix:])
    assert encoder.tokens(IMAGES).shape == (3, 16, 16)
    normed = encoder.tokens(IMAGES)
    assert_close(normed.mean(-1), torch.zeros(3, 16), atol=1e-5, rtol=0)  # a new LayerNorm
    if pool != "avg":
        assert_close(normed, model.forward_features(IMAGES)[:, prefix:])
    assert_close(encoder.pooled(IMAGES), normed.mean(1) if pool == "none" else model(IMAGES))
    assert not any(p.requires_grad for p in encoder.module.parameters())


def test_a_block_that_is_not_there():
    encoder = timm_encoder("ours", build(Shape(16, 2, 32, 8, patch_size=7, image_size=28), 0))
    for layer in (2, -3):
        with pytest.raises(UserError, match="give -2 to 1"):
            encoder.tokens(IMAGES, layer)


# a trained run of ours -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("runs")
    run = Run(SHAPE, Recipe(peak_lr=0.01, warmup_examples=80), (320,))
    train(run, runs_dir)
    return runs_dir, run


def test_a_trained_branch_and_the_same_network_before_training(trained):
    runs_dir, run = trained
    run_id = run.run_ids[0]
    encoder, start = (load_encoder(name, runs_dir) for name in (run_id, f"random:{run_id}"))
    model, _ = load_branch(run_id, runs_dir)
    images = IMAGES[..., :16, :16]
    assert_close(model.head(encoder.tokens(images)), model(images))
    before = build(SHAPE, 16, run.recipe.parametrisation, run.init_seed).eval()
    assert_close(start.tokens(images), before.forward_features(images))
    assert not torch.allclose(start.tokens(images), encoder.tokens(images), atol=0.1)
    assert encoder.preprocess.mean == (0.4,) * 3 and encoder.preprocess.std == (0.5,) * 3
    assert (encoder.preprocess.image_size, encoder.preprocess.crop_pct) == (16, 1.0)


def test_what_cannot_be_opened_is_said(trained, tmp_path):
    runs_dir, run = trained
    for name, message in (
        ("ffffffffff-320", "no run"),
        (f"{run.trunk_id}-640", "no run"),
        ("jax:vit", "of no known kind"),
        ("timm:no_such_model", "cannot be opened"),
        (f"hf:{tmp_path}", "cannot be opened"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder(name, runs_dir)


def test_another_family_is_refused():
    import timm

    with pytest.raises(UserError, match="no plain Vision Transformer"):
        timm_encoder("timm:resnet18", timm.create_model("resnet18", num_classes=0))


# timm and transformers -------------------------------------------------------------------------------------------------


def test_a_timm_folder(trained, tmp_path):
    from sovit.encoder.export import export_encoder

    runs_dir, run = trained
    export_encoder(run.run_ids[0], runs_dir, tmp_path / "out")
    ours, theirs = load_encoder(run.run_ids[0], runs_dir), load_encoder(f"timm:local-dir:{tmp_path / 'out'}")
    images = IMAGES[..., :16, :16]
    assert_close(ours.tokens(images), theirs.tokens(images))
    assert ours.preprocess == theirs.preprocess


SMALL = dict(
    hidden_size=16, image_size=28, patch_size=7, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
)
# model_type -> (config class, prefix tokens, the final norm's name)
REFERENCE = {
    "siglip_vision_model": ("SiglipVisionConfig", 0, "post_layernorm"),
    "clip_vision_model": ("CLIPVisionConfig", 1, "post_layernorm"),
    "vit": ("ViTConfig", 1, "layernorm"),
    "dinov2": ("Dinov2Config", 1, "layernorm"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", 5, "layernorm"),
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.mark.parametrize("kind", REFERENCE)
def test_a_transformers_tower(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config_class, prefix, norm = REFERENCE[kind]
    torch.manual_seed(0)
    tower = getattr(transformers, TOWERS[kind])(getattr(transformers, config_class)(**SMALL)).eval()
    tower.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(
        size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD, resample=2
    ).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.width, encoder.depth, encoder.grid, encoder.num_prefix_tokens) == (16, 3, 4, prefix)
    blocks = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))  # whose place differs by version
    with torch.no_grad():
        outputs = block_outputs(blocks, lambda: tower(IMAGES))
        for layer in (0, 1, -1):
            assert_close(encoder.tokens(IMAGES, layer, norm=False), outputs[layer][:, prefix:])
            expected = getattr(getattr(tower, "vision_model", tower), norm)(outputs[layer])
            assert_close(encoder.tokens(IMAGES, layer), expected[:, prefix:])
        result = tower(IMAGES)
        if kind not in ("clip_vision_model",):  # CLIP's own last_hidden_state is left unnormed
            assert_close(encoder.tokens(IMAGES), result.last_hidden_state[:, prefix:])
        pooled = result.last_hidden_state[:, 0] if kind == "vit" else result.pooler_output
        assert_close(encoder.pooled(IMAGES), pooled)
    record = encoder.preprocess
    assert (record.image_size, record.mean, record.std) == (28, tuple(MEAN), tuple(STD))
    assert (record.resample, record.crop, record.crop_pct) == ("bilinear", "squash", 1.0)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_model_of_text_and_image_gives_its_image_side(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    configs = {"siglip": transformers.SiglipConfig, "clip": transformers.CLIPConfig}
    words = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    both = transformers.AutoModel.from_config(configs[kind](text_config=words, vision_config=SMALL)).eval()
    both.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.width, encoder.depth, encoder.grid, encoder.num_prefix_tokens) == (16, 3, 4, int(kind == "clip"))
    with torch.no_grad():
        expected = both.vision_model(IMAGES, output_hidden_states=True).hidden_states[-1][
            :, encoder.num_prefix_tokens :
        ]
        assert_close(encoder.tokens(IMAGES, norm=False), expected)


@pytest.mark.parametrize(
    "wrong", [{"resample": None}, {"image_mean": None}, {"image_mean": [0.5]}, {"image_std": [0.5, 0.5, 0]}]
)
def test_a_processor_that_says_nothing_is_one_line(wrong, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record | wrong))
    with pytest.raises(UserError, match="preprocessor_config.json of hf:.* does not say how images are made.*mend it"):
        load_encoder(f"hf:{tmp_path}")


def test_a_processor_that_crops_is_recorded(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path
    )
    record = load_encoder(f"hf:{tmp_path}").preprocess
    assert (record.crop, record.crop_pct, record.resample) == ("center", 28 / 32, "bicubic")


def test_preprocessing_is_the_processors(tmp_path):
    """A photograph-sized image in [0, 1] through our record and through transformers' own processor."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = torch.rand(3, 50, 50, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(image[None, :, :10, :10], (50, 50), mode="bicubic").clamp(0, 1)[0]
    theirs = processor((image * 255).round().byte(), return_tensors="pt")["pixel_values"]
    ours = load_encoder(f"hf:{tmp_path}").preprocess(((image * 255).round() / 255)[None])
    assert_close(ours, theirs, atol=0.03, rtol=0)  # they round to 8 bits between the two steps


def test_dinov2_at_the_size_of_its_processor(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | {"image_size": 56})).eval()
    tower.save_pretrained(tmp_path)
    transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path
    )
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.preprocess.image_size, encoder.grid) == (28, 4)
    with torch.no_grad():
        assert_close(encoder.tokens(IMAGES), tower(IMAGES).last_hidden_state[:, 1:])


def test_no_code_and_no_pickle_of_a_folder_is_run(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "conf.Evil"}}')
    (evil / "conf.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be opened"):
        load_encoder(f"hf:{evil}")
    assert not (tmp_path / "ran").exists()
    pickled = tmp_path / "pickled"
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL))
    tower.save_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tower.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be opened"):
        load_encoder(f"hf:{pickled}")


@pytest.mark.parametrize("sizes", [dict(img_size=(28, 14), patch_size=7), dict(img_size=(28, 56), patch_size=(7, 14))])
def test_a_tower_that_is_not_square_is_refused(sizes):
    import timm

    args = dict(embed_dim=16, depth=1, num_heads=2, num_classes=0)
    with pytest.raises(UserError, match=r"reads images of 28 x (14|56); only square ones"):
        timm_encoder("timm:wide", timm.create_model("vit_tiny_patch16_224", **args, **sizes))
