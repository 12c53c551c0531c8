"""Trained branches as models again: the weights of a run, and of what it was fine-tuned from.

The file of a fine-tuned branch holds what it does not share with its base; laid over the base's tensors it gives the
trained model back, bit by bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sovit import UserError, reason
from sovit.data import NORMALISATION
from sovit.data.hub.images import seen_share
from sovit.encoder.from_timm import Base, load_timm_base
from sovit.encoder.model import build
from sovit.encoder.weights import load_weights, weights_digest
from sovit.ledger.records import find_branch
from sovit.spec.run import Run


def load_branch(run_id: str, runs_dir: Path | str) -> tuple[Any, Run]:
    """Rebuild the trained model of one branch, task head and all, in eval mode. Raises UserError where it is not there."""
    model, run, _ = _load(run_id, runs_dir)
    return model, run


def _load(run_id: str, runs_dir: Path | str) -> tuple[Any, Run, Base | None]:
    """The trained model of one branch, its run, and what that was fine-tuned from, if it was."""
    run_id = find_branch(run_id, runs_dir)
    folder = Path(runs_dir) / run_id.rpartition("-")[0]
    path, config = folder / f"{run_id}.safetensors", folder / "config.json"

    def damaged(why: object) -> UserError:
        again = f"{folder / 'records' / run_id}.json and run python -m sovit.train {config} {runs_dir}"
        return UserError(f"the trained run {run_id} is damaged ({why}); to train it again, delete {again}")

    try:
        run = Run.from_dict(json.loads(config.read_text(encoding="utf-8")))
        weights, said = load_weights(path)
    except (OSError, ValueError) as error:
        raise damaged(reason(error)) from None
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("text.")}  # of no encoder
    base = None
    if run.base:
        try:
            base = base_of(run, runs_dir)
        except UserError as error:
            raise UserError(f"{run_id} is stored beside its base {run.base}: {error}") from None
        if said.get("base_sha256") != base.sha256:
            raise damaged(f"its base {run.base} holds other weights than it was trained from")
        weights = {**base.weights, **weights}
    model: Any = build(run.shape, weights["head.weight"].shape[0], mean_std=NORMALISATION[run.data])
    model.load_state_dict(weights)
    if run.data == "hub":
        model.pretrained_cfg["crop_pct"] = seen_share(run.preset)
    return model.eval(), run, base


def base_of(run: Run, runs_dir: Path | str) -> Base:
    """What `run.base` names. Raises UserError as `open_base`, and where its weights are not those that the run means."""
    base = open_base(run.base, runs_dir)
    if run.base_sha256 not in ("", base.sha256):
        raise UserError(f"the weights of {run.base} have changed since {run.trunk_id} began; fine-tune it anew")
    return base


def open_base(name: str, runs_dir: Path | str) -> Base:
    """A trained branch by its run_id, fine-tuned itself or not, or timm:NAME. Raises UserError where it is not there."""
    if name.startswith("timm:"):
        return load_timm_base(name)
    name = find_branch(name, runs_dir)
    model, before, earlier = _load(name, runs_dir)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    mean, std = ((value,) * 3 for value in NORMALISATION[before.data])
    num_examples = int(name.rpartition("-")[2])
    flops: int | None = before.train_flops(num_examples, weights["head.weight"].shape[0])
    if earlier:
        flops = None if earlier.train_flops is None or flops is None else flops + earlier.train_flops
    return Base(name, before.shape, weights, weights_digest(weights), mean, std, before, flops, num_examples)
