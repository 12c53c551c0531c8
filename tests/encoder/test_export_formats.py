"""Every format x every kind of shape: what the other library makes of the folder is what our model makes of the images."""

import json

import pytest
import timm
import torch
from planted_branch import BASE, SHAPES, plant
from torch import nn

from sovit import UserError
from sovit.cli.main import main
from sovit.encoder.export import MAX_PATCHES, export_encoder
from sovit.encoder.export.formats import FORMATS, config_of
from sovit.encoder.export.roundtrip_check import NANOVLM_TOLERANCE, TOLERANCE
from sovit.encoder.open import load_encoder, timm_encoder
from sovit.encoder.trained import load_branch

transformers = pytest.importorskip("transformers")

PLAIN = {"none", "avg", "map"}
EXPRESSES = {  # written down by hand, not read from what is tested
    "timm": set(SHAPES),
    "sovit": set(SHAPES),
    "siglip": PLAIN,
    "nanovlm": PLAIN,
    "vit": {"token", "token, qkv without bias"},
}
PAIRS = [(f, s) for f in EXPRESSES for s in SHAPES if s in EXPRESSES[f]]
REFUSED = [(f, s) for f in EXPRESSES for s in SHAPES if s not in EXPRESSES[f]]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("runs")
    return {name: plant(BASE.replace(**more), runs_dir) for name, more in SHAPES.items()}, runs_dir


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_the_table_has_every_format():
    assert set(EXPRESSES) == set(FORMATS)


@pytest.mark.parametrize(("format", "shape"), PAIRS)
def test_round_trip(planted, tmp_path, format, shape):
    run_ids, runs_dir = planted
    report = export_encoder(run_ids[shape], runs_dir, tmp_path / "out", format=format)
    model, run = load_branch(run_ids[shape], runs_dir)
    ours = timm_encoder("trained", model)
    with torch.no_grad():
        tokens, pooled = ours.tokens(IMAGES), ours.pooled(IMAGES)
        assert (tokens - tokens.mean(0)).abs().max() > 0.1  # what is compared depends on the images
        if format == "nanovlm":
            vit = NanoViT(json.loads((tmp_path / "out" / "config.json").read_text())).eval()
            vit.load_state_dict(weights_of(tmp_path / "out"), strict=True)
            # as nanoVLM makes images: in [0, 1], no normalisation
            mean, std = ours.preprocess.mean[0], ours.preprocess.std[0]
            found = vit(IMAGES * std + mean)
            assert (found - tokens).abs().max() < NANOVLM_TOLERANCE * tokens.std()
            vit.set_gelu("none")
            torch.testing.assert_close(vit(IMAGES * std + mean), tokens, rtol=0, atol=2e-5)
            assert 1e-5 < report["tokens_max_difference"] < NANOVLM_TOLERANCE * report["tokens_std"]
            return
        if format == "timm":
            reloaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
            assert all(torch.equal(t, model.state_dict()[name]) for name, t in reloaded.state_dict().items())
            torch.testing.assert_close(reloaded(IMAGES), model(IMAGES))
            theirs = load_encoder(f"timm:local-dir:{tmp_path / 'out'}")
        else:
            kind = {"siglip": "SiglipVisionModel", "vit": "ViTModel", "sovit": "SovitVisionModel"}[format]
            more = {"add_pooling_layer": False} if format == "vit" else {}
            tower, loading = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, **more)
            assert type(tower).__name__ == kind and not loading["missing_keys"] and not loading["unexpected_keys"]
            output = tower(IMAGES, output_hidden_states=True)
            last, states = output.last_hidden_state, output.hidden_states
            prefix = 1 if format == "vit" else 0
            torch.testing.assert_close(last[:, prefix:], tokens, rtol=1e-5, atol=1e-5)
            assert len(states) == run.shape.depth + 1 and {s.shape for s in states} == {last.shape}
            for layer in range(run.shape.depth):  # hidden_states[0] is the embedding
                expected = ours.tokens(IMAGES, layer, norm=False)
                torch.testing.assert_close(states[layer + 1][:, prefix:], expected, rtol=1e-5, atol=1e-5)
            if output.pooler_output is not None:
                torch.testing.assert_close(output.pooler_output, pooled, rtol=1e-5, atol=1e-5)
            else:
                assert run.shape.pool in ("avg", "none", "token")
            assert report["tokens_max_difference"] <= TOLERANCE * tokens.abs().max()
            theirs = load_encoder(f"hf:{tmp_path / 'out'}")
            assert theirs.num_params == run.shape.num_params
        torch.testing.assert_close(theirs.tokens(IMAGES), tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.pooled(IMAGES), pooled, rtol=1e-5, atol=1e-5)
        assert theirs.preprocess == ours.preprocess
    assert (tmp_path / "out" / "README.md").stat().st_size > 500


@pytest.mark.parametrize(("format", "shape"), REFUSED)
def test_a_shape_that_a_format_cannot_express_is_refused_with_those_that_can(planted, tmp_path, format, shape):
    run_ids, runs_dir = planted
    with pytest.raises(UserError, match=f"--format {format} cannot express .*; use --format timm .*or sovit$") as error:
        export_encoder(run_ids[shape], runs_dir, tmp_path / "out", format=format)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
    offered = str(error.value).partition("use --format ")[2].split(" or ")
    assert set(offered) == {other for other in EXPRESSES if shape in EXPRESSES[other]}


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class NanoViT(nn.Module):
    """nanoVLM's ViT, written again from the names of its tensors and its VLMConfig's fields."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config["vit_hidden_dim"], config["vit_n_heads"]
        patch, hidden, eps = config["vit_patch_size"], config["vit_inter_dim"], config["vit_ln_eps"]
        self.patch_embedding = nn.Module()
        self.patch_embedding.conv = nn.Conv2d(3, width, patch, patch)
        grid = config["vit_img_size"] // patch
        self.patch_embedding.position_embedding = nn.Parameter(torch.zeros(1, grid**2, width))
        self.blocks = nn.ModuleList()
        for _ in range(config["vit_n_blocks"]):
            block = nn.Module()
            block.ln1, block.ln2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
            block.attn, block.mlp = nn.Module(), nn.Module()
            block.attn.qkv_proj, block.attn.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
            self.blocks.append(block)
        self.layer_norm = nn.LayerNorm(width, eps)
        self.set_gelu("tanh")

    def set_gelu(self, approximate):
        self.gelu = nn.GELU(approximate)

    def forward(self, images):
        x = self.patch_embedding.conv(images).flatten(2).mT + self.patch_embedding.position_embedding
        for block in self.blocks:
            q, k, v = block.attn.qkv_proj(block.ln1(x)).chunk(3, -1)
            q, k, v = (y.reshape(*y.shape[:2], self.heads, -1).transpose(1, 2) for y in (q, k, v))
            mixed = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + block.attn.out_proj(mixed.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp.fc2(self.gelu(block.mlp.fc1(block.ln2(x))))
        return self.layer_norm(x)


# what a reload would have to notice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "shape", "field", "wrong"),
    [
        ("siglip", "map", "layer_norm_eps", 1e-5),
        ("siglip", "none", "hidden_act", "gelu_pytorch_tanh"),
        ("vit", "token", "layer_norm_eps", 1e-12),
        ("sovit", "token, registers", "pool", "avg"),
    ],
)
def test_a_wrong_config_is_found_out_and_nothing_is_written(
    planted, tmp_path, monkeypatch, format, shape, field, wrong
):
    run_ids, runs_dir = planted
    monkeypatch.setattr("sovit.encoder.export.config_of", lambda s, f: config_of(s, f) | {field: wrong})
    with pytest.raises((RuntimeError, UserError), match="nothing was written|does not fit its config"):
        export_encoder(run_ids[shape], runs_dir, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["prefix", "missing"])
def test_a_folder_whose_tensors_would_be_drawn_anew_is_refused(planted, tmp_path, kind):
    """transformers warns and goes on with random weights."""
    from safetensors.torch import save_file

    run_ids, runs_dir = planted
    export_encoder(run_ids["map"], runs_dir, tmp_path / "out", format="siglip")
    tensors = weights_of(tmp_path / "out")
    assert all(name.startswith("vision_model.") for name in tensors)  # without it transformers 4 draws all of them anew
    if kind == "prefix":
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    else:
        del tensors["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks .* of the tensors of a SiglipVisionModel, such as"):
        load_encoder(f"hf:{tmp_path / 'out'}")


def test_the_processor_makes_what_our_record_says(planted, tmp_path):
    """An image that is not square, through transformers' processor and through the short side, the middle and our record."""
    run_ids, runs_dir = planted
    export_encoder(run_ids["token"], runs_dir, tmp_path / "out", format="vit")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = torch.randint(0, 256, (3, 16, 22), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = load_encoder(f"hf:{tmp_path / 'out'}").preprocess(image[None, :, :, 3:19] / 255)
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("format", ["timm", "vit"])
def test_a_run_on_random_crops_is_shown_the_middle_as_in_its_validation(tmp_path, format):
    shape = BASE.replace(pool="token")
    run_id = plant(shape, tmp_path / "runs", data="hub", preset="pictures?crop=0.3&flip=0")
    export_encoder(run_id, tmp_path / "runs", tmp_path / "out", 32, format=format)
    place = "timm:local-dir:" if format == "timm" else "hf:"
    record = load_encoder(f"{place}{tmp_path / 'out'}").preprocess
    assert (record.crop, record.mean) == ("center", (0.5,) * 3)
    assert record.crop_pct == (7 / 8 if format == "timm" else 32 / 36)  # in whole pixels there
    assert "short side to 36 px (bicubic), the middle 32 px" in (tmp_path / "out" / "README.md").read_text()


# sizes, cards, the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "shape"), [("siglip", "map"), ("vit", "token"), ("nanovlm", "avg"), ("sovit", "none")]
)
def test_at_another_size(planted, tmp_path, format, shape):
    run_ids, runs_dir = planted
    export_encoder(run_ids[shape], runs_dir, tmp_path / "timm", 24, 8)
    report = export_encoder(run_ids[shape], runs_dir, tmp_path / "out", 24, 8, format)
    assert report["tokens_max_difference"] >= 0
    if format == "nanovlm":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["vit_img_size"] == 24
        return
    images = torch.randn(2, 3, 24, 24)
    expected = load_encoder(f"timm:local-dir:{tmp_path / 'timm'}").tokens(images)
    found = load_encoder(f"hf:{tmp_path / 'out'}")
    torch.testing.assert_close(found.tokens(images), expected, rtol=1e-5, atol=1e-5)
    assert (found.preprocess.image_size, found.grid) == (24, 3)
    assert "resized to 24 px, patch 8" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_shape_cost_data_seeds_score_and_licence(planted, tmp_path):
    run_ids, runs_dir = planted
    run_id = run_ids["avg, registers"]
    shape = BASE.replace(**SHAPES["avg, registers"])
    _, run = load_branch(run_id, runs_dir)
    export_encoder(run_id, runs_dir, tmp_path / "out", format="sovit")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "license: mit",
        "width 24, depth 2, MLP dim 40, 2 heads of 12, patch 4 px, image 16 px, pool avg, 3 registers",
        f"{shape.num_params:,} parameters, {shape.forward_flops:,} FLOPs an image",
        f"run `{run_id}`",
        "no record of it",  # a planted run has none
        "160 examples",
        "weights 0, order of the data 0",
        "no outside data",
        "(x - 0.4) / 0.5",
        "import sovit.encoder.hf_model",
    ):
        assert text in card, text


def test_sizes_without_bound_and_unknown_formats_are_refused(planted, tmp_path, capsys):
    run_ids, runs_dir = planted
    command = ["export", run_ids["none"], "--runs", str(runs_dir), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--image-size", "4096", "--format", "siglip"], f"1,048,576 tokens, at most {MAX_PATCHES:,} are exported"),
        (["--format", "onnx"], "--format 'onnx' is unknown; choose one of timm, siglip, vit, nanovlm, sovit"),
        (["--format", "vit"], "--format vit cannot express pool=none"),
    ):
        assert main(command + more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_one_format_replaces_another_and_json_tells_the_differences(planted, tmp_path, capsys):
    run_ids, runs_dir = planted
    command = ["export", run_ids["map"], "--runs", str(runs_dir), "--out", str(tmp_path / "out")]
    for format in ("timm", "siglip", "nanovlm"):
        assert main([*command, "--format", format, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["format"], report["out"]) == (format, str(tmp_path / "out"))
        assert report["tokens_max_difference"] < 0.01
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()  # nothing is left of the format before


def test_what_a_checkpoint_lacks_is_drawn_and_not_left_as_memory_was(planted, tmp_path):
    """Of another image size transformers takes no positions from the file, and has nothing else to fill them with."""
    run_ids, runs_dir = planted
    run_id = next(iter(run_ids.values()))
    export_encoder(run_id, runs_dir, tmp_path / "encoder", format="sovit")
    again = {"image_size": 2 * load_branch(run_id, runs_dir)[1].shape.image_size, "ignore_mismatched_sizes": True}
    for _ in range(3):
        model = transformers.AutoModel.from_pretrained(tmp_path / "encoder", **again)
        drawn = model.trunk.pos_embed
        assert 0.5 < drawn.std().item() / model.config.initializer_range < 1.5 and drawn.abs().max() < 1
