"""Templates, and the filters that write numbers, intervals and tables in them. Every sentence stands in `templates/`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from math import expm1, log10

import jinja2

from sovit.predict.recommend import Recommendation

NAMES = {
    "width": "width",
    "depth": "depth",
    "mlp_dim": "MLP dim",
    "patch_size": "patch size",
    "image_size": "image size",
    "num_params": "parameters",
}
UNKNOWN = "not determined"


def render(template: str, **values) -> str:
    """Fill a file of `templates/`; a value that is missing is an error."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sovit.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    words = [listed, few, sentence, oneline, named, in_words, cell, number, digits, percent, flops, interval]
    words += [gain, wider, label, shape_words, count_words, flat_words, table, columns, log10, relative]
    environment.filters |= {function.__name__: function for function in words}
    return environment


# words ----------------------------------------------------------------------------------------------------------------


def named(dimension: str) -> str:
    """A dimension as it is said: `mlp_dim` as MLP dim."""
    return NAMES.get(dimension, dimension)


def listed(items: Iterable) -> str:
    """Items as text: "a, b and c"."""
    texts = [str(item) for item in items]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def few(items: Iterable, most: int = 4) -> str:
    """List the first items and count the others: "a, b, c, d and 2 more"."""
    texts = [str(item) for item in items]
    return listed(texts if len(texts) <= most else [*texts[:most], f"{len(texts) - most} more"])


def sentence(text: str) -> str:
    """Start with a capital letter, end with a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def oneline(text: str) -> str:
    return " ".join(text.split())


def in_words(text: str) -> str:
    """Text with dimensions as they are said: "mlp_dim is edge" as "MLP dim is edge"."""
    for name, words in NAMES.items():
        text = text.replace(name, words)
    return text


def cell(text) -> str:
    """Text of the rows inside a table: one line, without a bar."""
    return oneline(str(text)).replace("|", "/")


# numbers --------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def digits(value: float | None, significant: int = 4) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 10**significant else f"{value:.{significant}g}"


def percent(value: float | None, sign: bool = False) -> str:
    if value is None:
        return UNKNOWN
    return f"{100 * value:+.2f} %" if sign else f"{100 * value:.2f} %"


def flops(value: float) -> str:
    """3.16e12, without trailing zeros or a plus."""
    head, exponent = f"{value:.2e}".split("e")
    return f"{head.rstrip('0').rstrip('.')}e{int(exponent)}"


def interval(entry: Mapping, significant: int = 4, prefix: str = "") -> str:
    """Both ends of {prefix}low and {prefix}high: "0.103 to 0.159"."""
    low, high = entry[f"{prefix}low"], entry[f"{prefix}high"]
    return "not computed" if low is None else f"{digits(low, significant)} to {digits(high, significant)}"


def wider(entry: Mapping, significant: int = 3, prefix: str = "") -> str:
    """The interval to quote, with its name: the headline one, or the cluster bootstrap's where that is twice as wide."""
    ends = {k: entry[f"{prefix}{k}"] for k in ("low", "high", "pairs_low", "pairs_high")}
    if ends["low"] is None:
        return "no interval"
    if ends["pairs_low"] is not None and ends["pairs_high"] - ends["pairs_low"] > 2 * (ends["high"] - ends["low"]):
        return f"{interval(ends, significant, 'pairs_')}, cluster bootstrap"
    return f"{interval(ends, significant)}, parametric bootstrap"


def relative(difference: Mapping) -> dict:
    """{estimate, low, high} of ln of a ratio as relative differences."""
    return {end: None if difference[end] is None else expm1(difference[end]) for end in ("estimate", "low", "high")}


def gain(excess: Mapping, sign: bool = False) -> str:
    """A relative loss {estimate, low, high} as "+1.20% (+0.90% to +1.50%)"."""
    form = "+.2%" if sign else ".2%"
    text = f"{excess['estimate']:{form}}"
    return text if excess["low"] is None else f"{text} ({excess['low']:{form}} to {excess['high']:{form}})"


# shapes and tables ----------------------------------------------------------------------------------------------------


def label(shape: Mapping, dims: Iterable[str] = ()) -> str:
    """width x depth x mlp_dim, and /patch@image where the law, of `dims`, chooses among these."""
    text = f"{shape['width']}x{shape['depth']}x{shape['mlp_dim']}"
    return text + f"/{shape['patch_size']}@{shape['image_size']}" * bool({"patch_size", "image_size"} & set(dims))


def shape_words(shape: Mapping) -> str:
    text = f"width {shape['width']}, depth {shape['depth']}, MLP dim {shape['mlp_dim']}"
    return text + f" (head dim {shape['head_dim']}, patch {shape['patch_size']}, image {shape['image_size']})"


def count_words(flat: Mapping) -> str:
    """How many shapes are in a flat region: "1,234", or "at least 1,234" where not all were counted."""
    return f"{flat['count']:,}" if flat["exact"] else f"at least {flat['count']:,}"


def flat_words(flat: Mapping) -> str:
    """The same with its noun."""
    return f"{count_words(flat)} shape{'s' * (flat['count'] != 1 or not flat['exact'])}"


def _cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")] for line in text.splitlines() if line.strip()]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def table(text: str) -> str:
    """Lines of cells with bars between them as a Markdown table."""
    return markdown_table(_cells(text))


def columns(text: str) -> str:
    """The same in columns, for a terminal."""
    rows = _cells(text)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# what `sovit predict` prints ------------------------------------------------------------------------------------------


def recommendation_text(r: Recommendation, beside: Mapping) -> str:
    """A recommendation in words; beside: {size_rule, paper_rule}, what the command puts beside it."""
    return render("predict.txt.j2", r=r.to_dict(), beside=beside).rstrip("\n")


def frontier_text(rows: Sequence[Recommendation]) -> str:
    """A frontier as a table."""
    warnings = dict.fromkeys(w for row in rows for w in row.warnings if "decades" not in w and "optimum" not in w)
    plain = [row.to_dict() for row in rows]
    common = dict(metric=rows[0].metric, level=rows[0].level, warnings=list(warnings))
    return render("frontier.txt.j2", rows=plain, **common).rstrip("\n")


def trade_text(found: Mapping) -> str:
    """What `patch_tradeoff.trade` found, in words."""
    return render("trade.txt.j2", found=found).rstrip("\n")
