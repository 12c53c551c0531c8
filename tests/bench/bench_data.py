"""How much faster are cached reads than decoding JPEG files in every epoch? Both in one run, by turns.

    python tests/bench/bench_data.py [--images 1200] [--repeats 5] [--json]

Baseline: torch's DataLoader over torchvision's ImageFolder with RandomResizedCrop, flip, ToTensor and Normalize, with 0
and with 2 workers. Ours: sovit's hub source on the same folder, crops and flips included, on one thread of this process.
Both give float32 batches [B, 3, S, S] on the CPU. The files are crops of real photographs at 500 x 375 and of about
90 kB (ImageNet's have 110 kB on average); files and cache are in memory for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import photographs
import torch
from torchvision import datasets, transforms

from sovit.data import open_data

torch.set_num_threads(1)
BATCH, MIN_AREA = 64, 0.05
CASES = {  # image size -> options of the preset: what is decoded once, at how many pixels
    64: ("crop=0.05", "crop=0.05&cache_size=256"),
    224: ("crop=0.05", "flip=1"),
}


def jpeg_loader(folder: Path, size: int, num_workers: int):
    view = transforms.Compose([
        transforms.RandomResizedCrop(size, (MIN_AREA, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip
    return torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), view), BATCH, shuffle=True, drop_last=True, num_workers=num_workers
    )


def rate_of_loader(loader, num_batches: int) -> float:
    """Images a second from the first batch on: starting the workers is not counted."""
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    for _ in range(num_batches):
        images, _ = next(batches)
        assert images.dtype == torch.float32
    return num_batches * BATCH / (time.perf_counter() - started)


def rate_of_source(source, first: int, num_batches: int) -> float:
    started = time.perf_counter()
    for i in range(first, first + num_batches):
        images = source.train(i * BATCH, BATCH).images
        assert images.dtype == torch.float32
    return num_batches * BATCH / (time.perf_counter() - started)


def measure(num_images: int, repeats: int) -> dict:
    """Images a second of each way at each size, a list over the repeats; the ratios are within a repeat."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        photographs.write_folder(folder, num_images, quality=97)
        mean_bytes = sum(f.stat().st_size for f in folder.rglob("*.jpg")) / num_images
        os.environ["SOVIT_CACHE"] = f"{scratch}/cache"
        num_batches = num_images // BATCH - 4  # an epoch of the loader, without what its workers did ahead
        for size, presets in CASES.items():
            loaders = {workers: jpeg_loader(folder, size, workers) for workers in (0, 2)}
            sources, decoding = {}, {}
            for preset in presets:
                started = time.perf_counter()
                sources[preset] = open_data("hub", f"{folder}?{preset}", size, 8, 0)
                decoding[preset] = num_images / (time.perf_counter() - started)
                sources[preset].train(0, BATCH)
            rates: dict = {key: [] for key in (*loaders, *sources)}
            for repeat in range(repeats):
                for workers, loader in loaders.items():
                    rates[workers].append(rate_of_loader(loader, num_batches))
                for preset, source in sources.items():
                    rates[preset].append(rate_of_source(source, repeat * num_batches, num_batches))
            for preset in presets:
                rows.append(
                    {
                        "image_size": size,
                        "preset": preset,
                        "cache_size": sources[preset]._images.shape[1],
                        "images_per_second": rates[preset],
                        "jpeg_0_workers": rates[0],
                        "jpeg_2_workers": rates[2],
                        "ratio_0_workers": [a / b for a, b in zip(rates[preset], rates[0], strict=True)],
                        "ratio_2_workers": [a / b for a, b in zip(rates[preset], rates[2], strict=True)],
                        "decoded_once_per_second": decoding[preset],
                    }
                )
    return {"num_images": num_images, "mean_bytes": mean_bytes, "batch_size": BATCH, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.images, options.repeats)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{result['num_images']} files of {result['mean_bytes'] / 1e3:.0f} kB, batch {BATCH}, {options.repeats} repeats"
    )
    print("images a second (median), and how many times the JPEG loader (least and median over the repeats)")
    print(f"{'size':>4} {'ours':26} {'cache':>5} {'ours':>7} {'jpeg 0w':>8} {'jpeg 2w':>8} {'x 0w':>12} {'x 2w':>12}")
    for row in result["rows"]:
        ours, none, two = (statistics.median(row[k]) for k in ("images_per_second", "jpeg_0_workers", "jpeg_2_workers"))
        ratios = [f"{min(row[k]):.1f} {statistics.median(row[k]):5.1f}" for k in ("ratio_0_workers", "ratio_2_workers")]
        print(
            f"{row['image_size']:4} {row['preset']:26} {row['cache_size']:5} {ours:7,.0f} {none:8,.0f} {two:8,.0f}"
            f" {ratios[0]:>12} {ratios[1]:>12}"
        )


if __name__ == "__main__":
    main()
