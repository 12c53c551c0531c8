"""Language models by name: what is promised of each, what is refused, and SmolLM2 out of a wheel."""

import json
import re
import string

import pytest
import torch

from sovit import UserError
from sovit.data import assets

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from sovit.vlm.language_model import byte_tokenizer, open_language_model  # noqa: E402


def keeps_its_promises(lm):
    rows, _ = lm.model.get_input_embeddings().weight.shape
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert 0 <= lm.image_token_id < rows and lm.image_token_id not in (lm.eos_token_id, lm.pad_token_id)
    assert 0 <= lm.eos_token_id < rows and 0 <= lm.pad_token_id < rows
    assert lm.context_length >= 64 and len(bytes.fromhex(lm.sha256)) == 32
    text = "Is there a red square? " + string.printable
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    assert lm.tokenizer.decode(ids) == text and lm.image_token_id not in ids and max(ids) < rows
    ids = torch.tensor([ids[:20]])
    embedded = lm.model.get_input_embeddings()(ids)
    assert torch.equal(lm.model(inputs_embeds=embedded).logits, lm.model(ids).logits)


# random --------------------------------------------------------------------------------------------------------------


def test_random_is_a_function_of_its_name():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lm = open_language_model("random:2x64")
    assert torch.equal(torch.get_rng_state(), before)
    keeps_its_promises(lm)
    assert (lm.model.config.num_hidden_layers, lm.model.config.hidden_size) == (2, 64)
    assert 259 < len(lm.tokenizer) == lm.model.config.vocab_size <= 512
    same, other = open_language_model("random:2x64@0"), open_language_model("random:2x64@3")
    assert same.sha256 == lm.sha256 != other.sha256
    ids = torch.arange(40)[None]
    assert torch.equal(same.model(ids).logits, lm.model(ids).logits)
    assert not torch.equal(other.model(ids).logits, lm.model(ids).logits)
    half = open_language_model("random:2x64", torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half.sha256 == lm.sha256


def test_bytes_are_read_and_given_back_exactly():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(256))) + "  two  spaces, \n\t, 東京 🙂 <|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text and max(ids) < len(tokenizer)
    rare = "xQzjé"
    assert len(tokenizer.encode(rare)) == len(rare.encode())
    assert tokenizer.decode(tokenizer.encode("a<|end|>"), skip_special_tokens=True) == "a"


def test_words_of_the_questions_are_one_token_each():
    """Every question of the stream, written as the model is asked it."""
    from sovit.vlm.questions.questions import open_questions

    tokenizer = byte_tokenizer()
    (asked,) = open_questions("stream", "cpu", 16, 0).ask("train", 0, 1)
    for q in asked:
        for text in ("\n" + q.question, " " + q.answer):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == text
            pieces = re.findall(r"\n| ?[A-Za-z]+| ?\d+|[^\w\s]", text)
            assert len(ids) == len(pieces), (text, tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    "name", ["random:", "random:2", "random:0x64", "random:2x60", "random:2x0", "random:2x64@x", "random:999x64"]
)
def test_a_random_model_that_cannot_be(name):
    with pytest.raises(UserError, match="is no random:DEPTHxWIDTH.*a width that 16 divides"):
        open_language_model(name)


@pytest.mark.parametrize("name", ["", "hf:", "smollm", "gpt2", "/tmp"])
def test_a_kind_that_is_not_known(name):
    with pytest.raises(UserError, match="of no known kind; give smollm2, random:DEPTHxWIDTH, hf:NAME or hf:FOLDER"):
        open_language_model(name)


# a folder of transformers ----------------------------------------------------------------------------------------------


def save(folder, rows=0, special=("<image>",), kind="LlamaForCausalLM", **options):
    """A tiny model and a byte tokenizer of its own in `folder`; `rows` of the embedding beyond the words."""
    inner = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    inner["added_tokens"] = []
    inner["model"]["vocab"] = {t: i for t, i in inner["model"]["vocab"].items() if i < 256}
    inner["model"]["merges"] = []
    inner = tokenizers.Tokenizer.from_str(json.dumps(inner))
    inner.add_special_tokens(["<end>", *special])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=0)
    sizes["vocab_size"] = len(tokenizer) + rows
    config = {"LlamaForCausalLM": transformers.LlamaConfig, "BertLMHeadModel": transformers.BertConfig}[kind](
        **sizes, max_position_embeddings=128, bos_token_id=None, eos_token_id=256, pad_token_id=None
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder, **options)
    return model


def refused(folder, reason):
    with pytest.raises(UserError, match=reason) as caught:
        open_language_model(f"hf:{folder}")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_folder(tmp_path, capsys):
    model = save(tmp_path)
    lm = open_language_model(f"hf:{tmp_path}")
    keeps_its_promises(lm)
    ids = torch.arange(30)[None]
    assert torch.equal(lm.model(ids).logits, model.eval()(ids).logits)
    assert lm.tokenizer.convert_ids_to_tokens([lm.image_token_id, lm.eos_token_id]) == ["<image>", "<end>"]
    assert lm.pad_token_id == lm.eos_token_id and lm.context_length == 128
    assert lm.sha256 == assets.file_sha256(tmp_path / "model.safetensors")
    assert open_language_model(f"hf:{tmp_path}", torch.bfloat16).sha256 == lm.sha256
    assert "Loading" not in capsys.readouterr().err


def test_weights_in_several_files(tmp_path):
    save(tmp_path / "one")
    save(tmp_path / "many", max_shard_size="20KB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    one, many = (open_language_model(f"hf:{tmp_path / name}") for name in ("one", "many"))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True))
    part = sorted((tmp_path / "many").glob("*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\x11")
    assert open_language_model(f"hf:{tmp_path / 'many'}").sha256 != many.sha256


@pytest.mark.parametrize(
    ("special", "rows", "expected"),
    [
        (("<|x|>", "<|image|>"), 0, 258),
        (("<repo_name>", "<reponame>"), 0, 258),  # StarCoder's, of which SmolLM2's text has the first alone
        (("<unused0>", "<unused1>"), 3, 257),
        (("<|reserved_special_token_7|>",), 0, 257),
        (("<|x|>",), 2, 258),  # the first row behind the words
    ],
)
def test_what_stands_for_an_image(tmp_path, special, rows, expected):
    save(tmp_path, rows, special)
    assert open_language_model(f"hf:{tmp_path}").image_token_id == expected


def test_nothing_that_could_stand_for_an_image(tmp_path):
    save(tmp_path, special=())
    refused(tmp_path, "no idle special token .* tokenizer.add_special_tokens and model.resize_token_embeddings")


def test_a_tokenizer_of_another_model(tmp_path):
    save(tmp_path, rows=-2)
    refused(tmp_path, r"gives ids up to 257, its embedding has 256 rows; the two belong to different models")


def test_no_tokenizer(tmp_path):
    save(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    refused(tmp_path, "the tokenizer of .* cannot be opened .*tokenizer.json")


def test_pickled_weights_are_not_read(tmp_path):
    model = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "cannot be opened .*safetensors")


def test_weights_that_lack(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"], state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "lacks 2 weights of a LlamaForCausalLM, 'lm_head.weight' first")


def test_what_sees_ahead_is_no_causal_model(tmp_path):
    save(tmp_path, kind="BertLMHeadModel")
    refused(tmp_path, "is no causal language model: its tokens see those behind them")


def test_an_image_tower_is_no_language_model(tmp_path):
    save(tmp_path)
    transformers.ViTConfig().save_pretrained(tmp_path)
    refused(tmp_path, "cannot be opened")


def test_a_folder_and_a_name_that_are_not_there(tmp_path):
    refused(tmp_path, "cannot be opened")
    with pytest.raises(UserError, match="hf:nobody/nothing cannot be opened") as caught:
        open_language_model("hf:nobody/nothing")  # offline here: see conftest
    assert "\n" not in str(caught.value)
