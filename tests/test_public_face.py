"""The public names: each loads when it is used, and its docstring holds an example that runs."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from photographs import write_folder

import sovit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the committed results, images, and the branch that the example of run_study trains."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "results").symlink_to(ROOT / "results")
    write_folder(folder / "images", 240, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shape = sovit.Shape(8, 1, 16, head_dim=8, patch_size=4, image_size=16, pool="none")
        sovit.run_study([sovit.Run(shape, sovit.Recipe(0.01, warmup_examples=16), (80,))], workers=1, name="made")
    return folder


@pytest.mark.parametrize("name", sovit.__all__)
def test_the_example_of_a_public_name_runs(name, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("SOVIT_CACHE", str(home / "cache"))
    thing = getattr(sovit, name)
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs={"sovit": sovit})
    assert sum(len(test.examples) for test in found), f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert runner.summarize().failed == 0


def test_every_public_name_is_what_a_type_checker_sees():
    for name in sovit.__all__:
        assert getattr(importlib.import_module(f"sovit.{sovit._HOME[name]}"), name) is getattr(sovit, name)
    assert set(sovit.__all__) == set(sovit._HOME) and set(sovit.__all__) <= set(dir(sovit))
    with pytest.raises(AttributeError, match="no attribute 'shape_of_things'"):
        _ = sovit.shape_of_things


def test_the_command_line_is_a_module_too():
    done = subprocess.run([sys.executable, "-m", "sovit", "--version"], capture_output=True, text=True, check=True)
    assert sovit.__version__ in done.stdout
