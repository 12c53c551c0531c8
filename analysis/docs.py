"""Fill README.md and docs/ with numbers from committed files.

A page marks a block by a call of one of the macros in docs.jinja: from `<!-- law("stream_star") -->` to `<!-- end -->`.

python -m analysis.docs          rewrites the pages
python -m analysis.docs --check  exit status 1 if a page does not say what the files say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

import jinja2

from analysis.flexivit.tables import sizes_table
from analysis.publish import templates
from analysis.published.shapes import flops_table, shapes_table
from analysis.resolution.tables import scratch_table, short_table
from analysis.vlm_encoders.tables import short_text
from sovit.law.diagnostics import SIGNIFICANT
from sovit.law.forms import LAWS
from sovit.ledger.ledger import read_ledger
from sovit.predict.growth_rules import PAPER
from sovit.spec.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BLOCK = re.compile(r"<!-- (\w+\(.*?\)) -->\n.*?<!-- end -->", re.DOTALL)
SETS = {  # (name, metric) in results/extrapolation.json -> in words
    ("stream_star", "val_loss"): "stream, loss",
    ("stream_star", "val_error"): "stream, error",
    ("icons_star", "val_loss"): "icons, loss",
    ("icons_star", "val_error"): "icons, error",
    ("gemstones hot_100b+", "loss"): "Gemstones, constant rate",
    ("gemstones cool_end", "loss"): "Gemstones, cooled down",
    ("farseer", "loss"): "Farseer",
    ("data_constrained", "loss"): "repeated data",
}


def load(name: str):
    """Read a JSON file of results/."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def ledger(study: str) -> list[dict]:
    return read_ledger(RESULTS / f"{study}.jsonl")


def seconds(study: str) -> list[float]:
    """Busy seconds of the rows that kept their time."""
    return [row["spent_seconds"] for row in ledger(study) if row.get("spent_seconds") is not None]


def by_shape(study: str) -> dict[str, list[dict]]:
    arms: dict[str, list[dict]] = {}
    for row in ledger(study):
        arms.setdefault(f"{row['width']}x{row['depth']}x{row['mlp_dim']}", []).append(row)
    return arms


def extrapolated() -> list[dict]:
    """Of each data set: its name, scores by form over all cuts, and the chosen form against the N-D law."""
    found = {(e["name"], e["metric"]): e["pooled"] for e in load("extrapolation.json") if "pooled" in e}
    return [
        dict(name=name, forms=found[key]["forms"], against=found[key]["against"]["headline"]["chinchilla"])
        for key, name in SETS.items()
    ]


def coverage(kind: str, quantity: str) -> list[float]:
    """Coverage of an interval in every condition where the form is right, sorted."""
    lines = [json.loads(line) for line in (RESULTS / "coverage.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line["coverage"].get(kind, {}) for line in lines if line["right"] and not line.get("profile")]
    return sorted(c[quantity]["mean"] for c in found if quantity in c)


def comparison(study: str, ours: str, theirs: str, axis: str) -> dict:
    """Two ways to fine-tune, pooled over shapes and resolutions at the largest common budget."""
    wanted = dict(metric="val_loss", end="largest", ours=ours, theirs=theirs, axis=axis)
    pooled = [e for e in load(f"{study}.json")["pooled"] if "image_size" not in e and "shape" not in e]
    (found,) = (e for e in pooled if wanted.items() <= e.items())
    return found


def environment() -> jinja2.Environment:
    found = templates()
    found.globals |= dict(load=load, ledger=ledger, seconds=seconds, by_shape=by_shape, extrapolated=extrapolated)
    found.globals |= dict(coverage=coverage, comparison=comparison, mean=fmean, sd=stdev, Shape=Shape)
    found.globals |= dict(
        text=lambda name: (RESULTS / name).read_text(encoding="utf-8").strip("\n"), LAWS=LAWS, PAPER=PAPER
    )
    found.globals |= dict(SIGNIFICANT=SIGNIFICANT, flops_table=flops_table, shapes_table=shapes_table)
    found.globals |= dict(short_table=short_table, scratch_table=scratch_table)
    found.globals |= dict(sizes_table=sizes_table, short_text=short_text)
    return found


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def render(text: str) -> str:
    """Fill every marked block. Raises jinja2.UndefinedError for a block that docs.jinja has no macro for."""
    template = environment()

    def fill(match: re.Match) -> str:
        call = template.from_string("{% import 'docs.jinja' as block with context %}{{ block." + match[1] + " }}")
        return f"<!-- {match[1]} -->\n{call.render().strip()}\n<!-- end -->"

    return BLOCK.sub(fill, text)


def main() -> int:
    """Write the pages, or with --check only say which are stale."""
    stale = [path for path in pages() if render(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} differs from the committed results; run python -m analysis.docs")
        else:
            path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
