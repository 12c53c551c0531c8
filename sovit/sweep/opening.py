"""What a study trains on and is made of, opened before it is launched: bad input stops there, not in a worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sovit import UserError
from sovit.spec.run import Run
from sovit.spec.vlm_run import VlmRun
from sovit.sweep.queue import Sweep

if TYPE_CHECKING:
    from sovit.data import Source


def data_lines(sweep: Sweep, runs: Sequence[Run], device: str) -> list[str]:
    """Open the data that encoders are trained and probed on; say what is in it, and what knowing nothing scores there.

    Raises UserError where it cannot be opened, does not fit the shapes, or changed since a part of the study was trained.
    """
    from sovit.data import baselines, open_data
    from sovit.encoder.probe import check_same_data, open_probe
    from sovit.train.siglip import pair_baselines
    from sovit.train.trainer import check_readout

    sources, probes, lines = {}, set(), []
    for run in runs:
        shape = run.shape
        key = (run.data, run.preset, shape.image_size, shape.patch_size)
        if key not in sources:
            sources[key] = open_data(*key, 0, device)
            known = baselines if run.recipe.objective == "classification" else pair_baselines
            what = f"{run.data}:{run.preset} at {shape.image_size} px"
            same = (other.budgets[-1] for other in runs if (other.data, other.preset) == (run.data, run.preset))
            lines.append(f"{what}: {_contents(sources[key], max(same))}; {known(sources[key])}")
        for size in run.recipe.patch_sizes:
            other = (*key[:-1], size)
            if other not in sources:
                sources[other] = open_data(*other, 0, device)
        check_readout(run, sources[key].readout)
        if run.probe and (run.probe, shape.image_size, shape.patch_size) not in probes:
            probes.add((run.probe, shape.image_size, shape.patch_size))
            probe_data = open_probe(run.probe, shape.image_size, shape.patch_size, device)
            lines.append(f"probe: {probe_data}")
            check_same_data(sweep.in_ledger.values(), probe_data)
        for row in filter(None, sweep.rows(run)):
            if row.get("data_key", sources[key].content_key) != sources[key].content_key:
                raise UserError(
                    f"the data of {run.data}:{run.preset} changed since {row['run_id']} was trained;"
                    " give the study another --name and --runs"
                )
    return lines


def _contents(source: Source, num_examples: int) -> str:
    """Classes and images of a source; of one with an end, how often the longest run sees each image."""
    num_train = getattr(source, "num_train", None)
    epochs = f" ({num_examples / num_train:.3g} epochs of the longest run)" if num_train else ""
    train = f"{num_train:,}" if num_train else "endless"
    return f"{source.num_classes} classes, {train} training images{epochs}, {source.num_val:,} validation images"


def open_parts(runs: Sequence[VlmRun], runs_dir: Path, device: str) -> None:
    """Open what vision-language models are made of and asked: each thing once, and none of it is kept."""
    if not runs:
        return
    from sovit.encoder.open import load_encoder
    from sovit.vlm.language_model import open_language_model
    from sovit.vlm.projectors import PROJECTORS
    from sovit.vlm.questions.questions import open_questions

    asked: set[tuple] = set()
    for run in runs:
        place = (run.data, run.preset, run.image_size, run.families)
        if place not in asked:
            questions = open_questions(*place[:-1], run.data_seed, families=run.families)
            print(
                f"{run.data}:{run.preset} at {run.image_size} px: questions of {', '.join(questions.families)}",
                flush=True,
            )
            if run.num_val > questions.num_val:
                raise UserError(
                    f"num_val={run.num_val} of {run.trunk_id}: there are {questions.num_val} images to validate on"
                )
            asked.add(place)
        name = run.projector.partition("?")[0]
        if name not in PROJECTORS:
            raise UserError(f"projector={run.projector!r} is unknown; choose one of {', '.join(PROJECTORS)}")
    for name in dict.fromkeys(run.language_model for run in runs):
        words = open_language_model(name)
        print(f"{name}: {sum(p.numel() for p in words.model.parameters()):,} parameters", flush=True)
    for name in dict.fromkeys(run.encoder for run in runs if run.control != "blind"):
        # what this study trains is not there yet
        if name.partition(":")[0] in ("timm", "hf"):
            load_encoder(name, runs_dir, device)
