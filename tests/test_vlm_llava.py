"""An exported encoder as the tower of transformers' own Llava: its features, training, saving."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sovit import UserError
from sovit.encoder import open_encoder
from sovit.export import export_encoder
from sovit.vlm import projectors
from sovit.vlm.language_model import open_language_model
from sovit.vlm.llava import llava_model
from tests.planted_branch import BASE, SHAPES, plant

transformers = pytest.importorskip("transformers")

TOWERS = {  # format, shape -> tokens before the patches that transformers' tower gives out
    ("siglip", "map"): 0,
    ("siglip", "avg"): 0,
    ("vit", "token"): 1,
    ("sovit", "token, registers"): 0,  # its own are kept inside
    ("sovit", "avg, all of it"): 0,
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    for format, shape in [*TOWERS, ("timm", "map")]:
        run_id = plant(BASE.replace(**SHAPES[shape]), root / f"runs {format} {shape}")
        export_encoder(run_id, root / f"runs {format} {shape}", root / f"{format} {shape}", format=format)
    return root


@pytest.fixture(scope="module")
def llama():
    return open_language_model("random:2x32")


@pytest.mark.parametrize(("format", "shape"), TOWERS)
@pytest.mark.parametrize("layer", [-1, 1, [-2, -1]])
def test_image_features_are_the_encoders_tokens_through_the_projector(folders, llama, format, shape, layer):
    folder = folders / f"{format} {shape}"
    model = llava_model(folder, llama, vision_feature_layer=layer)
    encoder = open_encoder(f"hf:{folder}")
    # hidden_states[i] stands behind block i - 1, before the final norm
    blocks = [i - 1 if i > 0 else i for i in ([layer] if isinstance(layer, int) else layer)]
    with torch.no_grad():
        tokens = torch.cat([encoder.tokens(IMAGES, block, norm=False) for block in blocks], -1)
        ours = projectors.build("mlp2x_gelu", tokens.shape[-1], 32, num_tokens=16)
        ours.load_state_dict(model.model.multi_modal_projector.state_dict())
        features = torch.stack(list(model.get_image_features(IMAGES).pooler_output))
        torch.testing.assert_close(features, ours(tokens), rtol=1e-5, atol=1e-6)
    assert model.config.image_seq_length == 16 == features.shape[1]


@pytest.mark.parametrize(("format", "shape"), [("siglip", "map"), ("sovit", "token, registers"), ("vit", "token")])
def test_it_learns_and_comes_back_from_disk(folders, llama, tmp_path, format, shape):
    model = llava_model(folders / f"{format} {shape}", llama)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert before and all(name.startswith("model.vision_tower.") for name in before)
    answers = torch.tensor([llama.tokenizer.encode(text, add_special_tokens=False) for text in ("red", "sky")])
    image = torch.full((2, model.config.image_seq_length), llama.image_token_id)
    ids = torch.cat([image, answers], 1)
    labels = torch.cat([torch.full_like(image, -100), answers], 1)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(45):
        loss = model(input_ids=ids, pixel_values=IMAGES, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # who does not look at the images can tell the first letter by half at best
    assert losses[0] > 3 and losses[-1] < 0.5 * math.log(2) / answers.shape[1], losses
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    untouched = llava_model(folders / f"{format} {shape}", llama)  # the language model that was given is not trained
    assert untouched(input_ids=ids, pixel_values=IMAGES, labels=labels).loss.item() == pytest.approx(losses[0])
    model.save_pretrained(tmp_path / "llava")
    again, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        expected, found = (m(input_ids=ids, pixel_values=IMAGES).logits for m in (model, again.eval()))
        assert torch.equal(expected, found)
        other = again(input_ids=ids, pixel_values=IMAGES.flip(0)).logits
    assert (other - found).abs().max() > 0.1  # the images are seen


def test_tied_embeddings_stay_tied(folders, tmp_path):
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(text).save_pretrained(tmp_path / "lm")
    tied = dataclasses.replace(
        open_language_model("random:1x32"), model=transformers.LlamaForCausalLM.from_pretrained(tmp_path / "lm")
    )
    tied = dataclasses.replace(tied, image_token_id=3)
    model = llava_model(folders / "siglip map", tied)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied.model.lm_head.weight)


def test_what_cannot_be_a_tower_is_said_in_one_line(folders, llama, tmp_path):
    wrong = tmp_path / "wrong width"
    wrong.mkdir()
    for path in (folders / "siglip map").iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for path in (folders / "vit token").iterdir():
        (lacking / path.name).write_bytes(path.read_bytes())
    tensors = load_file(lacking / "model.safetensors")
    del tensors["embeddings.cls_token"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    for folder, more, message in (
        (tmp_path / "nowhere", {}, "holds no encoder; write one with sovit export"),
        (folders / "timm map", {}, "is a timm folder, which Llava cannot hold"),
        (wrong, {}, r"does not fit its config.json: .* is \(.*24.*\), by the config \(.*48.*\)"),
        (lacking, {}, "lacks 1 of the tensors of a ViTModel, such as embeddings.cls_token"),
        (
            folders / "siglip map",
            {"vision_feature_select_strategy": "default"},
            'is a patch of the image .*give "full"',
        ),
        (folders / "sovit token, registers", {"vision_feature_select_strategy": "default"}, 'give "full"'),
        (folders / "siglip map", {"vision_feature_select_strategy": "cls"}, "choose one of full, default"),
        (folders / "siglip map", {"vision_feature_layer": 3}, "does not exist; give -3 to 2"),
        (folders / "siglip map", {"projector": "perceiver"}, "has mlp2x_gelu alone"),
    ):
        with pytest.raises(UserError, match=message) as error:
            llava_model(folder, llama, **more)
        assert "\n" not in str(error.value)


def test_full_keeps_the_class_token_of_a_vit(folders, llama):
    model = llava_model(folders / "vit token", llama, vision_feature_select_strategy="full")
    assert model.config.image_seq_length == 17
    assert model.get_image_features(IMAGES).pooler_output[0].shape == (17, 32)
