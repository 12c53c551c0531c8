"""timm models as bases: the Shape said of one builds a model that gives its outputs, and all else is refused."""

import pytest
import timm
import timm.models
import torch

from sovit import UserError
from sovit.encoder.from_timm import load_timm_base, shape_of_timm
from sovit.encoder.model import build
from sovit.spec.named_shapes import TIMM_SHAPES

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
CLOSED = {"vit_so400m_patch16_siglip_256", "vit_so400m_patch14_siglip_gap_224", "vit_so150m_patch16_reg4_gap_256"}
# every family of TIMM_SHAPES, and those that have positions for patches alone, LayerScale, another attention bias
OPEN = [
    *("vit_tiny_patch16_224", "vit_small_patch8_224", "vit_huge_patch14_224", "vit_base_patch16_siglip_224"),
    *("vit_so400m_patch14_siglip_384", "vit_so150m_patch16_reg4_map_256", "vit_so150m2_patch16_reg1_gap_256"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224", "flexivit_small"),
    *("vit_base_patch16_224_miil", "vit_medium_patch16_reg4_gap_256"),
]


def tiny(name, **more):
    """A small model of a timm architecture, every tensor of it drawn at random, so that none is silent."""
    model = timm.create_model(name, num_classes=5, **TINY | more).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


# one of each family in the table; test_shape builds every one of it
@pytest.mark.parametrize("name", sorted({*CLOSED, *(set(OPEN) & set(TIMM_SHAPES))} - {"vit_huge_patch14_224"}))
def test_the_shape_of_a_timm_model_is_the_one_in_the_table_or_it_is_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        if name in CLOSED:
            with pytest.raises(UserError, match=f"{name} is no plain ViT of the family: (blocks.0.mlp.act|norm) is"):
                shape_of_timm(model, name)
            return
        shape = shape_of_timm(model)
        ours = build(shape)
    assert shape == TIMM_SHAPES[name]
    sizes = {n: t.shape for n, t in model.state_dict().items() if not n.startswith("head.")}
    assert {n: t.shape for n, t in ours.state_dict().items()} == sizes


@pytest.mark.parametrize("name", OPEN)
def test_a_base_gives_the_outputs_of_the_timm_model(name, tmp_path):
    model = tiny(name)
    timm.models.save_for_hf(model, str(tmp_path), model_args=TINY, safe_serialization=True)
    base = load_timm_base(f"timm:local-dir:{tmp_path}")
    ours = build(base.shape).eval()
    ours.load_state_dict(base.weights)  # strict: the same names and shapes, no head
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
    assert base.mean == tuple(model.pretrained_cfg["mean"]) and base.std == tuple(model.pretrained_cfg["std"])
    assert base.sha256 == load_timm_base(f"timm:local-dir:{tmp_path}").sha256 and len(base.sha256) == 64
    assert base.run is None and base.train_flops is None


def test_a_patch_that_does_not_divide_the_image_reads_less_of_it(tmp_path):
    args = TINY | {"img_size": 30}
    model = tiny("vit_base_patch16_siglip_224", img_size=30)
    timm.models.save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    base = load_timm_base(f"timm:local-dir:{tmp_path}")
    assert base.shape.image_size == 24
    ours = build(base.shape).eval()
    ours.load_state_dict(base.weights)
    images = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images[..., :24, :24]), model.forward_head(model.forward_features(images), True)
        )


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("resnet18", None, "it is a ResNet, not a VisionTransformer"),
        ("vit_small_plus_patch16_dinov3", {}, "it is a Eva"),
        ("deit_tiny_distilled_patch16_224", {}, "it is a VisionTransformerDistilled"),
        ("vit_small_patch16_18x2_224", {}, "its blocks are ParallelThingsBlocks"),
        ("vit_base_patch16_rpn_224", {}, "its blocks are ResPostBlocks"),
        ("aimv2_large_patch14_224", {}, "its blocks are Blocks of SwiGLU"),
        ("vit_giant_patch14_dinov2", {}, r"blocks.0.mlp is GluMlp\(\) there"),
        ("vit_small_r26_s32_224", None, r"patch_embed is HybridEmbed\(\) there"),
        ("vit_base_patch16_clip_224", {}, "patch_embed.proj is .* bias=False"),
        ("vit_base_patch16_siglip_gap_224", {}, "norm is LayerNorm.* there and nothing here"),
        ("vit_base_patch16_224", dict(pre_norm=True), "patch_embed.proj is"),
        ("vit_base_patch16_224", dict(qk_norm=True), "blocks.0.attn.q_norm is LayerNorm"),
        ("vit_base_patch16_224", dict(global_pool="avg"), "a class token is True there and False here"),
        ("vit_base_patch16_224", dict(global_pool="avgmax"), "pool='avgmax' is unknown"),
        ("vit_base_patch16_224", dict(class_token=False, global_pool="avg", reg_tokens=1, pool_include_prefix=True),
         "a mean over registers is True there"),
        ("vit_base_patch16_224", dict(pos_embed="none"), "learned positions is False there"),
        ("vit_base_patch16_224", dict(in_chans=1), r"patch_embed.proj is Conv2d\(1,"),
        ("vit_base_patch16_224", dict(img_size=(32, 48)), "images of 32 x 48; only square ones"),
        ("vit_base_patch16_224", dict(patch_size=(8, 16)), "only square ones"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_family_is_refused_in_one_line(name, more, message):
    with torch.device("meta"):
        model = timm.create_model(name, **({} if more is None else TINY | more))
    with pytest.raises(UserError, match=message) as raised:
        shape_of_timm(model, "timm:x")
    assert "\n" not in str(raised.value) and str(raised.value).startswith("timm:x ")


def test_a_base_that_cannot_be_opened_is_said_in_one_line(tmp_path):
    for name in (f"timm:local-dir:{tmp_path}", "timm:no_such_model"):
        with pytest.raises(UserError, match=f"{name} cannot be opened") as raised:
            load_timm_base(name)
        assert "\n" not in str(raised.value)
