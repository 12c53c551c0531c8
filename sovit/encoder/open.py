"""Open a vision tower by its name.

load_encoder("3aa5591831-184320")          a trained branch, by its run_id, from runs/
load_encoder("random:3aa5591831-184320")   the same network as it was before training: the control
load_encoder("timm:vit_base_patch16_224"), load_encoder("timm:local-dir:FOLDER")
load_encoder("hf:google/siglip-base-patch16-224"), load_encoder("hf:FOLDER")
load_encoder("pixels:16")                  the pixels themselves: the baseline of any encoder
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sovit import UserError
from sovit.data import NORMALISATION
from sovit.encoder.from_timm import open_timm, timm_encoder
from sovit.encoder.from_transformers import transformers_encoder
from sovit.encoder.model import build
from sovit.encoder.tower import Encoder, Preprocess
from sovit.encoder.trained import load_branch


def load_encoder(name: str, runs_dir: Path | str = "runs", device: str = "cpu") -> Encoder:
    """Open a tower by the names of this module's docstring.

    `pooled` is, for sovit and timm, what the tower hands to its task head (MAP head, mean, class token), the mean of the
    normed patch tokens where nothing is pooled; for transformers SigLIP's MAP head, else the normed class token, else
    the mean of the normed patch tokens. Raises UserError for what cannot be opened.

    >>> sovit.load_encoder("2da54a192d-80").num_params  # a branch that was trained in runs/
    1280
    """
    kind, _, rest = name.partition(":")
    if kind == "hf":
        return transformers_encoder(name, rest, device)
    if kind == "pixels":
        return _pixels(name, rest)
    if kind == "timm":
        model = open_timm(rest)
    elif kind == "random":
        trained, run = load_branch(rest, runs_dir)  # for its number of classes, which moves the draw of all weights
        classes, mean_std = trained.num_classes, NORMALISATION[run.data]
        model = build(run.shape, classes, run.recipe.parametrisation, run.init_seed, mean_std)
    elif not rest:
        model, _ = load_branch(name, runs_dir)
    else:
        raise UserError(f"encoder {name!r} is of no known kind; give a run_id, random:RUN_ID, timm:NAME or hf:NAME")
    return timm_encoder(name, model.to(device))


def _pixels(name: str, side: str) -> Encoder:
    if not side.isdecimal() or not int(side):
        raise UserError(f"{name}: give the size of the image in pixels, such as pixels:16")
    preprocess = Preprocess(int(side), (0.0,) * 3, (1.0,) * 3)
    flat, nothing = (lambda images: images.flatten(1)), nn.Identity()
    return Encoder(name, nothing, 3 * int(side) ** 2, 0, 1, 0, preprocess, lambda images, block: images, nothing, flat)
