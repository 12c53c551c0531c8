"""A small Llama as a GGUF file, written by the `gguf` package in the way of llama.cpp's converter."""

import gguf
import numpy as np

WORDS = ["Ġt", "he", "Ġthe", "in", "re"]  # merged in this order: Ġ t, h e, Ġt he, i n, r e
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
WIDTH, MLP_DIM, HEADS, KV_HEADS, DEPTH = 64, 96, 4, 2, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
MATRIX_TYPES = {"attn": "F16", "ffn_": "Q4_1", "toke": "Q8_0"}  # by the first four letters; the rest is F32


def vocabulary():
    from tokenizers.pre_tokenizers import ByteLevel

    return SPECIAL + sorted(ByteLevel.alphabet()) + WORDS


def permute(weight, num_heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(path, architecture="llama", types=MATRIX_TYPES, tied=True, without=(), extra=()):
    """Write the file; return the weights before permutation and rounding, by llama.cpp's names."""
    words = vocabulary()
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(words), WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (len(words), WIDTH)
    for i in range(DEPTH):
        shapes |= {f"blk.{i}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH)}
        shapes |= {f"blk.{i}.{name}": (WIDTH * KV_HEADS // HEADS, WIDTH) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (MLP_DIM, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (WIDTH, MLP_DIM)}
    shapes |= {name: (WIDTH,) for name in extra}
    weights = {k: draw.normal(0.0, 0.3, v).astype(np.float32) for k, v in shapes.items() if k not in without}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_feed_forward_length(MLP_DIM)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if w in SPECIAL else 1 for w in words])
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "i n", "r e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        kind = types.get(name.split(".")[-1][:4], "F32") if weight.ndim == 2 else "F32"
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-1])
        stored = permute(weight, heads) if heads else weight
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
