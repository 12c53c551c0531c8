"""The main job, small: a family of ViTs on the stream, a law, a prediction, its test, and an encoder that timm loads."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from sovit.design import star, to_runs
from sovit.run import Recipe, Run, learning_rate
from sovit.shape import Shape
from sovit.sweep import Sweep, run_sweep

CENTRE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
ARMS = {"width": (16, 24, 48, 64), "depth": (1, 3, 4), "mlp_dim": (32, 64, 256, 512)}
BUDGETS = (1.6e10, 4e10, 1e11)
SEEDS = {CENTRE: 3, CENTRE.replace(mlp_dim=256): 3}
NUM_CLASSES = 16
VALIDATION_FLOPS = 2.5e11
VALIDATION_SEEDS = [10, 11, 12]  # not among the seeds of the star


def recipe(shape: Shape) -> Recipe:
    return Recipe(peak_lr=learning_rate(shape))


def star_runs() -> list[Run]:
    runs = to_runs(star(CENTRE, ARMS), BUDGETS, NUM_CLASSES, recipe, SEEDS, study="demo_star")
    return sorted(runs, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


def demo(out: Path, workers: int) -> int:
    """Everything under `out`; a second call resumes what a first left undone. Returns the exit status."""
    from sovit.cli import recommendation_text
    from sovit.export import export_timm
    from sovit.predict import best_shape
    from sovit.report import fit_ledgers
    from sovit.validate import runs_of, validation_report, verdict_text, write_prediction

    started = time.monotonic()
    step = _Steps()
    step("1/5  a star of shapes at three budgets")
    ledger = out / "star.jsonl"
    rows = run_sweep(Sweep("demo_star", star_runs(), out / "runs", ledger), workers)
    step("2/5  the law")
    fit_ledgers([ledger], out=out / "law", train_flops=VALIDATION_FLOPS)
    law = json.loads((out / "law" / "law.json").read_text())
    step(f"3/5  the prediction for {VALIDATION_FLOPS:.2g} FLOPs, written down")
    from sovit.cli import read_law

    recommendation = best_shape(read_law(out / "law" / "law.json"), VALIDATION_FLOPS)
    prediction = write_prediction(out / "law" / "law.json", VALIDATION_FLOPS, VALIDATION_SEEDS, out / "prediction.json")
    step("4/5  the prediction tested: recommended shape and ViT-B proportions, three seeds each")
    runs = runs_of(prediction, NUM_CLASSES, recipe, study="demo_validation")
    tested = run_sweep(Sweep("demo_validation", runs, out / "runs", out / "validation.jsonl"), workers)
    result = validation_report(prediction, tested, out / "validation")
    step("5/5  the encoder")
    encoder = export_timm(runs[0].run_ids[-1], out / "runs", out / "encoder")
    wall = time.monotonic() - started

    trained = sum(row.get("spent_seconds") or 0 for row in rows + tested)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("\n" + "=" * 78)
    print(f"law ({law['form']}): best shape as compute grows, x* ~ compute^s, {law['level']:.0%} intervals")
    for name, e in law["exponents"].items():
        s = "s not determined" if e["estimate"] is None else f"s = {e['estimate']:.2f} ({e['low']:.2f} to {e['high']:.2f})"
        print(f"  {name:>8}: {s}" + (f"  [{e['status']}: {e['note']}]" if e["status"] != "ok" else ""))
    print(recommendation_text(recommendation))
    print(verdict_text(result))
    print(f"report   {out / 'law' / 'report.md'}\nverdict  {out / 'validation' / 'validation.json'}\nencoder  {encoder['out']}  timm.create_model('local-dir:{encoder['out']}', pretrained=True)")
    print(
        f"{wall / 60:.1f} minutes, {workers} workers; {1 - trained / (wall * workers):.0%} of worker time outside training"
        f" steps and data; at most {memory / 2**20:.1f} GiB in one worker and the launcher"
    )
    return int(any(row["status"] == "failed" for row in rows + tested))


class _Steps:
    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, title: str) -> None:
        print(f"\n[{time.monotonic() - self.started:4.0f} s] {title}", file=sys.stderr, flush=True)
