"""Causal language models by name, each with its tokenizer, frozen.

    open_language_model("smollm2")            SmolLM2-135M-Instruct (Apache-2.0); first: sovit assets fetch smollm2
    open_language_model("random:2x64")        a new Llama, depth x width: nothing is downloaded; "@3" = seed 3
    open_language_model("hf:NAME"), open_language_model("hf:FOLDER")   any causal model of transformers, safetensors only

An image needs one token that stands for it in the text, which no text means: a special token that lies idle is taken, or a
row of the embedding behind the last word, so that the embedding keeps its size and, where it is tied, its output layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sovit import UserError, reason
from sovit.data import assets
from sovit.vlm.smollm2_wheel import SHA256_FILE, SMOLLM2, smollm2_folder, state_sha256

# what random:DxW reads and writes as one token each, with the space before it: the words of sovit's own questions
FIRST_WORDS = "Read Name Which What How Are Is Answer Question"
WORDS = (
    "colour colours cell cells row column mark marks icon icons image order the of in is are has have only most more than"
    " there many frequent one two three four left right above below top bottom"
    " grey blue green cyan red magenta yellow white yes no 0 1 2 3 4 5 6 7 8 9 A B C D E F G H I J K L M N O P"
)
BYTES_CONTEXT = 2048  # positions of random:DxW
# special tokens that can stand for an image, the best first; patterns of whole tokens
IDLE_TOKENS = (
    r"<\|?image(_pad|_soft_token)?\|?>",
    r"<reponame>",
    r"<repo_name>|<empty_output>",
    r"<\|?reserved[_a-z]*\d+\|?>|<unused\d+>|\[unused\d+\]|<\|extra_\d+\|>",
)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode, its parameters frozen, and its tokenizer.

    `model` is a transformers *ForCausalLM, `tokenizer` one of transformers' (encode(text, add_special_tokens=False),
    decode(ids), apply_chat_template where the model has a template). `image_token_id` is an idle row of the
    embedding (text that spells it out is no image: put it in by its id). `context_length` in tokens. `sha256` is the
    identity of the weights, whatever the dtype they are held in.
    """

    name: str
    model: Any
    tokenizer: Any
    image_token_id: int
    eos_token_id: int
    pad_token_id: int
    context_length: int
    sha256: str


def open_language_model(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Open a language model by the names of this module's docstring. Raises UserError for what cannot be opened."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(f"{name} needs transformers; run: pip install 'sovit[vlm]'") from None
    kind, _, rest = name.partition(":")
    if name == SMOLLM2:
        folder = smollm2_folder()
        return _open_pretrained(name, str(folder), dtype, (folder / SHA256_FILE).read_text(encoding="utf-8").strip())
    if kind == "random":
        return _open_random(name, rest, dtype)
    if kind == "hf" and rest:
        return _open_pretrained(name, rest, dtype)
    raise UserError(
        f"language model {name!r} is of no known kind; give smollm2, random:DEPTHxWIDTH, hf:NAME or hf:FOLDER"
    )


# by folder or by name on the hub ---------------------------------------------------------------------------------------


def _open_pretrained(name: str, location: str, dtype: torch.dtype, sha256: str = "") -> LanguageModel:
    import transformers

    bars = transformers.utils.logging
    quiet = Path(location).is_dir() and bars.is_progress_bar_enabled()  # a download is shown, a short read is not
    what = ""
    try:
        if quiet:
            bars.disable_progress_bar()
        # said in so many words: left out, transformers asks on the terminal whether to run a repository's own code
        options: dict[str, Any] = {"trust_remote_code": False}
        factory: Any = transformers.AutoModelForCausalLM
        model, report = factory.from_pretrained(
            location, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        what = "the tokenizer of "
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
        sha256 = sha256 or _files_sha256(location)
    except Exception as error:  # transformers, tokenizers and the hub client raise a dozen unrelated kinds
        raise UserError(
            f"{what}{name} cannot be opened ({reason(error)}); check the name and the network, or give a folder with"
            " config.json, model.safetensors and tokenizer.json of a causal language model"
        ) from error
    finally:
        if quiet:
            bars.enable_progress_bar()
    if report["missing_keys"]:
        lacks = sorted(report["missing_keys"])
        raise UserError(
            f"{name} lacks {len(lacks)} weights of a {type(model).__name__}, {lacks[0]!r} first; give another"
        )
    return _language_model(name, model, tokenizer, sha256)


def _language_model(name: str, model: Any, tokenizer: Any, sha256: str) -> LanguageModel:
    """Checked as far as can be: the tokenizer against the embedding, and that no token sees what follows it."""
    model = model.eval().requires_grad_(False)
    config = model.config.get_text_config()
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    if not vocabulary or not tokenizer.encode("Yes", add_special_tokens=False):
        raise UserError(f"{name} has no tokenizer that reads 'Yes'; put its tokenizer.json beside the weights")
    if max(vocabulary.values()) >= rows:
        raise UserError(
            f"the tokenizer of {name} gives ids up to {max(vocabulary.values())}, its embedding has {rows} rows;"
            " the two belong to different models"
        )
    context_length = getattr(config, "max_position_embeddings", None)
    if not isinstance(context_length, int):
        raise UserError(f"the config of {name} names no max_position_embeddings; give a model that does")
    eos = tokenizer.eos_token_id
    if eos is None:
        ids = config.eos_token_id
        eos = ids[0] if isinstance(ids, (list, tuple)) and ids else ids
    if not isinstance(eos, int) or not 0 <= eos < rows:
        raise UserError(f"{name} has no token that ends an answer; set eos_token in its tokenizer_config.json")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    if _sees_ahead(model):
        raise UserError(f"{name} is no causal language model: its tokens see those behind them; give one that is")
    return LanguageModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        image_token_id=_idle_token(name, tokenizer, rows, {eos, pad}),
        eos_token_id=eos,
        pad_token_id=pad,
        context_length=context_length,
        sha256=sha256,
    )


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Whether the logits of a first token depend on the second; some classes named ...LMHead are encoders."""
    words = model.get_input_embeddings().weight
    texts = torch.stack((words[[0, 0]], words[[0, len(words) - 1]]))  # [2, 2, D]
    one, other = model(inputs_embeds=texts, use_cache=False).logits[:, 0].float()
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())


def _idle_token(name: str, tokenizer: Any, rows: int, taken: set[int]) -> int:
    """The id that stands for an image: a special token that lies idle, else a row behind the last word."""
    vocabulary = tokenizer.get_vocab()
    taken = taken | {i for i in (tokenizer.bos_token_id, tokenizer.unk_token_id) if i is not None}
    for pattern in IDLE_TOKENS:
        found = sorted(i for token, i in vocabulary.items() if re.fullmatch(pattern, token) and i not in taken)
        if found:
            return found[0]
    if max(vocabulary.values()) + 1 < rows:
        return max(vocabulary.values()) + 1
    raise UserError(
        f"{name} has no idle special token that could stand for an image; add one with"
        " tokenizer.add_special_tokens and model.resize_token_embeddings, save both to a folder, and give hf:FOLDER"
    )


def _files_sha256(location: str) -> str:
    """Of the weight file; of several, of their names and hashes."""
    from transformers.utils import cached_file

    whole = cached_file(location, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return assets.file_sha256(Path(whole))
    index = json.loads(Path(str(cached_file(location, "model.safetensors.index.json"))).read_text(encoding="utf-8"))
    parts = {part: assets.file_sha256(Path(str(cached_file(location, part)))) for part in index["weight_map"].values()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# new models ----------------------------------------------------------------------------------------------------------


def _open_random(name: str, rest: str, dtype: torch.dtype) -> LanguageModel:
    import transformers

    match = re.fullmatch(r"(\d{1,2})x(\d{1,4})(?:@(\d{1,9}))?", rest)
    depth, width, seed = (int(v or 0) for v in match.groups()) if match else (0, 0, 0)
    if depth < 1 or width < 16 or width % 16:
        raise UserError(f"{name!r} is no random:DEPTHxWIDTH[@SEED]; give 1 to 99 blocks and a width that 16 divides")
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
        max_position_embeddings=BYTES_CONTEXT,
        initializer_range=width**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.LlamaForCausalLM(config)
    sha256 = state_sha256({k: v.numpy() for k, v in model.state_dict().items()})
    return _language_model(name, model.to(dtype), tokenizer, sha256)


def byte_tokenizer() -> Any:
    """UTF-8 bytes, WORDS and their beginnings, and <|end|>, <|pad|>, <image>: every text is given back exactly."""
    import tokenizers
    import transformers

    space = "\u0120"  # what stands for it among the letters of bytes
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*FIRST_WORDS.split(), *(space + word for word in WORDS.split())]
    # a word grows from its left, letter by letter, so that every beginning of it is a token, and no two words compete
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = letters + [left + right for left, right in merges]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<|end|>", "<|pad|>", "<image>")])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
