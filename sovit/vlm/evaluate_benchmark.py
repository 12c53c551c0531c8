"""A vision-language model on a public benchmark: its answers, kept line by line, and their score beside two controls.

    "image"     the question about its own image
    "blind"     the question alone: what the words give away
    "shuffled"  the question about the image of another one: what any image does to the answers

A model is anything with

    generate(images, prompts, max_new_tokens) -> list[str]
    score(images, prompts, answers) -> list[Tensor]     log-probabilities of each prompt's candidate answers

images [B, 3, S, S] in [0, 1], or None. By route "generate" an answer is what the model writes, by "likelihood" the likeliest
of the choices of an item: no format can be got wrong there, and only benchmarks with choices have it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sovit import UserError
from sovit.bootstrap import LEVEL, interval
from sovit.data.cache import content_key, say, track
from sovit.data.hub.decode import MAX_PIXELS
from sovit.encoder import Preprocess
from sovit.ledger import is_locked, locked, write_atomic
from sovit.vlm.benchmarks import Benchmark, Item

CONTROLS = ("image", "blind", "shuffled")
ROUTES = ("generate", "likelihood")
DRAWS = 1000  # of the bootstrap
SHUFFLE_KEY = 0x53485546464C45  # whose image a shuffled question is asked about


def compare(
    model: Any,
    items: Sequence[Item],
    benchmark: Benchmark,
    name: str,
    folder: Path,
    controls: Sequence[str] = CONTROLS,
    route: str = "generate",
    batch_size: int = 16,
) -> dict:
    """`scored` of the model's answers under some of CONTROLS, and in which files of `folder` they are kept.

    They stay there by benchmark, control, route and number of questions; the scores beside them, as JSON.
    """
    files = {c: folder / f"{benchmark.name}-{c}-{route}-{len(items)}.jsonl" for c in controls}
    answers = {c: evaluate(model, items, benchmark, c, route, batch_size, files[c], name=name) for c in controls}
    result = {"model": name, "route": route, **scored(benchmark, items, answers)}
    result["answers"] = {control: str(file) for control, file in files.items()}
    part = "" if tuple(controls) == CONTROLS else "-" + "-".join(controls)  # which must not replace the whole
    write_atomic(folder / f"{benchmark.name}{part}-{route}-{len(items)}.json", json.dumps(result, indent=1) + "\n")
    return result


def evaluate(
    model: Any,
    items: Sequence[Item],
    benchmark: Benchmark,
    control: str = "image",
    route: str = "generate",
    batch_size: int = 16,
    out: Path | str = "predictions.jsonl",
    *,
    name: str = "",
    preprocess: Preprocess | None = None,
) -> list[str]:
    """The model's answer to each item, in their order; answers that `out` holds already are taken from there.

    out: a JSON Lines file; its first line says whose answers to which items these are, and each answer is appended when
    it is known, so that a kill loses at most a batch and repeats none that was written. name: of the model, for that line.
    preprocess: how an image becomes the model's square; if not given that of model.encoder. A model without an encoder
    (model.encoder is None) sees nothing, and no image is read.
    Raises UserError for an unknown control or route, a benchmark without choices by likelihood, an image that cannot be
    read, and a file of other answers.
    """
    if control not in CONTROLS:
        raise UserError(f"control={control!r} is not known; choose of {', '.join(CONTROLS)}")
    if route not in ROUTES:
        raise UserError(f"route={route!r} is not known; choose of {', '.join(ROUTES)}")
    if route == "likelihood" and not all(item.choices for item in items):
        raise UserError(f"{benchmark.name} has open answers, whose likelihoods do not compare; take route 'generate'")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is no batch; give 1 or more")
    encoder = getattr(model, "encoder", None)
    preprocess = preprocess or (encoder and encoder.preprocess)
    shown = donors(items) if control == "shuffled" else list(range(len(items)))
    header = {
        "schema": 1,
        "model": name,
        "benchmark": benchmark.name,
        "control": control,
        "route": route,
        "limit": len(items),
        "items": content_key(asked=[[i.id, benchmark.prompt(i), list(i.choices), list(i.answers)] for i in items]),
    }
    out = Path(out)
    if is_locked(out):
        say(f"waiting for who writes {out} already")
    with locked(out), open(out, "r+b") as file:
        said = _kept(file, out, header)
        left = [i for i, item in enumerate(items) if item.id not in said]
        if said and left:
            say(f"{out}: {len(said):,} of {len(items):,} answers are there, going on")
        batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
        for batch in track(batches, f"{benchmark.name}, {control}", len(batches)) if batches else ():
            images = None
            if control != "blind":
                images = _images([items[shown[i]] for i in batch], preprocess)
            lines = _answers(model, images, [items[i] for i in batch], benchmark, route)
            for i, line in zip(batch, lines, strict=True):
                said[items[i].id] = line["said"]
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
    return [said[item.id] for item in items]


def _answers(model: Any, images: Tensor | None, items: list[Item], benchmark: Benchmark, route: str) -> list[dict]:
    prompts = [benchmark.prompt(item) for item in items]
    try:
        if route == "generate":
            texts = model.generate(images, prompts, benchmark.max_new_tokens)
            return [{"id": item.id, "said": text} for item, text in zip(items, texts, strict=True)]
        found = model.score(images, prompts, [list(item.choices) for item in items])
    except UserError as error:  # a prompt that does not fit into the context, above all
        raise UserError(f"{benchmark.name}, questions {items[0].id} to {items[-1].id}: {error}") from None
    lines = []
    for item, log_probs in zip(items, found, strict=True):
        if not bool(torch.isfinite(log_probs).all()):
            raise UserError(f"the model gives no number for the answers to {item.id}; its training may have diverged")
        best = int(log_probs.argmax())
        lines.append(
            {"id": item.id, "said": item.choices[best], "log_probs": [round(v, 6) for v in log_probs.tolist()]}
        )
    return lines


def _kept(file: Any, path: Path, header: dict) -> dict[str, str]:
    """Answers by item that a file holds, left ready to append to; what a kill left of a line is cut off.

    A new file gets its header. Raises UserError where the file's header is another one.
    """
    whole = file.read()
    whole = whole[: whole.rfind(b"\n") + 1]
    file.seek(len(whole))
    file.truncate()
    if not whole:
        file.write((json.dumps(header) + "\n").encode())
        file.flush()
        return {}
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        other = [f"{key}={first.get(key)!r}, not {value!r}" for key, value in header.items() if first.get(key) != value]
        if not other:
            return {line["id"]: line["said"] for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of answers ({error}); move it away") from None
    raise UserError(f"{path} holds other answers ({'; '.join(other)}); move it away")


def donors(items: Sequence[Item]) -> list[int]:
    """For each item, the item whose image it is asked about when images are shuffled: never one of its own image.

    Images go round one fixed random circle, each to the next one's questions. Raises UserError for fewer than two images.
    """
    first: dict[str, int] = {}
    for i, item in enumerate(items):
        first.setdefault(item.image_id, i)
    if len(first) < 2:
        raise UserError("the shuffled control needs two images at least; give more items, or leave it out")
    names = sorted(first)
    order = np.random.Generator(np.random.Philox(SHUFFLE_KEY)).permutation(len(names))
    circle = [names[i] for i in order]
    following = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [first[following[item.image_id]] for item in items]


# images --------------------------------------------------------------------------------------------------------------


def _images(items: list[Item], preprocess: Preprocess | None) -> Tensor:
    if preprocess is None:
        return torch.zeros(len(items), 3, 1, 1)
    return torch.stack([_shown(item, preprocess) for item in items])


def _shown(item: Item, preprocess: Preprocess) -> Tensor:
    try:
        return to_tensor(item.images[0].open(), preprocess)
    except UserError as error:
        raise UserError(f"question {item.id}: {error}") from None


def to_tensor(image: Any, preprocess: Preprocess) -> Tensor:
    """A Pillow RGB image of any shape -> [3, S, S] in [0, 1], made square as the tower was shown its images.

    squash: both sides resized; center: the short side, and the middle cut out. Both leave crop_pct of the resized side.
    Rounded to 8 bits and by the half pixel as torchvision does it, which timm's own transforms are made of. Raises
    UserError for an image so long that its resized form has no room.
    """
    from PIL import Image

    side = preprocess.image_size
    larger = math.floor(side / preprocess.crop_pct + 1e-6)  # pixels
    if preprocess.crop == "squash":
        width, height = larger, larger
    else:
        short = min(image.size)
        width, height = (larger if n == short else int(larger * n / short) for n in image.size)
    kind = Image.Resampling.BILINEAR if preprocess.resample == "bilinear" else Image.Resampling.BICUBIC
    if width * height > MAX_PIXELS:  # a strip of 1 x 10^6 pixels grows on the way
        raise UserError(
            f"an image of {image.width} x {image.height} pixels is too long to be resized to {side} pixels; crop it"
        )
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), kind).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


# scores --------------------------------------------------------------------------------------------------------------


def scored(benchmark: Benchmark, items: Sequence[Item], answers: dict[str, list[str]]) -> dict:
    """The scores of answers by control (some of CONTROLS, each as `evaluate` gives them), and what the image is worth.

    n, num_images, headline, chance; controls.<control>: unparsed (share of answers that cannot be read) and metrics, of
    each value, low, high: the 90 % bootstrap interval, drawn by image, so that the questions about one stay together
    (None where there is one image, no width where all answers are right, or all wrong: n says how little that tells);
    over.<control>: the headline number less that of a control, paired, likewise.
    """
    _, cluster = np.unique([item.image_id for item in items], return_inverse=True)
    scores = {
        control: [benchmark.score(text, item) for text, item in zip(said, items, strict=True)]
        for control, said in answers.items()
    }
    drawn: dict[str, dict[str, list]] = {control: {} for control in scores}
    for weights in track(image_weights(cluster), f"{benchmark.name}, intervals", math.ceil(DRAWS / num_drawn(cluster))):
        for control in scores:
            for name, numbers in benchmark.aggregate(scores[control], weights).items():
                drawn[control].setdefault(name, []).extend(np.atleast_1d(numbers))
    num_images = int(cluster.max()) + 1

    def told(value: Any, draws: list, least: float = 0.0) -> dict:
        low, high = spread(np.array(draws), num_images, least)
        return {"value": float(value), "low": low, "high": high}

    values = {control: benchmark.aggregate(of, None) for control, of in scores.items()}
    headline = benchmark.headline
    return {
        "benchmark": benchmark.name,
        "n": len(items),
        "num_images": num_images,
        "headline": headline,
        "chance": benchmark.chance,
        "level": LEVEL,
        "controls": {
            control: {
                "unparsed": 1 - float(np.mean([s["parsed"] for s in scores[control]])),
                "metrics": {name: told(value, drawn[control][name]) for name, value in values[control].items()},
            }
            for control in scores
        },
        "over": {
            control: told(
                values["image"][headline] - values[control][headline],
                list(np.subtract(drawn["image"][headline], drawn[control][headline])),
                least=-1.0,
            )
            for control in scores
            if control != "image" and "image" in scores
        },
    }


def image_weights(cluster: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Iterable[np.ndarray]:
    """How often each item counts in a bootstrap sample of whole images, in parts of [R, n]; cluster [n]: image numbers."""
    rng, num = np.random.default_rng(seed), int(cluster.max()) + 1
    part = num_drawn(cluster)
    for start in range(0, draws, part):
        size = min(part, draws - start)
        picked = rng.integers(0, num, (size, num)) + num * np.arange(size)[:, None]
        counts = np.bincount(picked.ravel(), minlength=size * num).reshape(size, num)
        yield counts.astype(np.float64)[:, cluster]


def num_drawn(cluster: np.ndarray) -> int:
    """Bootstrap samples at a time, R, so that memory stays within bounds: 214,354 questions of VQAv2 take 9."""
    return max(1, 2_000_000 // len(cluster))


def spread(draws: np.ndarray, num_images: int, least: float) -> tuple[float | None, float | None]:
    """The interval of draws between `least` and 1; left out are those (nan) that drew no question of a group."""
    draws = draws[~np.isnan(draws)]
    if num_images < 2 or not len(draws):
        return None, None
    low, high = interval(draws, math.sqrt(num_images / (num_images - 1)), floor=None)
    return max(low, least), min(high, 1.0)  # of few images it is stretched past what there is


def scores_text(result: dict) -> str:
    """The scores as a table, a column for each control."""
    controls = result["controls"]

    def cell(of: dict) -> str:
        if of["low"] is None:
            return f"{of['value']:.3f}"
        return f"{of['value']:.3f} ({of['low']:.3f} to {of['high']:.3f})"

    rows = [["", *controls]]
    for name in next(iter(controls.values()))["metrics"]:
        rows.append([name, *(cell(of["metrics"][name]) for of in controls.values())])
    rows.append(["unparsed", *(f"{of['unparsed']:.3f}" for of in controls.values())])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    guess = "" if result["chance"] is None else f"; guessing scores {result['chance']:.2f}"
    lines.insert(
        0,
        f"{result['benchmark']}: {result['n']:,} questions, {result['num_images']:,} images,"
        f" {result['level']:.0%} intervals by image{guess}",
    )
    for control, of in result["over"].items():
        lines.append(f"{result['headline']} over {control}: {cell(of)}")
    return "\n".join(lines)
