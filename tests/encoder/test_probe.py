"""Probing encoders: a real folder of images, real training, records and ledgers; a kill loses nothing."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from icon_package import small_package, write_package
from PIL import Image

from sovit import UserError
from sovit.cli.main import main
from sovit.data import open_data
from sovit.data.icons import labels
from sovit.encoder import probe
from sovit.encoder.open import load_encoder
from sovit.ledger.few_shot_columns import column, is_probed
from sovit.ledger.ledger import read_ledger, update_ledger
from sovit.ledger.records import read_record, record_path
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import launch, queue, study_main
from sovit.sweep import worker as sweep
from sovit.train.trainer import train

SHAPE = Shape(16, 1, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
RUN = Run(SHAPE, Recipe(peak_lr=0.008, warmup_examples=160), (320, 640), study="s")
CLASSES = ("flat", "bars", "steps")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The name of a folder of noisy pictures: 30 to train on and 20 to test on of each class, 16 px; and its cache."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    x = np.linspace(0, 1, 16)
    patterns = {"flat": 0 * x, "bars": np.sin(12 * x), "steps": np.sign(np.sin(25 * x))}
    for split, count in (("train", 30), ("test", 20)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                grey = 0.5 + 0.1 * patterns[name] + 0.2 * random.standard_normal((16, 16))
                pixels = (255 * np.clip(grey, 0, 1)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield f"hub:{root}?flip=0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs with RUN in it, trained without a probe, and its rows."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(RUN, folder)


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of that folder."""
    for path in trained[0].rglob("*"):
        if path.is_file() and path.suffix != ".pt":
            copy = tmp_path / "runs" / path.relative_to(trained[0])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "runs"


def expected_errors(encoder, name):
    """big_vision's evaluator written out on the features of the whole pool, its loop and all."""
    source = open_data("hub", name.removeprefix("hub:"), 16, 4, data_seed=probe.PROBE_SEED)

    def read(batch):
        image = batch.images / 2 + 0.5  # what was decoded, in [0, 1]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.preprocess.mean, encoder.preprocess.std))
        return encoder.pooled((image - mean) / std).double().numpy(), batch.labels.numpy()

    (pool, labels), (test, test_labels) = read(source.train(0, 90)), read(source.val(0, 60))
    errors = {}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        indices = [rng.permutation(np.where(labels == c)[0]) for c in range(3)]
        for shots in (1, 5, 10, 25):
            rows = np.concatenate([order[:shots] for order in indices])
            mean, std = pool[rows].mean(0), pool[rows].std(0) + 1e-5
            z, zt = (np.pad((v - mean) / std, ((0, 0), (0, 1)), constant_values=100.0) for v in (pool[rows], test))
            y = 2.0 * np.eye(3)[labels[rows]] - 1.0
            weights = np.linalg.solve(z.T @ z + 1024 * np.eye(z.shape[1]), z.T @ y)
            errors.setdefault(shots, []).append(float(((zt @ weights).argmax(1) != test_labels).mean()))
    return errors


def test_errors_of_a_trained_run_and_of_its_control(runs, pictures):
    data = probe.open_probe(pictures, 16, 4)
    assert data.pool_size == 90  # an epoch: an image shown twice is no second example
    assert data.zero_line == pytest.approx(2 / 3)
    for name in (RUN.run_ids[0], f"random:{RUN.run_ids[0]}"):
        encoder = load_encoder(name, runs)
        assert probe.probe(encoder, data) == expected_errors(encoder, pictures)


def test_pixels_are_a_baseline(pictures):
    encoder = load_encoder("pixels:16")
    data = probe.open_probe(pictures, 16, 16)
    support, test, labels = probe.features(encoder, data)
    raw = data.source._images[data.source._val_rows].astype(np.float32) / 255  # [V, 16, 16, 3]
    np.testing.assert_allclose(test, raw.transpose(0, 3, 1, 2).reshape(60, -1), atol=1e-6)
    assert support.shape == (len(data.support), 768) and (labels == data.source._labels[data.source._val_rows]).all()
    assert np.mean(probe.probe(encoder, data)[25]) < 0.5


def test_a_tower_sees_images_as_in_training(runs, pictures):
    """Un-normalised and normalised again: a tower trained on a source sees what it was trained on."""
    encoder = load_encoder(RUN.run_ids[0], runs)
    images = open_data("stream", "cpu", 16, 4, 0).val(0, 8).images
    torch.testing.assert_close(encoder.preprocess(images * 0.5 + 0.4), images, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "patch", "message"),
    [
        ("stream:cpu", 4, "stream:cpu has a label a patch; a probe needs one an image, such as icons:single40"),
        ("pictures", 5, "at 16 px, in patches of 5: patch_size=5 does not divide"),
        ("nothing:x", 4, "data='nothing' is unknown"),
        ("hub:", 4, "needs a preset"),
    ],
)
def test_data_that_cannot_be_probed_on(pictures, name, patch, message):
    with pytest.raises(UserError, match=message) as error:
        probe.open_probe(pictures if name == "pictures" else name, 16, patch)
    assert "\n" not in str(error.value)


def test_too_few_examples_name_the_data(pictures, monkeypatch):
    monkeypatch.setattr(probe, "POOL", 60)
    with pytest.raises(
        UserError, match=r"hub:.*: class \d has \d+ different examples among 60, fewer than 25 shots need"
    ):
        probe.open_probe(pictures, 16, 4)


def test_a_repeated_drawing_is_no_second_example(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py", reason="rendering needs the extra `icons`")
    write_package(tmp_path / "iconify.tgz", small_package())
    monkeypatch.setenv("SOVIT_ICONIFY", str(tmp_path / "iconify.tgz"))
    monkeypatch.setenv("SOVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(labels, "VAL_FAMILY_SHARE", 1.0)
    monkeypatch.setattr(probe, "POOL", 8192)
    source = open_data("icons", "single40", 16, 4, 0)
    per_class = np.bincount(source.classes[source._train_icons], minlength=40)
    fewest = per_class.min()
    assert fewest < 25 and np.bincount(source.train(0, 8192).labels).min() > 75  # shown often enough, but the same ones
    message = (
        f"icons:single40: class {per_class.argmin()} has {fewest} different examples among 8192, fewer than 25 shots"
    )
    with pytest.raises(UserError, match=message):
        probe.open_probe("icons:single40", 16, 4)
    monkeypatch.setattr(probe, "SHOTS", (1, int(fewest)))
    assert probe.open_probe("icons:single40", 16, 4).pool_size <= 8192


# rows ----------------------------------------------------------------------------------------------------------------


def test_a_run_with_a_probe_has_its_columns_and_the_same_measurement(trained, runs, pictures):
    """Trained already: each branch is only probed, once; the id is that of the run without a probe."""
    run = RUN.replace(probe=pictures)
    weights = {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")}
    rows = train(run, runs, on_progress=lambda p: pytest.fail("trained again"))
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")} == weights
    for row, before in zip(rows, trained[1]):
        assert {k: row[k] for k in before} == before and is_probed(row, pictures)
        expected = expected_errors(load_encoder(row["run_id"], runs), pictures)
        assert row[column(10, pictures)] == np.mean(expected[10])
        assert row[column(10, pictures, "sd")] == pytest.approx(np.std(expected[10], ddof=1))
        assert row[f"probe_zero_line/{pictures}"] == pytest.approx(2 / 3)
        assert row == read_record(runs, row["trunk_id"], row["run_id"])
    fresh = train(run, runs.parent / "fresh")  # trained and probed in one go
    incidental = ("seconds", "spent_seconds", "date")
    assert [{k: v for k, v in row.items() if k not in incidental} for row in fresh] == [
        {k: v for k, v in row.items() if k not in incidental} for row in rows
    ]
    records = {p: p.stat().st_mtime_ns for p in runs.rglob("records/*.json")}
    assert train(run, runs) == rows
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("records/*.json")} == records


def _killed_after_the_first(ledger, runs, name):
    real, calls = probe.add_columns, []

    def add(*arguments):
        real(*arguments)
        if calls:
            os.kill(os.getpid(), signal.SIGKILL)  # the record of the second is written, the ledger not
        calls.append(arguments)

    probe.add_columns = add
    probe.probe_ledger(ledger, runs, name)


def test_a_ledger_is_probed_and_a_kill_repeats_nothing(runs, trained, pictures, tmp_path, monkeypatch):
    # a third branch, without its weights, and one that diverged
    ledger = tmp_path / "results" / "s.jsonl"
    lost = trained[1][0] | {"run_id": "lost-320", "trunk_id": "lost"}
    spoilt = trained[1][0] | {"run_id": "spoilt-320", "trunk_id": "spoilt", "status": "diverged", "val_loss": None}
    third = trained[1][1] | {"run_id": f"{RUN.trunk_id}-9", "num_examples": 9}  # has weights and no record of its own
    (runs / RUN.trunk_id / f"{RUN.trunk_id}-9.safetensors").write_bytes(
        (runs / RUN.trunk_id / f"{RUN.run_ids[1]}.safetensors").read_bytes()
    )
    update_ledger(ledger, [*trained[1], lost, spoilt, third])
    process = multiprocessing.get_context("fork").Process(target=_killed_after_the_first, args=(ledger, runs, pictures))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sum(is_probed(row, pictures) for row in read_ledger(ledger)) == 1
    probed = []
    real = probe.probe
    monkeypatch.setattr(probe, "probe", lambda encoder, *more: probed.append(encoder.name) or real(encoder, *more))
    result = probe.probe_ledger(ledger, runs, pictures)
    assert len(probed) == 1  # one was in the ledger, one in its record
    assert (result["probed"], result["probed_before"], result["without_weights"]) == (1, 2, 1)
    rows = {row["run_id"]: row for row in read_ledger(ledger)}
    assert {run_id for run_id, row in rows.items() if is_probed(row, pictures)} == {*RUN.run_ids, third["run_id"]}
    for run_id in RUN.run_ids:
        assert is_probed(json.loads(record_path(runs, RUN.trunk_id, run_id).read_text()), pictures)
    same = [column(shots, pictures, kind) for shots in (1, 25) for kind in ("", "seeds")]
    assert [rows[third["run_id"]][k] for k in same] == [rows[RUN.run_ids[1]][k] for k in same]
    text = ledger.read_text()
    assert probe.probe_ledger(ledger, runs, pictures)["probed"] == 0
    assert ledger.read_text() == text and len(probed) == 1
    # from the command line, with nothing left to do; and with weights that are elsewhere
    arguments = ["probe", "--study", "s", "--data", pictures, "--results", str(ledger.parent), "--runs"]
    assert main([*arguments, str(runs), "--json"]) == 0
    assert main([*arguments, str(tmp_path / "elsewhere")]) == 0
    ledger.write_text(json.dumps(trained[1][0]) + "\n")
    assert main([*arguments, str(tmp_path / "elsewhere")]) == 2


def test_rows_probed_on_other_data_of_the_name_are_not_joined(runs, trained, pictures, tmp_path):
    ledger = tmp_path / "s.jsonl"
    update_ledger(ledger, trained[1])
    probe.probe_ledger(ledger, runs, pictures)
    first, second = read_ledger(ledger)
    for row in (first, second):
        record_path(runs, row["trunk_id"], row["run_id"]).unlink()
    stripped = {k: v for k, v in second.items() if pictures not in k}
    other = first | {f"probe_data_key/{pictures}": "0"}
    ledger.write_text("".join(json.dumps(row) + "\n" for row in (other, stripped)))
    with pytest.raises(UserError, match=f"the data of .* changed since {first['run_id']} was probed"):
        probe.probe_ledger(ledger, runs, pictures)


# studies -------------------------------------------------------------------------------------------------------------


def study(folder, name, metric="val_loss", some_runs=(RUN,), **more):
    named = [run.replace(study=name, **more) for run in some_runs]
    return queue.Sweep(name, named, folder / "runs", folder / "results" / f"{name}.jsonl", metric=metric)


def work_here(found, monkeypatch):
    """`launch`, with its one worker in this process, which saves the start of another."""

    class Here:
        returncode = None

        def __init__(self, command, **more):
            self.plan = command[-1]

        def poll(self):
            if self.returncode is None:
                self.returncode = sweep.work(self.plan)
            return self.returncode

        terminate = wait = lambda self: None

    monkeypatch.setattr(launch, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(launch.subprocess, "Popen", Here)
    monkeypatch.setattr(sweep.os, "getppid", os.getpid)
    return study_main.run_sweep(found, 1)


def values(found):
    storage = queue.open_storage(found.storage)
    return [t.value for t in sweep.optuna.load_study(study_name=found.name, storage=storage).trials]


def test_a_study_whose_metric_is_the_probe(tmp_path, trained, runs, pictures, monkeypatch, capsys):
    metric = column(10, pictures)
    found = study(tmp_path, "s", metric, probe=pictures)
    assert not found.is_done(found.runs[RUN.trunk_id])
    rows = work_here(found, monkeypatch)
    assert all(is_probed(row, pictures) and row["val_loss"] for row in rows)
    assert {row["run_id"]: row["val_loss"] for row in rows} == {r["run_id"]: r["val_loss"] for r in trained[1]}
    assert values(found) == [rows[-1][metric]]
    out = capsys.readouterr()
    assert f"{metric} {rows[-1][metric]:.4f} at" in out.err and "a guess is wrong in 66.7%" in out.out
    # the store is made again with the same values; another metric is another study
    (tmp_path / "runs" / "s.journal").unlink()
    work_here(study(tmp_path, "s", metric, probe=pictures), monkeypatch)
    assert values(found) == [rows[-1][metric]]
    with pytest.raises(UserError, match="the study 's' exists with val_error_10shot/.* as its value, not val_loss"):
        work_here(study(tmp_path, "s"), monkeypatch)


def test_a_ledger_whose_records_are_gone_is_only_probed(tmp_path, trained, runs, pictures, monkeypatch):
    """The rows came from elsewhere with their weights; and without them nothing is trained behind one's back."""
    ledger = tmp_path / "results" / "s.jsonl"
    update_ledger(ledger, trained[1])
    for path in runs.rglob("records/*.json"):
        path.unlink()
    rows = work_here(study(tmp_path, "s", probe=pictures), monkeypatch)
    assert all(is_probed(row, pictures) for row in rows) and len(rows) == 2
    assert not list(runs.rglob("trunk-*.pt"))
    ledger.write_text("".join(json.dumps(row) + "\n" for row in trained[1]))
    for path in [*runs.rglob("*.safetensors"), *runs.rglob("records/*.json"), *runs.rglob("s.journal")]:
        path.unlink()
    with pytest.raises(UserError, match="is not probed on hub:.*, and its weights are not in .*; copy them there"):
        work_here(study(tmp_path, "s", probe=pictures), monkeypatch)


def test_a_metric_needs_its_probe(tmp_path, capsys):
    with pytest.raises(UserError, match="the metric val_error_10shot/icons:single40 of study 's' needs probe=icons:"):
        study(tmp_path, "s", column(10, "icons:single40"))
    with pytest.raises(UserError, match="probe='icons' names no SOURCE:PRESET"):
        RUN.replace(probe="icons")
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    arguments = ["--dry-run", "--json", *folders]
    metric = column(10, "icons:single40")
    assert study_main.main("A study.", "s", lambda: [RUN], [*arguments, "probe=icons:single40"], metric=metric) == 0
    assert study_main.main("A study.", "s", lambda: [RUN], arguments, metric=metric) == 2


def test_the_next_step_names_the_metric(tmp_path, runs, pictures, capsys):
    folders = ["--runs", str(runs), "--results", str(tmp_path / "results")]
    train(RUN.replace(probe=pictures), runs)
    metric = column(5, pictures)
    assert study_main.main("A study.", "s", lambda: [RUN], [*folders, f"probe={pictures}"], metric=metric) == 0
    assert f"s.jsonl --metric {metric}\n" in capsys.readouterr().out


# the command line ----------------------------------------------------------------------------------------------------


def test_encoders_compared_on_the_command_line(runs, pictures, capsys):
    names = [RUN.run_ids[1], f"random:{RUN.run_ids[1]}", "pixels:16"]
    assert main(["probe", *names, "--data", pictures, "--runs", str(runs), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [e["encoder"] for e in result["encoders"]] == names
    expected = expected_errors(load_encoder(names[0], runs), pictures)
    for shots, found in result["encoders"][0]["shots"].items():
        assert found["errors"] == expected[int(shots)]
        assert (found["error"], found["sd"]) == (np.mean(found["errors"]), np.std(found["errors"], ddof=1))
    assert main(["probe", *names[2:], "--data", pictures]) == 0
    text = capsys.readouterr().out
    assert f"{result['encoders'][2]['shots']['10']['error']:.4f} ± " in text and "a guess is wrong in 0.6667" in text


@pytest.mark.parametrize(
    "arguments", [[], ["pixels:16", "--study", "s"], ["pixels:none"], ["pixels:²"], ["nobody-320"]]
)
def test_bad_arguments(arguments, pictures, tmp_path, capsys):
    assert main(["probe", *arguments, "--data", pictures, "--runs", str(tmp_path)]) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.startswith("sovit: ") and "\n" not in line
