"""What the answer depends on: conclusion first, then what was altered and what came of it."""

from __future__ import annotations

from sovit.report.sections.phrases import NAMES, cell, few, listed, percent, three

SHOWN_SHAPES = 6  # single shapes left out that are listed; sensitivity.json has all
SHOWN_METRICS = 12


def movers(found: dict) -> str:
    """The alterations that push exponents out of their own intervals, in a sentence; "" where none does."""
    out = []
    for dim, moved in found.get("dimensions", {}).items():
        outside = moved["choices"]["outside"]
        if outside and moved["estimate"] is not None:
            out.append(
                f"of {NAMES.get(dim, dim)} from {moved['estimate']:.3g} to {outside[0]['exponent']:.3g}"
                f" ({_plain(outside[0]['setting'])})"
            )
    return (
        f"choices that another analyst could make move the exponent {listed(out)}: outside its interval" if out else ""
    )


def sensitivity_section(fit, found: dict) -> str:
    if "dimensions" not in found:
        return f"Not examined: {found['note']}."
    choices = [row for row in found["alterations"] if row["what"] != "metric"]
    draws = sum(d["draws"] for d in found["drops"])
    lines = [
        f"The law was fitted again under {len(choices)} alterations of one choice, {draws} random sets of shapes left out"
        f" and {len(found['alterations']) - len(choices)} other metrics (point fits; all of it in `sensitivity.json`).",
        "\n".join(f"- {_conclusion(dim, moved, found)}" for dim, moved in found["dimensions"].items())
        + f"\n- {_excess(choices, found)}",
    ]
    dims = list(found["headline"]["exponents"])
    head = (
        "| altered | rows | "
        + " | ".join(f"s of {NAMES.get(d, d)}" for d in dims)
        + " | "
        + " | ".join(f"best {NAMES.get(d, d)}" for d in dims)
        + " | excess loss | |\n"
        + "|---" * (4 + 2 * len(dims))
        + "|\n"
    )
    shapes = [row for row in choices if row["what"] == "shape"]
    order = sorted(shapes, key=lambda row: -_distance(row, found["headline"]))[:SHOWN_SHAPES]
    kept = [found["headline"], *(r for r in shapes if r in order), *(r for r in choices if r["what"] != "shape")]
    lines.append(
        "The best values are those at the budget of the recommendation; excess loss is what the headline law says that"
        f" they lose against its own. Of {len(shapes)} single shapes left out the {len(order)} that move most are listed."
        "\n\n" + head + "\n".join(_row(row, dims, fit) for row in kept)
    )
    if found["drops"]:
        lines.append(_drops(found["drops"], dims))
    metrics = [row for row in found["alterations"] if row["what"] == "metric"]
    if metrics:
        more = f" The first {SHOWN_METRICS} of {len(metrics)}." if len(metrics) > SHOWN_METRICS else ""
        lines.append(
            "Another metric asks another question; a law of shape that is one law of nature would answer it with the same"
            f" exponents.{more}\n\n" + head + "\n".join(_row(row, dims, fit) for row in metrics[:SHOWN_METRICS])
        )
    lines.append("**Bold**: outside the headline interval of that exponent.")
    return "\n\n".join(lines)


def _plain(setting: str) -> str:
    """`window: without the ...` as it stands in a sentence."""
    what, _, rest = setting.partition(": ")
    if what == "counting":
        return f"FLOPs counted otherwise ({rest})"
    return f"the {what} {rest}" if what in ("form", "loss") else rest


def _conclusion(dim: str, moved: dict, found: dict) -> str:
    name, choices, metrics = NAMES.get(dim, dim), moved["choices"], moved["metrics"]
    drops = [d["exponents"][dim] for d in found["drops"]]
    if choices["smallest"] is None:
        return f"**The {name} exponent** cannot be fitted under any of {choices['num']} alterations."
    lows = [choices["smallest"], *(d["low"] for d in drops if d["low"] is not None)]
    highs = [choices["largest"], *(d["high"] for d in drops if d["high"] is not None)]
    text = f"**The {name} exponent** moves between {min(lows):.3g} and {max(highs):.3g}; "
    if moved["low"] is None:
        text += "it has no interval to compare with. "
    else:
        text += f"its interval is {moved['low']:.3g} to {moved['high']:.3g}. "
    if moved["status"] != "ok":
        text = text[:-2] + f" ({moved['status']}). "
    text += f"The largest mover is {_plain(choices['mover'])} ({choices['mover_exponent']:.3g})"
    outside = [o for o in choices["outside"] if o["setting"] != choices["mover"]]
    if moved["low"] is not None and not choices["outside"]:
        text += "; nothing moves it out of its interval"
    elif outside:
        text += f"; also out of its interval: {few([_plain(o['setting']) for o in outside])}"
    text += "."
    if choices["lost"]:
        text += f" No gain from it, or no fit: {few([_plain(s) for s in choices['lost']])}."
    if metrics["smallest"] is not None:
        text += f" Other metrics: {metrics['smallest']:.3g} to {metrics['largest']:.3g}"
        text += f", none in {len(metrics['lost'])} of {metrics['num']}." if metrics["lost"] else "."
    return text


def _excess(choices: list[dict], found: dict) -> str:
    """What the recommendations of the altered fits lose, if the headline law is right."""
    kind = found["headline"]["kind"]
    known = [(row["excess_loss"], row) for row in choices if row["excess_loss"] is not None and row["kind"] == kind]
    if not known:
        return "What the recommendation loses cannot be said: this law does not rank whole shapes."
    most, row = max(known, key=lambda k: k[0])
    small = sum(e <= 0.01 for e, _ in known)
    text = (
        f"**The recommendation**: if the headline law is right, {small} of {len(known)} altered fits recommend a shape"
        f" within 1 % of its best loss; the worst, {_plain(row['what'] + ': ' + row['setting'])}, loses {percent(most)}."
    )
    worst = [d["excess_loss"]["high"] for d in found["drops"] if d["excess_loss"]]
    return text + (f" Random sets of shapes left out: at most {percent(max(worst))}." if worst else "")


def _distance(row: dict, headline: dict) -> float:
    pairs = [(s, headline["exponents"][d]) for d, s in row["exponents"].items()]
    return sum(1.0 if s is None or own is None else abs(s - own) / max(abs(own), 1e-9) for s, own in pairs)


def _row(row: dict, dims: list[str], fit) -> str:
    def exponent(dim):
        s, known = row["exponents"][dim], fit.exponents[dim]
        outside = s is not None and known.low is not None and not known.low <= s <= known.high
        return f"**{s:.3g}**" if outside and s is not None else three(s)

    lost = row["excess_loss"]
    cells = [f"{row['what']}: {cell(row['setting'])}", str(row["num_rows"]), *(exponent(d) for d in dims)]
    cells += [three(row["optimum"][d]) for d in dims]
    cells += ["not known" if lost is None else percent(lost), cell(row["note"])]
    return "| " + " | ".join(cells) + " |"


def _drops(drops: list[dict], dims: list[str]) -> str:
    lines = [
        "Shapes left out at random: median, 5 and 95 %, and the draw that moves most.",
        "| left out | draws | " + " | ".join(f"s of {NAMES.get(d, d)}" for d in dims) + " |",
        "|---" * (2 + len(dims)) + "|",
    ]
    rows = []
    for drop in drops:
        cells = []
        for d in dims:
            e = drop["exponents"][d]
            cells.append(
                "not determined"
                if e["median"] is None
                else f"{e['median']:.3g} ({e['low']:.3g} to {e['high']:.3g}; {e['worst']:.3g} {e['worst_setting']})"
                + (f"; lost in {e['lost']}" if e["lost"] else "")
            )
        rows.append(f"| {drop['num_shapes']} shapes | {drop['draws']} | " + " | ".join(cells) + " |")
    return lines[0] + "\n\n" + "\n".join(lines[1:] + rows)
