"""What `sovit predict` prints: a recommendation, what stands beside it, and a frontier, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import expm1

from sovit.predict.flat_region import FlatRegion
from sovit.predict.recommend import Recommendation
from sovit.spec.shape import Shape

NAMES = dict(width="width", depth="depth", mlp_dim="MLP dim", patch_size="patch size", image_size="image size")


def recommendation_text(r: Recommendation, beside: Mapping | None = None) -> str:
    """A recommendation in words; beside: the dict that `cli` puts beside it in JSON, see `beside_lines`."""
    s = r.shape
    lines = [
        f"budget {r.train_flops:.3g} training FLOPs; {r.decades:+.2f} decades from the largest run; law: {r.form}",
        f"best shape: width {s.width}, depth {s.depth}, MLP {s.mlp_dim} (head {s.head_dim},"
        f" patch {s.patch_size}, {s.image_size} px): {r.num_params:,} parameters, {r.num_examples:,} images",
        f"predicted {r.metric} {r.loss:.4f} ({_interval(r.level, r.loss_low, r.loss_high, '.4f')})",
    ]
    for name, o in r.optimum.items():
        note = f"; {o.status}: {o.note}" if o.status != "ok" else ""
        lines.append(f"  {name}: {o.estimate:.3g}, {_interval(r.level, o.low, o.high, '.3g')}{note}")
    flat = r.flat_region
    ranges = ", ".join(
        f"{name} {low:g}" + (f" to {high:g}" if high > low else "") for name, (low, high) in flat.ranges.items()
    )
    lines.append(f"as good within one noise s.d. ({flat.within:.2%}): {flat_words(flat)}, {ranges}")
    if r.regret is not None:
        lines.append(
            f"if a bootstrap draw were the truth, this shape would lose {r.regret.median:.2%} to the draw's own best"
            f" (95th percentile {r.regret.high:.2%})"
        )
    parts = ["whole numbers", *(f"a {NAMES[n]} that was run" for n in ("patch_size", "image_size") if n in r.optimum)]
    what = " and ".join(", ".join(parts + ["rules"] * (r.rules_cost is not None)).rsplit(", ", 1))
    lines.append(f"{what} cost {_gain(vars(r.rounding))} against the real optimum")
    if r.rules_cost is not None:
        lines.append(f"the rules alone cost {_gain(vars(r.rules_cost))} against the best shape without them")
    usual = r.proportional
    misfit = "" if r.rules_cost is None else r.rules.misfit(usual.shape)
    lines.append(
        f"ViT-B proportions at the same FLOPs: {label(usual.shape, r.optimum)}, predicted {usual.loss:.4f}"
        f" ({usual.loss_excess:+.2%})" + f"; {misfit}" * bool(misfit)
    )
    if beside:
        lines += beside_lines(r, beside)
    return "\n".join(lines + [f"warning: {w}" for w in r.warnings])


def count_words(flat: FlatRegion) -> str:
    """How many shapes are in a flat region: "1,234", or "12 of 5,678 surveyed" where not all were counted."""
    return f"{flat.count:,}" if flat.exact else f"{flat.count:,} of {flat.surveyed:,} surveyed"


def flat_words(flat: FlatRegion) -> str:
    """The same with its noun."""
    return f"{count_words(flat)} shape{'s' * (flat.count != 1 or not flat.exact)}"


def beside_lines(r: Recommendation, beside: Mapping) -> list[str]:
    """Other rules at the same budget, and how the optimum grows. beside: {size_rule, paper_rule, growth}."""
    lines = []
    for name, title in (("size_rule", "ViT-B proportions, size by the N-D law"), ("paper_rule", "SoViT's 1/D recipe")):
        rule = beside.get(name)
        if rule:
            worse = {k: None if v is None else expm1(v) for k, v in rule["difference"].items()}
            note = f"; {rule['note']}" if rule["note"] else ""
            lines.append(
                f"{title}: {label(Shape(**rule['shape']), r.optimum)}, {rule['num_params']:,} parameters,"
                f" predicted {rule['loss']:.4f}, {_gain(worse, sign=True)}{note}"
            )
    if beside.get("paper_rule"):
        lines += paper_lines(beside["paper_rule"])
    return lines + growth_lines(beside["growth"], beside.get("paper_rule"))


def paper_lines(rule: Mapping) -> list[str]:
    """Where the paper's rule and the law part."""
    s = ", ".join(f"{NAMES[n]} {value:.2g}" for n, value in rule["exponents"].items())
    start = " x ".join(f"{x:.3g}" for x in rule["start"].values())
    lines = [
        f"  from the law's own {start} at the least budget run, each dimension by"
        f" (budget ratio)^(s/{len(rule['exponents'])}), s = {s} ({rule['source']})"
    ]
    under = rule["under_growth"]
    if under is not None:
        verb, factor = ("under", under) if under >= 1 else ("over", 1 / under)
        parts = ", ".join(f"{NAMES[n]} {x:.2f}" for n, x in rule["factors"].items())
        lines.append(
            f"  it {verb}-grows the model by a factor {factor:.2f} in parameters a decade of compute"
            f" (x{rule['params_per_decade']:.2f} a decade; the law x{rule['law_params_per_decade']:.2f});"
            f" the law's optimum over the recipe's here: {parts}"
        )
    return lines


def growth_lines(growth: Mapping, paper: Mapping | None = None) -> list[str]:
    """The table of exponents: slope at the budget, and mean slope over the span with its interval."""
    low, high = growth["span"]
    head = ["x* ~ compute^", "slope here", f"{low:.3g} to {high:.3g}"] + ["recipe"] * bool(paper)
    table = [head]
    for name, row in (growth["dims"] | dict(FLOPs=growth["flops"], images=growth["images"])).items():
        exact = f"{row['exact']:.3f}" + (f" ({row['low']:.3f} to {row['high']:.3f})" if row["low"] is not None else "")
        cells = [NAMES.get(name, name), f"{row['slope']:.3f}", exact]
        if paper:
            s = paper["exponents"].get(name)
            cells.append("" if s is None else f"{s / len(paper['exponents']):.3f}")
        table.append(cells)
    return [line.rstrip() for line in _columns(table)]


def frontier_text(rows: Sequence[Recommendation]) -> str:
    """A frontier as a table."""
    metric, level = rows[0].metric, rows[0].level
    table = [["training FLOPs", "decades", "shape", "parameters", "images", metric, f"{level:.0%} interval"]]
    dims = list(rows[0].optimum)
    table[0] += [f"{NAMES[d]} ({level:.0%})" for d in dims] + ["as good: shapes"]
    for row in rows:
        ends = [
            f"{o.estimate:.3g}" + (f" ({o.low:.3g} to {o.high:.3g})" if o.low is not None else "")
            for o in row.optimum.values()
        ]
        known = row.loss_low is not None
        table.append(
            [
                f"{row.train_flops:.3g}",
                f"{row.decades:+.1f}",
                label(row.shape, dims),
                f"{row.num_params:,}",
                f"{row.num_examples:,}",
                f"{row.loss:.4f}",
                f"{row.loss_low:.4f} to {row.loss_high:.4f}" if known else "none",
                *ends,
                f"{row.flat_region.count:,}" + ("" if row.flat_region.exact else " surveyed"),
            ]
        )
    warnings = list(dict.fromkeys(w for row in rows for w in row.warnings if "decades" not in w and "optimum" not in w))
    lines = [line.rstrip() for line in _columns(table)]
    lines.append("decades: of compute from the largest run; beyond 2 a shape is a guess")
    return "\n".join(lines + [f"warning: {w}" for w in warnings])


def label(shape: Shape, dims: Iterable[str] = ()) -> str:
    """width x depth x mlp_dim, and /patch@image where the law, of `dims`, chooses among these."""
    return shape.label + f"/{shape.patch_size}@{shape.image_size}" * bool({"patch_size", "image_size"} & set(dims))


def _columns(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in table]


def _interval(level: float, low, high, form: str) -> str:
    known = low is not None and high is not None
    return f"{level:.0%} interval {low:{form}} to {high:{form}}" if known else "no interval: fitted without draws"


def _gain(excess: Mapping, sign: bool = False) -> str:
    form = "+.2%" if sign else ".2%"
    text = f"{excess['estimate']:{form}}"
    return text if excess["low"] is None else f"{text} ({excess['low']:{form}} to {excess['high']:{form}})"


def trade_text(found: Mapping) -> str:
    """What `trade.trade` found, in words."""
    name, level = NAMES[found["by"]], found["level"]
    table = [[name, "best shape with it", "parameters", "images", found["metric"], f"{level:.0%} interval", "excess"]]
    for row in found["values"]:
        known = row["loss_low"] is not None
        table.append(
            [
                str(row["value"]),
                label(Shape(**row["shape"]), [found["by"]]),
                f"{row['num_params']:,}",
                f"{row['num_examples']:,}",
                f"{row['loss']:.4f}",
                f"{row['loss_low']:.4f} to {row['loss_high']:.4f}" if known else "none",
                "best" if row["excess"]["estimate"] == 0 else _gain(row["excess"], sign=True),
            ]
        )
    lines = [f"{found['train_flops']:.3g} training FLOPs, law {found['form']}; all else chosen anew for each {name}:"]
    lines += [line.rstrip() for line in _columns(table)]
    lines.append(f"excess: over the best of them, both shapes as they stand, draw by draw ({level:.0%})")
    lines += [turn_words(turn, name, level) for turn in found["turns"]]
    return "\n".join(lines + spend_lines(found))


def turn_words(turn: Mapping, name: str, level: float) -> str:
    """From which budget the value with more tokens is the better one."""
    fewer, more, where = turn["fewer"], turn["more"], turn["where"]["estimate"]
    if where == "within":
        text = f"{name} {more} is better than {fewer} from {turn['estimate']:.3g} training FLOPs on"
    else:
        better, other = (more, fewer) if where == "before" else (fewer, more)
        every = "at the largest of the budgets" if turn["changes"] else "at every budget"
        text = f"{name} {better} is better than {other} {every} from {_searched(turn)}"
    return text + _turn_ends(turn, level)


def spend_lines(found: Mapping) -> list[str]:
    """Where twice the FLOPs of an image are best spent, and from which budget the answer turns."""
    spend, name, level = found["spend"], found["by"], found["level"]
    options = sorted(spend["options"].items(), key=lambda option: -option[1]["gain"]["estimate"])
    said = ", ".join(f"{NAMES[n]} ({o['to']:.3g}) {_gain(o['gain'])}" for n, o in options)
    lines = [
        f"from {label(Shape(**spend['shape']), [name])}, {spend['factor']:g} times the FLOPs an image at as many images (so"
        f" {spend['train_flops']:.3g} in all) lower the loss by, spent on: {said}"
    ]
    spent = {"patch_size": "smaller patches", "image_size": "a larger image"}
    for n, d in spend["difference"].items():
        if d["low"] is None:
            verdict = "no interval: fitted without draws"
        elif d["low"] <= 0 <= d["high"]:
            verdict = "not distinguishable"
        else:
            verdict = "better" if d["low"] > 0 else "worse"
        against = spent.get(n, f"more {NAMES[n]}")
        lines.append(f"  {spent[name]} against {against}: {_gain(d, sign=True)} of the loss; {verdict}")
    if turn := spend["turn"]:
        fixed = f"with {NAMES[name]} {spend['shape'][name]} kept and all else chosen anew"
        rival, where = NAMES[turn["against"]], turn["where"]["estimate"]
        if where == "within":
            text = (
                f"{fixed}, {rival} is the better place below {turn['estimate']:.3g} training FLOPs, {spent[name]} above"
            )
        else:
            every = "at the largest of the budgets" if turn["changes"] else "at every budget"
            text = f"{fixed}, {spent[name] if where == 'before' else rival} is the better place {every} from"
            text += f" {_searched(turn)}"
        lines.append("  " + text + _turn_ends(turn, level))
    return lines


def _searched(turn: Mapping) -> str:
    return f"{turn['searched'][0]:.3g} to {turn['searched'][1]:.3g}"


def _turn_ends(turn: Mapping, level: float) -> str:
    """The interval of a turn, and whether it lies outside of the data."""
    (first, last), where = turn["run"], turn["where"]
    beyond = dict(before=f"below {turn['searched'][0]:.3g}", after=f"beyond {turn['searched'][1]:.3g}")
    if where["low"] is None:
        text = "; no interval: fitted without draws"
    elif where["low"] == where["high"] == where["estimate"] != "within":
        text = f" (so in the whole {level:.0%} interval)"
    else:
        low, high = (f"{turn[end]:.3g}" if where[end] == "within" else beyond[where[end]] for end in ("low", "high"))
        text = f" ({level:.0%} interval of the turn {low} to {high})"
    if where["estimate"] == "within" and not first <= turn["estimate"] <= last:
        text += f"; that is outside the budgets run, {first:.3g} to {last:.3g}"
    if turn["changes"] > 1:
        text += f"; they change places {turn['changes']} times on the way"
    return text
