"""report.md says what was found and, as plainly, what was not."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import planted_ledger as planted
import pytest

from sovit import UserError
from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.law.exponents import Growth
from sovit.ledger.measurements import measurements
from sovit.report.build import choose_headline, fit_ledgers, held_out
from sovit.report.sections.data import rates
from sovit.report.sections.extrapolation import extrapolation_table
from sovit.report.sections.law import equation
from sovit.report.sections.limits import not_shown_section
from sovit.report.sections.phrases import few
from sovit.report.sections.summary import exponent_words
from sovit.spec.run import learning_rate
from sovit.spec.shape import Shape


def report_of(rows, folder, **options):
    options = dict(bootstrap=100, figures=False, refits=False) | options
    ledger = planted.write_ledger(folder / "planted.jsonl", rows)
    return Path(fit_ledgers([ledger], out=folder / "planted_law", **options)["report"]).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report_of(planted.planted_rows(), folder, refits=True)
    return folder / "planted_law"


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.md").read_text()


def part(text, title):
    """The section of that title."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text, first):
    """Rows of the table whose head begins with `first`."""
    lines = text.split(f"| {first} |")[1].splitlines()[2:]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines[: [*lines, ""].index("")]]


def test_every_section_is_there_and_nothing_is_unfilled(text):
    for title in (
        "What was found",
        "Extrapolation",
        "Recommendation",
        "How the best shape grows",
        "What is known, and what is not",
        "What it depends on",
        "The law",
        "How good the fit is",
        "Data",
        "What was not shown",
    ):
        assert f"\n## {title}\n" in text
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b|\{|\}", text)
    assert max(map(len, re.findall(r"\.\.|  \.| ,", text)), default=0) == 0


def test_the_numbers_are_the_fits_own(text, tmp_path):
    data = measurements([planted.write_ledger(tmp_path / "a.jsonl", planted.planted_rows())])
    fit = law.fit("bounded", data.columns, data.y, bootstrap=100, zero_line=data.zero_line)
    for name, value in fit.params.items():
        assert f"| `{name}` | {value!r}" in text
    assert "95 rows of 24 trunks and 18 shapes" in text
    assert "Seeds: 3 shapes with 3 and 15 shapes with 1." in text
    assert "one data order (data seed 0)" in text
    assert "peak learning rate 0.008 · (32 / width)^0.50 · (2 / depth)^0.00, from 0.004619 to 0.01131" in text
    assert f"({fit.noise.n} degrees of freedom between trunks, read from {fit.noise.num_rows} rows)" in text
    assert (fit.noise.n, fit.noise.num_rows) == (6, 36)
    assert f"{100 * fit.noise.sd:.2f} %" in text


def test_the_source_of_the_data_is_said(text, tmp_path):
    assert "procedural scenes of the stream" in text and "Nothing here shows" in text
    other = report_of([row | dict(data="icons") for row in planted.planted_rows(seeds=1)], tmp_path, bootstrap=0)
    assert "drawings (icons)" in other and "stream" not in other.split("## What was not shown")[1]
    assert "Fewer than 3 seeds" in other


def test_rows_that_do_not_say_their_data_are_said_not_to(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "data"} for row in planted.planted_rows(seeds=1)]
    text = report_of(rows, tmp_path, bootstrap=0)
    assert "The rows do not say what data they are of." in text and "None”" not in text


def test_a_long_list_ends_in_how_many_more():
    assert few(["a", "b"]) == "a and b" and few(list("abcdef")) == "a, b, c, d and 2 more"


def test_what_was_not_shown_is_true_of_other_rows_too(folder):
    data, fit = measurements([folder.parent / "planted.jsonl"]), fitted_law.read_law(folder / "law.json")
    row = data.rows[0]

    def said(fit=fit, **shape):
        times = shape.pop("times", 1)
        asked = SimpleNamespace(shape=SimpleNamespace(**(row | shape)), train_flops=row["train_flops"] * times)
        return not_shown_section(data, {fit.form: fit}, fit.form, asked)

    assert "was run at that budget" in said() and "never run" in said(depth=7)
    assert "was run, but not at that budget" in said(times=1e4)
    assert "decades more" in said()
    large = dataclasses.replace(fit, data=dataclasses.replace(fit.data, train_flops_range=[1e20, 1e24]))
    assert re.search(r"takes 3\S+: \d\.\d decades less", said(large))


def test_an_edge_is_said_in_words(tmp_path):
    # the best MLP dim lies above the largest one run
    arms = planted.ARMS | {"mlp_dim": (32, 64, 128)}
    text = report_of(planted.planted_rows(arms=arms, budgets=(3.2e11, 1e12, 3.2e12), noise=0.002), tmp_path)
    assert "**MLP dim is edge**: the optimum lies at or beyond the last value run" in text
    assert "extend that arm" in text and re.search(r"Not determined by these runs\*\*: [^.]*MLP dim", text)


def test_an_unidentified_dimension_gets_no_number(tmp_path):
    # the loss does not depend on depth, but for its FLOPs
    text = report_of(planted.planted_rows(amplitudes={"depth": (0.0, 1.0)}, noise=0.01), tmp_path)
    assert "depth is unidentified" in text and "| depth | not determined |" in text
    assert "law is not determined in depth" in text


def test_a_baseline_that_wins_is_said_to_win(tmp_path):
    # constant loss but for compute: every shape law can only lose against compute alone
    rows = planted.planted_rows(seeds=1)
    rng = np.random.default_rng(1)
    rows = [row | dict(val_loss=float(1 + 30 * row["compute"] ** -0.12 * np.exp(rng.normal(0, 0.002)))) for row in rows]
    text = report_of(rows, tmp_path, bootstrap=0)
    assert "A baseline extrapolates better than the law" in text


def test_a_law_that_misses_more_than_noise_says_so(tmp_path):
    text = report_of(planted.planted_rows(noise=0.001), tmp_path, form="joint", bootstrap=0)
    assert "**The law misses more than noise**" in text
    assert text.count("that region is narrower than what the law can resolve") == 1
    text = report_of(planted.planted_rows(), tmp_path, bootstrap=0)
    assert "misses more than noise" not in text


def test_cautions(tmp_path):
    rows = planted.planted_rows(seeds=1)
    rows[0] |= dict(peak_lr=0.5)
    rows[1] |= dict(val_loss=3.0, parametrisation="timm")
    rows[2] |= dict(batch_size=512)
    rows[3] |= dict(weight_decay=0.5)
    text = report_of(rows, tmp_path, bootstrap=0)
    assert text.split("## Data")[0].count("**Caution**") == 5
    assert "differ in batch_size (16 and 512)" in text and "differ in weight_decay" in text
    assert "several learning rates" in text and "mix parametrisations" in text and "above the zero line" in text


def test_rows_without_shapes_give_a_law_of_size_and_no_recommendation(tmp_path):
    rows = [
        {k: row[k] for k in ("run_id", "trunk_id", "status", "num_examples", "num_params", "forward_flops", "val_loss")}
        for row in planted.planted_rows(seeds=1)
    ]
    summary = fit_ledgers([planted.write_ledger(tmp_path / "a.jsonl", rows)], bootstrap=100, out=tmp_path)
    text = Path(summary["report"]).read_text()
    assert summary["form"] == "chinchilla" and summary["recommendation"] is None
    assert "No shape is recommended" in text and "`joint` was not fitted" in text
    assert "Not examined: the law has no shape dimension" in text
    assert summary["figures"] == ["extrapolation.png", "residuals.png"]


def test_rows_at_one_budget_have_a_report_that_says_what_it_cannot(tmp_path):
    path = planted.write_ledger(tmp_path / "a.jsonl", planted.planted_rows(budgets=(1e11,)))
    summary = fit_ledgers([path], form="joint", bootstrap=0, refits=False, out=tmp_path)
    text = Path(summary["report"]).read_text()
    assert "No extrapolation test was possible: the rows span a factor" in text
    assert "extrapolation.png" not in summary["figures"] and "Width: unidentified" in text


def test_a_form_that_cannot_be_solved_is_refused(tmp_path, monkeypatch):
    path, plain = planted.write_ledger(tmp_path / "a.jsonl", planted.planted_rows(seeds=1)), law.fit

    def broken(name, *args, **options):
        if name == "bounded":
            raise np.linalg.LinAlgError("SVD did not converge")
        return plain(name, *args, **options)

    monkeypatch.setattr(law, "fit", broken)
    summary = fit_ledgers([path], bootstrap=0, figures=False, refits=False, out=tmp_path)
    assert "SVD did not converge" in summary["refused"]["bounded"] and summary["form"] == "joint"
    with pytest.raises(UserError, match="form='bounded' cannot be fitted"):
        fit_ledgers([path], form="bounded", bootstrap=0, figures=False, out=tmp_path)


def test_rates_are_said_by_their_rule_their_range_or_to_be_the_same(tmp_path):
    rows = planted.planted_rows(seeds=1)

    def said(rows):
        return rates(measurements([planted.write_ledger(tmp_path / "a.jsonl", rows)]))

    def ruled(r):
        return learning_rate(Shape(r["width"], r["depth"], 64, head_dim=8), 0.01, 0.65, 0.75)

    assert "peak learning rate 0.01 · (32 / width)^0.65 · (2 / depth)^0.75, from" in said(
        [row | dict(peak_lr=ruled(row)) for row in rows]
    )
    assert "the same peak learning rate, 0.01, throughout" in said([row | dict(peak_lr=0.01) for row in rows])
    assert "from 0.01 to 0.02, by no power" in said(
        [row | dict(peak_lr=0.01 * (1 + (row["depth"] == 3))) for row in rows]
    )


def test_extrapolation_leads(text, folder):
    first = part(text, "What was found").strip().splitlines()[0]
    fit = fitted_law.Fit.from_json((folder / "law.json").read_text())
    scores = fit.extrapolation.scores
    assert first.startswith("- **Extrapolation**: fitted to the") and "It beats every baseline" in first
    for name in ("bounded", "chinchilla", "compute_only", "nearest"):
        assert f"{100 * scores[name].rmse:.2f} %" in first
    assert f"({scores['nearest'].rmse / scores['bounded'].rmse:.2g} ×)" in first
    titles = re.findall(r"\n## (.*)\n", text)
    assert titles[:3] == ["What was found", "Extrapolation", "Recommendation"] and len(titles) == 10
    cuts = json.loads((folder / "report.json").read_text())["cuts"]
    rows = table(part(text, "Extrapolation"), "fitted to, in training FLOPs")
    assert [row[:3] for row in rows] == [
        [f"up to {b}", str(c["n_fit"]), str(c["n"])] for b, c in zip(("1e11", "3.2e11"), cuts)
    ]
    assert rows[-1][3].startswith(f"{100 * scores['bounded'].rmse:.2f} %")


def test_what_it_depends_on_begins_with_the_conclusion(text, folder):
    found = json.loads((folder / "sensitivity.json").read_text())
    section = part(text, "What it depends on")
    for dim, label in (("width", "width"), ("depth", "depth"), ("mlp_dim", "MLP dim")):
        moved = found["dimensions"][dim]
        line = next(
            line for line in section.splitlines() if line.startswith(f"- **The {label} exponent** moves between")
        )
        low, high = (float(x) for x in re.findall(r"between ([\d.]+) and ([\d.]+);", line)[0])
        assert low <= moved["choices"]["smallest"] * 1.01 and high >= moved["choices"]["largest"] * 0.99
        assert f"its interval is {moved['low']:.3g} to {moved['high']:.3g}" in line and "largest mover is" in line
        assert ("nothing moves it out" in line) == (not moved["choices"]["outside"])
    assert section.index("exponent** moves") < section.index("| altered |")
    shown = table(section, "altered")
    assert shown[0][0] == "headline: `bounded`, all rows" and shown[0][-2] == "0.00 %"
    assert all(
        row["setting"] in section for row in found["alterations"] if row["what"] in ("window", "counting", "loss")
    )


def test_each_dimension_is_said_to_be_known_or_not(text, folder, tmp_path):
    facts = json.loads((folder / "report.json").read_text())
    section = part(text, "What is known, and what is not")
    for dim, label in (("width", "Width"), ("depth", "Depth"), ("mlp_dim", "MLP dim")):
        line = next(line for line in section.splitlines() if line.startswith(f"- **{label}** grows as compute^"))
        assert "{:.3g} to {:.3g}".format(*facts["inside"][dim]["at"]) in line and "Remedy" not in line
    assert f"(`{facts['weakest']['parameters'][0]}`)" in section and "moves the recommended width by" in section
    flat = report_of(planted.planted_rows(amplitudes={"depth": (0.0, 1.0)}, noise=0.01), tmp_path)
    flat = part(flat, "What is known, and what is not")
    assert "**Depth** is not determined" in flat and "Remedy: run larger budgets" in flat


def test_predict_names_the_metric(folder, capsys):
    from sovit.cli.main import main

    assert main(["predict", str(folder / "law.json"), "--train-flops", "3e12"]) == 0
    assert "predicted val_loss 1." in capsys.readouterr().out


def test_exponent_words():
    ends = dict(low=0.1, high=0.3, pairs_low=0.1, pairs_high=0.3)
    ok = Growth(estimate=0.2, kind="joint", compute_range=[1, 10], status="ok", note="", **ends)
    assert exponent_words("mlp_dim", ok) == "best MLP dim grows as compute^0.2 (0.1 to 0.3)"
    edge = dataclasses.replace(ok, status="edge", note="extend that arm")
    assert exponent_words("width", edge).endswith("edge: extend that arm")
    assert (
        exponent_words("depth", dataclasses.replace(ok, status="unidentified", estimate=None, note="flat"))
        == "depth: unidentified (flat)"
    )


def test_held_out_scores_are_those_of_the_fit(tmp_path):
    data = measurements([planted.write_ledger(tmp_path / "a.jsonl", planted.planted_rows())])
    fits = {
        name: law.fit(name, data.columns, data.y, **({"zero_line": data.zero_line} if name == "bounded" else {}))
        for name in ("joint", "bounded", "sovit", "chinchilla")
    }
    assert choose_headline(fits, None)[0] == "bounded" and choose_headline(fits, "joint")[0] == "joint"
    table = extrapolation_table(fits)
    scores = held_out(fits, "bounded", data)
    assert [s["label"] for s in scores] == ["bounded", "joint", "sovit", "chinchilla", "compute only"]
    for score in scores:
        own = table[score["label"].replace(" ", "_")]
        residual = np.log(score["predicted"] / score["measured"])
        assert score["rmse"] == own["rmse"] == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-9)
        assert score["bias"] == own["bias"] and len(residual) == own["n"]
    assert equation(fits["joint"]) == (
        "loss = A_width·width^-a_width + A_depth·depth^-a_depth + A_mlp_dim·mlp_dim^-a_mlp_dim + B·n^-c + eps"
    )
