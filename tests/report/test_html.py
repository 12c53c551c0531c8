"""The report as one HTML file: the numbers of the law, well-formed, and nothing fetched from anywhere."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import planted_ledger as planted
import pytest

from sovit import UserError
from sovit.cli.main import main
from sovit.ledger.measurements import measurements
from sovit.report import html
from sovit.report.build import FitOptions
from sovit.report.html import mismatch, page_of, write_page

VOID = {"meta", "img", "br", "hr", "link"}
RESULTS = Path(__file__).resolve().parents[2] / "results"


class Page(HTMLParser):
    """Tags with their attributes, tables as rows of cells, headings; fails on a tag that is not closed in its place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.tables, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """A ledger, and beside it the law that `sovit fit` made of it."""
    folder = tmp_path_factory.mktemp("html")
    shutil.copy(RESULTS / "stream_star.jsonl", folder)
    shutil.copy(RESULTS / "exclusions.csv", folder)
    shutil.copytree(RESULTS / "stream_star_law", folder / "stream_star_law")
    return folder / "stream_star.jsonl"


@pytest.fixture(scope="module")
def page(ledger):
    path = ledger.with_name("stream_star_report.html")
    write_page([ledger], out=path)
    return Page(path.read_text())


def svgs(page):
    return [base64.b64decode(image["src"].partition("base64,")[2]) for image in page.all("img")]


def test_the_numbers_are_those_of_the_law(page, ledger):
    law = json.loads((ledger.with_name("stream_star_law") / "law.json").read_text())
    (parameters,) = [t for t in page.tables if t[0][0] == "parameter"]
    bound = {name: f" ({side} bound)" for name, side in law["diagnostics"]["active_bounds"].items()}
    said = [[name, repr(value) + bound.get(name, "")] for name, value in law["params"].items()]
    assert [row[:2] for row in parameters[1:]] == said
    for row, ends in zip(parameters[1:], law["intervals"].values()):
        assert [float(cell) for cell in row[2:]] == pytest.approx(list(ends.values()), rel=1e-3)
    (growth,) = [t for t in page.tables if t[0][:2] == ["dimension", "s"] and t[0][-1] == "status"]
    for row, exponent in zip(growth[1:], law["exponents"].values()):
        assert float(row[1]) == pytest.approx(exponent["estimate"], rel=1e-3) and row[-1] == exponent["status"]
    assert f"objective {law['objective']!r}" in page.text


def test_every_word_and_table_of_the_report_is_there(page, ledger):
    text = (ledger.with_name("stream_star_law") / "report.md").read_text()
    rows = [
        line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")
    ]
    cells = [re.sub(r"[`*]", "", cell).strip() for row in rows for cell in row]
    assert [cell.strip() for table in page.tables for row in table for cell in row] == cells
    assert all(h.get("scope") == "col" for h in page.all("th"))
    prose = re.sub(r"(?m)^\|.*$|^!\[.*$|^```$|^ *- |^#+ |[`*]|\(\[SVG\].*$", "", text)
    squeezed = re.sub(r"\s+", " ", page.text.replace("*", ""))
    for line in filter(None, map(str.strip, prose.splitlines())):
        assert re.sub(r"\s+", " ", line) in squeezed


def test_figures_are_those_of_the_law_with_words_for_who_cannot_see_them(page, ledger):
    folder = ledger.with_name("stream_star_law")
    names = re.findall(r"!\[[^\]]*\]\((\w+)\.png\)", (folder / "report.md").read_text())
    assert {"fit_by_dimension", "isoflop", "optimal_shape", "residuals", "extrapolation"} <= set(names)
    assert svgs(page) == [(folder / f"{name}.svg").read_bytes() for name in names]
    assert [image["alt"] for image in page.all("img")] == [name.replace("_", " ") for name in names]
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(names)
    for svg in svgs(page):  # an <img> is a document of its own: what it refers to must be in it
        tree = ElementTree.fromstring(svg)
        ids = {e.get("id") for e in tree.iter()}
        used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg.decode()))
        assert used and {a or b for a, b in used} <= ids


def test_nothing_is_fetched_and_nothing_runs(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:image/svg+xml;base64,")
    for svg in svgs(page):
        for element in ElementTree.fromstring(svg).iter():
            assert "script" not in element.tag
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
                assert "url(" not in value or "url(#" in value
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_contents_lead_to_the_sections(page, ledger):
    sections = (ledger.with_name("stream_star_law") / "report.md").read_text().count("\n## ")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == sections
    assert [a["href"] for a in page.all("a")] == [f"#{i}" for i in ids]
    assert page.all("html")[0]["lang"] == "en" and "Shape law of stream_star.jsonl" in page.text


def test_the_same_bytes_again_and_no_law_touched(ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, path = ledger.with_name("stream_star_law"), Path("runs/results/stream_star_report.html")
    before, text = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}, page_of(folder)
    assert "made of these very rows" in write_page([ledger])
    assert path.read_text() == text
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_law_of_something_else_is_not_shown(ledger, tmp_path, capsys):
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    folder = ledger.with_name("stream_star_law")
    assert (
        mismatch(folder, measurements([ledger]), FitOptions())
        == mismatch(folder, measurements([ledger]), FitOptions(form="bounded"))
        == ""
    )
    assert "is of form bounded" in mismatch(folder, measurements([ledger]), FitOptions(form="joint"))
    assert "is of other metric" in mismatch(folder, measurements([ledger], "val_error"), FitOptions())
    rows[0]["val_loss"] += 1e-9
    other = planted.write_ledger(tmp_path / "stream_star.jsonl", rows)
    assert "is of other rows" in mismatch(folder, measurements([other]), FitOptions())
    rows[0] |= {"status": "diverged"}  # no row of the law, but its report counts it
    assert "is of other rows" in mismatch(folder, measurements([planted.write_ledger(other, rows)]), FitOptions())
    with pytest.raises(UserError, match="is of other rows; renew it with sovit fit"):
        write_page([other], law=folder)
    assert main(["report", str(ledger), "--law", str(tmp_path / "nowhere")]) == 2
    assert "nowhere/inputs.json; renew it with sovit fit" in capsys.readouterr().err


def test_rows_of_somebody_else_are_fitted_for_the_page_alone(tmp_path, capsys):
    keys = ("run_id", "trunk_id", "status", "num_examples", "num_params", "forward_flops", "val_loss")
    rows = [{k: row[k] for k in keys} | {"data": "<b>photos</b>"} for row in planted.planted_rows(seeds=1)]
    path = planted.write_csv(tmp_path / "theirs.csv", rows, [*keys, "data"])
    reason = "<script>alert(1)</script> [x](javascript:alert(1)) ![eye](../../../etc/hosts) ![y](https://a.b/c.png)"
    (tmp_path / "exclusions.csv").write_text(f"run_id,reason\n{rows[0]['run_id']},{reason}\n")
    assert main(["report", str(path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    captured = capsys.readouterr()
    assert "fitting, because there is no" in captured.err and "sovit fit keeps one" in captured.out
    page = Page((tmp_path / "new" / "page.html").read_text())
    assert "<b>photos</b>" in page.text and "<script>alert(1)</script>" in page.text  # shown, not obeyed
    assert "eye" in page.text and len(page.all("img")) == len(page.all("figure")) == 2
    test_nothing_is_fetched_and_nothing_runs(page)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exclusions.csv", "new", "theirs.csv"]


def test_links_that_lead_nowhere_from_the_page_are_plain_words():
    page = Page(html.page("# A\n\n[here](other.md) and [there](https://arxiv.org/abs/2305.13035)\n", None))
    assert [a.get("href") for a in page.all("a")] == [
        None,
        "https://arxiv.org/abs/2305.13035",
    ] and "here and there" in page.text


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*_law")), ids=lambda p: p.name)
def test_committed_reports_are_of_the_committed_rows(folder):
    ledger = folder.with_name(folder.name.removesuffix("_law") + ".jsonl")
    assert mismatch(folder, measurements([ledger]), FitOptions()) == ""
    Page(page_of(folder))
