"""The bounds in pyproject.toml are the versions of `make test-oldest`, no newer and no older."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_lower_bounds_are_the_oldest_versions_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["vlm"], *extras["icons"], *extras["dashboard"]]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in asked)
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), flags=re.M))
    assert bounds == {name: tested[name] for name in bounds}
