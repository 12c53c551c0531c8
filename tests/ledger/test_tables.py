"""Tables that others wrote: any dialect, their names, their units; the right law comes out, or one line says what lacks."""

import gzip
import json
from pathlib import Path

import pytest

from sovit import UserError
from sovit.cli.main import main
from sovit.ledger.measurements import measurements
from sovit.ledger.tables import SYNONYMS, Reading
from sovit.report.build import FitOptions, read_ledgers
from sovit.spec.shape import Shape

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GEMSTONES = DATA / "gemstones" / "wandb_df_for_fitting_cool_end.jsonl"
NAMES = ("N=num_params,D=num_examples,loss=val_loss",)
A, B, E, ALPHA, BETA = 400.0, 410.0, 1.7, 0.34, 0.28
ROWS = [
    dict(N=n, D=d, loss=E + A / n**ALPHA + B / d**BETA)
    for n in (10**6, 3 * 10**6, 10**7, 10**8)
    for d in (10**8, 10**9, 3 * 10**9, 10**10)
]


def table(path: Path, rows=ROWS, mark=",", encoding="utf-8") -> Path:
    lines = [mark.join(rows[0]), *(mark.join(str(value) for value in row.values()) for row in rows)]
    content = ("\n".join(lines) + "\n").encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path, *names, units=(), metric="val_loss"):
    return measurements([path], metric, reading=Reading.of(names, units, metric))


@pytest.mark.parametrize(
    ("name", "mark", "encoding"),
    [
        ("a.csv", ",", "utf-8"),
        ("a.csv", ";", "utf-8-sig"),
        ("a.csv", "|", "utf-8"),
        ("a.tsv", "\t", "utf-8"),
        ("a.csv", ",", "utf-16"),
        ("a.csv.gz", ",", "utf-8"),
        ("a.tsv.gz", "\t", "utf-16"),
    ],
)
def test_every_dialect_gives_the_same_columns(tmp_path, name, mark, encoding):
    data = read(table(tmp_path / name, mark=mark, encoding=encoding), *NAMES)
    columns = (data.columns["num_params"].tolist(), data.columns["num_examples"].tolist(), data.y.tolist())
    assert sorted(zip(*columns)) == sorted(tuple(row.values()) for row in ROWS)
    assert "16 rows name no run" in data.notes[0] and len(set(data.columns["trunk_id"])) == 4


def test_json_lines_of_others_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert sorted(read(path, *NAMES).y) == sorted(row["loss"] for row in ROWS)


def test_a_law_of_size_and_data_is_found_from_the_command_line(tmp_path):
    """Loss, delta and names as a paper has them: the planted exponents come back."""
    path = table(tmp_path / "a.csv")
    arguments = ["fit", str(path), "--map", *NAMES, "--huber-delta", "1e-3", "--bootstrap", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    law = json.loads((tmp_path / "law.json").read_text())
    assert law["form"] == "chinchilla" and law["model"]["huber_delta"] == 1e-3
    assert [law["params"][name] for name in ("E", "alpha", "beta")] == pytest.approx([E, ALPHA, BETA], rel=1e-3)


def test_without_a_map_the_field_s_words_are_proposed_and_not_applied(tmp_path, capsys):
    path = table(tmp_path / "a.csv")
    assert main(["fit", str(path)]) == 2
    error = capsys.readouterr().err
    assert "lacks num_examples, val_loss; it has N, D, loss" in error and f"--map {NAMES[0]}" in error
    assert all(word == word.lower() for word in SYNONYMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(map=["Q=width"]), "has no column 'Q' for --map Q=width; it has N, D, loss"),
        (dict(map=["loss=quality"]), "'quality' is no column of a ledger"),
        (dict(map=["loss"]), "is no pair"),
        (dict(map=["N=num_params,D=num_params"]), "names one column twice"),
        (dict(map=[*NAMES], units=["num_examples=0"]), "is no factor above 0"),
        (dict(map=[*NAMES], units=["width=2"]), "has no column 'width' for --units width=2"),
        (dict(map=[*NAMES], loss="mae"), "loss='mae' is unknown; choose huber_log or log_squares"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, options, message):
    path = table(tmp_path / "a.csv")
    with pytest.raises(UserError) as caught:
        read_ledgers([path], FitOptions(**options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("column", "text"), [("D", "100,000,000"), ("D", "100 000"), ("loss", "5,72")])
def test_separators_within_numbers_are_refused(tmp_path, column, text):
    path = table(tmp_path / "a.csv", [row | {column: text} for row in ROWS], ";")
    with pytest.raises(UserError, match="write it without separators, decimals after a point"):
        read(path, *NAMES)


def test_what_cannot_be_read_says_how_to_save_it(tmp_path):
    with pytest.raises(UserError, match="save it as UTF-8"):
        read(table(tmp_path / "a.csv", [row | dict(name="\u00e9") for row in ROWS], encoding="latin-1"), *NAMES)
    with pytest.raises(UserError, match="one column only, 'x'"):
        read(table(tmp_path / "b.csv", [dict(x=1)]), *NAMES)
    (tmp_path / "c.csv.gz").write_bytes(table(tmp_path / "whole.csv.gz").read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "c.csv.gz", *NAMES)


SHAPES = [Shape(w, d, 4 * w, head_dim=8, patch_size=4, image_size=16) for w in (16, 32, 64) for d in (1, 3)]
OURS = ("hidden_size=width,n_layer=depth,d_ff=mlp_dim,images=num_examples,flops=train_flops,loss=val_loss",)


def shaped(**changes):
    rows = []
    for s in SHAPES:
        for n in (16_000, 64_000):
            names = dict(hidden_size=s.width, n_layer=s.depth, d_ff=s.mlp_dim, patch_size=4, image_size=16, pool="avg")
            flops = dict(forward_flops=s.forward_flops, flops=3 * (s.forward_flops + s.head_flops(10)) * n)
            row = names | dict(qkv_bias=True, images=n, num_classes=10, loss=1 + 8 / s.width) | flops
            rows.append(row | {name: row[name] * factor for name, factor in changes.items()})
    return rows


def test_a_column_of_true_and_false_is_read(tmp_path):
    data = read(table(tmp_path / "a.csv", shaped()), *OURS)
    assert len(data.y) == 12 and all(row["qkv_bias"] is True for row in data.rows)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (dict(images=1e-6), "num_examples=1e+06"),
        (dict(forward_flops=5e-10), "forward_flops=2e+09"),
        (dict(flops=1e-9), "train_flops=1e+09"),
        (dict(flops=1e-18 * 1e6), "train_flops=1e+12"),
    ],
)
def test_another_unit_is_refused_and_the_factor_that_is_named_mends_it(tmp_path, changes, remedy):
    path = table(tmp_path / "a.csv", shaped(**changes))
    with pytest.raises(UserError, match="another unit") as caught:
        read(path, *OURS)
    assert f"--units {remedy}" in str(caught.value)
    right, mended = read(table(tmp_path / "b.csv", shaped()), *OURS), read(path, *OURS, units=[remedy])
    for name in ("num_examples", "forward_flops", "train_flops"):
        assert mended.columns[name].tolist() == pytest.approx(right.columns[name].tolist(), rel=1e-12)


def test_another_convention_is_kept_and_the_head_is_counted_in_it(tmp_path):
    """A multiply-add counted once: half of ours, and so is the head that the rows do not give."""
    rows = [{k: v for k, v in row.items() if k != "flops"} for row in shaped(forward_flops=0.5)]
    data = read(table(tmp_path / "a.csv", rows), OURS[0].replace("flops=train_flops,", ""))
    assert "forward_flops is 0.5 x what its shape counts: another convention, and kept" in data.notes
    ours = [3 * (s.forward_flops + s.head_flops(10)) * n / 2 for s in SHAPES for n in (16_000, 64_000)]
    assert sorted(data.columns["train_flops"].tolist()) == pytest.approx(sorted(ours), rel=1e-12)


SIZED = (f"{NAMES[0]},C=train_flops",)


def priced(tokens=1, **changes):
    rows = [row | dict(C=6 * row["N"] * row["D"] * tokens) for row in ROWS]
    return [row | {name: row[name] * factor for name, factor in changes.items()} for row in rows]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [(dict(D=1e-9), "num_examples=1e+09"), (dict(C=1e-18), "train_flops=1e+18"), (dict(C=1 / 8.64e19), "=8.64e+19")],
)
def test_units_are_checked_by_size_where_no_shape_is_known(tmp_path, changes, remedy):
    with pytest.raises(UserError, match="another unit") as caught:
        read(table(tmp_path / "a.csv", priced(**changes)), *SIZED)
    assert remedy in str(caught.value)


def test_one_row_in_another_unit_is_named_and_can_be_left_out(tmp_path):
    rows = priced()
    rows[5] |= dict(D=rows[5]["D"] / 1e6)
    path = table(tmp_path / "a.csv", rows)
    with pytest.raises(UserError, match=r"row a.csv:7 has train_flops=.* 1e\+06 x .*median of all rows has 1 x"):
        read(path, *SIZED)
    data = measurements([path], skip_bad=True, reading=Reading.of(SIZED))
    assert len(data.y) == 15 and [run_id for run_id, _ in data.left_out] == ["a.csv:7"]


def test_both_conventions_at_once_and_tokens_of_an_example_are_said(tmp_path):
    sixth = read(table(tmp_path / "a.csv", priced(C=1 / 6)), *SIZED)
    assert any("train_flops is 0.1667 x" in note and "another convention" in note for note in sixth.notes)
    images = read(table(tmp_path / "b.csv", priced(tokens=196)), *SIZED)
    assert any("FLOPs are 196 x those of num_params x num_examples" in note for note in images.notes)


def test_first_lines_spaces_and_packing_do_not_matter_and_repeats_are_said(tmp_path):
    path = table(tmp_path / "a.csv", [{f" {name} ": value for name, value in row.items()} for row in ROWS], ";")
    path.write_bytes(gzip.compress(b"\nsep=;\n" + path.read_bytes() + path.read_bytes().splitlines()[1]))
    data = read(path, *NAMES)
    assert len(data.y) == 17 and data.rows[0]["run_id"] == "a.csv:10"
    assert any("1 rows repeat another in every column" in note for note in data.notes)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32"])
def test_zero_bytes_say_how_to_save_it(tmp_path, encoding):
    with pytest.raises(UserError, match="no mark of UTF-16; save it as UTF-8"):
        read(table(tmp_path / "a.csv", encoding=encoding), *NAMES)


@pytest.mark.skipif(not GEMSTONES.exists(), reason="the published sweep is not here")
def test_a_published_optimum_is_reached_from_the_command_line(tmp_path):
    """Gemstones' N-D law of the cooled-down models (arXiv 2502.06857): Huber delta 1e-3, every row as it is."""
    names = "params_active_precise=num_params,tokens=num_examples,final_loss=val_loss"
    options = ["--form", "chinchilla", "--huber-delta", "1e-3", "--bootstrap", "0", "--out", str(tmp_path)]
    assert main(["fit", str(GEMSTONES), "--map", names, *options]) == 0
    law = json.loads((tmp_path / "law.json").read_text())
    assert [law["params"][name] for name in ("alpha", "beta", "E")] == pytest.approx([0.3003, 0.5802, 2.075], abs=5e-4)
