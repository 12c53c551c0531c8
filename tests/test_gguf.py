"""The GGUF reader, on files of the `gguf` package: equal to its reader and to transformers', and no prey to damage."""

import random
import struct
import tracemalloc

import numpy as np
import pytest

from sovit import UserError
from sovit.vlm.gguf import TENSOR_TYPES, Gguf, llama_config, llama_state, undo_permutation

gguf = pytest.importorskip("gguf")
tiny_gguf = pytest.importorskip("tiny_gguf")  # needs tokenizers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_gguf.write(path)


def test_metadata_and_tensors_are_those_of_the_gguf_package(tiny):
    ours, theirs = Gguf(tiny[0]), gguf.GGUFReader(tiny[0])
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields and len(ours.metadata["tokenizer.ggml.tokens"]) == 266
    assert ours.tensors.keys() == {t.name for t in theirs.tensors}
    assert {t.tensor_type for t in theirs.tensors} == set(TENSOR_TYPES)  # every type that is read is in the file
    for t in theirs.tensors:
        assert np.array_equal(ours.read(t.name), gguf.dequantize(t.data, t.tensor_type)), t.name


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_coarse_type_is_within_half_a_step(tmp_path, kind):
    """Against the numbers before rounding: a block of 32 spans 15 steps of Q4_1, +-127 of Q8_0."""
    weights = tiny_gguf.write(tmp_path / "x.gguf", types={"ffn_": kind})
    blocks = weights["blk.0.ffn_up"].reshape(-1, 32)
    read = Gguf(tmp_path / "x.gguf").read("blk.0.ffn_up.weight").reshape(-1, 32)
    span = (blocks.max(1) - blocks.min(1)) / 15 if kind == "Q4_1" else np.abs(blocks).max(1) / 127
    assert (np.abs(read - blocks).max(1) <= 0.51 * span + 2e-3).all()
    assert not np.array_equal(read, blocks)


def test_the_permutation_is_undone():
    weight = np.random.default_rng(0).normal(size=(24, 5))
    for heads in (1, 2, 3, 6):
        assert np.array_equal(undo_permutation(tiny_gguf.permute(weight, heads), heads), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_is_the_one_that_transformers_makes_of_the_file(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch = pytest.importorskip("torch")
    weights = tiny_gguf.write(tmp_path / "tiny.gguf", tied=tied)
    options = {"gguf_file": "tiny.gguf", "quantization_config": transformers.GgufConfig(dequantize=True)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    file = Gguf(tmp_path / "tiny.gguf")
    state = {k: torch.from_numpy(v) for k, v in llama_state(file).items()}
    expected = theirs.state_dict()
    assert state.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(state[k], expected[k]) for k in state)
    ours = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(file)))
    assert set(ours.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    words = torch.arange(200).view(2, 100)
    assert torch.equal(ours.eval()(words).logits, theirs.eval()(words).logits)
    assert (
        np.abs(state["model.layers.1.self_attn.q_proj.weight"].numpy() - weights["blk.1.attn_q"]).max() < 1e-3
    )  # float16


# damage ----------------------------------------------------------------------------------------------------------------


def read_all(path):
    file = Gguf(path)
    llama_state(file)
    return file


def test_a_file_cut_anywhere_is_one_line(tiny, tmp_path):
    whole = tiny[0].read_bytes()
    cuts = [*range(0, 200, 7), *range(200, len(whole), 2999), len(whole) - 40]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            read_all(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value) and "cut.gguf" in str(caught.value)
    (tmp_path / "cut.gguf").write_bytes(whole)
    read_all(tmp_path / "cut.gguf")


def test_flipped_bits_are_read_or_refused_and_never_allocate(tiny, tmp_path):
    whole, draw = tiny[0].read_bytes(), random.Random(0)
    header = min(info.start for info in Gguf(tiny[0]).tensors.values())
    path, refused = tmp_path / "flipped.gguf", 0
    tracemalloc.start()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(header)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_all(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 5 < refused < 100  # most flips are in words of the vocabulary
    assert peak < 100 * len(whole)


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "keys"])
@pytest.mark.parametrize("count", [2**64 - 1, 2**60, 2**32])
def test_announced_counts_are_held_against_the_bytes(tiny, tmp_path, at, count):
    damaged = bytearray(tiny[0].read_bytes())
    damaged[at : at + 8] = struct.pack("<Q", count)
    (tmp_path / "x.gguf").write_bytes(damaged)
    with pytest.raises(UserError, match=f"ends before the {count} entries announced"):
        Gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot read"),
        (b"PK\3\4 and more", "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 is not 2 or 3, of little-endian"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 0), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<II", 4, 0), "not UTF-8"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 0)) * 2,
            "twice",
        ),
    ],
)
def test_what_is_no_gguf_file(tmp_path, content, reason):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        Gguf(tmp_path / "x.gguf")


def test_other_types_other_models_and_misfits_are_named(tmp_path):
    path = tmp_path / "x.gguf"
    tiny_gguf.write(path, types={"ffn_": "Q4_0"})
    with pytest.raises(UserError, match="ffn_down.weight' is Q4_0; the types read here are F32, F16, Q4_1, Q8_0"):
        read_all(path)
    tiny_gguf.write(path, architecture="qwen2")
    with pytest.raises(UserError, match="holds a 'qwen2'; only a 'llama'"):
        read_all(path)
    tiny_gguf.write(path, without=["blk.1.ffn_up"])
    with pytest.raises(UserError, match="'blk.1.ffn_up.weight' is not there"):
        read_all(path)
    tiny_gguf.write(path, extra=["blk.0.attn_q_norm"])
    with pytest.raises(UserError, match="holds 'blk.0.attn_q_norm.weight', for which a Llama has no place"):
        read_all(path)
