"""Towers as people have them: read as their own library reads them, counted to the unit, or refused in one line."""

import json
import re

import pytest
import timm
import torch
from torch.testing import assert_close

from sovit import UserError
from sovit.cli.main import main
from sovit.encoder.from_timm import named_timm, timm_encoder
from sovit.encoder.open import load_encoder
from sovit.encoder.probe import sizes
from sovit.spec.named_shapes import named, named_shape

TINY = dict(embed_dim=16, depth=2, num_heads=2, num_classes=0)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("samvit_base_patch16", "a VisionTransformerSAM has no full set of tokens"),
        ("hiera_tiny_224", "a Hiera has no grid of patches"),
        ("xcit_nano_12_p16_224", "a Xcit has no grid of patches"),
        ("crossvit_9_240", "a CrossVit has no grid of patches"),
        ("swin_tiny_patch4_window7_224", "a SwinTransformer has no list of blocks"),
        ("mobilevit_xxs", "a ByobNet has no list of blocks"),
        ("convit_tiny", "a ConVit has no full set of tokens"),
        ("qwen3_vit_306m_enc", "a Qwen3VitEncoder has no "),
    ],
)
def test_a_tower_of_another_kind_is_refused_in_one_line(name, missing):
    if not timm.is_model(name):
        pytest.skip("younger than this timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    with pytest.raises(UserError, match=f"timm:{name} is no plain Vision Transformer: {missing}.*; give one") as caught:
        timm_encoder(f"timm:{name}", model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 12])
def test_other_channels_are_refused(channels):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=channels, **TINY)
    with pytest.raises(UserError, match=f"timm:x reads images of in_chans={channels}; only red, green, blue"):
        timm_encoder("timm:x", model)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_a_patch_that_does_not_divide_the_image_leaves_the_rest_unread(name):
    model = timm.create_model(name, img_size=31, patch_size=8, **TINY).eval()
    encoder = timm_encoder("timm:odd", model)
    images = torch.randn(2, 3, 31, 31)
    prefix = encoder.num_prefix_tokens
    assert (encoder.grid, prefix, encoder.preprocess.image_size) == (3, 5 * ("reg4" in name), 31)
    assert_close(encoder.tokens(images), model.forward_features(images)[:, prefix:])
    assert_close(encoder.pooled(images), model(images))
    # a probe opens its source in one patch, which divides every size
    assert sizes(encoder) == (31, 31)
    assert sizes(timm_encoder("timm:even", timm.create_model(name, img_size=32, patch_size=8, **TINY))) == (32, 8)


def test_a_tower_without_prefix_tokens_whose_class_forgets_them():
    model = timm.create_model("vit_relpos_small_patch16_224", img_size=32, patch_size=8, **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_close(timm_encoder("timm:relpos", model).tokens(images), model.fc_norm(model.forward_features(images)))


# transformers ----------------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=16, patch_size=7, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def saved_tower(folder, record=None, **config):
    transformers = pytest.importorskip("transformers")
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL | dict(image_size=28) | config))
    tower.eval().save_pretrained(folder)
    size = config.get("image_size", 28)
    processor = transformers.SiglipImageProcessor(
        size=dict(height=size, width=size), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], **record or {}
    )
    processor.save_pretrained(folder)
    return tower, processor


@pytest.mark.parametrize(
    "record",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "do_normalize": False},
        {},
    ],
    ids=str,
)
def test_the_flags_of_a_processor_are_obeyed(record, tmp_path):
    _, processor = saved_tower(tmp_path, record)
    pixels = torch.arange(3 * 28 * 28, dtype=torch.uint8).view(3, 28, 28)
    theirs = processor(pixels, return_tensors="pt")["pixel_values"].float()
    assert_close(load_encoder(f"hf:{tmp_path}").preprocess(pixels[None] / 255), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"do_pad": True}, "do_pad=true"),
        ({"resample": 1}, r"resample=1, not bilinear \(2\) or bicubic"),
        ({"size": {"height": 28, "width": 56}}, "28 x 56 px"),
        ({"size": {"height": 56, "width": 56}}, "its processor makes 56"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(record, words, tmp_path):
    saved_tower(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | record))
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_transformers_towers_of_odd_size_and_of_one_channel(tmp_path):
    tower, _ = saved_tower(tmp_path / "odd", image_size=30)
    encoder, images = load_encoder(f"hf:{tmp_path / 'odd'}"), torch.randn(1, 3, 30, 30)
    assert (encoder.grid, sizes(encoder)) == (4, (30, 30))
    assert_close(encoder.tokens(images), tower(images).last_hidden_state)
    saved_tower(tmp_path / "grey", num_channels=1)
    with pytest.raises(UserError, match="has num_channels=1; only 3 is read here"):
        load_encoder(f"hf:{tmp_path / 'grey'}")


# counting --------------------------------------------------------------------------------------------------------------

# timm's own network for a name of open_clip (src/open_clip/model_configs/*.json)
OPEN_CLIP = {
    "ViT-B-16": "vit_base_patch16_clip_224",
    "ViT-L-14-336-quickgelu": "vit_large_patch14_clip_336",
    "ViT-H-14-378": "vit_huge_patch14_clip_378",
    "ViT-g-14": "vit_giant_patch14_clip_224",
    "ViT-bigG-14": "vit_gigantic_patch14_clip_224",
    "ViT-M-32": "vit_medium_patch32_clip_224",
    "ViT-B-16-SigLIP-i18n-256": "vit_base_patch16_siglip_256",
    "ViT-SO400M-14-SigLIP-384": "vit_so400m_patch14_siglip_384",
    "ViT-gopt-16-SigLIP2-384": "vit_giantopt_patch16_siglip_384",
}


def truth(name, **kwargs):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **kwargs)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return sum(p.numel() for p in model.parameters()), tokens


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_names_of_open_clip_count_like_their_network(name):
    counts = named(name).counts()
    assert (counts["num_params"], counts["num_tokens"]) == truth(OPEN_CLIP[name])


def test_clipa_has_no_norm_before_its_blocks():
    clip, clipa = named("ViT-L-14-336"), named("ViT-L-14-CLIPA-336")
    assert clip.counts()["num_params"] - clipa.counts()["num_params"] == 2 * 1024 and clip.shape == clipa.shape


@pytest.mark.parametrize(
    ("name", "more", "note"),
    [
        ("vit_small_patch14_reg4_dinov2", -1920, "positions for the patches alone"),
        ("vit_base_patch16_clip_224", 768, "patch_embed.proj is .*bias=False"),
        ("deit_tiny_distilled_patch16_224", 0, "VisionTransformerDistilled"),
    ],
)
def test_other_networks_of_timm_count_to_the_unit_and_say_what_differs(name, more, note):
    found = named_timm(name)
    counts = found.counts()
    assert (counts["num_params"], counts["num_tokens"]) == truth(name) and found.more_params == more
    assert re.search(note, found.note)


def test_a_patch_that_does_not_divide_the_image_is_counted_as_the_network_reads_it():
    name = "vit_base_patch16_siglip_gap_224"
    found = named_timm(name, image_size=100)
    assert (found.counts()["num_params"], found.shape.num_tokens) == truth(name, img_size=100)
    assert found.note.endswith("its patches read 96 of 100 px")


def test_what_cannot_be_counted_is_refused():
    for name, words in (
        (
            "eva02_tiny_patch14_224",
            "cannot be counted: it is a Eva, not a VisionTransformer, with [0-9,]+ FLOPs an image",
        ),
        ("vit_base_patch16_clip_224.nonsense", "timm cannot build .*nonsense"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            named_timm(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="width of vit_x is timm's own"):
        named_timm("vit_x", width=8)
    with pytest.raises(UserError, match=r"ViT-B-16 is no plain ViT \(no patch bias"):
        named_shape("ViT-B-16")


def test_count_by_tag_by_sizes_and_by_open_clip(capsys):
    assert named_shape("vit_base_patch16_224.augreg_in21k") == named_shape("vit_base_patch16_224")
    assert named_shape("768x12x3072") == named_shape("B/16")
    assert named_shape("64x1x32x16", patch_size=8).num_heads == 4
    assert main(["count", "ViT-B-16", "--json"]) == 0
    assert '"num_params": 85799424' in (said := capsys.readouterr().out) and "no patch bias" in said
    assert main(["count", "ViT-B-16"]) == 0
    assert "before the blocks, so +768 parameters beside a plain ViT." in capsys.readouterr().out
    for name, words in (
        ("0x1x2", "shape '0x1x2', WIDTHxDEPTHxMLP_DIM[xHEAD_DIM], cannot be built: width=0 must be at least 1"),
        ("100x1x2", "the nearest width is 128"),
        ("ViT-B-0", "unknown shape 'ViT-B-0'; write VARIANT/PATCH[@SIZE], WIDTHxDEPTHxMLP_DIM"),
        ("swin_tiny_patch4_window7_224", "a SwinTransformer has no list of blocks"),
        ("vit_base_patch16_225", "such as vit_base_patch16_224"),
    ):
        assert main(["count", name]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
