"""`sovit status`: what it says against counts made without it, while a study runs, after a kill and after the end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_sweep
import pytest
from fake_sweep import SHAPE, runs

from sovit import UserError
from sovit.cli.main import main
from sovit.files import locked, write_atomic
from sovit.ledger.records import record_path, write_record
from sovit.ledger.schema import new_row
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import worker as sweep
from sovit.sweep.status import study_status
from sovit.sweep.status_text import status_text, watch

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(8, 1, 16, head_dim=8, patch_size=4, image_size=16, pool="none")


def status(folder, name="s", **more):
    return study_status(name, Path(folder) / "runs", **more)


def status_when(condition, folder, name="s", seconds=240):
    """The first status of which `condition` holds, once the study is there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (Path(folder) / "runs" / f"{name}.design.json").exists() and condition(s := status(folder, name)):
            return s
        time.sleep(0.02)
    raise AssertionError("waited too long")


def per_image(run, num_classes=16):
    return run.shape.train_flops_per_image(num_classes)


def test_what_is_trained_but_not_probed_is_not_done(tmp_path):
    """And the metric that the study was launched with is the one that the best is told by."""
    metric = "val_error"
    design = runs(2)
    swept = fake_sweep.opened(tmp_path, design)
    swept.metric = metric
    fake_sweep.launch_sweep(swept, 1, worker_command=[sys.executable, fake_sweep.__file__])
    path = tmp_path / "runs" / "s.design.json"
    written = json.loads(path.read_text())
    assert written["metric"] == status(tmp_path).metric == metric and status(tmp_path).state == "done"
    probed = [run.replace(probe="icons:single40").to_dict() for run in design]
    write_atomic(path, json.dumps(written | dict(runs=probed)))
    s = status(tmp_path)
    assert s.state == "stopped" and s.trunks["waiting"] == 2 and s.train_flops["left"] == 0 and s.resume
    with locked(tmp_path / "runs" / design[0].trunk_id / "lock"):
        (worker,) = status(tmp_path).workers
        assert worker["phase"] == "probing"


def test_a_study_that_ended_with_a_failure_and_a_divergence(tmp_path):
    bad, diverging = (runs(1, (1600, 3200))[0].replace(init_seed=seed) for seed in (666, 777))
    design = [bad, diverging, *runs(3, (1600, 3200))]
    fake_sweep.launch(tmp_path, design[1:])
    path = tmp_path / "runs" / "s.design.json"
    written = json.loads(path.read_text())
    write_atomic(path, json.dumps(written | dict(runs=[r.to_dict() for r in design])))  # as if it had grown
    sweep._record_failure(fake_sweep.opened(tmp_path, design), bad, "RuntimeError: out of memory")
    s = status(tmp_path)
    assert s.state == "stopped" and s.trunks == dict(total=5, done=4, running=0, waiting=0, failed=1)
    assert s.measurements == dict(total=10, ok=6, diverged=2, failed=2, missing=0)
    cost = per_image(design[0])
    assert s.train_flops["left"] == cost * design[0].total_examples
    assert s.train_flops["done"] == 3 * cost * design[0].total_examples  # nobody knows what a divergence has spent
    assert s.flops_per_second == 0 and s.seconds_left is None and not s.workers
    assert {(p["status"], p["init_seed"], p["error"]) for p in s.problems} == {
        ("failed", 666, "RuntimeError: out of memory"),
        ("diverged", 777, "trunk: not finite at step 3"),
    }
    best = s.best
    assert [b["val_loss"] for b in best] == [fake_sweep.loss_of(design[2], n) for n in (3200, 1600)]
    assert [(b["num_rows"], b["num_shapes"], b["shape"]) for b in best] == [(3, 1, "16x1x32")] * 2
    text = status_text(s)
    assert f"failed: {bad.trunk_id} 16x1x32 seed 666 at 1,600, 3,200 images: RuntimeError: out of memory" in text
    assert s.resume and text.endswith(s.resume)
    only = fake_sweep.opened(tmp_path / "only", [diverging], name="d")
    fake_sweep.launch_sweep(only, 1, worker_command=[sys.executable, fake_sweep.__file__])
    alone = study_status("d", tmp_path / "only" / "runs")
    assert "d: done; 1 of 1 trunks done, 2 of 2 measurements" in status_text(alone)  # although no FLOPs are known
    # the next launch tries the failed one again: then it waits
    held = tmp_path / "runs" / "s.0123abcd.plan.json"
    with locked(held):
        again = status(tmp_path)
        assert again.state == "running" and again.launches == 1
        assert again.trunks["waiting"] == 1 and again.trunks["failed"] == 0
        assert status_text(again).splitlines()[2] == "  time   workers are starting"


def test_while_it_runs_and_when_it_is_done(tmp_path, capsys):
    command = [sys.executable, fake_sweep.__file__, "launch", str(tmp_path), "6", "2"]
    launcher = subprocess.Popen(command, env=os.environ | {"SOVIT_TEST_PAUSE": "0.4"}, stderr=subprocess.DEVNULL)
    seen = status_when(lambda s: s.workers, tmp_path)
    assert seen.state == "running" and seen.launches == 1
    assert seen.trunks["total"] == 6 == seen.trunks["done"] + seen.trunks["running"] + seen.trunks["waiting"]
    for worker in seen.workers:
        assert worker["phase"] == "starting" and worker["silent_seconds"] < 30 and not worker["stale"]
    watch("s", tmp_path / "runs", None, 0.1)  # returns when nothing runs any more
    assert launcher.wait(60) == 0
    assert "s: done; 6 of 6 trunks done, 6 of 6 measurements" in capsys.readouterr().out
    s = status(tmp_path)
    assert s.state == "done" and s.resume is None
    assert s.train_flops["done"] == s.train_flops["total"] == 6 * 1600 * per_image(runs(1)[0])


STUDY = """
import os
from pathlib import Path
from sovit.sweep.launch import launch
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep.queue import Sweep

shapes = [Shape(w, 1, 2 * w, head_dim=8, patch_size=4, image_size=16, pool="none") for w in (16, 8)]
runs = [Run(s, Recipe(peak_lr=0.008, warmup_examples=160), (1600, 6400), study="tiny") for s in shapes]
worker = os.environ.get("SOVIT_TEST_WORKER", "").split()
launch(Sweep("tiny", runs, Path("runs"), Path("mine/tiny.jsonl")), workers=1, worker_command=worker)
"""


@pytest.mark.slow
def test_real_training_watched_killed_and_resumed_by_the_command_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.py").write_text(STUDY)
    command = [sys.executable, "study.py", "and arguments"]
    launcher = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        s = status_when(lambda s: any(w["share"] for w in s.workers), ".", "tiny")
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    shapes = {f"{w}x1x{2 * w}": Shape(w, 1, 2 * w, 8, 4, 16, "none") for w in (16, 8)}
    cost = {label: shape.train_flops_per_image(16) for label, shape in shapes.items()}
    total = sum(cost.values()) * (6400 + 1600 - 1280)  # the trunk once, up to 80 % of 6400, and two cooldowns
    assert s.state == "running"
    assert s.train_flops["total"] == pytest.approx(total, rel=1e-9)
    (worker,) = s.workers
    assert worker["flops_per_second"] / worker["images_per_second"] == pytest.approx(cost[worker["shape"]])
    assert 0 < worker["share"] <= 1 and 0 < worker["loss"] < 3.5 and worker["phase"] in ("trunk", "cooldown")
    assert s.flops_per_second == worker["flops_per_second"] and s.seconds_left > 0
    assert max(map(len, status_text(s).splitlines())) <= 100

    s = status_when(lambda s: s.state == "stopped", ".", "tiny")
    records = [json.loads(p.read_text()) for p in Path("runs").glob("*/records/*.json")]
    assert s.launches == 0 and s.trunks["running"] == 0 and s.measurements["ok"] == len(records)
    assert s.train_flops["done"] == sum(r["spent_flops"] for r in records)
    assert s.resume.endswith("study.py 'and arguments'")
    quick = os.environ | {"SOVIT_TEST_WORKER": f"{sys.executable} {fake_sweep.__file__}"}  # what is left is made up
    subprocess.run(s.resume, shell=True, check=True, capture_output=True, env=quick)
    s = status(".", "tiny")
    assert s.state == "done" and s.train_flops["done"] == total and s.ledger == str(Path("mine/tiny.jsonl"))
    rows = [json.loads(line) for line in Path("mine/tiny.jsonl").read_text().splitlines()]
    for n in (6400, 1600):
        best = min((r for r in rows if r["num_examples"] == n), key=lambda r: r["val_loss"])
        assert best["val_loss"] in [b["val_loss"] for b in s.best]
    assert f"cd {tmp_path} && " in study_status_from("/", tmp_path, monkeypatch)


def study_status_from(where, folder, monkeypatch):
    """The command that goes on, as named to somebody who stands elsewhere, with a trunk taken away."""
    shutil.rmtree(next(p for p in (folder / "runs").iterdir() if p.is_dir()))
    (folder / "mine/tiny.jsonl").unlink()
    monkeypatch.chdir(where)
    return study_status("tiny", folder / "runs").resume


# planted states ------------------------------------------------------------------------------------------------------


def planted(folder, *, silent=0.0):
    """One trunk done, one in the middle of training, two that wait; the first two are of known speed."""
    design = [
        Run(SHAPE, Recipe(0.008), (1600,), study="s"),
        Run(SHAPE.replace(width=32), Recipe(0.008), (1600, 3200), study="s"),
        Run(SHAPE.replace(width=64), Recipe(0.008), (1600,), study="s"),
        Run(SMALL, Recipe(0.008), (1600,), study="s"),
    ]
    runs_dir = Path(folder) / "runs"
    body = dict(name="s", runs=[r.to_dict() for r in design], ledger="s.jsonl", metric="val_loss")
    write_atomic(runs_dir / "s.design.json", json.dumps(body | dict(command=["make", "s"], folder=str(folder))))
    done = dict(status="ok", val_loss=2.0, num_classes=16, seconds=4.0, spent_seconds=4.0)
    write_record(runs_dir, new_row(design[0], 1600, **done))
    progress = dict(
        phase="trunk", share=0.25, loss=2.5, images_per_second=100.0, flops_per_second=100.0 * per_image(design[1]),
        seconds_left=30.0, window_seconds=2.0,
    )  # fmt: skip
    path = runs_dir / design[1].trunk_id / "progress.json"
    write_atomic(path, json.dumps(progress))
    return design, locked(path.with_name("lock")), [path, path.with_name("lock")]


def backdate(paths, seconds):
    then = time.time() - seconds
    for path in paths:
        os.utime(path, (then, then))


def test_time_left_is_that_of_the_workers_that_run(tmp_path):
    design, lock, paths = planted(tmp_path)
    with lock:
        backdate(paths, 0)
        s = status(tmp_path)
    left = 0.75 * per_image(design[1]) * design[1].total_examples + sum(per_image(r) * 1600 for r in design[2:])
    live = 100 * per_image(design[1])
    assert s.seconds_left == pytest.approx(left / live)
    assert s.flops_per_second == live
    flight = 0.25 * per_image(design[1]) * design[1].total_examples
    assert s.train_flops["done"] == pytest.approx(per_image(design[0]) * 1600 + flight)
    assert s.train_flops["total"] == pytest.approx(sum(per_image(r) * r.total_examples for r in design))
    assert [w["shape"] for w in s.waiting] == ["64x1x32", "8x1x16"]
    assert "no launch of it is alive" in status_text(s)


def test_a_lock_that_is_held_in_silence_is_said(tmp_path):
    _, lock, paths = planted(tmp_path)
    with lock:
        backdate(paths, 50)
        assert not status(tmp_path).workers[0]["stale"]
        backdate(paths, 200)
        s = status(tmp_path)
        assert s.workers[0]["stale"] and s.workers[0]["silent_seconds"] == pytest.approx(200, abs=5)
        assert s.flops_per_second == 0  # it may be dead: it is not counted
        assert "silent for 3 min" in status_text(s) and "no estimate while one is silent" in status_text(s)
        backdate(paths[:1], 300)  # what an earlier attempt said is not what this one does
        assert status(tmp_path).workers[0]["phase"] == "starting"


def test_damaged_files_count_as_missing(tmp_path):
    design, lock, paths = planted(tmp_path)
    paths[0].write_text('{"share": 0.')
    record_path(tmp_path / "runs", design[0].trunk_id, design[0].run_ids[0]).write_text("[]")
    with lock:
        s = status(tmp_path)
    assert s.workers[0]["phase"] == "starting" and s.measurements["missing"] == 5


def test_progress_of_the_dead_is_no_progress(tmp_path):
    design, _, _ = planted(tmp_path)
    s = status(tmp_path)
    assert s.state == "stopped" and not s.workers and s.trunks["waiting"] == 3
    assert s.train_flops["done"] == per_image(design[0]) * 1600
    assert s.resume == f"cd {tmp_path} && make s"


def test_branches_that_only_the_ledger_knows_have_no_trunk_to_go_on_from(tmp_path):
    design, _, _ = planted(tmp_path)
    others = sum(per_image(run) * 1600 for run in design[2:])
    row = new_row(design[1], 1600, status="ok", val_loss=2.1, num_classes=16)
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    assert status(tmp_path).train_flops["left"] == per_image(design[1]) * 3200 + others
    write_record(tmp_path / "runs", row)
    assert status(tmp_path).train_flops["left"] == per_image(design[1]) * (3200 - 1280) + others


def test_rows_of_another_results_folder_are_not_taken_for_its_own(tmp_path, monkeypatch):
    """`--results mine` beside a committed ledger of the same name: nothing is done before the first trunk ends."""
    monkeypatch.chdir(tmp_path)
    design, _, _ = planted(tmp_path)
    row = new_row(design[2], 1600, status="ok", val_loss=2.1, num_classes=16)
    write_atomic(Path("results/s.jsonl"), json.dumps(row) + "\n")
    assert status(".").measurements["ok"] == 1 and status(".").ledger == "s.jsonl"
    assert status(".", results_dir=Path("results")).measurements["ok"] == 2


def test_without_a_design_file_what_is_there_is_told_and_no_more(tmp_path):
    design = runs(3)
    fake_sweep.launch(tmp_path, design)
    (tmp_path / "runs" / "s.design.json").unlink()
    write_atomic(tmp_path / "runs" / design[0].trunk_id / "config.json", json.dumps(design[0].to_dict()))
    s = status(tmp_path, results_dir=tmp_path)
    assert s.state == "unknown" and not s.design_known and s.measurements["ok"] == 3
    assert s.trunks == dict(total=3, done=3, running=0, waiting=0, failed=0)
    assert "what else is asked for is not known without" in status_text(s)


def test_a_committed_ledger_alone(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["status", "stream_star", "--runs", "nowhere", "--json"]) == 0
    s = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (ROOT / "results/stream_star.jsonl").read_text().splitlines()]
    assert s["state"] == "unknown" and s["measurements"]["ok"] == len(rows) == s["measurements"]["total"]
    assert s["train_flops"]["done"] == sum(r["spent_flops"] for r in rows)
    top = [r for r in rows if abs(r["train_flops"] / 1e12 - 1) < 0.02]
    assert s["best"][0]["val_loss"] == min(r["val_loss"] for r in top) and s["best"][0]["num_rows"] == len(top)


def test_a_study_whose_name_begins_like_anothers_is_not_it(tmp_path):
    planted(tmp_path)
    with locked(tmp_path / "runs" / "s.t.0123abcd.plan.json"):
        assert status(tmp_path).launches == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], r"no study 'nope' in .*; there are (.*, )?other, s$"),
        (["s", "--watch", "0"], "--watch 0 must be above 0"),
        (["s", "--watch", "--json"], "leave out --json"),
        (["spoilt"], r"spoilt.design.json is damaged; delete it"),
        (["short"], r"short.design.json lacks 'runs'; delete it"),
    ],
)
def test_bad_input_is_one_line_that_names_what_there_is(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted(tmp_path)
    write_atomic(Path("results/other.jsonl"), "")
    write_atomic(Path("runs/spoilt.design.json"), "{")
    write_atomic(Path("runs/short.design.json"), "{}")
    if arguments == ["nope"]:
        Path("runs/spoilt.design.json").unlink(), Path("runs/short.design.json").unlink()
    assert main(["status", *arguments]) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.startswith("sovit: ") and "\n" not in line and re.search(words, line), line


def test_nothing_at_all(tmp_path):
    with pytest.raises(UserError, match="there is none; launch one first"):
        status(tmp_path, "x", results_dir=tmp_path / "results")
