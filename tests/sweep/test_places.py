"""Names, modes, secrets, locks and damaged stores: what a study writes where, and one line for what is wrong with it."""

import errno
import fcntl
import io
import os
import stat
import sys
from pathlib import Path

import fake_sweep
import pytest
import torch

from sovit import UserError
from sovit.cli.main import main
from sovit.encoder.weights import load_weights, save_weights
from sovit.files import CannotLock, check_name, locked, write_atomic
from sovit.signals import print_anywhere, without_password
from sovit.sweep import launch, queue
from sovit.sweep.study_main import exit_status

URL = "postgresql+psycopg://me:hunter2@db:5432/studies"


@pytest.mark.parametrize("name", ["", ".", "../../x", "a/b", "a\nb", "a\0b", "-x", "x" * 200, "\u732b" * 60, "a\x1bb"])
def test_a_name_that_cannot_be_that_of_files_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot name files"):
        fake_sweep.queue.Sweep(name, fake_sweep.runs(1), tmp_path, tmp_path / "s.jsonl")


def test_names_of_people_are_taken():
    assert [check_name(name) for name in ("icons_star", "run 2, lr=0.01", "\u732b", "v1.2-b")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "record.json", "{}")
        save_weights(torch.nn.Linear(2, 2), tmp_path / "w.safetensors", "a-1")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"record.json": mode, "w.safetensors": mode}


def test_the_password_of_a_store_stands_in_no_file(tmp_path, monkeypatch):
    sweep = fake_sweep.opened(tmp_path, fake_sweep.runs(1))
    sweep.storage = URL
    sweep.runs_dir.mkdir()
    monkeypatch.setattr(sys, "orig_argv", ["python", "studies/x.py", "--storage", URL])
    plan = launch._write_plan(sweep, "cpu", "token")
    for path in (plan, sweep.runs_dir / "s.design.json"):
        assert "hunter2" not in path.read_text() and "me:***@db:5432" in path.read_text()
    crew = launch.Crew(["true"], tmp_path / "log", URL)
    assert crew.environment[queue.STORAGE] == URL
    with pytest.raises(UserError) as caught:
        queue.open_storage(URL)
    assert "hunter2" not in str(caught.value) and "***" in str(caught.value)
    assert without_password("journal:/a:b/c@d") == "journal:/a:b/c@d"


@pytest.mark.parametrize("line", ['{"op_code": 0}', "[1]", '{"op_code": 99, "worker_id": "a"}', '"text"'])
def test_a_journal_with_a_strange_record_is_said_in_one_line(tmp_path, line):
    path = tmp_path / "s.journal"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="is damaged .*; delete it: it is made again from the records") as caught:
        queue.open_storage(f"journal:{path}")
    assert "\n" not in str(caught.value)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(CannotLock, match="choose a folder on a disk with file locks"), locked(tmp_path / "lock"):
        pass


def test_weights_that_say_nonsense_of_themselves_are_no_traceback(tmp_path):
    import safetensors.torch

    from sovit.encoder.weights import Unusable

    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"sovit": "[1, 2]"})
    with pytest.raises(Unusable, match="is no object"):
        load_weights(path)


def test_memory_that_runs_out_in_the_launcher_is_one_line(capsys, monkeypatch):
    def study():
        raise MemoryError("Unable to allocate 9 TiB")

    assert exit_status(study) == 1
    monkeypatch.setattr("sovit.cli.train._named", lambda *_, **__: study())
    assert main(["count", "B/16"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("out of memory (Unable to allocate 9 TiB)" in line for line in lines)


def test_a_terminal_that_lacks_a_letter_prints_a_question_mark(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_anywhere()
    print("3 \u2192 4", flush=True)
    assert stream.buffer.getvalue() == b"3 ? 4\n"


def test_a_study_may_not_be_written_elsewhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["finetune", "timm:x", "--name", "../y"], ["vlm", "train", "blind:16", "--name", "../y"]):
        assert main(command) == 2
        assert "cannot name files" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not Path("../y.jsonl").exists()
