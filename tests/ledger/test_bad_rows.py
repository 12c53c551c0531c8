"""Bad rows of every kind: refused in one line that names row, value and remedy, or left out with a reason that is kept."""

import json
from pathlib import Path

import numpy as np
import planted_ledger as planted
import pytest

from sovit import UserError
from sovit.cli.main import main
from sovit.law import fit as law
from sovit.ledger.ledger import read_ledger, read_rows
from sovit.ledger.measurements import measurements, measurements_of
from sovit.report.build import fit_ledgers
from sovit.spec.shape import Shape


@pytest.fixture(scope="module")
def rows():
    return planted.planted_rows(seeds=1)


def written(path: Path, rows) -> Path:
    """As JSON lines, NaN and Infinity as Python writes them; a str is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def changed(rows, change, count=1):
    """The ledger with `change` in its first rows."""
    return [row | change for row in rows[:count]] + rows[count:]


# kind -> (change of the first row, what its line says)
ROWS = {
    "nan": (dict(val_loss=float("nan")), "has val_loss=nan; a power law needs a number above 0"),
    "infinite": (dict(val_loss=float("inf")), "has val_loss=inf; a power law"),
    "negative": (dict(val_loss=-1.0), "has val_loss=-1.0; a power law"),
    "zero": (dict(val_loss=0), "has val_loss=0; a power law"),
    "no metric": (dict(val_loss=None), "has val_loss=None; a power law"),
    "text": (dict(val_loss="1.5"), "has val_loss='1.5'; a power law"),
    "truth value": (dict(val_loss=True), "has val_loss=True; a power law"),
    "text in a count": (dict(forward_flops="much"), "has forward_flops='much', which is not a number"),
    "nan in a count": (dict(compute=float("nan")), "has compute=nan, which is not a number"),
    "no images": (dict(num_examples=0), "has num_examples=0, which is not above 0"),
    "negative rate": (dict(peak_lr=-0.1), "has peak_lr=-0.1, which is below 0"),
    "beyond floats": (dict(num_examples=10**400), "which is not a number"),
    "half a block": (dict(depth=1.5), "has depth=1.5, which is not a whole number"),
    "list": (dict(width=[16]), "has width=[16], which is not a number"),
    "no such shape": (dict(image_size=17), "has no possible shape: image_size=17 is not a multiple of patch_size=4"),
    "no such pool": (dict(pool=["avg"]), "has no possible shape: pool=['avg'] is unknown"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_refused_in_one_line_or_left_out_with_the_reason(kind, rows, tmp_path):
    change, message = ROWS[kind]
    path = written(tmp_path / "a.jsonl", changed(rows, change))
    with pytest.raises(UserError) as caught:
        measurements([path])
    line, run_id = str(caught.value), rows[0]["run_id"]
    assert line.startswith(f"row {run_id} ") and message in line and "--skip-bad" in line and "\n" not in line
    data = measurements([path], skip_bad=True)
    assert len(data.y) == len(rows) - 1 and run_id not in {row["run_id"] for row in data.rows}
    ((left, reason),) = data.left_out
    assert left == run_id and message in reason
    (tmp_path / "exclusions.csv").write_text(f"run_id,reason\n{run_id},wrong\n")  # the other remedy
    assert measurements([path]).left_out == [(run_id, "excluded: wrong")]


LINES = {
    "no json": ('{"run_id": ', "is not JSON"),
    "no object": ("[1]", "is not an object"),
    "no id": ('{"run_id": "", "trunk_id": "a", "status": "ok", "num_examples": 1}', "lacks run_id"),
    "a number for a name": (
        '{"run_id": 1, "trunk_id": "a", "status": "ok", "num_examples": 1}',
        "has run_id=1; it must",
    ),
    "status": ('{"run_id": "a", "trunk_id": "a", "status": "good", "num_examples": 1}', "has status='good'"),
    "a name twice": ('{"run_id": "a", "trunk_id": "b", "trunk_id": "c"}', "says a name twice; remove one"),
    "digits without end": ('{"run_id": ' + "1" * 5000 + "}", "is not JSON"),
    "nested without end": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_is_no_row_is_named_by_its_number(kind, rows, tmp_path):
    line, message = LINES[kind]
    path = written(tmp_path / "a.jsonl", [*rows[:5], "", line, *rows[5:]])
    for read in (read_ledger, lambda p: measurements([p])):
        with pytest.raises(UserError, match=r"a\.jsonl:7 ") as caught:
            read(path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    data = measurements([path], skip_bad=True)
    assert len(data.y) == len(rows) and data.left_out[0][0] == "a.jsonl:7" and message in data.left_out[0][1]


def test_a_ledger_without_one_sound_row_is_refused_either_way(rows, tmp_path):
    with pytest.raises(UserError, match="has no sound row among 2"):
        measurements([written(tmp_path / "a.jsonl", ["{", "["])], skip_bad=True)
    with pytest.raises(UserError, match="no row is left, each being bad; the last is .*val_loss=-1.0"):
        measurements([written(tmp_path / "b.jsonl", [row | dict(val_loss=-1.0) for row in rows])], skip_bad=True)


def test_conflicting_rows_are_refused_or_all_left_out(rows, tmp_path):
    run_id = rows[0]["run_id"]
    whole = written(tmp_path / "a.jsonl", [*rows, rows[0] | dict(val_loss=9.0)])
    halves = [written(tmp_path / "b.jsonl", rows), written(tmp_path / "c.jsonl", [rows[0] | dict(val_loss=9.0)])]
    for paths in ([whole], halves, halves[::-1]):
        with pytest.raises(UserError, match=f"two rows of run_id {run_id} disagree on val_loss"):
            measurements(paths)
        data = measurements(paths, skip_bad=True)
        assert run_id not in {row["run_id"] for row in data.rows} and len(data.y) == len(rows) - 1
        assert data.left_out[0][0] == run_id and "disagree on val_loss" in data.left_out[0][1]


def test_repeats_are_counted_once_and_said(rows, tmp_path):
    plain = measurements([written(tmp_path / "a.jsonl", rows)])
    data = measurements([written(tmp_path / "b.jsonl", rows + rows[:3])])
    assert np.array_equal(data.y, plain.y) and plain.notes == []
    assert data.notes == [
        f"3 of {len(rows) + 3} rows repeat the run_id of another, with which they agree: counted once"
    ]
    nan = [rows[0] | dict(status="diverged", val_loss=float("nan"))] * 2  # NaN agrees with NaN
    assert len(measurements([written(tmp_path / "c.jsonl", nan + rows[1:])]).y) == len(rows) - 1


@pytest.mark.parametrize("name", ["data", "preset", "objective", "num_classes"])
def test_mixed_ledgers_are_refused_either_way(name, rows, tmp_path):
    path = written(tmp_path / "a.jsonl", changed(rows, {name: 7}, 4))
    for skip_bad in (False, True):  # which of the two is wanted cannot be guessed
        with pytest.raises(UserError, match=rf"mix {name}=.*give ledgers of one") as caught:
            measurements([path], skip_bad=skip_bad)
        assert f"{name}=7 (4 rows)" in str(caught.value) and f"({len(rows) - 4} rows)" in str(caught.value)


# counting ------------------------------------------------------------------------------------------------------------


def test_another_convention_throughout_is_kept_and_said(rows, tmp_path):
    macs = [row | dict(forward_flops=row["forward_flops"] // 2, compute=None, train_flops=None) for row in rows]
    data = measurements([written(tmp_path / "a.jsonl", macs)])
    (note,) = data.notes
    assert note == "forward_flops is 0.5 x what its shape counts: another convention, and kept"
    assert data.columns["forward_flops"].tolist() == [row["forward_flops"] for row in data.rows]
    fit = law.fit("joint", data.columns, data.y, extrapolate=False)
    assert fit.geometry.flops_scale == pytest.approx(0.5, rel=1e-6)
    train = measurements([written(tmp_path / "b.jsonl", [row | dict(compute=3 * row["compute"]) for row in rows])])
    assert train.notes == ["compute is 3 x forward_flops x num_examples: another convention, and kept"]
    half = [row | dict(num_params=row["num_params"] * (2 if row["width"] > 32 else 1)) for row in rows]
    (note,) = measurements([written(tmp_path / "c.jsonl", half)]).notes
    assert note.startswith("num_params is 1 to 2 x what its shape counts")


@pytest.mark.parametrize("name", ["forward_flops", "num_params", "compute"])
def test_rows_of_one_shape_that_count_differently_are_bad(name, rows, tmp_path):
    bad = rows[0]["run_id"]
    path = written(tmp_path / "a.jsonl", changed(rows, {name: 2 * rows[0][name]}))
    with pytest.raises(
        UserError, match=f"row {bad} has {name}=.* 2 x .*the median of the same shape has 1 x; mend the row"
    ):
        measurements([path])
    data = measurements([path], skip_bad=True)
    assert len(data.y) == len(rows) - 1 and data.left_out[0][0] == bad and not data.notes
    rounded = [row | {name: float(f"{row[name]:.2e}")} for row in rows]  # as people write numbers down
    assert not measurements([written(tmp_path / "b.jsonl", rounded)]).left_out


def test_a_trunk_of_several_shapes_is_said(rows, tmp_path):
    data = measurements([written(tmp_path / "a.jsonl", [row | dict(trunk_id="one") for row in rows])])
    assert "1 trunk_id (such as one) stand for several shapes each" in data.notes[0]
    with pytest.raises(UserError, match=r"bootstrap=100 with 1 trunk\(s\); an interval by trunk needs at least 3"):
        law.fit("joint", data.columns, data.y, bootstrap=100)


def test_too_few_rows_and_constant_columns_are_refused(rows, tmp_path):
    few = measurements([written(tmp_path / "a.jsonl", rows[::12])])
    with pytest.raises(UserError, match="6 rows cannot determine the 9 parameters of form='joint'; give at least 10"):
        law.fit("joint", few.columns, few.y)
    same = [row | dict(num_examples=1600, compute=None, train_flops=None) for row in rows]
    data = measurements([written(tmp_path / "b.jsonl", same)])
    with pytest.raises(UserError, match="column 'num_examples' has one value only"):
        law.fit("joint", data.columns, data.y)
    one = [row for row in rows if row["width"] == 16]
    with pytest.raises(UserError, match="a shape law needs at least two shapes"):
        fit_ledgers([written(tmp_path / "c.jsonl", one)], bootstrap=0, out=tmp_path / "law")
    assert not (tmp_path / "law").exists()


# tables --------------------------------------------------------------------------------------------------------------


def test_csv_from_elsewhere(tmp_path):
    head = "run_id,trunk_id,status,num_examples,val_loss,note"
    path = tmp_path / "x.csv"
    path.write_text(f'\ufeff{head}\na,t,ok,1,1.5,"two\nlines"\nb,t,ok\nc,t,ok,2,1.4,\n', encoding="utf-8")
    bad: list = []
    assert [row["run_id"] for row in read_rows(path, bad)] == ["a", "c"]  # a mark of Excel's, and a quoted line break
    assert bad == [("x.csv:4", "lacks num_examples; see docs/ledger-schema.md")]
    path.write_text(f"{head},val_loss\n")
    with pytest.raises(UserError, match="has two columns 'val_loss'"):
        read_rows(path)
    path.write_text(f"{head}\na,t,ok,1,nan,\n")
    with pytest.raises(UserError, match="has val_loss='nan'"):
        measurements([path])


# end to end ----------------------------------------------------------------------------------------------------------


def test_what_was_left_out_is_in_the_law_and_in_the_report(rows, tmp_path, capsys):
    bad = [*changed(rows, dict(val_loss=-1.0)), "{", rows[5]]
    path = str(written(tmp_path / "a.jsonl", bad))
    options = ["fit", path, "--form", "joint", "--bootstrap", "0", "--out", str(tmp_path / "law")]
    assert main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "law").exists()
    assert main([*options, "--skip-bad"]) == 0
    assert "(2 left out)" in capsys.readouterr().out
    data = json.loads((tmp_path / "law" / "law.json").read_text())["data"]
    assert [entry["run_id"] for entry in data["left_out"]] == [f"a.jsonl:{len(rows) + 1}", rows[0]["run_id"]]
    assert "val_loss=-1.0" in data["left_out"][1]["reason"] and "repeat the run_id" in data["notes"][0]
    report = (tmp_path / "law" / "report.md").read_text()
    assert "val_loss=-1.0" in report and "is not JSON" in report and f"1 of {len(rows) + 1} rows repeat" in report
    assert main(["report", path, "--law", str(tmp_path / "law"), "--out", str(tmp_path / "a.html"), "--skip-bad"]) == 0


def test_one_patch_a_cell_answers_for_its_cell(rows, tmp_path):
    some = [row | {"val_cell_loss": row["val_loss"] * 0.9} if i % 2 else row for i, row in enumerate(rows)]
    data = measurements([written(tmp_path / "cells.jsonl", some)], "val_cell_loss")
    by_id = {row["run_id"]: row for row in some}
    assert len(data.y) == len(rows) and data.zero_line is not None
    for row, y in zip(data.rows, data.y):
        own = by_id[row["run_id"]]
        assert y == own.get("val_cell_loss", own["val_loss"])
    assert any("have one patch a cell: their val_loss is taken as val_cell_loss" in note for note in data.notes)
    with pytest.raises(UserError, match="no row has metric='val_cell_loss'"):
        measurements([written(tmp_path / "none.jsonl", rows)], "val_cell_loss")


def rows_of_shapes(**changes):
    shapes = [Shape(w, 2, 64, head_dim=8, patch_size=4, image_size=16) for w in (16, 32, 48)]
    sizes = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "pool")
    rows = []
    for s in shapes:
        for n in (800, 1600):
            named = {name: getattr(s, name) for name in sizes} | {"forward_flops": s.forward_flops, "num_examples": n}
            rows.append(named | dict(run_id=f"{s.width}-{n}", trunk_id=str(s.width), status="ok", val_loss=2 - n / 9e3))
    return [row | changes for row in rows]


def test_counts_by_several_rules_are_told_from_one_convention():
    one = rows_of_shapes()
    several = [row | {"forward_flops": row["forward_flops"] // (2 if row["width"] == 16 else 1)} for row in one]
    assert (
        "0.5 to 1 x what its shape counts: kept, but rows counted by different rules"
        in measurements_of(several).notes[0]
    )
    half = [row | {"forward_flops": row["forward_flops"] // 2} for row in one]
    assert "0.5 x what its shape counts: another convention, and kept" in measurements_of(half).notes[0]


def test_a_count_within_five_per_cent_of_its_shape_s_is_no_mistake():
    rows = rows_of_shapes()
    rows[0]["forward_flops"] *= 1.03
    assert len(measurements_of(rows).y) == 6


def test_a_measurement_under_two_names_is_said():
    rows = rows_of_shapes()
    assert not measurements_of(rows).notes
    notes = measurements_of([*rows, rows[0] | {"run_id": "again"}]).notes
    assert len(notes) == 1 and "1 measurements stand under several names (such as 16-800 and again)" in notes[0]


def test_flags_of_a_table_may_be_numbers():
    assert len(measurements_of(rows_of_shapes(qkv_bias=1, layer_scale=0)).y) == 6
