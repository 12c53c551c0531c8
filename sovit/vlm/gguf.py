"""A reader of GGUF files (github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3): metadata, and tensors as float32.

numpy and a memory map, and nothing of what is read is trusted: every length in the file is held against the bytes that
are there before anything is read or allocated, so that a damaged file is one line of text.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sovit import UserError

SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
MAX_DIMS = 4  # GGML_MAX_DIMS
# ggml's numbers of tensor types -> names, to say what cannot be read
TYPE_NAMES = {
    **{2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0"},
    **{35: "TQ2_0", 39: "MXFP4"},
}


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """Blocks of 20 bytes: scale d, minimum m (float16), 32 nibbles q, the low ones first; x = d q + m."""
    d, m = blocks[:, :4].view("<f2").astype(np.float32).T[:, :, None]
    q = blocks[:, 4:, None].transpose(0, 2, 1) >> np.array([0, 4], np.uint8)[:, None] & 15  # [n, 2, 16]
    return d * q.reshape(-1, 32).astype(np.float32) + m


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """Blocks of 34 bytes: scale d (float16), 32 signed bytes q; x = d q."""
    return blocks[:, :2].view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8).astype(np.float32)


# ggml's number -> (name, numbers a block, bytes a block, blocks [n, bytes] uint8 -> [n, numbers] float32)
TENSOR_TYPES: dict[int, tuple[str, int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: ("F32", 1, 4, lambda blocks: blocks.view("<f4")),
    1: ("F16", 1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
    3: ("Q4_1", 32, 20, _q4_1),
    8: ("Q8_0", 32, 34, _q8_0),
}


@dataclass(frozen=True)
class TensorInfo:
    """`shape` in numpy's order (GGUF's reversed); `start` in bytes from the beginning of the file."""

    shape: tuple[int, ...]
    type: int
    start: int


class Gguf:
    """An open GGUF file: `metadata` (numbers, strings, lists of them) and `tensors` (infos) by name.

    Raises UserError for a file that is no GGUF file, or cut short, or that contradicts itself.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise UserError(f"cannot read {self.path}: {error}") from None
        self._at = 0
        if bytes(self._take(4)) != b"GGUF":
            raise self._error("it does not begin with 'GGUF'")
        version = self._number("<u4")
        if version not in (2, 3):
            raise self._error(f"version {version} is not 2 or 3, of little-endian bytes")
        num_tensors, num_keys = self._count(24), self._count(13)  # the fewest bytes of one of each
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise self._error(f"the key {key!r} stands there twice")
            self.metadata[key] = self._value(self._number("<u4"))
        found = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in found:
                raise self._error(f"the tensor {name!r} stands there twice")
            num_dims = self._number("<u4")
            if num_dims > MAX_DIMS:
                raise self._error(f"the tensor {name!r} has {num_dims} dimensions")
            shape = tuple(self._number("<u8") for _ in range(num_dims))[::-1]
            found[name] = TensorInfo(shape, self._number("<u4"), self._number("<u8"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._error(f"general.alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        self.tensors = {name: TensorInfo(i.shape, i.type, data + i.start) for name, i in found.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as a new float32 array. Raises UserError where it is not there or of a type not read here."""
        if name not in self.tensors:
            raise self._error(f"the tensor {name!r} is not there")
        info = self.tensors[name]
        if info.type not in TENSOR_TYPES:
            kind = TYPE_NAMES.get(info.type, f"type {info.type}")
            known = ", ".join(t[0] for t in TENSOR_TYPES.values())
            raise UserError(f"{self.path}: the tensor {name!r} is {kind}; the types read here are {known}")
        kind, numbers, size, decode = TENSOR_TYPES[info.type]
        if not info.shape or info.shape[-1] % numbers:
            raise self._error(f"rows of {name!r} {info.shape} are no whole blocks of {numbers} {kind}")
        count = math.prod(info.shape) // numbers  # exact: Python's integers do not overflow
        if info.start + count * size > len(self._bytes):
            raise self._error(f"it ends within the tensor {name!r}")
        blocks = np.frombuffer(self._bytes, np.uint8, count * size, info.start).reshape(count, size)
        return np.array(decode(blocks), np.float32).reshape(info.shape)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind = self._number("<u4")
            if kind == STRING:
                return [self._string() for _ in range(self._count(8))]
            dtype = np.dtype(self._scalar(kind))  # an array of arrays, which the format allows, is in no model's file
            return np.frombuffer(self._take(self._count(dtype.itemsize) * dtype.itemsize), dtype).tolist()
        return self._number(self._scalar(kind))

    def _scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._error(f"a value of unknown type {kind} stands before byte {self._at}")
        return SCALARS[kind]

    def _string(self) -> str:
        try:
            return str(self._take(self._count(1)), "utf-8")
        except UnicodeDecodeError:
            raise self._error(f"the text before byte {self._at} is not UTF-8") from None

    def _count(self, size: int) -> int:
        """A number of things of at least `size` bytes each, which must fit into the rest of the file."""
        count = self._number("<u8")
        if count * size > len(self._bytes) - self._at:
            raise self._error(f"it ends before the {count} entries announced at byte {self._at - 8}")
        return count

    def _number(self, dtype: str) -> Any:
        return np.frombuffer(self._take(np.dtype(dtype).itemsize), dtype)[0].item()

    def _take(self, size: int) -> memoryview:
        if size > len(self._bytes) - self._at:
            raise self._error(f"it ends at byte {len(self._bytes)}")
        self._at += size
        return self._bytes[self._at - size : self._at]

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self.path} is no sound GGUF file: {reason}; fetch it again")


def undo_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a Llama's q or k projection, from GGUF's order (rotated pairs side by side) to transformers' (halves)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


# what stands in a block of llama.cpp's Llama -> what it is called by transformers, below model.layers.<i>
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(file: Gguf) -> dict[str, Any]:
    """Fields of transformers' LlamaConfig. Raises UserError for another architecture, and for what it has no field for."""
    have = file.metadata
    architecture = have.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file.path} holds a {architecture!r}; only a 'llama' is read here")
    odd = [k for k in have if k.startswith(("llama.rope.scaling", "llama.expert")) and have[k] not in (0, "none")]
    if odd:
        raise UserError(f"{file.path} has {odd[0]}, which is not read here; give another file")

    def number(key: str, kind: Any, default: Any = None) -> Any:
        value = have.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**31:
            raise UserError(f"{file.path}: llama.{key} is {value!r}, which is no {kind.__name__} above 0")
        return value

    width, heads = number("embedding_length", int), number("attention.head_count", int)
    head_dim = number("attention.key_length", int, width // heads)
    if number("rope.dimension_count", int, head_dim) != head_dim or head_dim % 2:
        raise UserError(f"{file.path} rotates a part of its {head_dim} head dimensions; give another file")
    return {
        "hidden_size": width,
        "num_hidden_layers": number("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": number("feed_forward_length", int),
        "max_position_embeddings": number("context_length", int),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base", float, 10000.0)},
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{name}_token_id": have.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }


def llama_state(file: Gguf) -> dict[str, np.ndarray]:
    """The weights of transformers' LlamaForCausalLM, float32. Raises UserError where one lacks, is too many, or misfits."""
    c = llama_config(file)
    width, mlp_dim, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    shapes = {
        **{"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, mlp_dim)},
        **{"attn_q": (heads * head_dim, width), "attn_k": (kv_heads * head_dim, width)},
        **{"attn_v": (kv_heads * head_dim, width), "attn_output": (width, heads * head_dim)},
        **{"ffn_gate": (mlp_dim, width), "ffn_up": (mlp_dim, width)},
    }
    wanted = {"token_embd": ("model.embed_tokens", (c["vocab_size"], width)), "output_norm": ("model.norm", (width,))}
    if not c["tie_word_embeddings"]:
        wanted["output"] = ("lm_head", (c["vocab_size"], width))
    if c["num_hidden_layers"] > len(file.tensors):
        raise UserError(
            f"{file.path} has {len(file.tensors)} tensors for {c['num_hidden_layers']} blocks; fetch it again"
        )
    for i in range(c["num_hidden_layers"]):
        wanted |= {f"blk.{i}.{ours}": (f"model.layers.{i}.{BLOCK[ours]}", shape) for ours, shape in shapes.items()}
    extra = file.tensors.keys() - {f"{name}.weight" for name in wanted}
    if extra:
        raise UserError(f"{file.path} holds {sorted(extra)[0]!r}, for which a Llama has no place; give another file")
    state = {}
    for name, (theirs, shape) in wanted.items():
        info = file.tensors.get(f"{name}.weight")
        if info is not None and info.shape != shape:
            raise UserError(f"{file.path}: {name}.weight is {info.shape} and not {shape}; fetch it again")
        weight = file.read(f"{name}.weight")
        if name.endswith("attn_q"):
            weight = undo_permutation(weight, heads)
        elif name.endswith("attn_k"):
            weight = undo_permutation(weight, kv_heads)
        state[f"{theirs}.weight"] = weight
    return state
