"""What one trunk for several patch sizes costs against a trunk for each: paired seeds, at equal images and equal FLOPs.

A Flexi trunk draws the patch size of each batch (FlexiViT, 2212.08013), so that of k sizes each is seen in 1 / k of the
steps. The trunks of a single size are compared with it at each size in three ways, all read at the Flexi trunk's own FLOPs
x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.resolution.curves import FLEXI, METRICS, RULE, SAME_LEVEL, SCRATCH, Curve, Study, read_study, seed_noise
from analysis.resolution.report import difference_text
from sovit import UserError
from sovit.predict.paired_test import paired

WAYS = {
    "images": "equal images",
    "all": "equal FLOPs, a trunk for every size",
    "one": "equal FLOPs, one trunk of that size",
}


def images_of_single(way: str, flexi: Curve, singles: dict[int, Curve], size: int) -> float:
    """Images that the trunk of one size sees for each FLOP of the Flexi trunk.

    `all`: the FLOPs are shared among the trunks of all sizes so that each sees as many images.
    """
    if way == "images":
        return 1 / flexi.flops_per_image
    if way == "one":
        return 1 / singles[size].flops_per_image
    return 1 / sum(single.flops_per_image for single in singles.values())


def compare_sizes(
    flexi: dict[tuple, Curve], singles: dict[tuple, dict[int, Curve]], size: int, way: str, metric: str
) -> list[dict]:
    """Points {x, images, seeds, d, flexi, single, **paired} at Flexi FLOPs x, rising, within both; [] without overlap."""
    seeds = sorted(seed for seed in flexi if len(singles.get(seed, ())) and size in singles[seed])
    name = f"{metric}@p{size}"
    if not seeds or not all(np.all(flexi[s].metrics[name] > 0) for s in seeds):
        return []
    rate = {s: images_of_single(way, flexi[s], singles[s], size) for s in seeds}
    low = max(max(flexi[s].own_flops[0], singles[s][size].examples[0] / rate[s]) for s in seeds)
    high = min(min(flexi[s].own_flops[-1], singles[s][size].examples[-1] / rate[s]) for s in seeds)
    if low > high * (1 + 1e-9):
        return []
    low = min(low, high)
    at = [low, *(x for x in flexi[seeds[0]].own_flops if low < x < high), high]
    at = [x for i, x in enumerate(at) if i == len(at) - 1 or math.log(at[i + 1] / x) > SAME_LEVEL]
    out = []
    for x in at:
        ours = np.log([flexi[s].at("own_flops", x, name) for s in seeds])
        theirs = np.log([singles[s][size].at("examples", x * rate[s], metric) for s in seeds])
        means = [float(np.exp(side.mean())) for side in (ours, theirs)]
        images = float(x * rate[seeds[0]])
        named = dict(x=float(x), images=images, seeds=[s[0] for s in seeds], flexi=means[0], single=means[1])
        out.append(named | {"d": (ours - theirs).tolist()} | paired(ours - theirs))
    return out


def summarise_sizes(paths: Sequence[Path | str]) -> dict:
    """Every shape's Flexi trunks against its trunks of one size. Raises UserError where there is no such pair."""
    study = read_study(paths, several_sizes=True)
    found = []
    for (network, image_size), (flexi, singles) in _groups(study).items():
        if not flexi or not singles:
            continue
        sizes = sorted({int(k.partition("@p")[2]) for c in flexi.values() for k in c.metrics if "@p" in k})
        one, some = next(iter(flexi.values())), next(iter(singles.values()))
        found.append(
            {
                "shape": "x".join(map(str, network[:3])),
                "image_size": image_size,
                "patch_sizes": sizes,
                "flops_per_image": {"flexi": one.flops_per_image}
                | {str(p): c.flops_per_image for p, c in some.items()},
                "curves": _curves(flexi, singles, sizes),
                "comparisons": [
                    dict(patch_size=size, way=way, metric=metric, points=points)
                    for metric in METRICS
                    for size in sizes
                    for way in WAYS
                    if (points := compare_sizes(flexi, singles, size, way, metric))
                ],
            }
        )
    if not any(entry["comparisons"] for entry in found):
        raise UserError(
            f"{', '.join(study.paths)}: no trunk of several patch sizes meets trunks of one, in shape, seeds and budgets;"
            " run both"
        )
    return dict(ledgers=study.paths, rule=RULE, noise=seed_noise(study), left_out=study.left_out, shapes=found)


def _groups(study: Study) -> dict:
    """(network, image_size) -> ({seed: Flexi curve}, {seed: {patch_size: curve}})."""
    groups: dict = {}
    for c in study.curves:
        flexi, singles = groups.setdefault((c.arm.network, c.arm.image_size), ({}, {}))
        if c.arm.mode == FLEXI:
            flexi[c.seed] = c
        elif c.arm.mode == SCRATCH:
            singles.setdefault(c.seed, {})[c.arm.patch_size] = c
    return groups


def _curves(flexi: dict, singles: dict, sizes: list[int]) -> list[dict]:
    """Means over seeds: {patch_size, arm, flops, loss, sd} where all seeds have the same branches."""
    out = []
    for size in sizes:
        for arm, curves, name in (
            ("flexi", list(flexi.values()), f"val_loss@p{size}"),
            ("single", [by_size[size] for by_size in singles.values() if size in by_size], "val_loss"),
        ):
            if not curves:
                continue
            shared = sorted(set.intersection(*({float(n) for n in c.examples} for c in curves)))
            values = np.array([[c.metrics[name][c.examples == n][0] for n in shared] for c in curves])  # [S, k]
            flops = [float(curves[0].own_flops[curves[0].examples == n][0]) for n in shared]
            sd = values.std(0, ddof=1).tolist() if len(curves) > 1 else [0.0] * len(shared)
            loss = values.mean(0).tolist()
            out.append(dict(patch_size=size, arm=arm, flops=flops, loss=loss, sd=sd, n=len(curves)))
    return out


def sizes_table(found: dict, metric: str = "val_loss") -> str:
    """At each patch size, at the largest common budget of each way: the Flexi trunk against single ones, as markdown."""
    lines = [
        "| shape, px | patch | " + " | ".join(WAYS.values()) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for entry in found["shapes"]:
        for size in entry["patch_sizes"]:
            texts = []
            for way in WAYS:
                have = [
                    c for c in entry["comparisons"] if (c["patch_size"], c["way"], c["metric"]) == (size, way, metric)
                ]
                texts.append("no budget in common" if not have else _point_text(have[0]["points"][-1]))
            lines.append(f"| {entry['shape']}, {entry['image_size']} | {size} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _point_text(point: dict) -> str:
    return f"{point['flexi']:.4f} / {point['single']:.4f}: {difference_text(point)}, {point['verdict']}"


def sizes_text(found: dict) -> str:
    """The tables of loss and error, as markdown."""
    sd = found["noise"]["sd"]
    noise = "unknown (one seed)" if sd is None else f"{sd:.2%}"
    return (
        f"One trunk of several patch sizes / a trunk of one, at the largest common budget. Noise between seeds {noise}."
        f" {found['rule']}.\n\nLoss:\n\n{sizes_table(found)}\n\nError:\n\n{sizes_table(found, 'val_error')}\n"
    )
