"""`sovit fit`: ledgers in, law.json, report and figures out; bad input in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import planted_ledger as planted
import pytest

from sovit import UserError
from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.ledger.measurements import levels, measurements
from sovit.report.build import fit_ledgers
from sovit.spec.shape import Shape

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return planted.planted_rows()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory, rows):
    return planted.write_ledger(tmp_path_factory.mktemp("ledger") / "planted.jsonl", rows)


@pytest.fixture(scope="module")
def summary(ledger):
    return fit_ledgers([ledger], bootstrap=100, out=ledger.with_name("planted_law"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# what is written ------------------------------------------------------------------------------------------------------


def test_law_json_holds_the_contract(summary):
    body = json.loads(Path(summary["law"]).read_text())
    assert {
        "form",
        "params",
        "level",
        "exponents",
        "noise",
        "num_rows",
        "num_clusters",
        "extrapolation",
        "diagnostics",
        "draws",
    } <= set(body)
    assert body["level"] == 0.9 and body["num_rows"] == 95 and body["num_clusters"] == 24
    for exponent in body["exponents"].values():
        assert {"estimate", "low", "high", "kind", "compute_range", "status"} <= set(exponent)
        assert exponent["low"] < exponent["estimate"] < exponent["high"]
    assert set(body["noise"]) == {"sd", "source", "n", "num_rows"} and body["noise"]["source"] == "seeds"


def test_the_form_that_was_planted_is_the_headline(summary):
    assert summary["form"] == "bounded" and summary["forms"] == ["joint", "bounded", "sovit", "chinchilla"]
    scores = summary["extrapolation"]
    assert scores["bounded"]["rmse"] < 0.02 < scores["joint"]["rmse"] < scores["compute_only"]["rmse"]
    assert "RMSE" in summary["why"]


def test_the_planted_exponents_and_optimum_are_found(summary):
    # K = sum A x^-a and D = B n^-c meet at an optimum that grows about as compute^(c / (a + c)) for each dimension's a
    e = summary["exponents"]
    assert e["mlp_dim"]["estimate"] > 1.5 * e["width"]["estimate"]
    shape = Shape(**summary["recommendation"]["shape"])
    budget = summary["recommendation"]["train_flops"]
    own = planted.planted_loss(shape, budget / shape.train_flops_per_image(16))
    best = min(
        planted.planted_loss(s, budget / s.train_flops_per_image(16))
        for w in range(16, 65, 8)
        for d in range(1, 6)
        for m in range(128, 769, 32)
        for s in [planted.CENTRE.replace(width=w, depth=d, mlp_dim=m)]
    )
    assert own / best - 1 < 0.01


def test_every_form_and_figure_is_there(summary):
    names = set(contents(summary["out"]))
    figures = {"fit_by_dimension", "isoflop", "optimal_shape", "residuals", "extrapolation", "sensitivity", "frontier"}
    assert names == (
        {"law.json", "report.md", "inputs.json", "sensitivity.json", "report.json"}
        | {f"forms/{f}.json" for f in ("joint", "sovit", "chinchilla")}
        | {f"{f}.{end}" for f in figures for end in ("png", "svg")}
    )
    for path in Path(summary["out"], "forms").iterdir():
        assert fitted_law.Fit.from_json(path.read_text()).form == path.stem


def test_figures_are_embedded_by_relative_path(summary):
    embedded = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", Path(summary["report"]).read_text())
    assert embedded == summary["figures"] and all(Path(summary["out"], name).exists() for name in embedded)


def test_a_rerun_writes_the_same_bytes_where_git_does_not_look(summary, ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit_ledgers([ledger], bootstrap=100)["out"] == "runs/results/planted_law"
    first, again = contents(summary["out"]), contents("runs/results/planted_law")
    assert [name for name in first if first[name] != again[name]] == []


def test_a_budget_and_a_form_can_be_asked_for(ledger, tmp_path):
    options = dict(train_flops=2e12, bootstrap=0, out=tmp_path, figures=False, refits=False)
    summary = fit_ledgers([ledger], form="joint", **options)
    assert summary["form"] == "joint" and summary["why"] == "it was asked for"
    assert summary["recommendation"]["train_flops"] == 2e12
    assert set(contents(tmp_path)) == {
        "law.json",
        "report.md",
        "report.json",
        "sensitivity.json",
        *(f"forms/{f}.json" for f in ("bounded", "sovit", "chinchilla")),
    }
    assert "bootstrap=0" in (tmp_path / "report.md").read_text()


# what is read ---------------------------------------------------------------------------------------------------------


def test_csv_gives_the_same_law_and_counts_what_it_lacks(rows, ledger, tmp_path):
    columns = [
        "run_id",
        "trunk_id",
        "status",
        "num_examples",
        "width",
        "depth",
        "mlp_dim",
        "patch_size",
        "image_size",
        "pool",
        "head_dim",
        "num_classes",
        "val_loss",
        "init_seed",
        "data_seed",
        "peak_lr",
    ]
    path = planted.write_csv(tmp_path / "planted.csv", rows, columns)
    ours, theirs = measurements([ledger]), measurements([path])
    for name in ("forward_flops", "num_params", "compute", "train_flops"):
        assert np.array_equal(ours.columns[name], theirs.columns[name]), name
    fits = [law.fit("joint", d.columns, d.y) for d in (ours, theirs)]
    assert fits[0].to_json() == fits[1].to_json()


def test_forward_flops_are_the_rows_own_where_given(rows, tmp_path):
    rows = [row | dict(forward_flops=2 * row["forward_flops"], compute=None, train_flops=None) for row in rows]
    data = measurements([planted.write_ledger(tmp_path / "a.jsonl", rows)])
    given = {row["run_id"]: row for row in rows}
    for row, forward, compute in zip(data.rows, data.columns["forward_flops"], data.columns["compute"]):
        assert forward == given[row["run_id"]]["forward_flops"] and compute == forward * row["num_examples"]


def test_rows_are_left_out_with_a_reason(rows, tmp_path):
    rows = [dict(row) for row in rows]
    rows[0] |= dict(status="diverged", val_loss=None)
    costs = ("num_params", "forward_flops", "head_flops", "compute", "train_flops", "spent_flops")
    rows[1] |= dict(status="failed", val_loss=None) | dict.fromkeys(costs)
    path = planted.write_ledger(tmp_path / "a.jsonl", rows)
    (tmp_path / "exclusions.csv").write_text(f"run_id,reason\n{rows[2]['run_id']},power cut\n")
    data = measurements([path])
    assert len(data.y) == len(rows) - 3 and data.statuses == {"ok": 93, "diverged": 1, "failed": 1}
    assert {reason for _, reason in data.left_out} == {"status diverged", "status failed", "excluded: power cut"}
    summary = fit_ledgers([path], bootstrap=0, figures=False, refits=False, out=tmp_path)
    text = Path(summary["report"]).read_text()
    assert "Left out: 3" in text and "power cut" in text and "1 diverged" in text


def test_several_ledgers_are_one(rows, ledger, tmp_path):
    halves = [planted.write_ledger(tmp_path / f"{i}.jsonl", rows[i::2]) for i in range(2)]
    assert np.array_equal(measurements(halves).y, measurements([ledger]).y)


def test_the_zero_line_is_the_rows_own(rows, tmp_path):
    path = planted.write_ledger(tmp_path / "a.jsonl", rows)
    assert measurements([path]).zero_line == np.log(16)
    path = planted.write_ledger(tmp_path / "b.jsonl", [row | dict(zero_line=2.767) for row in rows])
    assert measurements([path]).zero_line == 2.767
    assert measurements([path], "val_error").zero_line is None
    probed = [row | {"val_error_1shot/d": 0.9, "val_error_1shot_sd/d": 0.1, "probe_zero_line/d": 0.975} for row in rows]
    path = planted.write_ledger(tmp_path / "c.jsonl", probed)
    assert measurements([path], "val_error_1shot/d").zero_line == 0.975
    with pytest.raises(
        UserError, match="the rows have val_error, val_error_1shot/d, val_loss$"
    ):  # a spread is no metric
        measurements([path], "nothing")


def test_budgets_that_whole_batches_miss_are_one_level():
    group, centres = levels(np.array([1.001e11, 3.2e10, 0.999e11, 3.19e10]))
    assert group.tolist() == [1, 0, 1, 0] and centres == pytest.approx([3.195e10, 1e11], rel=1e-3)


def test_budgets_without_gaps_are_not_one_level():
    values = np.geomspace(1e10, 1e13, 2000)
    group, centres = levels(values[::-1])
    assert group[0] == len(centres) - 1 and (np.diff(group) <= 0).all() and len(centres) > 100
    for g in range(len(centres)):
        members = values[::-1][group == g]
        assert members.max() / members.min() < 1.031 and 0.999 * members.min() < centres[g] < 1.001 * members.max()


# bad input ------------------------------------------------------------------------------------------------------------


def bad_ledgers(rows):
    conflict = rows[:30] + [rows[0] | dict(val_loss=9.0)]
    yield "missing", None, "no ledger at"
    yield "empty", "", "is empty"
    yield "malformed", "{not json}\n", "is not JSON"
    yield "not_rows", '{"a": 1}\n', "lacks num_examples, val_loss"
    yield "conflicting", conflict, "disagree on val_loss"
    yield "too_few", rows[::12], "rows cannot determine"
    yield "one_shape", rows[:4], "needs at least two shapes"
    yield "presets", rows[:40] + [r | dict(preset="gpu") for r in rows[40:]], "mix preset"
    yield "data", rows[:40] + [r | dict(data="icons") for r in rows[40:]], "mix data"
    yield "diverged", [r | dict(status="diverged", val_loss=None) for r in rows], "none of the 95 rows is usable"
    yield "null", [rows[0] | dict(val_loss=None), *rows[1:]], "has val_loss=None"
    yield "negative", [rows[0] | dict(val_loss=-1.0), *rows[1:]], "needs a number above 0"
    yield "text", [rows[0] | dict(forward_flops="much"), *rows[1:]], "has forward_flops='much', which is not a number"
    yield (
        "width",
        [{k: v for k, v in r.items() if k not in ("forward_flops", "num_params")} | dict(image_size=17) for r in rows],
        "not a multiple",
    )


@pytest.mark.parametrize("name", [case[0] for case in bad_ledgers(planted.planted_rows(seeds=1))])
def test_bad_input_is_one_line_and_status_2(name, rows, tmp_path, capsys):
    from sovit.cli.main import main

    body, message = next((body, message) for n, body, message in bad_ledgers(rows) if n == name)
    path = tmp_path / "bad.jsonl"
    if isinstance(body, str):
        path.write_text(body)
    elif body is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in body))
    assert main(["fit", str(path), "--bootstrap", "0"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("sovit: ") and message in err
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    "option, message",
    [
        (["--metric", "val_los"], "no row has metric='val_los'"),
        (["--form", "spline"], "form='spline' is unknown"),
        (["--train-flops", "-1"], "not a positive number"),
        (["--bootstrap", "-1"], "bootstrap=-1 draws"),
        (["--bootstrap", "99"], "at least 100, or 0 for none"),
        (["--out", "/dev/null/x"], "cannot write"),
    ],
)
def test_bad_options_are_one_line_and_status_2(option, message, ledger, capsys):
    from sovit.cli.main import main

    assert main(["fit", str(ledger), "--bootstrap", "0", *option]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_the_script_is_the_command(ledger, tmp_path):
    code = (
        f"import sys, runpy; sys.argv = ['fit_laws.py', '{ledger}', '--bootstrap', '0', '--out', '{tmp_path}',"
        " '--json']\n"
        "try: runpy.run_path('analysis/fit_laws.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["form"] == "bounded"
    assert done.stderr.strip().endswith("False")  # no torch


def test_without_a_zero_line_the_power_mean_stands_in_for_the_bounded_law(tmp_path):
    rows = [row | dict(num_classes=None, zero_line=None) for row in planted.planted_rows(seeds=1)]
    ledger = planted.write_ledger(tmp_path / "foreign.jsonl", rows)
    found = fit_ledgers([ledger], out=tmp_path / "law", bootstrap=0, figures=False, refits=False)
    assert found["form"] == "power_mean" and "bounded" not in found["forms"]
