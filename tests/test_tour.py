"""The README's tour, on small settings, in a copy of the repository: nothing is written that git sees."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAW = "results/stream_star_law/law.json"
TINY = "--head-dim 8 --patch-size 4 --image-size 16 --repeats 1 --batch-sizes 1"
QUICK = [
    "sovit count B/16 vit_base_patch16_224 So400m/14@378",
    "studies/sovit_paper.py --dry-run",
    f"sovit predict {LAW} --train-flops 3e12",
    f"sovit predict {LAW} --frontier",
    "sovit fit results/stream_isoflop.jsonl --bootstrap 0",
    "sovit report results/stream_star.jsonl",
    "sovit data show stream:cpu",
    "sovit status stream_star",
]
SLOW = [
    "studies/stream_isoflop.py --workers 2 budgets=[640] recipe.warmup_examples=64",
    "studies/active_sweep.py --dry-run",
    f"studies/validate_prediction.py {LAW} --train-flops 2e12 --dry-run",
    f"sovit profile 16x1x32 {TINY}",
    "sovit track stream_isoflop",
]


@pytest.fixture
def copy(tmp_path):
    """A git repository of what this one tracks, as it is in the working tree, without a change."""

    def git(*arguments, folder=ROOT):
        options = ["-c", "user.name=sovit", "-c", "user.email=sovit@example.com"]
        return subprocess.run(
            ["git", *options, *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout

    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    folder = tmp_path / "sovit"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("init", "-q", folder=folder)
    git("add", "-A", folder=folder)
    git("commit", "-q", "-m", "copy", folder=folder)
    return folder, lambda: git("status", "--porcelain", folder=folder)


@pytest.mark.parametrize("tour", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_no_command_of_the_tour_changes_what_git_sees(copy, tour):
    folder, changes = copy
    environment = os.environ | {"PYTHONPATH": str(folder)}
    for line in tour:
        words = shlex.split(line)
        command = [sys.executable, *(["-m"] if words[0] == "sovit" else []), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert changes() == "", line
    assert (folder / "runs" / "results").is_dir()
