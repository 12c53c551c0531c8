"""Rows, record files and ledgers: nothing lost, nothing twice, nothing half written."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sovit import UserError
from sovit.files import locked, write_atomic
from sovit.ledger import schema
from sovit.ledger.ledger import merge, read_exclusions, read_ledger, update_ledger
from sovit.ledger.provenance import provenance
from sovit.ledger.records import dump_row, read_record, record_path, write_record
from sovit.ledger.schema import FAMILIES, LedgerRow, new_row, schema_text
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(32, 2, 128, head_dim=8, patch_size=4, image_size=16, pool="none")
RUN = Run(SHAPE, Recipe(peak_lr=0.008), (1600, 3200), study="s")


def row(run=RUN, n=1600, status="ok", **more):
    return new_row(run, n, status=status, num_classes=16, **{"val_loss": 1.5, "val_error": 0.5} | more)


def rows(count):
    return [row(RUN.replace(init_seed=i)) for i in range(count)]


# a row ---------------------------------------------------------------------------------------------------------------


def test_costs_of_a_row():
    r = row(n=3200)
    assert r["compute"] == SHAPE.forward_flops * 3200
    assert r["train_flops"] == 3 * (r["forward_flops"] + r["head_flops"]) * 3200
    assert (r["trunk_examples"], r["cooldown_examples"]) == (2560, 640)
    assert r["head_params"] == 32 * 16 + 16
    # the bill: what the shorter branch left of the trunk is not paid twice
    assert sum(row(n=n)["spent_flops"] for n in RUN.budgets) == SHAPE.train_flops_per_image(16) * RUN.total_examples


def test_fields_of_the_shape_that_are_not_usual_are_named():
    plain, special = row(), row(RUN.replace(shape=SHAPE.replace(pool="avg", num_registers=4, qkv_bias=False)))
    assert set(special) - set(plain) == {"num_registers", "qkv_bias"}
    assert special["num_registers"] == 4


def test_a_missing_number_is_null():
    r = new_row(RUN, 1600, status="diverged", num_classes=16)
    assert r["val_loss"] is None and r["val_error"] is None
    assert '"val_loss": null' in dump_row(r)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            dump_row({**r, "val_loss": value})


def test_provenance_says_where_and_with_what():
    p = provenance("cpu x1")
    assert set(p) == {"device", "versions", "commit", "commit_dirty", "date"}
    assert p["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    json.dumps(p)


# merging -------------------------------------------------------------------------------------------------------------


def test_merge_is_sorted_idempotent_and_collapses_repeats():
    a = rows(5)
    merged = merge(a[::-1] + a + a[:2])
    assert merged == sorted(a, key=lambda r: r["run_id"])
    assert merge(merged) == merged
    assert merge([]) == []


def test_repeats_of_one_measurement_may_differ_in_when_and_where():
    first, second = row(seconds=1.0, date="a", commit="b"), row(seconds=2.0, date="c", commit="d", device="other")
    assert merge([first, second]) == [first]


@pytest.mark.parametrize(
    ("name", "value"), [("val_loss", 1.6), ("val_loss/attr", 1.0), ("peak_lr", 0.004), ("status", "diverged")]
)
def test_conflicting_rows_are_an_error(name, value):
    with pytest.raises(UserError, match=f"two rows of run_id {RUN.trunk_id}-1600 disagree on {name}") as caught:
        merge([row() | {"val_loss/attr": 1.1}, row() | {"val_loss/attr": 1.1, name: value}], "results/x.jsonl")
    assert str(caught.value).startswith("results/x.jsonl: ")


@pytest.mark.parametrize("order", [1, -1])
def test_a_column_added_later_is_kept_and_what_describes_the_first_run_stays(order):
    before, after = row(seconds=9.0), row(seconds=8.0) | {"zero_line": 2.77}
    first = [before, after][::order][0]
    (merged,) = merge([before, after][::order])
    assert merged == first | {"zero_line": 2.77}
    assert list(merged)[: len(before)] == list(before)  # in their order, so that a ledger changes at its ends only
    assert merge([merged, before]) == merge([merged, after]) == [merged]


@pytest.mark.parametrize("order", [1, -1])
def test_null_says_nothing_and_gives_way_to_a_number(order):
    unknown, known = row() | {"val_error_10shot/x": None, "b": None}, row() | {"val_error_10shot/x": 0.5}
    (merged,) = merge([unknown, known][::order])
    assert merged == row() | {"val_error_10shot/x": 0.5, "b": None}
    other = row() | {"val_error_10shot/x": 0.6}
    for rows_ in ([unknown, known, other], [known, other, unknown], [other, unknown, known]):
        with pytest.raises(UserError, match="disagree on val_error_10shot/x"):
            merge(rows_)


def test_lists_are_compared_like_numbers():
    one, two = row() | {"seeds": [0.1, 0.2]}, row() | {"seeds": [0.1, 0.3]}
    assert merge([one, dict(one)]) == [one]
    with pytest.raises(UserError, match="disagree on seeds"):
        merge([one, two])


def test_a_machine_fact_that_one_row_lacks_is_not_taken_from_another_run():
    (merged,) = merge([row(seconds=4.0), row(seconds=5.0, device="cuda")])
    assert "device" not in merged and merged["seconds"] == 4.0


def test_provenance_sees_changed_code_and_nothing_of_a_foreign_repository(tmp_path):
    def git(*arguments, cwd=tmp_path / "clone"):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)

    def asked():
        code = "import json; from sovit.ledger.provenance import provenance; print(json.dumps(provenance('cpu')))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "clone", capture_output=True, text=True)
        return json.loads(done.stdout)

    shutil.copytree(ROOT / "sovit", tmp_path / "clone" / "sovit", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "someone else's")
    assert (asked()["commit"], asked()["commit_dirty"]) == (None, None)
    git("add", "sovit")
    git("commit", "-q", "-m", "ours")
    assert asked()["commit"] and asked()["commit_dirty"] is False
    # an index whose dates are old is not brought up to date: git locks it for that, and a kill would leave the lock
    os.utime(tmp_path / "clone" / "sovit" / "encoder" / "model.py", (1, 1))
    index = (tmp_path / "clone" / ".git" / "index").read_bytes()
    assert asked()["commit_dirty"] is False
    assert (tmp_path / "clone" / ".git" / "index").read_bytes() == index
    with (tmp_path / "clone" / "sovit" / "encoder" / "model.py").open("a") as file:
        file.write("# changed\n")
    assert asked()["commit_dirty"] is True


@pytest.mark.parametrize("order", [1, -1])
def test_a_failed_row_gives_way_to_an_answer(order):
    failed, answer = row(status="failed", val_loss=None, error="out of memory"), row()
    assert merge([failed, answer][::order]) == [answer]
    assert merge([failed, failed | {"error": "killed"}]) == [failed]


def test_update_is_idempotent_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "results" / "s.jsonl"
    a = rows(6)
    update_ledger(path, a[3:])
    update_ledger(path, a[:3])
    text = path.read_text()
    inode = path.stat().st_ino
    assert update_ledger(path, a) == read_ledger(path) == merge(a)
    assert path.read_text() == text
    assert path.stat().st_ino == inode  # not even rewritten
    with pytest.raises(UserError, match="disagree on val_loss"):
        update_ledger(path, [a[0] | {"val_loss": 9.0}])
    assert path.read_text() == text


def _update(path, part):
    for r in part:
        update_ledger(path, [r])


def test_updates_of_several_processes_are_all_kept(tmp_path):
    a = rows(40)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_update, args=(tmp_path / "s.jsonl", a[i::4])) for i in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert read_ledger(tmp_path / "s.jsonl") == merge(a)


# reading -------------------------------------------------------------------------------------------------------------


def test_csv_is_read_like_json_lines(tmp_path):
    lines = [
        "run_id,trunk_id,status,num_examples,val_loss,pool,commit,num_registers",
        "1234567890-1600,1234567890,ok,1600,1.5,none,123456789012,",
        "12345e6789-1600,12345e6789,diverged,1600,,none,,4",
    ]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    first, second = read_ledger(tmp_path / "x.csv")
    assert first == {
        "run_id": "1234567890-1600",
        "trunk_id": "1234567890",  # digits, and still a name
        "status": "ok",
        "num_examples": 1600,
        "val_loss": 1.5,
        "pool": "none",
        "commit": "123456789012",
        "num_registers": None,
    }
    assert (second["trunk_id"], second["val_loss"], second["commit"], second["num_registers"]) == (
        "12345e6789",
        None,
        None,
        4,
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "is empty; run its study first"),
        ("x.jsonl", "\n \n", "is empty; run its study first"),
        ("x.csv", "run_id,trunk_id,status,num_examples\n", "is empty; run its study first"),
        ("x.jsonl", '{"run_id": "a", "tr', "x.jsonl:1 is not JSON"),
        ("x.jsonl", dump_row(row()) + "\n" + dump_row(row(n=3200))[:-20], "x.jsonl:2 is not JSON"),
        ("x.jsonl", dump_row(row()) + dump_row(row(n=3200)), "x.jsonl:1 is not JSON"),
        ("x.jsonl", "[1, 2]", "x.jsonl:1 is not an object"),
        ("x.jsonl", '{"run_id": "a", "status": "ok"}', "x.jsonl:1 lacks trunk_id, num_examples"),
        ("x.jsonl", dump_row(row() | {"status": "done"}), "status='done'; it must be one of ok, diverged, failed"),
        ("x.csv", "run_id,trunk_id,status,num_examples\na,b,ok,1\na,b,ok\n", "x.csv:3 lacks num_examples"),
        ("x.csv", "run_id,trunk_id,status,num_examples\na,b,ok,1,2\n", "x.csv:2 has more fields than the header"),
    ],
)
def test_malformed_ledgers_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_ledger(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_unreadable_ledgers_say_so(tmp_path):
    with pytest.raises(UserError, match="no ledger at .*none.jsonl; run its study first"):
        read_ledger(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read .*b.jsonl"):
        read_ledger(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="is a folder; give a ledger in it"):
        read_ledger(tmp_path)


def test_exclusions_need_a_reason(tmp_path):
    path = tmp_path / "exclusions.csv"
    assert read_exclusions(path) == {}
    path.write_text('run_id,reason\na-1,"wrong data, see LOG"\nb-2,spike\n')
    assert read_exclusions(path) == {"a-1": "wrong data, see LOG", "b-2": "spike"}
    path.write_text("run_id,reason\na-1,\n")
    with pytest.raises(UserError, match=r"exclusions.csv:2 needs both a run_id and a reason"):
        read_exclusions(path)


# files ---------------------------------------------------------------------------------------------------------------


def test_records_round_trip_and_failed_ones_are_tried_again(tmp_path):
    assert read_record(tmp_path, RUN.trunk_id, RUN.run_id(1600)) is None
    write_record(tmp_path, row())
    assert read_record(tmp_path, RUN.trunk_id, RUN.run_id(1600)) == row()
    write_record(tmp_path, row(status="failed"))
    assert read_record(tmp_path, RUN.trunk_id, RUN.run_id(1600)) is None
    path = record_path(tmp_path, RUN.trunk_id, RUN.run_id(1600))
    assert path == tmp_path / RUN.trunk_id / "records" / f"{RUN.run_id(1600)}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps(row(n=3200)), json.dumps(row() | {"status": "?"})])
def test_a_damaged_record_counts_as_missing_and_is_said_once(tmp_path, capsys, content):
    path = record_path(tmp_path, RUN.trunk_id, RUN.run_id(1600))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    for _ in range(3):
        assert read_record(tmp_path, RUN.trunk_id, RUN.run_id(1600)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sovit: the record {path} is damaged and counts as missing (")


def test_what_a_kill_left_beside_a_ledger_is_cleared(tmp_path):
    (tmp_path / "s.jsonlabcd.tmp").write_text("{")
    (tmp_path / "t.jsonlabcd.tmp").write_text("another's")
    update_ledger(tmp_path / "s.jsonl", [row()])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jsonl", "s.lock", "t.jsonlabcd.tmp"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    """A process that rewrites a file without pause is read, and at last killed: every reading is whole."""
    path = tmp_path / "f"
    write_atomic(path, "0" * 200_000)
    code = (
        "import sys; from pathlib import Path; from sovit.ledger.ledger import write_atomic\n"
        "for i in range(10**6): write_atomic(Path(sys.argv[1]), str(i % 10) * 200_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        seen, until = set(), time.monotonic() + 20
        while len(seen) < 10 and time.monotonic() < until:
            text = path.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
            seen.add(text[0])
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(seen) == 10
    assert len(set(path.read_text())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_bad_input(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "f", "x")


def test_a_file_where_a_folder_should_be_is_bad_input(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot write .*; choose a folder that can be written"):
        write_record(tmp_path / "runs", row())


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sovit.ledger.ledger import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "l")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    with locked(tmp_path / "l"):
        pass


def test_schema_names_are_pinned():
    """The keys of a row are a contract with whoever reads a ledger (`train` adds the metrics and `provenance`)."""
    names = (
        "schema run_id trunk_id study status init_seed data_seed data preset num_classes objective width depth mlp_dim"
        " head_dim num_heads patch_size image_size pool num_params head_params num_examples trunk_examples"
        " cooldown_examples forward_flops head_flops compute train_flops spent_flops batch_size peak_lr weight_decay"
        " parametrisation val_loss val_error"
    )
    assert set(names.split()) <= set(row())
    assert schema.SCHEMA == 1


def test_every_column_of_the_committed_ledgers_is_explained():
    families = [name.strip() for names in FAMILIES for name in names.split(",")]
    varying = "|".join(re.sub("[A-Z]+", ".+", re.escape(name)) for name in families)
    known = LedgerRow.__annotations__.keys()
    for path in sorted((ROOT / "results").glob("*.jsonl")):
        if "run_id" in json.loads(path.read_text().partition("\n")[0]):
            columns = {name for row in read_ledger(path) for name in row}
            assert [n for n in columns - known if not re.fullmatch(varying, n)] == [], path.name


def test_the_page_of_columns_is_written_from_the_schema():
    assert (ROOT / "docs" / "ledger-schema.md").read_text() == schema_text()
