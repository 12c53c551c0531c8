"""The model card of an exported encoder: what it is, what it was trained on and for how much, how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sovit.data import NORMALISATION
from sovit.data.hub.images import seen_share
from sovit.data.icons import icons
from sovit.encoder.from_timm import Base
from sovit.encoder.resize import resize_method
from sovit.encoder.trained import base_of
from sovit.ledger.records import record_path, record_row
from sovit.spec.run import Run
from sovit.spec.shape import Shape


def card(run_id: str, run: Run, shape: Shape, runs_dir: Path | str, format: str) -> str:
    """README.md of an export of `run_id` at `shape`, which differs from the run's own where it was resized."""
    import jinja2

    chain = list(_descent(run_id, run, runs_dir))
    mean, std = NORMALISATION[run.data]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("sovit.encoder.export", ""), trim_blocks=True, keep_trailing_newline=True
    ).get_template("card.md.j2")
    return template.render(
        run_id=run_id,
        run=run,
        shape=shape,
        format=format,
        chain=chain,
        row=record_row(record_path(runs_dir, run.trunk_id, run_id)) or {},
        num_examples=int(run_id.rpartition("-")[2]),
        mean=mean,
        std=std,
        crop_pct=seen_share(run.preset) if run.data == "hub" else 1.0,
        resize_method=resize_method(run),
        licences=list(dict.fromkeys(_licence(tuned) for _, tuned, _ in chain)),
    )


def _descent(run_id: str, run: Run, runs_dir: Path | str) -> Iterator[tuple[str, Run, Base | None]]:
    """(run_id, run, its base or None) of a run, and of all that it was fine-tuned from."""
    while run.base:
        base = base_of(run, runs_dir)
        yield run_id, run, base
        if base.run is None:
            return
        run_id, run = base.name, base.run
    yield run_id, run, None


def _licence(run: Run) -> str:
    """The data of a run and whose it is."""
    name = f"`{run.data}:{run.preset}`"
    if run.data == "stream":
        return f"{name}, drawn by sovit's own program: no outside data, no licence attaches"
    if run.data != "icons":
        return f"{name}, under the data set's own licence, which is not recorded here"
    sets = icons.licences(run.preset, run.shape.image_size)
    told = [f"{licence}: {', '.join(names)}" for licence, names in sets.items()]
    by_set = "; ".join(told) if told else "set by set in ATTRIBUTION.tsv of sovit's cache, which is not on this machine"
    return f"{name}, drawings of the package @iconify/json, permissive sets alone ({by_set})"
