"""report.md and its figures as one HTML file that needs nothing else: no network, no script, no file beside it.

`markdown-it-py` reads the report (raw HTML in it is shown, not obeyed). A figure becomes an <img> that holds its own SVG:
matplotlib gives the same ids and a style for `*` to every figure, which would meet in one document.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.ledger.measurements import Measurements
from sovit.report.build import INPUTS, FitOptions, fit_ledgers, law_folder, read_ledgers
from sovit.report.text import render

FIGURE = {"figure": True}  # marks the images that are
LONG_CELL = 45  # letters; a longer cell of a table is broken into lines
FIGURE_SCALE = 1.3  # of a figure's printed size; never wider than the text


def write_page(
    ledgers: Sequence[Path | str],
    *,
    law: Path | None = None,
    out: Path | None = None,
    **options: Any,
) -> str:
    """Write the report of `ledgers` as one HTML file and say in a line where it is and which law it shows.

    The law that `sovit fit` wrote, or the one in the `_law` folder beside the ledger, is shown where it was made of these
    very rows, this metric and this form, else one is fitted for the page alone: only `sovit fit` writes laws. `law` names a
    folder that must match. out: None = the first ledger's name with _report.html, in OUTPUTS. options: of `FitOptions`.
    Raises UserError as `fit_ledgers` does, and for a `law` that does not match.
    """
    chosen = FitOptions(**options)
    data = read_ledgers(ledgers, chosen)
    path = Path(out) if out is not None else OUTPUTS / f"{Path(data.paths[0]).stem}_report.html"
    own = law_folder(data.paths)
    folders = [Path(law)] if law is not None else [own, Path(data.paths[0]).with_name(own.name)]
    reasons = {folder: mismatch(folder, data, chosen) for folder in folders}
    folder = min(folders, key=lambda folder: reasons[folder] != "")  # the first that matches
    reason = reasons[folder]
    if reason and law is not None:
        raise UserError(f"{reason}; renew it with sovit fit, or leave out --law")
    if not reason:
        write_atomic(path, page_of(folder))
        return f"{path}: the law in {folder}, which was made of these very rows"
    print(f"fitting, because {reason}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as fresh:
        fit_ledgers(ledgers, out=fresh, **options)
        write_atomic(path, page_of(Path(fresh)))
    return f"{path}: a law fitted for it alone; sovit fit keeps one"


def mismatch(folder: Path, data: Measurements, chosen: FitOptions) -> str:
    """Why the law in `folder` is not the one asked for, or "" where it is: its inputs.json names what it was made of."""
    try:
        made_of = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        law = json.loads((folder / "law.json").read_text(encoding="utf-8"))
        found, loss, delta = law["form"], law["model"]["loss"], law["model"]["huber_delta"]
        differing = [name for name, value in data.identity.items() if made_of.get(name) != value]
    except FileNotFoundError as error:
        return f"there is no {error.filename}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} cannot be read"
    if differing:
        what = "rows" if differing[0] == "sha256" else differing[0]
        return f"the law in {folder} is of other {what}"
    if loss != chosen.loss or chosen.huber_delta not in (None, delta):
        return f"the law in {folder} was fitted by another loss"
    return f"the law in {folder} is of form {found}" if chosen.form not in (None, found) else ""


def page_of(folder: Path) -> str:
    """report.md of `folder` as an HTML page with the figures in it. Raises UserError where one of its files is missing."""
    try:
        text = (folder / "report.md").read_text(encoding="utf-8")
        return page(text, lambda name: (folder / name).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; make it again with sovit fit") from None


def page(text: str, read: Callable[[str], bytes]) -> str:
    """Markdown -> a whole HTML page. read(name) -> the bytes of a figure named in it, its SVG in place of its PNG."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda self, *_: '<div class="table">\n<table>\n')
    parser.add_render_rule("table_close", lambda self, *_: "</table>\n</div>\n")
    tokens = _figures(parser.parse(text), read)
    title, sections = "", {}
    for token, inside in zip(tokens, tokens[1:]):
        words = "".join(child.content for child in inside.children or ())
        if token.type == "th_open":
            token.attrSet("scope", "col")
        elif token.type == "td_open" and len(inside.content) > LONG_CELL:
            token.attrSet("class", "long")
        elif token.type == "heading_open" and token.tag == "h1":
            title = title or words
        elif token.type == "heading_open" and token.tag == "h2":
            anchor = re.sub(r"\W+", "-", words.lower()).strip("-")
            token.attrSet("id", anchor)
            sections[anchor] = words
        for child in token.children or ():
            if child.type == "image" and child.meta != FIGURE:
                child.type, child.children = "text", None  # text of the rows may not bring in files: its words stay
            elif child.type == "link_open" and not re.match("https?:|#", str(child.attrGet("href"))):
                child.attrs.clear()  # a file that does not come with the page
    head, rule, rest = parser.renderer.render(tokens, parser.options, {}).partition("<h2")
    return render("page.html.j2", title=title, sections=sections, head=head, body=rule + rest)


def _figures(tokens: list[Token], read: Callable[[str], bytes]) -> list[Token]:
    """Turn a paragraph that is one image, and the paragraph in italics below it, into a figure and its caption."""
    out: list[Token] = []
    i = 0
    while i < len(tokens):
        inside = _paragraph(tokens, i)
        if [child.type for child in inside] != ["image"]:
            out.append(tokens[i])
            i += 1
            continue
        _embed(inside[0], read)
        out += [Token("figure_open", "figure", 1, block=True), tokens[i + 1]]
        i += 3
        below = _paragraph(tokens, i)
        if below and below[0].type == "em_open":
            end = [child.type for child in below].index("em_close")
            tokens[i + 1].children = below[1:end]  # without the link to the SVG, which stands above
            out += [Token("caption_open", "figcaption", 1), tokens[i + 1], Token("caption_close", "figcaption", -1)]
            i += 3
        out.append(Token("figure_close", "figure", -1, block=True))
    return out


def _paragraph(tokens: list[Token], i: int) -> list[Token]:
    """What a paragraph that begins at token i holds; [] where none does."""
    return (tokens[i + 1].children or []) if i + 2 < len(tokens) and tokens[i].type == "paragraph_open" else []


def _embed(image: Token, read: Callable[[str], bytes]) -> None:
    svg = read(re.sub(r"\.png$", ".svg", str(image.attrGet("src"))))
    image.meta = FIGURE
    image.attrSet("src", f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}")
    size = re.search(rb'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    if size:  # so that the page does not move while it is drawn
        for name, points in zip(("width", "height"), size.groups()):
            image.attrSet(name, str(round(float(points) * 96 / 72 * FIGURE_SCALE)))
