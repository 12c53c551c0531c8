"""The main job, small: a family of ViTs on the stream, a law, a prediction, its test, and an encoder that timm loads."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from sovit import UserError
from sovit.cli.common import Whole
from sovit.spec.design import star, to_runs
from sovit.spec.run import Recipe, Run, learning_rate
from sovit.spec.shape import Shape

CENTRE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
ARMS = {"width": (16, 24, 48, 64), "depth": (1, 3, 4), "mlp_dim": (32, 64, 256, 512)}
BUDGETS = (2e10, 5.6e10, 1.6e11)
SEEDS = {CENTRE: 3, CENTRE.replace(mlp_dim=256): 3}
NUM_CLASSES = 16
VALIDATION_FLOPS = 3.2e11
VALIDATION_SEEDS = [10, 11, 12]  # not among the seeds of the star


def recipe(shape: Shape) -> Recipe:
    return Recipe(peak_lr=learning_rate(shape))


def star_runs() -> list[Run]:
    runs = to_runs(star(CENTRE, ARMS), BUDGETS, NUM_CLASSES, recipe, SEEDS, study="demo_star")
    return sorted(runs, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


def demo(*, workers: Whole = 2, out: Path = Path("demo")) -> int:
    """Run the whole pipeline, small: study, law, prediction, validation, export. A second call goes on with a first.

    Args:
        workers: worker processes, one thread each
        out: folder for everything that it makes
    """
    from sovit.encoder.export import export_encoder
    from sovit.predict.validation import runs_of, verdict_text, write_prediction
    from sovit.report.build import fit_ledgers
    from sovit.report.validation import validation_report
    from sovit.sweep.queue import Sweep
    from sovit.sweep.study_main import run_sweep

    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    started = time.monotonic()

    def step(title: str) -> None:
        print(f"\n[{time.monotonic() - started:4.0f} s] {title}", file=sys.stderr, flush=True)

    step("1/5  a star of shapes at three budgets")
    star_sweep = Sweep("demo_star", star_runs(), out / "runs", out / "star.jsonl")
    new = {run_id for run in star_sweep.pending() for run_id in run.run_ids}
    rows = run_sweep(star_sweep, workers)
    step("2/5  the law")
    law_path = out / "law" / "law.json"
    summary = fit_ledgers([star_sweep.ledger], out=law_path.parent, train_flops=VALIDATION_FLOPS, bootstrap=400)
    step(f"3/5  the prediction for {VALIDATION_FLOPS:.2g} training FLOPs, written down")
    prediction = write_prediction(law_path, VALIDATION_FLOPS, VALIDATION_SEEDS, out / "prediction.json")
    step("4/5  the prediction tested: recommended shape and ViT-B proportions, three seeds each")
    runs = runs_of(prediction, "demo_validation")
    test_sweep = Sweep("demo_validation", runs, out / "runs", out / "validation.jsonl")
    new |= {run_id for run in test_sweep.pending() for run_id in run.run_ids}
    rows += run_sweep(test_sweep, workers)
    result = validation_report(prediction, rows, out / "validation")
    step("5/5  the encoder")
    encoder = export_encoder(runs[0].run_ids[-1], out / "runs", out / "encoder")
    wall = time.monotonic() - started

    print("\n" + "=" * 78)
    print(summary["text"])
    print("\npredicted against measured:\n" + verdict_text(result))
    print(f"\nreport   {summary['report']}\nverdict  {out / 'validation' / 'validation.json'}")
    print(f"encoder  {encoder['out']}    timm.create_model('local-dir:{encoder['out']}', pretrained=True)")
    if not new:
        print(f"\n{wall / 60:.1f} minutes: all was trained before")
        return 0
    trained = sum(row.get("spent_seconds") or 0 for row in rows if row["run_id"] in new)
    launcher = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\n{wall / 60:.1f} minutes with {workers} workers, {1 - trained / (wall * workers):.0%} of their time outside"
        f" training steps and data; memory {launcher:.1f} GiB in the launcher, {worker:.1f} GiB in the largest worker"
    )
    return int(bool(star_sweep.pending() or test_sweep.pending()))
