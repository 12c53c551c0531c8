"""The three layers: arithmetic, torch, edges. Imports point downwards; each outside package has its one importer."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sovit").rglob("*.py"))

TORCH = {
    *("data", "model", "encoder", "loop", "checkpoint", "train", "finetune"),
    *("evaluate", "probe", "export", "vlm", "hardware", "resize", "branches", "flexi", "tuning", "timm_base"),
    *("finetune_cost", "export_card", "export_check", "export_tensors", "hf_model"),
    "contrastive",
}
EDGES = {
    "sweep",
    "search",
    "grow",
    "launch",
    "status",
    "html",
    "track",
    "ui",
    "plot",
    "plan",
    "cli",
    "demo",
    "report",
    "validate",
    "__main__",
}  # all else is arithmetic
ONE_IMPORTER = {
    "optuna": {"sweep", "search"},
    "mlflow": {"track"},
    "matplotlib": {"plot"},
    "markdown_it": {"html"},
    "optuna_dashboard": {"ui"},
}
HEAVY = {"torch", "torchvision", "timm", "transformers", "tokenizers", "safetensors", "datasets", "peft"}


def unit(path):
    """sovit/train.py -> train, sovit/vlm/model.py -> vlm, sovit/__init__.py -> ''."""
    return path.relative_to(ROOT / "sovit").with_suffix("").parts[0].replace("__init__", "")


def layer(name):
    return 1 if name in TORCH else 2 if name in EDGES else 0


@functools.cache
def imports(path, top_level_only=False):
    """Dotted names of modules that a file imports, anywhere in it or when it is itself imported."""
    names, nodes = [], [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if top_level_only and (
            isinstance(node, (ast.FunctionDef, ast.Lambda))
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def own_units(path, **more):
    """Units of sovit that a file imports."""
    for name in imports(path, **more):
        parts = name.split(".")
        if parts[0] == "sovit" and len(parts) > 1 and known(parts[1]):
            yield parts[1]


@functools.cache
def known(name):
    return (ROOT / "sovit" / f"{name.replace(chr(46), chr(47))}.py").exists() or (ROOT / "sovit" / name).is_dir()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    ours = layer(unit(path))
    for name in own_units(path):
        assert layer(name) <= ours, f"{path.name} imports {name}, of a higher layer"
    outside = {name.split(".")[0] for name in imports(path)}
    assert not outside & {"studies", "analysis", "tests"}
    if ours == 0:
        assert not outside & HEAVY, "arithmetic needs no torch, not even inside a function"
    for package, importers in ONE_IMPORTER.items():
        assert package not in outside or unit(path) in importers, f"only {importers} imports {package}"


def test_no_two_modules_import_each_other():
    """Counting what is imported on import alone: no cycle among the units of sovit."""
    graph = {}
    for path in FILES:
        graph.setdefault(unit(path), set()).update(set(own_units(path, top_level_only=True)) - {unit(path)})
    done = set()

    def visit(name, above):
        assert name not in above, f"a cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for below in graph.get(name, ()):
                visit(below, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("folder", ["studies", "analysis"])
def test_nothing_imports_studies_or_analysis_and_analysis_needs_no_torch(folder):
    for path in sorted((ROOT / folder).glob("*.py")):
        outside = {name.split(".")[0] for name in imports(path)}
        assert not outside & {"studies", "analysis", "tests", *ONE_IMPORTER}, path
        if folder == "analysis":
            assert not outside & HEAVY, path
            assert not any(layer(name) == 1 for name in own_units(path)), path


# module -> packages that importing it may not bring in
LIGHT = {
    "shape": {"torch", "numpy", "scipy", "optuna"},
    "run": {"torch", "numpy", "scipy", "optuna"},
    "design": {"torch", "scipy", "optuna"},
    "ledger": {"torch", "scipy", "optuna"},
    "predict": {"torch", "scipy", "optuna"},
    "law": {"torch", "optuna", "matplotlib"},
    "data.assets": {"torch", "scipy", "optuna"},
    "cli.main": {"torch", "scipy", "optuna", "matplotlib", "mlflow"},
    "sweep": {"torch", "scipy", "timm", "mlflow", "matplotlib", "datasets", "sqlalchemy"},
}


def test_what_is_light_stays_light():
    """One fresh process imports them one after another, the lightest first, and tells what came in with each."""
    names = [name for name in LIGHT if known(name.partition(".")[0])]
    code = (
        "import importlib, json, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module('sovit.' + name)\n"
        "    print(json.dumps([name, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(found) == names
    for name in names:
        assert not LIGHT[name] & set(found[name]), f"importing sovit.{name} brings in {LIGHT[name] & set(found[name])}"


def test_every_unit_that_the_layers_name_is_classified_once():
    assert not TORCH & EDGES
    heavy = {unit(p) for p in FILES if {n.split(".")[0] for n in imports(p, top_level_only=True)} & {"torch", "timm"}}
    assert heavy <= TORCH
