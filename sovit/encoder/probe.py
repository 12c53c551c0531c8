"""Probe an encoder: features of a labelled source, and the few-shot error of a linear probe on them (see `few_shot`).

The representation is `Encoder.pooled`, as SoViT probes its pre-logits. Support sets are drawn from the first training
samples of the source, as training sees them; of icons, which are drawn with replacement, one may hold a drawing twice, under
other noise. The test images are its validation images. Both are opened at the encoder's own resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sovit import UserError
from sovit.data import NORMALISATION, Source, named_data, open_data
from sovit.data.cache import say, track
from sovit.encoder.few_shot import few_shot_errors, support_sets
from sovit.encoder.open import load_encoder
from sovit.encoder.tower import Encoder
from sovit.files import locked
from sovit.ledger.few_shot_columns import SHOTS, SUPPORT_SEEDS, about, columns, columns_of, is_probed
from sovit.ledger.ledger import read_ledger, update_ledger
from sovit.ledger.records import read_record, write_record
from sovit.ledger.schema import is_vlm
from sovit.tables import text_table

POOL = 65_536  # training samples that support sets are drawn from, at most; big_vision takes 65,000 of ImageNet
POOL_STEP = 4096  # the pool grows by so many until every class has enough for support sets that need not overlap
PROBE_SEED = 0x70726F62  # data_seed of the pool: none that a study trains with
BATCH = 256


@dataclass(frozen=True)
class ProbeData:
    """A source opened for probing at one resolution. Support sets index the samples that `support` lists."""

    name: str
    source: Source
    image_size: int
    support: np.ndarray  # [M] training samples in use, rising
    labels: np.ndarray  # [M]
    sets: list[np.ndarray]  # one for each seed: indices [C, shots] into `support`
    pool_size: int

    def __str__(self) -> str:
        said = (
            f"{self.name}: {self.source.num_classes} classes, {self.source.num_val:,} test images, support sets of the"
        )
        return f"{said} first {self.pool_size:,} training samples; a guess is wrong in {self.zero_line:.1%}"

    @property
    def zero_line(self) -> float:
        """Error of a guess."""
        return 1 - 1 / self.source.num_classes


def open_probe(name: str, image_size: int, patch_size: int, device: str = "cpu") -> ProbeData:
    """Open source `name` (SOURCE:PRESET) at `image_size` pixels and draw its support sets.

    Raises UserError for a source that cannot be opened or read in patches of `patch_size`, that has no single label an
    image, or too few examples of a class.
    """
    data, preset, _ = named_data(name)
    try:
        source = open_data(data, preset, image_size, patch_size, PROBE_SEED, device)
    except UserError as error:
        raise type(error)(f"{name} at {image_size} px, in patches of {patch_size}: {error}") from None
    if source.readout != "pooled":
        raise UserError(f"{name} has a label a patch; a probe needs one an image, such as icons:single40")
    most = min(POOL, getattr(source, "num_train", POOL))  # one epoch of a set of images
    enough = len(SUPPORT_SEEDS) * SHOTS[-1]
    labels = np.empty(0, np.int64)
    while len(labels) < most and (
        np.bincount(labels, minlength=source.num_classes).min() < enough
        or num_different(source, labels).min() < SHOTS[-1]
    ):
        batches = source_batches(source.train, len(labels), min(len(labels) + POOL_STEP, most))
        labels = np.concatenate([labels, *(batch.labels.cpu().numpy() for batch in batches)])
    different = num_different(source, labels)
    if different.min() < SHOTS[-1]:
        raise UserError(
            f"{name}: class {different.argmin()} has {different.min()} different examples among {len(labels)}, fewer than"
            f" {SHOTS[-1]} shots need; give data with more of it"
        )
    sets = [support_sets(labels, source.num_classes, seed) for seed in SUPPORT_SEEDS]
    support = np.unique(sets)
    indices = [np.searchsorted(support, chosen) for chosen in sets]
    return ProbeData(name, source, image_size, support, labels[support], indices, len(labels))


def num_different(source: Source, labels: np.ndarray) -> np.ndarray:
    """Different examples [C] of each class among the first samples, whose labels [n] are given: of icons, drawings."""
    if len(labels) and hasattr(source, "shown"):  # others repeat nothing within an epoch
        labels = labels[np.unique(source.shown(0, len(labels)), return_index=True)[1]]
    return np.bincount(labels, minlength=source.num_classes)


def source_batches(samples, start: int, stop: int) -> Iterator:
    for first in range(start, stop, BATCH):
        yield samples(first, min(BATCH, stop - first))


@torch.inference_mode()
def features(encoder: Encoder, data: ProbeData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled features of the support samples [M, D] and of the validation images [V, D], and the latter's labels [V]."""
    mean, std = NORMALISATION[named_data(data.name).data]

    def pooled(images: torch.Tensor) -> np.ndarray:
        # noise may stand a little outside of [0, 1]; it stays, so that a tower trained on the source sees what it knows
        return encoder.pooled(encoder.preprocess(images * std + mean)).float().cpu().numpy()

    support = []
    for start in np.unique(data.support // BATCH) * BATCH:
        rows = data.support[(data.support >= start) & (data.support < start + BATCH)] - start
        support.append(pooled(data.source.train(int(start), int(rows[-1]) + 1).images[torch.from_numpy(rows)]))
    test, labels = [], []
    for batch in source_batches(data.source.val, 0, data.source.num_val):
        test.append(pooled(batch.images))
        labels.append(batch.labels.cpu().numpy())
    return np.concatenate(support), np.concatenate(test), np.concatenate(labels)


def probe(encoder: Encoder, data: str | ProbeData = "icons:single40") -> dict[int, list[float]]:
    """Few-shot errors of an encoder: number of shots -> error with each support set.

    data: SOURCE:PRESET, opened at the encoder's resolution on its device, or as `open_probe` did. Raises UserError for data
    that cannot be probed on, and where the features are not finite.

    >>> errors = sovit.probe(sovit.load_encoder("2da54a192d-80"), data="hub:images")
    >>> sorted(errors)
    [1, 5, 10, 25]
    """
    if isinstance(data, str):
        device = next((p.device.type for p in encoder.module.parameters()), "cpu")
        data = open_probe(data, *sizes(encoder), device)
    support, test, test_labels = features(encoder, data)
    if not (np.isfinite(support).all() and np.isfinite(test).all()):
        raise UserError(f"{encoder.name} gives features that are not finite on {data.name}; it cannot be probed")
    return few_shot_errors(support, data.labels, data.sets, test, test_labels)


def compare(names: Sequence[str], data_name: str, runs_dir: Path | str = "runs", device: str = "cpu") -> dict:
    """Probe several encoders: {data, encoders: [{encoder, image_size, width, shots: {10: {error, sd, errors}}, ...}]}."""
    opened = functools.cache(functools.partial(open_probe, data_name, device=device))
    found = []
    for name in names:
        encoder = load_encoder(name, runs_dir, device)
        data = opened(*sizes(encoder))
        say(f"{name}, {data.image_size} px, on {data}")
        shots = {
            s: {"error": np.mean(e), "sd": np.std(e, ddof=1), "errors": e} for s, e in probe(encoder, data).items()
        }
        what = {
            "encoder": name,
            "image_size": data.image_size,
            "width": encoder.width,
            "num_params": encoder.num_params,
        }
        found.append(what | {"zero_line": data.zero_line, "shots": shots})
    return {"data": data_name, "encoders": found}


def comparison_text(result: dict) -> str:
    """What `compare` found as a table: mean error and s.d. over the support sets."""
    rows = [
        [e["encoder"], str(e["image_size"]), str(e["width"])]
        + [f"{shots['error']:.4f} ± {shots['sd']:.4f}" for shots in e["shots"].values()]
        for e in result["encoders"]
    ]
    names = ["encoder", "px", "features", *(f"{shots}-shot error" for shots in SHOTS)]
    about = f"± s.d. over {len(SUPPORT_SEEDS)} support sets, the same for all; a guess is wrong in"
    return f"{text_table(names, rows, left=names[:1])}\n{about} {result['encoders'][0]['zero_line']:.4f}"


def sizes(encoder: Encoder) -> tuple[int, int]:
    """Pixels a side of an encoder's image, and of the patches that a source of one label an image is opened with.

    Of such a source patches change nothing. So a patch that leaves the rest of the image unread, as 14 of 384 px, is
    named as the whole image.
    """
    size, patch = encoder.preprocess.image_size, encoder.preprocess.image_size // encoder.grid
    return size, size if size % patch else patch


# rows ----------------------------------------------------------------------------------------------------------------

Rows = Iterable[Mapping[str, Any]]


def probe_branches(rows: Sequence[dict], name: str, runs_dir: Path | str, device: str = "cpu") -> list[dict]:
    """The rows of trained branches with the columns of a probe on `name`, which are added to their records, too.

    Raises UserError for data that cannot be probed on.
    """
    todo = [row for row in rows if row["status"] == "ok" and not is_probed(row, name)]
    found = {row["run_id"]: row for row in probed(todo, name, runs_dir, device)}
    return [found.get(row["run_id"], row) for row in rows]


def probed(rows: Rows, name: str, runs_dir: Path | str, device: str, known: Rows = ()) -> Iterator[dict]:
    """Probe the branch of each row; yield the row with the columns, when its record has them.

    Raises UserError where one of the rows `known` was probed on other data of that name.
    """
    opened = functools.cache(functools.partial(open_probe, name, device=device))
    for row in rows:
        encoder = load_encoder(row["run_id"], runs_dir, device)
        data = opened(*sizes(encoder))
        check_same_data(known, data)
        found = columns(name, probe(encoder, data)) | dict(zip(about(name), (data.source.content_key, data.zero_line)))
        add_columns(runs_dir, row, found)
        yield dict(row) | found


def probe_ledger(ledger: Path, runs_dir: Path, name: str, device: str = "cpu") -> dict:
    """Probe every branch of a ledger that is `ok`, lacks the columns of `name` and has its weights in `runs_dir`.

    Each goes into its record and its row as soon as it is had: a kill loses none, and calling it again goes on. Returns
    what was done. Raises UserError where nothing can be done, and where other rows were probed on other data of that name.
    """
    rows = read_ledger(ledger)
    records = [read_record(runs_dir, row["trunk_id"], row["run_id"]) or {} for row in rows]
    # what a call that was killed had found
    rows = update_ledger(ledger, [row | columns_of(record, name) for row, record in zip(rows, records)])
    trained = [row for row in rows if row["status"] == "ok" and not is_vlm(row)]
    todo = [row for row in trained if not is_probed(row, name)]
    here = [row for row in todo if (runs_dir / row["trunk_id"] / f"{row['run_id']}.safetensors").exists()]
    if todo and not here and len(todo) == len(trained):
        raise UserError(f"none of the {len(todo)} branches to probe has its weights in {runs_dir}; name their --runs")
    for row in probed(track(here, f"probing {name}", len(here)), name, runs_dir, device, rows):
        update_ledger(ledger, [row])
    return {
        "ledger": str(ledger),
        "data": name,
        "probed": len(here),
        "probed_before": len(trained) - len(todo),
        "without_weights": len(todo) - len(here),
    }


def check_same_data(rows: Rows, data: ProbeData) -> None:
    """Raises UserError where one of `rows` of that resolution was probed on other samples under the same name."""
    key = data.source.content_key
    for row in rows:
        if row.get("image_size") == data.image_size and row.get(about(data.name)[0], key) != key:
            raise UserError(
                f"the data of {data.name} changed since {row['run_id']} was probed; take the columns of that probe out"
                " of its ledger and records"
            )


def add_columns(runs_dir: Path | str, row: Mapping[str, Any], found: dict) -> None:
    """Put columns into the record of a branch, if it has one; what it holds of another probe stays."""
    folder = Path(runs_dir) / row["trunk_id"]
    with locked(folder / "probe.lock"):
        record = read_record(runs_dir, row["trunk_id"], row["run_id"])
        if record is not None:
            write_record(Path(runs_dir), record | found)
