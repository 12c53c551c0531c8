"""A branch is found by its id or its trunk's, and where it is not, what is there is said."""

import json

import pytest

from sovit import UserError
from sovit.ledger.records import find_branch


def make(runs, trunk_id, *examples, kind=""):
    folder = runs / trunk_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"kind": kind} if kind else {}))
    for n in examples:
        (folder / f"{trunk_id}-{n}.safetensors").touch()


def test_a_trunk_alone_means_its_branch_of_most_images(tmp_path):
    make(tmp_path, "aa11", 960, 80, 1600)
    make(tmp_path, "bb22", 320)
    assert find_branch("aa11", tmp_path) == "aa11-1600"
    assert find_branch("aa11-80", tmp_path) == "aa11-80"


@pytest.mark.parametrize(
    "name", ["cc33", "aa11-81", "aa", "", "..", "../runs/aa11", "aa11-*", "a b", "aa11-80.safetensors"]
)
def test_what_is_not_there_is_refused_with_what_is(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs", "aa11", 80)
    with pytest.raises(UserError, match=r"in runs/ \(it holds 1 runs, such as aa11-80\)"):
        find_branch(name, "runs")


def test_a_run_in_another_folder_of_runs_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "demo" / "runs", "aa11", 80)
    for name in ("aa11", "aa11-80"):
        with pytest.raises(UserError, match="but in demo/runs/"):
            find_branch(name, "runs")


def test_an_encoder_and_a_vision_language_model_are_not_taken_for_each_other(tmp_path):
    make(tmp_path, "aa11", 80)
    make(tmp_path, "bb22", 80, kind="vlm")
    assert find_branch("bb22", tmp_path, vlm=True) == "bb22-80"
    with pytest.raises(UserError, match="aa11-80 is an encoder"):
        find_branch("aa11", tmp_path, vlm=True)
    with pytest.raises(UserError, match="bb22-80 is a vision-language model"):
        find_branch("bb22-80", tmp_path)
