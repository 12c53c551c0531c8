"""VlmRun -> one ledger row: a projector and a small language model, trained on a frozen encoder's tokens.

`python -m sovit.vlm.train VLMRUN.json [RUNS_DIR]` trains one; studies/vlm_thread.py trains an encoder beside its controls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sovit import UserError
from sovit.branches import load_branch
from sovit.checkpoint import Checkpoints, check_fits, save_weights
from sovit.data.stream import PRESETS, Stream
from sovit.encoder import open_encoder
from sovit.ledger import SCHEMA, is_locked, locked, provenance, read_record, write_atomic, write_record
from sovit.loop import Diverged, Interrupted, OutOfMemory, fit, schedule
from sovit.model import parameter_groups
from sovit.progress import progress_text, write_progress
from sovit.run import Recipe
from sovit.shape import DIMENSIONS, Shape
from sovit.stop import stop_on_signal, this_command
from sovit.train import SAVE_SECONDS, device_name, say
from sovit.vlm.data import FAMILIES, NO_LABEL, Questions, StreamQuestions
from sovit.vlm.model import VisionLanguageModel, small_language_model

VAL_IMAGES = 2048
VAL_BATCH = 64


@dataclass(frozen=True)
class VlmRun:
    """What is trained. `encoder` is a name of sovit.encoder, a trained run's, or "" for the blind model."""

    encoder: str
    recipe: Recipe
    num_examples: int  # images; each is asked every question
    preset: str = "cpu"  # of the stream
    layer: int = -1
    norm: bool = True
    lm_width: int = 64
    lm_depth: int = 2
    init_seed: int = 0
    data_seed: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            kind = {"encoder": str, "preset": str, "recipe": dict, "norm": bool}.get(name, int)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise UserError(f"{name}={value!r} must be of type {kind.__name__}")
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset!r} is unknown for the stream; choose one of {', '.join(PRESETS)}")
        if self.num_examples < 5 * self.recipe.batch_size or self.num_examples % self.recipe.batch_size:
            least = 5 * self.recipe.batch_size
            raise UserError(f"num_examples={self.num_examples} is no multiple of the batch, or under {least}")
        if self.lm_width < 16 or self.lm_width % 16 or self.lm_depth < 1:
            raise UserError(
                f"lm_width={self.lm_width}, lm_depth={self.lm_depth}: give a multiple of 16, and at least 1"
            )
        if self.recipe.schedule != "constant" or self.recipe.precision != "float32":
            raise UserError("a VLM run knows schedule='constant' and precision='float32' only")

    @property
    def control(self) -> str:
        """What the run is a control for: "blind", "random" (an encoder before training), or "none"."""
        return "blind" if not self.encoder else "random" if self.encoder.startswith("random:") else "none"

    @property
    def trunk_id(self) -> str:
        identity = {k: v for k, v in dataclasses.asdict(self).items() if k != "num_examples"}
        canonical = json.dumps({"vlm": identity}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:10]

    @property
    def run_id(self) -> str:
        return f"{self.trunk_id}-{self.num_examples}"

    @classmethod
    def from_dict(cls, d: dict) -> VlmRun:
        """Read what dataclasses.asdict wrote, or its JSON. Raises UserError for what is no VlmRun."""
        try:
            return cls(**{**d, "recipe": Recipe(**d["recipe"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"not a VLM run ({error}); give encoder, recipe, num_examples ...") from None


def train(
    run: VlmRun,
    runs_dir: Path | str = "runs",
    device: str = "cpu",
    on_progress: Callable[[dict], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    save_seconds: float = SAVE_SECONDS,
) -> dict:
    """Train `run` unless it has a record; return its row. Weights stand beside the record, the encoder's apart.

    Resumes from the last sound state that an earlier, killed, call has saved, to the same bits on a CPU. A loss that is
    not finite is recorded as `diverged`. Raises UserError where the encoder is not there or does not read the stream's
    images; Interrupted, its state saved, as soon as `should_stop()`.
    """
    runs_dir = Path(runs_dir)
    known = read_record(runs_dir, run.trunk_id, run.run_id)
    if known is not None:
        return known
    folder, recipe = runs_dir / run.trunk_id, run.recipe
    steps = run.num_examples // recipe.batch_size
    encoder = open_encoder(run.encoder, runs_dir, device) if run.encoder else None
    shape = load_branch(run.encoder.rpartition(":")[2], runs_dir)[1].shape if run.encoder else None
    sizes = (shape.image_size, shape.patch_size) if shape else (PRESETS[run.preset].image_size, 1)
    questions = StreamQuestions(Stream(PRESETS[run.preset], *sizes, run.data_seed, device))
    language_model = small_language_model(len(questions.words), run.lm_width, run.lm_depth, run.init_seed)
    model = VisionLanguageModel(encoder, language_model, run.layer, run.norm, run.init_seed).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=0.0, betas=(recipe.beta1, recipe.beta2), fused=True
    )
    warmup, cooldown = recipe.warmup_examples // recipe.batch_size, range(round((1 - recipe.cooldown) * steps), steps)
    trained_flops = forward_flops(model, questions.train(0, 1))  # of one image: projector and language model
    frozen_flops = encoder_flops_read(shape, run.layer) if shape else 0
    row = {
        "schema": SCHEMA,
        "run_id": run.run_id,
        "trunk_id": run.trunk_id,
        "study": "",
        "objective": "vlm",
        "control": run.control,
        **{k: v for k, v in dataclasses.asdict(run).items() if k != "recipe"},
        **{k: getattr(recipe, k) for k in ("batch_size", "peak_lr", "weight_decay")},
        "data": "stream",
        **({k: getattr(shape, k) for k in (*DIMENSIONS, "head_dim", "pool", "num_params")} if shape else {}),
        "lm_params": sum(p.numel() for p in model.parameters()),
        "forward_flops": frozen_flops + trained_flops,
        "train_flops": (frozen_flops + 3 * trained_flops) * steps * recipe.batch_size,
    }
    write_atomic(folder / "config.json", json.dumps(dataclasses.asdict(run), indent=2) + "\n")

    checkpoints = Checkpoints(folder, run.trunk_id, recipe.batch_size)
    # states are of a budget: all but the shortest runs would otherwise go on from another one's cooldown
    state = checkpoints.furthest(run.num_examples, 0, partial(check_fits, model=model, optimizer=optimizer))
    at: dict = {"step": 0, "seconds": 0.0, "window": None, "micro_batch": None}
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        at = {key: state[key] for key in at}
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save_latest({"trunk_id": run.trunk_id, "branch": run.num_examples, "spent": 0.0, **at, **states})
        saved_at = time.monotonic()

    def loss_fn(b: Questions) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = model(b.images, b.words).flatten(0, -2), b.labels.flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
        return loss, (labels != NO_LABEL).sum()

    def on_window(step: int, loss: float, seconds: float) -> None:
        rate = (step - at["step"]) * recipe.batch_size / seconds
        at.update(step=step, seconds=at["seconds"] + seconds, window=None)
        on_progress(
            {
                "trunk_id": run.trunk_id,
                "shape": run.control if run.control != "none" else "trained",
                "phase": "vlm",
                "examples": step * recipe.batch_size,
                "share": step / steps,
                "loss": loss,
                "images_per_second": rate,
                "flops_per_second": rate * (frozen_flops + 3 * trained_flops),
                "seconds_left": (steps - step) * recipe.batch_size / rate,
            }
        )
        if time.monotonic() - saved_at > save_seconds:
            save()

    try:
        fit(
            model.parameters(),
            optimizer,
            lambda step: questions.train(step * recipe.batch_size, recipe.batch_size),
            loss_fn,
            lambda step: recipe.peak_lr * schedule(step, warmup=warmup, timescale=None, cooldown=cooldown),
            range(at["step"], steps),
            clip_norm=recipe.clip_norm,
            on_window=on_window,
            should_stop=should_stop,
            window=at["window"],
            micro_batch=at["micro_batch"],
            on_split=lambda micro_batch: at.update(micro_batch=micro_batch),
        )
        save_weights(model, folder / f"{run.run_id}.safetensors", run.run_id)
        metrics = validate(model, questions)
        if not math.isfinite(metrics["val_loss"]):
            raise Diverged(steps)
        row |= {"status": "ok", **metrics}
    except Interrupted as stop:
        at.update(step=stop.step, seconds=at["seconds"] + stop.seconds, window=stop.window)
        save()
        raise
    except Diverged as error:
        row |= {"status": "diverged", "error": str(error), "val_loss": None, "val_error": None}
    row |= {"micro_batch": at["micro_batch"] or recipe.batch_size, "seconds": round(at["seconds"], 3)}
    row |= provenance(device_name(device))
    write_record(runs_dir, row)
    checkpoints.drop_latest()
    return row


@torch.no_grad()
def validate(model: VisionLanguageModel, questions: StreamQuestions) -> dict[str, float]:
    """Mean cross-entropy (nats) and error over the answer words of VAL_IMAGES images, in all and by family.

    Each word is judged given the right words before it (teacher forcing).
    """
    model.eval()
    losses, wrong = [], []
    for start in range(0, VAL_IMAGES, VAL_BATCH):
        b = questions.val(start, VAL_BATCH)
        logits = model(b.images, b.words).flatten(0, -2)  # [BQT, V]
        loss = F.cross_entropy(logits, b.labels.flatten(), ignore_index=NO_LABEL, reduction="none")
        losses.append(loss.view(b.labels.shape))
        wrong.append(logits.argmax(-1).view(b.labels.shape) != b.labels)
    model.train()
    loss, error = torch.cat(losses).double(), torch.cat(wrong).double()  # [I, Q, T]
    asked = (b.labels[0] != NO_LABEL).expand_as(loss)
    metrics = {"val_loss": loss[asked].mean().item(), "val_error": error[asked].mean().item()}
    for q, family in enumerate(FAMILIES):
        metrics[f"val_loss/{family}"] = loss[:, q][asked[:, q]].mean().item()
        metrics[f"val_error/{family}"] = error[:, q][asked[:, q]].mean().item()
    return metrics


def encoder_flops_read(shape: Shape, layer: int) -> int:
    """FLOPs of the encoder on one image up to block `layer`, behind which nothing of it is run."""
    return shape.replace(depth=layer % shape.depth + 1).forward_flops


def forward_flops(model: VisionLanguageModel, sample: Questions) -> int:
    """FLOPs that projector and language model spend on the questions of one image, counted by torch on `sample`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample.images, sample.words)
    counts = counter.get_flop_counts()
    whole = sum(counts["Global"].values())
    if model.encoder is None:
        return whole
    with torch.no_grad(), FlopCounterMode(display=False) as of_encoder:
        model.encoder.tokens(sample.images, model.layer, model.norm)
    return whole - sum(of_encoder.get_flop_counts()["Global"].values())


def main(argv: list[str] | None = None) -> int:
    """`python -m sovit.vlm.train VLMRUN.json [RUNS_DIR]`. Returns 0 done, 1 diverged, 2 bad input."""
    arguments = sys.argv[1:] if argv is None else argv
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m sovit.vlm.train VLMRUN.json [RUNS_DIR]", file=sys.stderr)
        return 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    live = sys.stderr.isatty()

    def show(progress: dict) -> None:
        write_progress(runs_dir, progress)
        if live:
            print("\r\033[K" + progress_text(progress), end="", file=sys.stderr, flush=True)

    try:
        try:
            run = VlmRun.from_dict(json.loads(Path(arguments[0]).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read the run {arguments[0]}: {error}") from None
        runs_dir = Path(arguments[1] if len(arguments) > 1 else "runs")
        lock = runs_dir / run.trunk_id / "lock"
        if is_locked(lock):
            say(f"waiting for who trains {run.trunk_id} already")
        with locked(lock), stop_on_signal() as should_stop:
            row = train(run, runs_dir, on_progress=show, should_stop=should_stop)
    except Interrupted as stop:
        say(f"{stop}, with the state in {runs_dir / run.trunk_id}; go on with: {this_command()}")
        return 130
    except KeyboardInterrupt:  # before it had begun
        return 130
    except OutOfMemory as error:
        say(str(error))
        return 1
    except UserError as error:
        say(str(error))
        return 2
    if live:
        print(file=sys.stderr)
    print(json.dumps({k: row[k] for k in ("run_id", "status", "control", "val_loss", "val_error")}))
    return 0 if row["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
