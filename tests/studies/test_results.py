"""What is committed agrees with itself: ledgers with their laws, the README with the files."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from sovit import UserError
from sovit.law import fit as law
from sovit.law.fitted_law import Fit
from sovit.ledger.few_shot_columns import SHOTS, column, columns, columns_of
from sovit.ledger.ledger import merge, read_ledger
from sovit.ledger.measurements import measurements
from sovit.predict.recommend import best_shape
from sovit.report import figures as plot
from sovit.spec.run import Recipe, Run, learning_rate
from sovit.spec.shape import Shape
from sovit.spec.siglip_costs import NUM_WORDS, pair_flops, text_flops

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
PROFILES = RESULTS / "hardware.jsonl"  # of shapes on a machine, not of runs
EPISODES = [p for p in RESULTS.glob("*.jsonl") if '"run_id"' not in p.open().readline()]  # of simulated studies
LEDGERS = sorted(set(RESULTS.glob("*.jsonl")) - {PROFILES, *EPISODES})
LAWS = sorted(RESULTS.glob("*_law/law.json"))


def costs_of_an_image(row, shape):
    """Training FLOPs of one image, at each patch size that the trunk is trained at."""
    if row.get("base"):
        return [shape.step_flops(row["num_classes"], row["trained"])]
    if row["objective"] == "siglip":
        return [
            3 * (shape.forward_flops + pair_flops(shape.width, row["batch_size"]) + text_flops(NUM_WORDS[row["data"]]))
        ]
    sizes = row.get("patch_sizes") or [row["patch_size"]]
    return [shape.replace(patch_size=size).train_flops_per_image(row["num_classes"]) for size in sizes]


@pytest.mark.parametrize("path", LEDGERS, ids=lambda p: p.stem)
def test_ledger_is_sorted_free_of_repeats_and_counts_its_costs(path):
    rows = read_ledger(path)
    assert rows == merge(rows) == [json.loads(line) for line in path.read_text().splitlines()]
    for row in (row for row in rows if row.get("kind") != "vlm"):
        extra = {k: row[k] for k in ("num_registers", "qkv_bias", "layer_scale") if k in row}
        shape = Shape(
            **{k: row[k] for k in ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")},
            **extra,
        )
        assert row["num_params"] == shape.num_params and row["forward_flops"] == shape.forward_flops
        costs, steps = costs_of_an_image(row, shape), row["num_examples"] // row["batch_size"]
        whole, rest = (row["batch_size"] * n for n in divmod(steps, len(costs)))  # every size once, again and again
        assert whole * sum(costs) + rest * min(costs) <= row["train_flops"] <= whole * sum(costs) + rest * max(costs)
        assert row["run_id"] == f"{row['trunk_id']}-{row['num_examples']}" and row["study"] == path.stem
        if row["status"] == "ok":
            nothing = math.log(row["num_classes"]) if row["num_classes"] else row["zero_line"]
            assert 0 < row["val_loss"] < nothing * 1.5 and 0 <= row["val_error"] <= 1


@pytest.mark.parametrize("path", sorted(RESULTS.glob("vlm_*.jsonl")), ids=lambda p: p.stem)
def test_rows_of_vision_language_models_agree_with_themselves(path):
    """What nobody who does not look can know bounds the blind arm: letters of marks have an entropy of 2.767 nats."""
    rows = read_ledger(path)
    answers, encoders = [r for r in rows if r.get("kind") == "vlm"], {r["run_id"] for r in rows}
    assert {row["control"] for row in answers} == {"none", "random", "blind"}
    for row in answers:
        assert row["run_id"] == f"{row['trunk_id']}-{row['num_examples']}" and row["study"] == path.stem
        assert row["status"] == "ok" and row["train_flops"] > 0
        assert row["val_error_low"] <= row["val_error"] <= row["val_error_high"]
        assert row["control"] == "blind" or row["encoder"].rpartition(":")[2] in encoders
        if row["control"] == "blind":
            assert row["val_loss/marks"] > 16 / 17 * 2.7672 - 0.02  # the end behind 16 letters is sure
            assert row["val_loss"] == pytest.approx(row["shuffled_loss"], rel=1e-4)
        trained = row["projector_params"] + (
            row["language_model_params"] if row["language_model_mode"] == "full" else 0
        )
        assert row["trained_params"] == trained


def test_few_shot_errors_of_the_stream_star_agree_with_themselves():
    data = "icons:single40"
    for row in read_ledger(RESULTS / "stream_star.jsonl"):
        found = {shots: row[column(shots, data, "seeds")] for shots in SHOTS}
        assert columns(data, found) == {k: v for k, v in columns_of(row, data).items() if not k.startswith("probe_")}
        assert all(len(errors) == 3 and 0.8 < e < 1 for errors in found.values() for e in errors)
        assert row[f"probe_zero_line/{data}"] == 0.975


def test_a_metric_that_carries_no_law_names_no_shape():
    """The one-shot error of the stream star: the law's best width is at the end of the world, and it takes no ages there."""
    data = measurements([RESULTS / "stream_star.jsonl"], column(1, "icons:single40"))
    fitted = law.fit(
        "bounded",
        data.columns,
        data.y,
        zero_line=data.zero_line,
        extrapolate=False,
    )
    assert {name: e.status for name, e in fitted.exponents.items()} == {
        "width": "edge",
        "depth": "unidentified",
        "mlp_dim": "unidentified",
    }
    with pytest.raises(UserError, match="is below the cost of one image"):
        best_shape(fitted, 3e12)
    assert plot.isoflop(fitted, data) is None


def test_rows_of_the_stream_star_have_the_ids_of_its_study():
    spec = importlib.util.spec_from_file_location("stream_star", ROOT / "studies" / "stream_star.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    ids = {run_id for run in study.runs() for run_id in run.run_ids}
    assert ids == {row["run_id"] for row in read_ledger(RESULTS / "stream_star.jsonl")}


@pytest.mark.parametrize("path", LAWS, ids=lambda p: p.parent.name)
def test_law_is_refitted_from_its_ledger(path, tmp_path):
    """The point fit again, without the bootstraps: the same parameters to 1e-6."""
    from sovit.report.build import fit_ledgers

    committed = Fit.from_json(path.read_text())
    ledger = RESULTS / f"{path.parent.name.removesuffix('_law')}.jsonl"
    fit_ledgers([ledger], form=committed.form, out=tmp_path, bootstrap=0, figures=False, refits=False)
    again = Fit.from_json((tmp_path / "law.json").read_text())
    assert again.num_rows == committed.num_rows and again.num_clusters == committed.num_clusters
    for name, value in committed.params.items():
        if value is not None:
            assert again.params[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert again.objective == pytest.approx(committed.objective, rel=1e-6)


def test_default_learning_rate_is_the_measured_rule():
    measured = json.loads((RESULTS / "recipe.json").read_text())
    for width, depth in ((16, 2), (32, 1), (32, 6), (64, 4), (96, 2)):
        shape = Shape(width, depth, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
        exact = learning_rate(shape, measured["base"], measured["width_power"], measured["depth_power"])
        assert abs(np.log(learning_rate(shape) / exact)) < 0.1  # the defaults are that rule, rounded


def test_golden_ids():
    """A default, once used, never changes: these ids stand in committed ledgers."""
    shape = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
    run = Run(shape, Recipe(learning_rate(shape)), budgets=(7392,))
    assert run.run_ids == ("d1d4a0632f-7392",)


def test_an_isoflop_line_draws_what_it_can_and_determines_no_exponent(tmp_path):
    """Constant proportions move all dimensions together: the fit must say that it cannot tell them apart."""
    from sovit.report.build import fit_ledgers

    summary = fit_ledgers([RESULTS / "stream_isoflop.jsonl"], out=tmp_path, bootstrap=100)
    assert {e["status"] for e in summary["exponents"].values()} == {"unidentified"}
    assert "fit_by_dimension.png" not in summary["figures"] and "isoflop.png" in summary["figures"]


def test_the_rates_of_fine_tuning_are_the_best_of_their_study():
    """And none of them is the highest or the lowest that was tried."""
    from sovit.train.finetune_command import RATE

    rows = read_ledger(RESULTS / "finetune_rate.jsonl")
    (base,) = (row for row in rows if not row.get("base"))
    for part, rate in RATE.items():
        ours = sorted((r for r in rows if r.get("trained") == part), key=lambda r: r["peak_lr"])
        losses = [r["val_loss"] for r in ours]
        best = losses.index(min(losses))
        assert 0 < best < len(ours) - 1
        assert ours[best]["peak_lr"] / base["peak_lr"] == pytest.approx(rate, rel=0.01), part
