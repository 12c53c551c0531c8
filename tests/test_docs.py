"""README.md and docs/: their numbers come from committed files, their links lead somewhere, their commands exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import docs
from sovit.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in docs.pages()]


def commands(text: str) -> list[list[str]]:
    """Words of each line of the blocks of code without a language, comments apart."""
    blocks = re.findall(r"^```\n(.*?)^```$", docs.BLOCK.sub("", text), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words]


@pytest.mark.parametrize("page", PAGES)
def test_numbers_come_from_the_committed_files(page):
    text = page.read_text()
    assert docs.render(text) == text, "run python -m analysis.docs"
    assert text.count("<!-- end -->") == len(docs.BLOCK.findall(text)) == text.count("<!--") / 2


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    linked = [page.parent / name for name in re.findall(r"\]\((?!http)([^)#]+)", text)]
    linked += [ROOT / name for name in re.findall(r"`((?:sovit|studies|analysis|tests|results)/[\w/.]*)`", text)]
    assert [str(path) for path in linked if not path.exists()] == []
    for name, path in re.findall(r"`([A-Z]{3,})` (?:of|in)\s+`([\w/]+\.py)`", text):
        assert re.search(rf"^{name}\b", (ROOT / path).read_text(), re.MULTILINE), f"no {name} in {path}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page):
    for words in commands(page.read_text()):
        if words[0] == "sovit":
            app.parse_args(words[1:], exit_on_error=False, print_error=False)
        elif words[0] == "python" and words[1] == "-m" and words[2].startswith("analysis."):
            assert (ROOT / Path(*words[2].split("."))).with_suffix(".py").exists(), words
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).exists(), words


def test_every_command_stands_on_a_page():
    text = "".join(path.read_text() for path in docs.pages())
    assert [name for name in app if not name.startswith("-") and f"sovit {name}" not in text] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def examples():
    """Each block of Python; a fit with its intervals takes half a minute."""
    for page in docs.pages():
        for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            yield pytest.param(code, id=page.name, marks=[pytest.mark.slow] if "fit_law" in code else [])


@pytest.mark.parametrize("code", list(examples()))
def test_examples_in_python_run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
