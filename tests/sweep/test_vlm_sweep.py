"""Vision-language runs beside encoders in one study: queue, kills, rows, plan, status, tracking."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from sovit import UserError
from sovit.files import locked
from sovit.ledger.ledger import read_ledger
from sovit.ledger.measurements import measurements
from sovit.ledger.schema import INCIDENTAL, failed_row
from sovit.report.shown_rows import curve, describe
from sovit.spec.any_run import run_from_dict
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.spec.vlm_run import Part, Stage, VlmRun
from sovit.sweep import launch, queue, study_main
from sovit.sweep.plan import plan_of, print_plan
from sovit.sweep.status import study_status
from sovit.sweep.status_text import status_text
from sovit.sweep.study_main import overridden

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
ENCODER = Run(SHAPE, Recipe(peak_lr=0.01, warmup_examples=80), (160,), study="s")
EYE = ENCODER.run_ids[0]


def reader(*stages, encoder=EYE, **more):
    setting = dict(language_model="random:1x32", families=("colours_row",), template="short", max_length=2048)
    return VlmRun(encoder, stages, **(setting | dict(batch_size=1, num_val=2, study="s") | more))


GOOD = reader(Stage(150, projector=Part("full", 0.01)), Stage(50, language_model=Part("full", 1e-3)))
WILD = reader(Stage(5, projector=Part("full", 1e30)))
BROKEN = reader(Stage(5), projector="nonsense")
DESIGN = [GOOD, WILD, BROKEN, ENCODER]  # asked for before the encoder that they read


def opened(folder, runs=DESIGN, name="s", **more):
    return queue.Sweep(name, [r.replace(study=name) for r in runs], folder / "runs", folder / f"{name}.jsonl", **more)


def begun(folder):
    path = folder / "runs" / "begun"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The study, launched with 2 workers, of which the one that trains GOOD is killed in the middle."""
    folder, ended = tmp_path_factory.mktemp("study"), threading.Event()

    def kill():
        while not (folder / "runs" / GOOD.trunk_id / "latest.pt").exists() and not ended.is_set():
            time.sleep(0.005)
        if not ended.is_set():
            os.kill(next(int(pid) for trunk, pid in begun(folder) if trunk == GOOD.trunk_id), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    worker = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "vlm_worker.py")]
    rows = launch.launch(opened(folder), 2, worker_command=worker)
    ended.set()
    thread.join()
    return SimpleNamespace(folder=folder, rows={row["trunk_id"]: row for row in rows})


def trials(folder):
    storage = queue.open_storage(f"journal:{folder / 'runs' / 's.journal'}")
    return optuna.load_study(study_name="s", storage=storage).get_trials(deepcopy=False)


def test_each_run_has_its_row_whatever_its_kind_and_end(swept):
    rows = swept.rows
    assert {t: row["status"] for t, row in rows.items()} == {
        ENCODER.trunk_id: "ok",
        GOOD.trunk_id: "ok",
        WILD.trunk_id: "diverged",
        BROKEN.trunk_id: "failed",
    }
    assert "kind" not in rows[ENCODER.trunk_id] and rows[GOOD.trunk_id]["kind"] == "vlm"
    assert "not finite" in rows[WILD.trunk_id]["error"] and "nonsense" in rows[BROKEN.trunk_id]["error"]
    order = [trunk for trunk, _ in begun(swept.folder)]
    assert order[0] == ENCODER.trunk_id  # the models wait for their eye
    assert read_ledger(swept.folder / "s.jsonl") == sorted(rows.values(), key=lambda row: row["run_id"])


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_repeats_nothing(swept, tmp_path):
    """Its successor goes on from the saved step, to the row of a run that nobody killed."""
    from sovit.vlm.trainer import train

    assert Counter(trunk for trunk, _ in begun(swept.folder)) == Counter(
        {ENCODER.trunk_id: 1, GOOD.trunk_id: 2, WILD.trunk_id: 1, BROKEN.trunk_id: 1}
    )
    lines = (swept.folder / "runs" / GOOD.trunk_id / "metrics.jsonl").read_text().splitlines()
    steps = Counter(json.loads(line)["step"] for line in lines)
    # a kill between a line and its save writes that line twice
    assert set(steps) == {50, 100, 150, 200} and steps.total() <= 5
    shutil.copytree(swept.folder / "runs" / ENCODER.trunk_id, tmp_path / ENCODER.trunk_id)
    (whole,) = json.loads(json.dumps(train(GOOD, tmp_path)))
    row = swept.rows[GOOD.trunk_id]
    assert {k: row[k] for k in set(whole) - INCIDENTAL} == {k: whole[k] for k in set(whole) - INCIDENTAL}


def test_a_second_launch_does_nothing(swept, capsys):
    again = opened(swept.folder, [GOOD, WILD, ENCODER], "t")  # without what fails each time
    again.ledger.write_text("".join(json.dumps(swept.rows[t] | {"study": "t"}) + "\n" for t in again.runs))
    before, trained = sorted(map(str, read_ledger(again.ledger))), begun(swept.folder)
    rows = study_main.run_sweep(again, 2)
    assert sorted(map(str, rows)) == before and begun(swept.folder) == trained
    assert "all 3 trunks are done already" in capsys.readouterr().err


def test_a_deleted_journal_is_rebuilt(swept):
    found = [t for t in trials(swept.folder) if t.value is not None]
    (swept.folder / "runs" / "s.journal").unlink()
    study = queue.open_study("s", queue.open_storage(opened(swept.folder).storage), DESIGN)
    queue.reconcile(opened(swept.folder), study, "token")
    rebuilt = [t for t in trials(swept.folder) if t.value is not None]
    for one in (found, rebuilt):
        assert {t.user_attrs["trunk_id"]: t.value for t in one} == {
            run.trunk_id: swept.rows[run.trunk_id]["val_loss"] for run in (ENCODER, GOOD)
        }
        (own,) = (t for t in one if t.user_attrs["trunk_id"] == GOOD.trunk_id)
        assert own.params["stage1_projector_lr"] == 0.01 and own.params["stage1_language_model_lr"] == 0.0
        assert own.params["stage2_num_examples"] == 50 and own.params["num_examples"] == 200
        assert own.user_attrs["language_model"] == "random:1x32" and own.user_attrs["encoder"] == EYE


def test_a_model_is_no_encoder(swept):
    from sovit.encoder.open import load_encoder

    with pytest.raises(UserError, match=f"{GOOD.run_ids[0]} is a vision-language model; name the encoder"):
        load_encoder(GOOD.run_ids[0], swept.folder / "runs")


# refused before anything is trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, said",
    [
        (reader(Stage(5), encoder="0123456789-160"), "needs the encoder 0123456789-160, whose weights are not in"),
        (reader(Stage(5), encoder="random:0123456789-160"), "needs the encoder 0123456789-160"),
        (reader(Stage(5), encoder=ENCODER.run_id(320)), "needs the encoder"),  # a branch that nobody asked for
        (reader(Stage(5), language_model="moon"), "'moon' is of no known kind"),
        (reader(Stage(5), families=("moon",)), "family='moon' is unknown"),
        (reader(Stage(5), num_val=10**6), "num_val=1000000 .* images"),
        (BROKEN, "projector='nonsense' is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_stops_the_launch_in_one_line(tmp_path, capsys, monkeypatch, wrong, said):
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("workers were started"))
    options = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert study_main.main("doc", "s", lambda: [ENCODER, wrong], options) == 2
    err = capsys.readouterr().err
    with pytest.raises(UserError, match=said):
        raise UserError(err)
    assert err.count("\n") == 1


# overrides -----------------------------------------------------------------------------------------------------------


def test_overrides_reach_what_has_the_field_and_an_eye_follows_its_encoder():
    blind = reader(Stage(5), encoder="blind:16")
    control = reader(Stage(5), encoder=f"random:{EYE}")
    runs = [GOOD, control, blind, ENCODER]
    good, other, blind_now, encoder = overridden(
        runs, ["recipe.peak_lr=0.02", "precision=bfloat16", "stages.0.num_examples=40", "stages.1.projector.warmup=0"]
    )
    assert encoder.recipe.peak_lr == 0.02 and encoder.recipe.precision == "float32"
    assert good.encoder == encoder.run_ids[0] != EYE and other.encoder == f"random:{encoder.run_ids[0]}"
    assert [run.precision for run in (good, other, blind_now)] == ["bfloat16"] * 3 and blind_now.encoder == "blind:16"
    assert good.stages == (
        Stage(40, projector=Part("full", 0.01)),
        Stage(50, projector=Part("full", 1e-3, warmup=0.0), language_model=Part("full", 1e-3)),
    )
    assert other.stages == (Stage(40),)
    assert overridden(runs, []) == runs


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("stages.2.num_examples=40", "unknown key .* keys are .*stages.1.num_examples.*shape.width"),
        ("stages.0.num_examples=many", "'many' is not a value"),
        ("stages.0.num_examples=4.5", "must be of type int"),
        ("stages.0.vision.peak_lr=0.1", "what is trained needs a rate, frozen none"),
        ("stages.0.projector.mode=half", "mode='half' is unknown"),
        ("stages", "unknown key"),
        ("budgets=[320]", f"takes away {EYE}, at which other runs of this study begin"),
    ],
)
def test_wrong_overrides_are_said(wrong, said):
    with pytest.raises(UserError, match=said):
        overridden([GOOD, ENCODER], [wrong])


def test_both_kinds_survive_their_json():
    for run in DESIGN:
        assert run_from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_the_row_of_a_failure_says_what_was_asked_for():
    row = failed_row(BROKEN, BROKEN.num_examples, "why", date="now")
    assert (row["status"], row["error"], row["encoder"], row["val_loss"]) == ("failed", "why", EYE, None)
    assert {k: row[k] for k in BROKEN.columns} == BROKEN.columns


# plan, status, tracking, laws ----------------------------------------------------------------------------------------


def test_the_plan_of_a_model_names_its_stages(swept, tmp_path, capsys):
    shutil.copytree(swept.folder / "runs" / ENCODER.trunk_id, tmp_path / "runs" / ENCODER.trunk_id)
    good, encoder = plan_of(opened(tmp_path, [*DESIGN[:1], ENCODER]), 2, "cpu")["trunks"]
    assert good["seconds"] is None and not good["done"] and encoder["done"]
    print_plan(opened(tmp_path, [GOOD, WILD, ENCODER]), 1, "cpu", [], as_json=False)
    text = capsys.readouterr().out
    assert EYE in text and "projector full 0.01: 150 images" in text and "16x1x32" in text


def test_status_of_a_study_with_models(swept):
    found = study_status("s", swept.folder / "runs")
    assert found.state == "stopped" and found.trunks["done"] == 3 and found.trunks["failed"] == 1
    assert {row["run_id"] for row in found.best} == {EYE, GOOD.run_ids[0]}
    assert f"{EYE} random:1x32" in status_text(found)


def test_status_of_a_model_in_training(tmp_path):
    """Its FLOPs are what its worker says, and another's on the same language model what these are."""
    runs, waiting = tmp_path / "runs", reader(Stage(100))
    folder = runs / GOOD.trunk_id
    folder.mkdir(parents=True)
    design = dict(runs=[r.to_dict() for r in (GOOD, waiting)], command=["x"], folder=str(tmp_path), metric="val_loss")
    (runs / "s.design.json").write_text(json.dumps(design | {"ledger": str(tmp_path / "s.jsonl")}))
    before = study_status("s", runs)
    assert before.train_flops["total"] == 0
    with locked(folder / "lock"):
        time.sleep(0.02)  # a file's date has the kernel's tick
        progress = dict(trunk_id=GOOD.trunk_id, phase="stage 1", share=0.25, loss=1.0, window_seconds=1.0)
        paces = dict(images_per_second=2.0, flops_per_second=6e9, seconds_left=75.0)
        (folder / "progress.json").write_text(json.dumps(progress | paces))
        found = study_status("s", runs)
    assert found.train_flops["left"] == pytest.approx(3e9 * (150 + 100)) and found.seconds_left == pytest.approx(125)
    assert "stage 1" in status_text(found)


def test_tracking_shows_parts_stages_and_controls(swept):
    shown = {w.row["trunk_id"]: w for w in describe("s", list(swept.rows.values()), {})}
    good, encoder = shown[GOOD.trunk_id], shown[ENCODER.trunk_id]
    params = good.params
    assert params["encoder"] == EYE and params["language_model"] == "random:1x32" and params["layer"] == "-1"
    assert params["stages.0.projector.peak_lr"] == "0.01" and params["stages.1.language_model.mode"] == "full"
    assert "stages.0.language_model.mode" not in params and "width" not in params and "encoder" not in encoder.params
    row = swept.rows[GOOD.trunk_id]
    for metric in ("val_loss", "val_error", "shuffled_error", "val_unparsed"):
        assert good.metrics.get(f"final/{metric}") == row[metric]
    assert good.metrics["skill/val_error/colours_row"] == row["val_error/colours_row"]
    assert good.metrics["skill/shuffled_error/colours_row"] == row["shuffled_error/colours_row"]
    assert good.tags["kind"] == "vlm" and good.tags["control"] == "none"
    points = curve(row, swept.folder / "runs" / GOOD.trunk_id / "metrics.jsonl")
    assert [examples for examples, _, _ in points] == [50, 100, 150, 200]
    assert points[-1][2]["compute/train_flops"] == row["train_flops"] and "train/loss" in points[0][2]


def test_no_law_is_fitted_to_models(swept, tmp_path):
    data = measurements([swept.folder / "s.jsonl"])
    assert [row["run_id"] for row in data.rows] == [EYE]
    assert dict(data.left_out)[GOOD.run_ids[0]].startswith("a vision-language model")
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(swept.rows[GOOD.trunk_id]) + "\n")
    with pytest.raises(UserError, match="none of the 1 rows is usable .*vision-language models"):
        measurements([only])


def test_the_end_of_a_study_names_what_can_be_done_with_it(swept, capsys):
    options = ["--runs", str(swept.folder / "runs"), "--results", str(swept.folder)]
    assert study_main.main("doc", "u", lambda: [GOOD, ENCODER], options) == 0
    assert f"next: sovit track {swept.folder / 'u.jsonl'}" in capsys.readouterr().out
