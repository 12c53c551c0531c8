"""MLflow's store against the ledger it was filled from, read back through MLflow's own client."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from planted_ledger import write_ledger
from planted_study import lines, plant, planted_row, planted_runs, write_metrics

from sovit import UserError
from sovit.cli.main import main
from sovit.ledger.ledger import read_ledger, study_ledger
from sovit.report.shown_rows import CURVE, describe
from sovit.sweep.dashboards import serve
from sovit.sweep.mlflow_log import fill, open_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")  # MLflow's use of SQLAlchemy
RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An MLflow store with no experiment in it: making one takes seconds, copying one does not."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(path)
    return path


@pytest.fixture
def study(tmp_path, empty_store):
    """(results, runs, rows) of a planted study; its store, RUNS/mlflow.db, is there and empty."""
    planted = plant(tmp_path)
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return planted


def stored(store, name="planted"):
    """run_id of a row -> MLflow's run, of one experiment; a row with two runs is an error."""
    client = open_store(store)
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000)
    by_row = {run.data.tags["run_id"]: run for run in found}
    assert len(by_row) == len(found), "a row has two runs"
    return by_row


def points(store, run, key):
    return [(m.step, m.value) for m in open_store(store).get_metric_history(run.info.run_id, key)]


def contents(store, name="planted"):
    """All that a store says of a study, but for ids of its own making."""
    tables = {
        table: "key, value, step, timestamp" if table == "metrics" else "key, value"
        for table in ("metrics", "params", "tags")
    }
    found = {}
    with sqlite3.connect(store) as db:
        for row_id, run in stored(store, name).items():
            info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
            query = "select {} from {} where run_uuid = ? and key not like 'mlflow.%' order by 1, 2"
            of_run = {t: db.execute(query.format(c, t), [run.info.run_id]).fetchall() for t, c in tables.items()}
            found[row_id] = info, of_run
    return found


def counts(store):
    tables = ("experiments", "runs", "metrics", "params", "tags", "latest_metrics", "experiment_tags")
    with sqlite3.connect(store) as db:
        return {t: db.execute(f"select count(*) from {t}").fetchone()[0] for t in tables}


# what is stored ---------------------------------------------------------------------------------------------------------


def test_every_row_of_a_real_ledger_is_a_run_that_says_the_same(tmp_path, empty_store):
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    done = fill("stream_validation", RESULTS, tmp_path / "no-runs", store)
    rows = read_ledger(RESULTS / "stream_validation.jsonl")
    found = stored(store, "stream_validation")
    assert done["rows"] == done["runs_added"] == len(found) == len(rows) > 0
    for row in rows:
        run = found[row["run_id"]]
        assert run.info.status == "FINISHED"
        for name in ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "init_seed", "data_seed"):
            assert int(run.data.params[name]) == row[name]
        assert float(run.data.params["peak_lr"]) == row["peak_lr"]
        expected = {"final/val_loss": "val_loss", "final/val_error": "val_error", "final/zero_line": "zero_line"}
        expected |= {f"size/{name}": name for name in ("num_params", "forward_flops", "head_params", "num_heads")}
        expected |= {f"compute/{name}": name for name in ("train_flops", "compute", "num_examples", "seconds")}
        skills = [name for name in row if name.startswith(("val_loss/", "val_error/"))]
        assert len(skills) >= 10
        expected |= {f"skill/{name}": name for name in skills}
        assert {name: run.data.metrics[name] for name in expected} == {name: row[c] for name, c in expected.items()}
        for name in ("trunk_id", "run_id", "status", "data", "preset", "commit", "device"):
            assert run.data.tags[name] == row[name]
        shape = f"{row['width']}x{row['depth']}x{row['mlp_dim']}"
        assert run.info.run_name == f"{shape} @2e12 s{row['init_seed']}"
        assert run.data.tags["shape"] == shape and run.data.tags["budget"] == "2e12"
        assert run.info.end_time - run.info.start_time == pytest.approx(1000 * row["seconds"], abs=1)
    note = open_store(store).get_experiment_by_name("stream_validation").tags["mlflow.note.content"]
    assert "One run is one row" in note


def test_a_curve_is_the_trunk_up_to_the_branch_and_then_the_rows_own_cooldown(study):
    results, runs, rows = study
    fill("planted", results, runs)
    found = stored(runs / "mlflow.db")
    for run in planted_runs():
        for n in run.budgets:
            leaves = run.trunk_examples(n)
            own = [p for p in lines(run) if p["branch"] == n or (p["branch"] is None and p["examples"] <= leaves)]
            assert {p["branch"] for p in own} == {None, n} and own[-1]["examples"] == n
            stored_run = found[run.run_id(n)]
            loss, flops, log_flops = (points(runs / "mlflow.db", stored_run, key) for key in CURVE)
            assert loss == [(p["examples"], p["train_loss"]) for p in own]
            per_image = run.shape.train_flops_per_image(16)
            assert flops == [(p["examples"], p["examples"] * per_image) for p in own]
            assert [10**v for _, v in log_flops] == pytest.approx([v for _, v in flops])
            for key in ("final/val_loss", "skill/val_loss/attr", "size/num_params", "compute/seconds"):
                assert [step for step, _ in points(runs / "mlflow.db", stored_run, key)] == [0]


def test_budgets_of_the_committed_star_are_four_whatever_whole_batches_make_of_them():
    rows = read_ledger(RESULTS / "stream_star.jsonl")
    labels = {w.row["run_id"]: w.tags["budget"] for w in describe("s", rows, {})}
    asked = (3.2e10, 1e11, 3.2e11, 1e12)
    near = {row["run_id"]: min(asked, key=lambda b: abs(b - row["train_flops"])) for row in rows}
    assert {run_id: float(label) for run_id, label in labels.items()} == near


def test_names_tell_apart_what_shape_budget_and_seed_do_not():
    described = describe("s", read_ledger(RESULTS / "recipe_search.jsonl"), {})
    names = [wanted.name for wanted in described]
    assert len(set(names)) == len(names)
    assert any(" peak_lr 0.0" in name for name in names)
    star = [wanted.name for wanted in describe("s", read_ledger(RESULTS / "stream_star.jsonl"), {})]
    assert "32x2x256 @3.2e11 s0" in star and len(set(star)) == len(star)
    assert not any("peak_lr" in name for name in star)


def test_rows_that_diverged_or_failed_say_why(tmp_path, study):
    results, runs, rows = study
    run = planted_runs()[0]
    n, m = run.budgets
    lost = dict(val_loss=None, val_error=None, **{"val_loss/attr": None, "val_error/attr": None})
    rows[0] = planted_row(run, n, status="diverged", error="cooldown: not finite at step 7", **lost)
    rows[1] = planted_row(run, m, status="failed", error="RuntimeError: out of memory", **lost, train_flops=None)
    write_ledger(results / "planted.jsonl", rows)
    fill("planted", results, runs)
    found = stored(runs / "mlflow.db")
    for row_id, reason in ((run.run_id(n), "diverged: cooldown: not"), (run.run_id(m), "failed: RuntimeError: out of")):
        assert found[row_id].info.status == "FAILED"
        assert found[row_id].data.tags["mlflow.note.content"].startswith(reason)
        assert "final/val_loss" not in found[row_id].data.metrics
    assert [r.info.status for r in found.values()].count("FINISHED") == len(rows) - 2

    rows[1] = planted_row(run, m)  # tried again, and well
    write_ledger(results / "planted.jsonl", rows)
    done = fill("planted", results, runs)
    assert (done["runs_added"], done["runs_removed"], done["runs_updated"]) == (0, 0, 1)
    again = stored(runs / "mlflow.db")[run.run_id(m)]
    assert again.info.status == "FINISHED" and "mlflow.note.content" not in again.data.tags
    assert again.data.metrics["final/val_loss"] == rows[1]["val_loss"]


def test_columns_that_are_not_known_come_through(study):
    results, runs, rows = study
    more = {
        "val_error_10shot/icons:single40": 0.25,
        "probe/acc@1 (linear)": 0.5,
        "probe/acc#1 (linear)": 0.75,  # becomes the same name
        "../up//to/./no good": 1.0,
        "val_cell_error": 0.125,
        "gpu_hours": 3,
        "num_registers": 4,
        "tuned": True,
        "host": "node 7",
        "nothing": None,
        "infinite": float("inf"),
    }
    rows[0] |= more
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (results / "planted.jsonl").write_text(text)
    fill("planted", results, runs)
    found = stored(runs / "mlflow.db")
    data = found[rows[0]["run_id"]].data
    expected = {
        "val_error_10shot/icons:single40": 0.25,
        "probe/acc_1 _linear_": 0.5,
        "probe/acc_1 _linear__": 0.75,
        "up/to/no good": 1.0,
        "final/val_cell_error": 0.125,
        "other/gpu_hours": 3,
    }
    assert {name: data.metrics.get(name) for name in expected} == expected
    assert not [name for name in data.metrics if "nothing" in name or "infinite" in name]
    assert data.tags["tuned"] == "true" and data.tags["host"] == "node 7" and data.params["num_registers"] == "4"
    assert found[rows[1]["run_id"]].data.params["num_registers"] == "0"  # the default, once another row says it


def test_excluded_rows_say_why_and_rows_of_others_are_left_alone(study):
    results, runs, rows = study
    fill("planted", results, runs)
    client = open_store(runs / "mlflow.db")
    foreign = client.create_run(client.get_experiment_by_name("planted").experiment_id).info.run_id
    (results / "exclusions.csv").write_text(f"run_id,reason\n{rows[0]['run_id']},disk was full\n")
    write_ledger(results / "planted.jsonl", rows[:-1])
    done = fill("planted", results, runs)
    assert (done["runs_removed"], done["runs_updated"]) == (1, 1)  # the row that left, and the one that is now excluded
    assert client.get_run(foreign).info.lifecycle_stage == "active"
    client.delete_run(foreign)
    found = stored(runs / "mlflow.db")
    assert set(found) == {row["run_id"] for row in rows[:-1]}
    assert found[rows[0]["run_id"]].data.tags["excluded"] == "disk was full"


def test_two_ledgers_of_one_name_do_not_share_a_store_and_a_repository_may_be_moved(tmp_path, study):
    results, runs, rows = study
    fill("planted", results, runs)
    before = contents(runs / "mlflow.db")
    theirs = tmp_path / "theirs" / "planted.jsonl"
    theirs.parent.mkdir()
    write_ledger(theirs, rows[:1])
    with pytest.raises(UserError, match="give another store") as refusal:
        fill(str(theirs), results, runs)
    assert str(theirs) in str(refusal.value) and str(results / "planted.jsonl") in str(refusal.value)
    assert contents(runs / "mlflow.db") == before
    moved = tmp_path / "moved"
    moved.mkdir()
    results, runs = results.rename(moved / "results"), runs.rename(moved / "runs")
    done = fill("planted", results, runs)
    assert (done["runs_added"], done["runs_removed"]) == (0, 0)


def test_a_ledger_is_found_as_launched_else_among_own_else_published_ones(tmp_path, study, monkeypatch):
    results, runs, rows = study
    design = runs / "planted.design.json"
    design.write_text(json.dumps({"ledger": "own/planted.jsonl", "folder": str(tmp_path)}))
    own = tmp_path / "own" / "planted.jsonl"
    own.parent.mkdir()
    assert study_ledger("planted", results, runs) == results / "planted.jsonl"
    shutil.copy(results / "planted.jsonl", own)
    done = fill("planted", None, runs)
    assert (done["ledger"], done["runs_added"]) == (str(own), len(rows))
    monkeypatch.chdir(tmp_path)
    assert study_ledger("planted", None, runs) == Path("own/planted.jsonl")
    for text in ("{}", "[]", "torn {"):
        design.write_text(text)
        assert study_ledger("planted", None, runs) == Path("results/planted.jsonl")  # published
    Path("runs/results").mkdir(parents=True, exist_ok=True)
    shutil.copy(own, "runs/results")
    assert study_ledger("planted", None, runs) == Path("runs/results/planted.jsonl")
    assert study_ledger("own/planted.jsonl", results, runs) == Path("own/planted.jsonl")


# again, later, killed, at once -----------------------------------------------------------------------------------------


def test_a_second_fill_writes_not_one_byte(study, capsys):
    results, runs, rows = study
    arguments = ["track", "planted", "--results", str(results), "--runs", str(runs)]
    assert main(arguments) == 0
    assert f"{len(rows)} runs added" in capsys.readouterr().out
    before, size = (runs / "mlflow.db").read_bytes(), counts(runs / "mlflow.db")
    assert main(arguments) == 0
    assert "nothing new" in capsys.readouterr().out
    assert counts(runs / "mlflow.db") == size and (runs / "mlflow.db").read_bytes() == before
    assert main([*arguments, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["rows"], done["runs_added"], done["points_added"]) == (len(rows), 0, 0)
    for run in planted_runs():  # copied over again: other times, the same lines
        os.utime(runs / run.trunk_id / "metrics.jsonl", ns=(1, 1))
    assert fill("planted", results, runs)["points_added"] == 0
    assert counts(runs / "mlflow.db") == size


def test_rows_and_points_that_come_later_are_added_and_nothing_else_changes(tmp_path, study, empty_store):
    results, runs, rows = study
    store, late = runs / "mlflow.db", planted_runs()[0]
    write_ledger(results / "planted.jsonl", rows[:-2])
    write_metrics(runs, late, keep=2).open("a").write('{"step": 1')  # the rest has not been copied yet
    fill("planted", results, runs)
    before = {row_id: run.info.run_id for row_id, run in stored(store).items() if not row_id.startswith(late.trunk_id)}
    write_ledger(results / "planted.jsonl", rows)
    write_metrics(runs, late)
    done = fill("planted", results, runs)
    assert (done["runs_added"], done["runs_removed"], done["runs_updated"]) == (2, 0, 2)
    assert before.items() <= {row_id: run.info.run_id for row_id, run in stored(store).items()}.items()
    at_once = shutil.copytree(runs, tmp_path / "at-once")
    shutil.copy(empty_store, at_once / "mlflow.db")
    fill("planted", results, at_once)
    assert contents(store) == contents(at_once / "mlflow.db")


@pytest.mark.parametrize(("method", "times"), [("create_experiment", 1), ("create_run", 2), ("log_batch", 3)])
def test_a_fill_killed_after_any_step_is_completed_by_the_next(study, empty_store, method, times):
    results, runs, _ = study
    store = runs / "mlflow.db"
    shutil.copy(empty_store, runs / "whole.db")
    fill("planted", results, runs, runs / "whole.db")

    def killed():
        from mlflow import MlflowClient

        whole, calls = getattr(MlflowClient, method), []

        def and_die(*arguments, **more):
            answer = whole(*arguments, **more)
            calls.append(1)
            if len(calls) == times:
                os.kill(os.getpid(), 9)
            return answer

        setattr(MlflowClient, method, and_die)
        fill("planted", results, runs)

    assert in_children([killed]) == [9]
    done = fill("planted", results, runs)
    assert done["runs_removed"] == 0
    assert contents(store) == contents(runs / "whole.db")
    assert fill("planted", results, runs)["points_added"] == 0


def test_two_fills_at_once_are_one(study, empty_store):
    results, runs, _ = study
    one = shutil.copy(empty_store, runs / "one.db")
    fill("planted", results, runs, one)
    (runs / "mlflow.db").unlink()  # the making of the store is part of the race
    assert in_children([lambda: fill("planted", results, runs)] * 2) == [0, 0]
    assert contents(runs / "mlflow.db") == contents(one)


def in_children(functions):
    """Call each in a process of its own, all at once; the exit status of each, a signal as its number."""
    children = []
    for function in functions:
        child = os.fork()
        if child == 0:
            try:
                function()
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    waited = [os.waitpid(child, 0)[1] for child in children]
    return [os.WTERMSIG(w) if os.WIFSIGNALED(w) else os.WEXITSTATUS(w) for w in waited]


def test_a_ledger_of_someone_elses_with_few_columns_is_filled_too(tmp_path, empty_store):
    path = tmp_path / "theirs.csv"
    path.write_text(
        "run_id,trunk_id,status,num_examples,width,seconds,val_loss,date\n"
        "a-1,a,ok,100.0,32,,1.5,yesterday\nb-1,b,diverged,200,64,long,,\n"
    )
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    fill(str(path), runs=tmp_path, store=store)
    found = stored(store, "theirs")
    assert found["a-1"].data.metrics["final/val_loss"] == 1.5 and found["a-1"].info.run_name == "32x?x? @100 images s0"
    assert found["b-1"].info.status == "FAILED"
    assert fill(str(path), runs=tmp_path, store=store)["points_added"] == 0


@pytest.mark.parametrize("name", ["planted.db", "store.log", "store.lock"])
def test_a_stores_own_files_are_nobody_elses(study, empty_store, monkeypatch, name):
    """runs/planted.log is the workers'; and a store may have any name, that of a log too."""
    results, runs, _ = study
    store, mine = Path(shutil.copy(empty_store, runs / name)), runs / "planted.log"
    mine.write_text("said by the workers\n")
    before = {path.name for path in runs.iterdir()}
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # a server that ends at once
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert serve("planted", results, runs, store) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert {path.name for path in runs.iterdir()} - before - {"mlartifacts"} == {f"{name}.log", f"{name}.lock"}
    assert mine.read_text() == "said by the workers\n" and len(stored(store)) == 6


@pytest.mark.slow
def test_servers_answer_refill_and_end_with_a_polite_kill(study):
    results, runs, rows = study
    write_ledger(results / "planted.jsonl", rows[:-1])
    command = [sys.executable, "-m", "sovit", "ui", "planted", "--results", str(results), "--runs", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = list(iter(process.stdout.readline, "they answer in some seconds; Ctrl-C stops\n"))
        assert f"{len(rows) - 1} runs added" in said[0]
        address = urlsplit(said[1].split()[1])
        assert address.hostname == "127.0.0.1" and address.fragment.startswith("/experiments/1/")
        until = time.monotonic() + 180
        while (answer := asked(address.port, "/health")) != "OK" and time.monotonic() < until:
            time.sleep(0.2)
        assert answer == "OK"
        write_ledger(results / "planted.jsonl", rows)
        assert "1 runs added" in process.stdout.readline()
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert asked(address.port, "/health") is None


def asked(port, path):
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except OSError:
        return None


# bad input --------------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_status_2(tmp_path, study, capsys):
    results, runs, _ = study
    where = ["--results", str(results), "--runs", str(runs)]
    (runs / "text.db").write_text("this is no database, whatever its name says")
    (runs / "folder.db").mkdir()
    other = runs / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("create table alembic_version (version_num varchar(32))")
        db.execute("insert into alembic_version values ('of another program')")
    words = '{"run_id": "a-1", "trunk_id": "a", "status": "ok", "num_examples": "many"}'
    (results / "words.jsonl").write_text(words + "\n")
    (results / "none.jsonl").write_text(words.replace('"many"', "0") + "\n")
    (results / "half.jsonl").write_text(words.replace('"many"', "0.5") + "\n")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    cases = [
        (["track", "no_such_study", *where], "no_such_study.jsonl; run its study first"),
        (["ui", "no_such_study", *where], "no_such_study.jsonl; run its study first"),
        (["track", "planted", *where, "--store", str(runs / "text.db")], "not an SQLite file"),
        (["track", "planted", *where, "--store", str(runs / "folder.db")], "directory"),
        (["track", "planted", *where, "--store", str(other)], "give another store"),
        (["ui", "planted", *where, "--port", str(port)], f"port {port} cannot be used (Address already in use)"),
        (["ui", "planted", *where, "--port", "0"], "invalid port 0; use 1 to 65534"),
        (["track", "words", *where], "num_examples='many'"),
        (["track", "none", *where], "row a-1 has num_examples=0; give a whole number from 1"),
        (["track", "half", *where], "row a-1 has num_examples=0.5; give a whole number from 1"),
    ]
    for arguments, words in cases:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and said.startswith("sovit: "), said
    taken.close()
    assert (runs / "text.db").read_text().startswith("this is no database")


def test_an_unwritable_store_is_refused_and_a_deleted_experiment_comes_back(study):
    results, runs, rows = study
    with pytest.raises(UserError, match="cannot write"):
        fill("planted", results, runs, Path("/proc/none/mlflow.db"))
    fill("planted", results, runs)
    client = open_store(runs / "mlflow.db")
    client.delete_experiment(client.get_experiment_by_name("planted").experiment_id)
    fill("planted", results, runs)
    assert set(stored(runs / "mlflow.db")) == {row["run_id"] for row in rows}
