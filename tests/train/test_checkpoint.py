"""Checkpoint files: whatever is damaged is found, and what cannot be written destroys nothing."""

import contextlib
import os
import random
import resource
import subprocess

import pytest
import safetensors.torch
import torch

from sovit.encoder.weights import Unusable, load, load_weights, save, save_weights
from sovit.files import CannotWrite, write_atomic
from sovit.train import checkpoint
from sovit.train.checkpoint import Checkpoints, check_fits


def some_state(seed=0, step=7):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(40, 3, generator=generator), "b": torch.randn(5, generator=generator)}
    optimizer = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}
    position = {"trunk_id": "t", "branch": None, "step": step, "seconds": 1.5, "spent": 0.5}
    return {**position, "window": None, "model": weights, "optimizer": optimizer}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def flipped(data, rng):
    place = rng.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


# damage --------------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path):
    save(some_state(), tmp_path / "x.pt")
    assert equal(load(tmp_path / "x.pt"), some_state())
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """torch.load by itself gives other weights in most of these files, and says nothing."""
    rng, path, silent = random.Random(0), tmp_path / "x.pt", 0
    save(some_state(), path)
    data, found = path.read_bytes(), 0
    for _ in range(300):
        path.write_bytes(flipped(data, rng))
        try:
            assert equal(load(path), some_state())  # the bit stood in padding
        except Unusable:
            found += 1
            with contextlib.suppress(Exception):
                silent += not equal(torch.load(path, weights_only=True), some_state())
    assert found > 100 and silent > 50


def test_no_shortened_file_goes_unnoticed(tmp_path):
    rng, path = random.Random(0), tmp_path / "x.pt"
    save(some_state(), path)
    data = path.read_bytes()
    for length in (0, 1, len(data) - 1, *(rng.randrange(len(data)) for _ in range(30))):
        path.write_bytes(data[:length])
        with pytest.raises(Unusable, match="damaged"):
            load(path)


@pytest.mark.parametrize("content", [b"no checkpoint", b"\x80\x02]q\x00.", bytes(5000)])
def test_another_file_is_no_checkpoint(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(Unusable, match="damaged"):
        load(tmp_path / "x.pt")


def test_weights_know_whether_they_are_damaged(tmp_path):
    """safetensors by itself reads a flipped bit of a weight as the weight."""
    model, path, rng, found = torch.nn.Linear(40, 30), tmp_path / "x.safetensors", random.Random(0), 0
    save_weights(model, path, "r-1")
    weights, data = model.state_dict(), path.read_bytes()
    assert equal(dict(sorted(load_weights(path)[0].items())), dict(sorted(weights.items())))
    for _ in range(100):
        path.write_bytes(flipped(data, rng))
        try:
            assert all(torch.equal(t, weights[name]) for name, t in load_weights(path)[0].items())
        except Unusable:
            found += 1
    assert found > 90
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(Unusable):
        load_weights(path)
    safetensors.torch.save_file(weights, path)  # of a time when no checksum was kept
    assert load_weights(path)[0].keys() == weights.keys()


# which is taken -------------------------------------------------------------------------------------------------------


@pytest.fixture
def states(tmp_path):
    """Batches of 10; branches to 100 and 200 examples leave the trunk at 80 and 160."""
    kept = Checkpoints(tmp_path, "t", 10)
    for step in (8, 16):
        kept.save_point(some_state(step=step), 10 * step)
    return kept


def reached(kept, branch=200, leaves=160, check=lambda state: None):
    state = kept.furthest(branch, leaves, check)
    return state and (state["branch"], state["step"], state["spent"])


def test_the_furthest_state_towards_a_branch(states):
    assert reached(states) == (None, 16, 0.5)
    assert reached(states, 300, 240) == (None, 16, 0.0)  # what was spent before is the bill of another branch
    assert reached(states, 100, 80) == (None, 8, 0.5)
    assert reached(states, 50, 40) is None
    states.save_latest(some_state(step=12))
    assert reached(states) == (None, 16, 0.5)
    states.save_latest(some_state(step=18) | {"branch": 200})
    assert reached(states) == (200, 18, 0.5)
    assert reached(states, 300, 240) == (None, 16, 0.0)
    (states.folder / "latest.pt").write_bytes(b"")
    (states.folder / "trunk-160.pt").write_bytes(b"")
    assert reached(states) == (None, 12, 0.5)  # previous.pt
    (states.folder / "previous.pt").unlink()
    assert reached(states) == (None, 8, 0.0)
    (states.folder / "trunk-80.pt").unlink()
    assert reached(states) is None


def test_what_is_not_used_is_said_in_one_line(states, capsys):
    (states.folder / "trunk-160.pt").write_bytes(b"x")
    assert reached(states) == (None, 8, 0.0)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "trunk-160.pt is not used (damaged: BadZipFile" in line
    save(some_state() | {"trunk_id": "u"}, states.latest)
    save(some_state(step=9), states.folder / "trunk-160.pt")
    assert reached(states) == (None, 8, 0.0)
    first, second = capsys.readouterr().err.splitlines()
    assert "latest.pt is not used (it belongs to the trunk u)" in first
    assert "trunk-160.pt is not used (it holds step 9)" in second


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"a": torch.zeros(2, 3), "b": torch.zeros(5)}}, r"a has shape \[2, 3\] there and \[40, 3\] here"),
        ({"model": {"a": torch.zeros(40, 3)}}, r"b has shape None there and \[5\] here"),
        ({"model": {**some_state()["model"], "c": torch.zeros(1)}}, r"c has shape \[1\] there and None here"),
        ({"model": None}, "it is no state of training, it lacks weights"),
        ({"optimizer": {"param_groups": [{"params": [0]}]}}, r"groups of \[1\] tensors, here they are of \[2\]"),
        ({}, None),
    ],
)
def test_a_state_of_something_else_does_not_fit(change, reason):
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Parameter(torch.zeros(40, 3)), torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW(model.parameters())
    if reason is None:
        check_fits(some_state(), model, optimizer)
        with pytest.raises(Unusable, match="it lacks step"):
            check_fits({k: v for k, v in some_state().items() if k != "step"}, model, optimizer)
    else:
        with pytest.raises(Unusable, match=reason):
            check_fits(some_state() | change, model, optimizer)


def test_a_save_keeps_the_one_before_and_clears_what_a_kill_left(tmp_path):
    (tmp_path / "latest.pt.tmp").write_bytes(b"half")
    kept = Checkpoints(tmp_path, "t", 10)
    assert not list(tmp_path.iterdir())
    for step in (1, 2, 3):
        kept.save_latest(some_state(step=step))
    assert (load(kept.latest)["step"], load(kept.previous)["step"]) == (3, 2)
    kept.drop_latest()
    assert not list(tmp_path.iterdir())


# a full disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_disk(folder):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tiny disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def small_files(folder):
    """No disk that is full, but files that may not grow: what an ordinary user can have."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limited", [tiny_disk, small_files])
def test_a_full_disk_destroys_nothing_and_says_so(tmp_path, limited):
    large = some_state() | {"model": {"a": torch.zeros(100_000), "b": torch.zeros(5)}}
    model = torch.nn.Linear(1000, 100)
    disk = tmp_path / "disk"
    disk.mkdir()
    with limited(disk):
        kept = Checkpoints(disk, "t", 10)
        for step in (1, 2):
            kept.save_latest(some_state(step=step))
        attempts = {
            "latest.pt": lambda: kept.save_latest(large),
            "trunk-80.pt": lambda: kept.save_point(large, 80),
            "r-1.safetensors": lambda: save_weights(model, disk / "r-1.safetensors", "r-1"),
            "r-1.json": lambda: write_atomic(disk / "r-1.json", "x" * 400_000),
        }
        for name, attempt in attempts.items():
            with pytest.raises(CannotWrite) as caught:
                attempt()
            reason = "No space left on device" if limited is tiny_disk else "File too large"
            line = f"cannot write {disk / name}: {reason}; free some space, and run the same command again"
            assert str(caught.value) == line
        assert sorted(os.listdir(disk)) == ["latest.pt", "previous.pt"]
        assert (load(kept.latest)["step"], load(kept.previous)["step"]) == (2, 1)


def test_other_errors_while_saving_are_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint.torch, "save", lambda *arguments: (_ for _ in ()).throw(RuntimeError("no disk's fault"))
    )
    with pytest.raises(RuntimeError, match="no disk's fault"):
        save(some_state(), tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())
