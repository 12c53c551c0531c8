"""report.md says what was found and, as plainly, what was not."""

import json
import re
from pathlib import Path

import numpy as np
import planted_ledger as planted
import pytest

from sovit import UserError
from sovit.law import fit as law
from sovit.law import fitted_law
from sovit.law.fit import choose_headline
from sovit.ledger.measurements import measurements
from sovit.report.build import fit_ledgers, report_text
from sovit.report.facts import equation, extrapolation_table, held_out, run_before
from sovit.report.text import few, listed, wider
from sovit.report.validation import validation_page
from sovit.spec.shape import DIMENSIONS, Shape

RESULTS = Path(__file__).parents[2] / "results"


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


def facts_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_every_section_is_there_and_nothing_is_unfilled(text):
    titles = ["Summary", "Data", "Law", "Extrapolation", "Recommendation", "Sensitivity", "Limits", "Appendix"]
    assert re.findall(r"\n## (.*)\n", text) == titles
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b|\{|\}|\n\n\n", text)
    assert not re.search(r"\.\.|  \.| ,", text)


def test_the_answer_stands_in_the_first_ten_lines(text, folder):
    head, law, r = text.splitlines()[:10], json.loads((folder / "law.json").read_text()), facts_of(folder)
    best, own = r["recommendation"], r["scores"]["bounded"]
    shape = f"width {best['shape']['width']}, depth {best['shape']['depth']}, MLP dim {best['shape']['mlp_dim']}"
    assert (
        shape in head[4] and f"{best['loss']:.4g} (90 %: {best['loss_low']:.4g} to {best['loss_high']:.4g}" in head[4]
    )
    for name, label in (("width", "width"), ("depth", "depth"), ("mlp_dim", "MLP dim")):
        assert f"best {label} grows as compute^{law['exponents'][name]['estimate']:.3g} (" in head[6]
    assert f"RMSE {100 * own['rmse']:.2f} %" in head[7]
    for name in ("chinchilla", "compute_only", "nearest"):
        rmse = r["scores"][name]["rmse"]
        assert f"{100 * rmse:.2f} % ({rmse / own['rmse']:.2g} ×)" in head[7]


def test_the_page_is_made_again_from_what_is_saved(text, folder):
    assert report_text(folder) == text


def test_the_numbers_are_the_fits_own(text, tmp_path):
    data = measurements([planted.write_ledger(tmp_path / "a.jsonl", planted.planted_rows())])
    fit = law.fit("bounded", data.columns, data.y, bootstrap=100, zero_line=data.zero_line)
    for name, value in fit.params.items():
        assert f"| `{name}` | {value!r}" in text
    assert "95 rows of 24 trunks and 18 shapes" in text
    assert "Seeds: 3 shapes with 3, 15 shapes with 1." in text
    assert "(data seed 0)" in text
    assert "Peak learning rates from 0.004619 to 0.01131" in text
    assert f"({fit.noise.n} degrees of freedom between trunks, {fit.noise.num_rows} rows)" in text
    assert (fit.noise.n, fit.noise.num_rows) == (6, 36)
    assert f"Noise s.d.: {100 * fit.noise.sd:.2f} %" in text
    growth = table(part(text, "Appendix"), "dimension")
    for row, e in zip(growth, fit.exponents.values()):
        assert row[1:] == [
            f"{e.estimate:.4g}",
            f"{e.low:.4g} to {e.high:.4g}",
            f"{e.pairs_low:.4g} to {e.pairs_high:.4g}",
            "ok",
        ]


def test_the_source_of_the_data_is_said(text, tmp_path):
    assert "scenes of the stream" in part(text, "Limits")
    other = report_of([row | dict(data="icons") for row in planted.planted_rows(seeds=1)], tmp_path, bootstrap=0)
    assert "drawings (icons)" in other and "stream" not in part(other, "Limits")
    assert "Fewer than 3 seeds" in other


def test_rows_that_do_not_say_their_data_are_said_not_to(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "data"} for row in planted.planted_rows(seeds=1)]
    text = report_of(rows, tmp_path, bootstrap=0)
    assert "The rows do not say what data they are of." in text and "None”" not in text


def test_lists_in_words():
    assert few(["a", "b"]) == "a and b" and few(list("abcdef")) == "a, b, c, d and 2 more"
    assert [listed("abc"), listed("a"), listed("")] == ["a, b and c", "a", ""]


def test_the_wider_interval_is_quoted_where_the_two_disagree():
    e = dict(low=0.1, high=0.2, pairs_low=0.1, pairs_high=0.25)
    assert wider(e) == "0.1 to 0.2, parametric bootstrap"
    assert wider(e | dict(pairs_high=0.4)) == "0.1 to 0.4, cluster bootstrap"
    assert wider(dict.fromkeys(e)) == "no interval"


def test_whether_the_shape_was_run_is_true_of_other_rows_too(folder):
    data = measurements([folder.parent / "planted.jsonl"])
    shape, flops = Shape(**{n: data.rows[0][n] for n in (*DIMENSIONS, "head_dim")}), data.rows[0]["train_flops"]
    assert run_before(data, shape, flops) == "at this budget"
    assert run_before(data, shape, 1e4 * flops) == "at other budgets"
    assert run_before(data, shape.replace(depth=7), flops) == "never"


def test_an_edge_is_said_in_words(tmp_path):
    # the best MLP dim lies above the largest one run
    arms = planted.ARMS | {"mlp_dim": (32, 64, 128)}
    text = report_of(planted.planted_rows(arms=arms, budgets=(3.2e11, 1e12, 3.2e12), noise=0.002), tmp_path)
    assert "**MLP dim is edge**" in text and "extend that arm" in text
    assert re.search(r"Warning\*\*: these runs do not determine [^.]*MLP dim", text)


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
    assert "**Warning**: a baseline extrapolates better than the law: compute only" in text


def test_a_law_that_misses_more_than_noise_says_so(tmp_path):
    text = report_of(planted.planted_rows(noise=0.001), tmp_path, form="joint", bootstrap=0)
    assert "times the seed noise, so the form is misspecified" in text
    text = report_of(planted.planted_rows(), tmp_path, bootstrap=0)
    assert "misspecified" not in text


def test_cautions(tmp_path):
    rows = planted.planted_rows(seeds=1)
    rows[0] |= dict(peak_lr=0.5)
    rows[1] |= dict(val_loss=3.0, parametrisation="timm")
    rows[2] |= dict(batch_size=512)
    rows[3] |= dict(weight_decay=0.5)
    text = part(report_of(rows, tmp_path, bootstrap=0), "Summary")
    assert text.count("**Caution**") == 5
    assert "differ in batch_size (16 and 512)" in text and "differ in weight_decay" in text
    assert "several learning rates" in text and "differ in parametrisation" in text and "above the chance loss" in text


def test_rows_without_shapes_give_a_law_of_size_and_no_recommendation(tmp_path):
    rows = [
        {k: row[k] for k in ("run_id", "trunk_id", "status", "num_examples", "num_params", "forward_flops", "val_loss")}
        for row in planted.planted_rows(seeds=1)
    ]
    summary = fit_ledgers([planted.write_ledger(tmp_path / "a.jsonl", rows)], bootstrap=100, out=tmp_path)
    text = Path(summary["report"]).read_text()
    assert summary["form"] == "chinchilla" and summary["recommendation"] is None
    assert "No shape is recommended" in text and "`joint` was not fitted" in text
    assert "Not examined: The law has no shape dimension" in text
    assert summary["figures"] == ["residuals.png", "extrapolation.png"]


def test_rows_at_one_budget_have_a_report_that_says_what_it_cannot(tmp_path):
    path = planted.write_ledger(tmp_path / "a.jsonl", planted.planted_rows(budgets=(1e11,)))
    summary = fit_ledgers([path], form="joint", bootstrap=0, refits=False, out=tmp_path)
    text = Path(summary["report"]).read_text()
    assert "No extrapolation test was possible: The rows span a factor" in text
    assert "extrapolation.png" not in summary["figures"] and "width is not determined" in text


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


def test_one_rate_for_all_is_said(tmp_path):
    rows = [row | dict(peak_lr=0.01) for row in planted.planted_rows(seeds=1)]
    assert "The same peak learning rate, 0.01" in report_of(rows, tmp_path, bootstrap=0)


def test_every_cut_is_in_the_table(text, folder):
    cuts = facts_of(folder)["cuts"]
    rows = table(part(text, "Extrapolation"), "fitted to, in training FLOPs")
    assert [row[:3] for row in rows] == [
        [f"up to {b}", str(c["n_fit"]), str(c["n"])] for b, c in zip(("1e11", "3.2e11"), cuts)
    ]
    scores = fitted_law.Fit.from_json((folder / "law.json").read_text()).extrapolation.scores
    assert any(cell.startswith(f"{100 * scores['bounded'].rmse:.2f} %") for cell in rows[-1])


def test_what_the_answer_depends_on(text, folder):
    found = json.loads((folder / "sensitivity.json").read_text())
    section = part(text, "Sensitivity")
    rows = table(section, "exponent of")
    for row, moved in zip(rows, found["dimensions"].values()):
        assert row[1:4] == [
            f"{moved['estimate']:.3g}",
            f"{moved['low']:.3g} to {moved['high']:.3g}",
            f"{moved['smallest']:.3g} to {moved['largest']:.3g}",
        ]
        assert (row[5] == "nothing") == (not moved["outside"])
    shown = table(section, "altered")
    assert shown[0][0] == "headline: `bounded`, all rows" and shown[0][-2] == "0.00 %"
    assert all(row["setting"] in section for row in found["alterations"] if row["what"] in ("window", "loss"))


def test_predict_names_the_metric(folder, capsys):
    from sovit.cli.main import main

    assert main(["predict", str(folder / "law.json"), "--train-flops", "3e12"]) == 0
    assert "predicted val_loss 1." in capsys.readouterr().out


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


@pytest.mark.parametrize("name", ["stream", "patch", "active"])
def test_the_page_of_a_validation_says_its_numbers(name):
    found = json.loads((RESULTS / f"{name}_validation" / "validation.json").read_text())
    page, d = validation_page(found), found["difference"]
    assert page.startswith(f"# Validation: {found['verdict']}\n")
    for key in ("mean", "low", "high"):
        assert f"{100 * np.expm1(d[key]):+.2f} %" in page
    assert [row[2] for row in table(page, "arm")] == [f"{arm['predicted']:.4f}" for arm in found["arms"].values()]
