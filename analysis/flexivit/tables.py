"""What does one trunk for several patch sizes cost against a trunk for each?

    python -m analysis.flexivit.tables results/flexivit.jsonl [--out results] [--json]

A Flexi trunk draws the patch size of each batch (FlexiViT, 2212.08013), so that of k sizes each is seen in 1 / k of the
steps. Trunks of one size are compared with it at each size in three ways, by paired seeds, all read at the Flexi trunk's
own FLOPs x. Writes flexivit.json, and report.md into OUT/flexivit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.publish import Result, markdown, run, template
from analysis.resolution.comparisons import RULE, compare, seed_noise
from analysis.resolution.curves import FLEXI, METRICS, SCRATCH, Curve, read_study
from sovit import UserError

REPORT = template("flexivit/report.md.j2")
WAYS = {
    "images": "equal images",
    "all": "equal FLOPs, a trunk for every size",  # shared so that each sees as many images
    "one": "equal FLOPs, one trunk of that size",
}


def compare_sizes(
    flexi: dict[tuple, Curve], singles: dict[tuple, dict[int, Curve]], size: int, way: str, metric: str
) -> list[dict]:
    """Compare trunks at one patch size and Flexi FLOPs x, within what both have run.

    Returns points {x, images, seeds, d, flexi, single, **paired}, x rising; [] where they do not overlap.
    """
    name = f"{metric}@p{size}"
    priced, cost = {}, {}  # the single trunks as curves over the Flexi trunk's FLOPs
    for seed in sorted(flexi):
        if size not in singles.get(seed, ()):
            continue
        single = singles[seed][size]
        every = sum(other.flops_per_image for other in singles[seed].values())
        cost[seed] = {"images": flexi[seed].flops_per_image, "all": every, "one": single.flops_per_image}[way]
        metrics = {name: single.metrics[metric]}
        priced[seed] = dataclasses.replace(single, own_flops=single.examples * cost[seed], metrics=metrics)
    out = []
    for point in compare(flexi, priced, "own_flops", name):
        means = {"images": point["x"] / next(iter(cost.values()))}
        out.append(point | means | {"flexi": point.pop("ours"), "single": point.pop("theirs")})
    return out


def summarise_sizes(paths: Sequence[Path | str]) -> dict:
    """Compare every shape's Flexi trunks with its trunks of one size. Raises UserError where there is no such pair."""
    study = read_study(paths)
    groups: dict = {}  # network and image size -> ({seed: Flexi curve}, {seed: {patch_size: curve}})
    for c in study.curves:
        flexi, singles = groups.setdefault(c.arm.shape.replace(patch_size=1), ({}, {}))
        if c.arm.mode == FLEXI:
            flexi[c.seed] = c
        elif c.arm.mode == SCRATCH:
            singles.setdefault(c.seed, {})[c.arm.shape.patch_size] = c
    found = [_entry(*group) for group in groups.values() if all(group)]
    if not any(entry["comparisons"] for entry in found):
        raise UserError(
            f"{', '.join(study.paths)}: no trunk of several patch sizes meets trunks of one, in shape, seeds and budgets;"
            " run both"
        )
    about = {"ledgers": study.paths, "rule": RULE, "noise": seed_noise(study), "left_out": study.left_out}
    return about | {"shapes": found}


def _entry(flexi: dict, singles: dict) -> dict:
    one, some = next(iter(flexi.values())), next(iter(singles.values()))
    sizes = sorted({int(name.partition("@p")[2]) for c in flexi.values() for name in c.metrics if "@p" in name})
    per_image = {"flexi": one.flops_per_image} | {str(p): c.flops_per_image for p, c in some.items()}
    comparisons = [
        {"patch_size": size, "way": way, "metric": metric, "points": points}
        for metric in METRICS
        for size in sizes
        for way in WAYS
        if (points := compare_sizes(flexi, singles, size, way, metric))
    ]
    shape = {"shape": one.arm.shape.label, "image_size": one.arm.shape.image_size, "patch_sizes": sizes}
    return shape | {"flops_per_image": per_image, "comparisons": comparisons}


def sizes_table(found: dict, metric: str = "val_loss") -> str:
    """Tabulate the Flexi trunk against single ones at each patch size, at the largest common budget of each way."""
    at = {
        (entry["shape"], entry["image_size"], c["patch_size"], c["way"]): c["points"][-1]
        for entry in found["shapes"]
        for c in entry["comparisons"]
        if c["metric"] == metric
    }
    return REPORT.module.sizes_table(found["shapes"], WAYS, at).strip()


def analyse(options: argparse.Namespace) -> Result:
    found = summarise_sizes(options.ledgers)
    tables = {metric: sizes_table(found, metric) for metric in METRICS}
    return Result(found, markdown(REPORT, found=found, tables=tables), "flexivit.json", "flexivit/report.md")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ledgers", type=Path, nargs="*", default=[Path("results/flexivit.jsonl")], metavar="LEDGER")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
