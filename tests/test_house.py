"""The house keeps its plan: sizes of files, folders and functions, and what an import costs. The order of the packages
is a contract of import-linter in pyproject.toml."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(path for folder in ("sovit", "studies", "analysis") for path in (ROOT / folder).rglob("*.py"))


def test_files_and_functions_are_short():
    long = []
    for path in PRODUCT:
        text = path.read_text()
        if len(text.splitlines()) > 300:
            long.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long, "\n".join(long)


def test_folders_are_small():
    folders = {path.parent for path in PRODUCT if "studies" not in path.parts}
    large = [str(f.relative_to(ROOT)) for f in folders if len(set(f.glob("*.py")) - {f / "__init__.py"}) > 12]
    assert not large


def test_the_product_does_not_grow():
    assert sum(len(path.read_text().splitlines()) for path in PRODUCT) < 24_000


# module -> packages that importing it may not bring in
LIGHT = {
    "sovit": {"torch", "numpy", "scipy", "optuna"},
    "sovit.spec.run": {"torch", "numpy", "scipy", "optuna"},
    "sovit.spec.design": {"torch", "scipy", "optuna"},
    "sovit.ledger.ledger": {"torch", "scipy", "optuna"},
    "sovit.predict.recommend": {"torch", "scipy", "optuna"},
    "sovit.law.fit": {"torch", "optuna", "matplotlib"},
    "sovit.data.assets": {"torch", "scipy", "optuna"},
    "sovit.cli.main": {"torch", "scipy", "optuna", "matplotlib", "mlflow"},
    "sovit.sweep.queue": {"torch", "scipy", "timm", "mlflow", "matplotlib", "datasets", "sqlalchemy"},
    "sovit.sweep.worker": {"torch", "scipy", "timm", "mlflow", "matplotlib", "datasets", "sqlalchemy"},
}


@pytest.fixture(scope="module")
def brought_in():
    """Module -> packages in memory after it and those before it were imported, in one fresh process."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {list(LIGHT)}:\n"
        "    importlib.import_module(name)\n"
        "    print(json.dumps([name, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", LIGHT)
def test_what_is_light_stays_light(name, brought_in):
    assert not LIGHT[name] & set(brought_in[name])


def test_nothing_imports_what_only_one_result_needs():
    for path in (ROOT / "sovit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"studies", "analysis", "tests"}, path


def test_every_text_file_is_read_and_written_as_utf_8():
    """Else a locale such as ISO-8859-1 decides; the linter sees only what it can type."""
    silent = []
    for path in PRODUCT:
        for call in ast.walk(ast.parse(path.read_text())):
            text = isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("read_text", "write_text")
            if text and "encoding" not in {keyword.arg for keyword in call.keywords}:
                silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not silent
