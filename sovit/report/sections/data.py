"""The rows: what was run, seeds, data order, learning rates, what was left out, and what makes rows hard to compare."""

from __future__ import annotations

from collections import Counter

import numpy as np

from sovit.law.design_matrix import star
from sovit.ledger.measurements import Measurements, levels
from sovit.report.sections.phrases import NAMES, flops, listed, number, percent, said, sentence

MIN_SEEDS, MIN_SEEDED_SHAPES = 3, 2  # what every study owes: 3 seeds at 2 shapes


def data_section(data: Measurements, fit) -> str:
    shapes = data.shapes()
    trunks = Counter(row["trunk_id"] for row in data.rows)
    lines = [
        f"- {len(data.y)} rows of {len(trunks)} trunks and {len(set(shapes))} shapes, metric `{data.metric}`; "
        + ", ".join(f"{key} {said(data.rows[0].get(key))}" for key in ("data", "preset", "num_classes", "objective"))
        + "."
    ]
    dims = fit.model.dims
    for dim in dims:
        lines.append(f"- Values of {NAMES[dim]} run: {listed([number(v) for v in fit.data.grid[dim]], 'and')}.")
    if dims:
        centre, arms = star(data.columns, dims)
        count = Counter(arms[list(dict(zip(shapes, range(len(shapes)))).values())].tolist())
        places = [f"{count[d]} on the {NAMES[d]} arm" for d in dims] + [f"{count['centre']} at the centre"]
        lines.append(
            f"- Design: centre {listed([f'{NAMES[d]} {number(v)}' for d, v in centre.items()])}; shapes: {listed(places)},"
            f" {count['corner']} off the axes"
            + ("." if count["corner"] else " (without any, no interaction between dimensions could be seen).")
        )
    for name, words in (("train_flops", "training FLOPs"), ("num_examples", "numbers of images")):
        if name in data.columns:
            _, found = levels(data.columns[name])
            text = (
                listed([flops(v) for v in found])
                if len(found) <= 8
                else f"{len(found)} levels from {flops(found[0])} to {flops(found[-1])}"
            )
            lines.append(f"- Budgets in {words}: {text}.")
    lines.append(f"- {seeds(data, shapes)}")
    if data.support:
        lines.append(f"- {support(data)}")
    lines.append(f"- {order(data, shapes)}")
    lines.append(f"- {rates(data)}")
    excluded = Counter(reason for _, reason in data.left_out)
    total = ", ".join(f"{n} {status}" for status, n in sorted(data.statuses.items()))
    most = [f"{n} × {reason}" for reason, n in sorted(excluded.most_common(9))] + ["..."] * (len(excluded) > 9)
    lines.append(
        f"- Status of the {sum(data.statuses.values())} rows read: {total}. Left out: {len(data.left_out)}"
        + (f" ({'; '.join(most)})." if excluded else ".")
    )
    lines += [f"  - `{run_id}`: {reason}" for run_id, reason in data.left_out[:20]]
    if len(data.left_out) > 20:
        lines.append(f"  - and {len(data.left_out) - 20} more")
    return "\n".join(lines)


def seeds(data, shapes) -> str:
    if "init_seed" not in data.columns:
        return "The rows do not say their seeds."
    seeds: dict = {}
    for shape, row in zip(shapes, data.rows):
        seeds.setdefault((shape, row.get("peak_lr")), set()).add((row.get("init_seed"), row.get("data_seed")))
    count = Counter(len(s) for s in seeds.values())
    enough = sum(n for seeds_here, n in count.items() if seeds_here >= MIN_SEEDS)
    text = f"Seeds: {listed([f'{n} shape' + 's' * (n > 1) + f' with {s}' for s, n in sorted(count.items(), reverse=True)])}."
    if enough >= MIN_SEEDED_SHAPES:
        return text + f" The noise between seeds can be read ({MIN_SEEDS} or more at {enough} shapes)."
    return text + (
        f" **Fewer than {MIN_SEEDS} seeds at {MIN_SEEDED_SHAPES} shapes**: the noise is poorly known, and so is every"
        " “within the noise” below."
    )


def support(data) -> str:
    """Few-shot errors: what the choice of the support sets does to a row by itself, and to all rows together."""
    s = data.support
    known = f"each row's mean over {s['sets']} support sets is known to {percent(s['sd'])} (s.d.), which the law"
    known += " takes for known noise of the row and weighs it by"
    alike = "; the rows do not differ in it by more than chance" if s["kept"] == 0 else ""
    if s["shared_sd"] is None:
        return f"Few-shot error: {known}{alike}. The rows hold no error by support set: what all share counts as noise too."
    return (
        f"Few-shot error: {known}{alike}. The sets are the same for all rows: another choice of them would move all rows"
        f" together by {percent(s['shared_sd'])}, which is in no interval here, because it cancels between shapes."
    )


def order(data, shapes) -> str:
    if "data_seed" not in data.columns:
        return "The rows do not say whether shapes saw the same images in the same order."
    seeds: dict = {}
    for shape, row in zip(shapes, data.rows):
        seeds.setdefault(shape, set()).add(row["data_seed"])
    common = set.intersection(*seeds.values())
    if common:
        return (
            "All shapes were trained with one data order (data seed "
            + listed([str(s) for s in sorted(common)])
            + "): common random"
            " numbers, which make differences between shapes less noisy than losses, and which leave out the noise of"
            " another order."
        )
    return "The shapes do not share a data seed: differences between shapes carry the noise of the data order as well."


def rates(data) -> str:
    rates = [row["peak_lr"] for row in data.rows if row.get("peak_lr")]
    kinds = sorted({str(row["parametrisation"]) for row in data.rows if row.get("parametrisation")})
    said = f"parametrisation {listed(kinds)}" if kinds else "parametrisation not said"
    if not rates:
        return (
            f"Learning rate: not said by the rows; {said}. Whether it was fair to every shape cannot be told from them."
        )
    low, high = min(rates), max(rates)
    if low == high:
        text = f"the same peak learning rate, {low:g}, throughout, whatever the shape"
    else:
        text = rate_rule(data) or f"peak learning rates from {low:g} to {high:g}, by no power of width and depth"
    return f"Recipe, as the rows carry it: {text}; {said}."


def rate_rule(data) -> str:
    """The rule peak_lr = base (32 / width)^p (2 / depth)^q where the rows' rates keep to it within 1 %, else ""."""
    if not {"width", "depth"} <= set(data.columns) or not all(row.get("peak_lr") for row in data.rows):
        return ""
    found = sorted({(row["width"], row["depth"], row["peak_lr"]) for row in data.rows})
    width, depth, rates = np.array(found, float).T
    terms = [np.ones(len(rates)), np.log(32 / width), np.log(2 / depth)]
    basis = np.stack([t for t in terms if np.ptp(t) > 0 or t is terms[0]], 1)
    power, _, rank, _ = np.linalg.lstsq(basis, np.log(rates), rcond=None)
    if rank < basis.shape[1] or len(found) <= rank:  # no one rule, or any rates would keep to some rule
        return ""
    if np.abs(basis @ power - np.log(rates)).max() > 0.01:
        return ""
    names = [n for n, t in (("(32 / width)", terms[1]), ("(2 / depth)", terms[2])) if np.ptp(t) > 0]
    factors = " · ".join(f"{name}^{round(p, 2) + 0.0:.2f}" for name, p in zip(names, power[1:]))
    return f"peak learning rate {np.exp(power[0]):.3g} · {factors}, from {rates.min():g} to {rates.max():g}"


def cautions(data) -> list[str]:
    """What makes rows hard to compare although nothing forbids it."""
    out = [sentence(note) for note in data.notes]
    rates: dict = {}
    for shape, row in zip(data.shapes(), data.rows):
        rates.setdefault(shape, set()).add(row.get("peak_lr"))
    several = [shape for shape, found in rates.items() if len(found) > 1]
    if several:
        out.append(
            f"{len(several)} of {len(rates)} shapes were run at several learning rates and all of their rows enter"
            " the law, which has"
            " no term for it: the scatter is not noise. Fit a ledger with one rate a shape."
        )
    if len({row.get("parametrisation") for row in data.rows}) > 1:
        out.append("The rows mix parametrisations; their laws may differ.")
    for name in ("batch_size", "weight_decay"):
        values = sorted({said(row.get(name)) for row in data.rows})
        if len(values) > 1:
            out.append(f"The rows differ in {name} ({listed(values)}), for which the law has no term.")
    if data.zero_line is not None and data.y.max() > data.zero_line:
        out.append(
            f"{int((data.y > data.zero_line).sum())} rows are above the zero line {data.zero_line:.4g}, the loss of"
            " knowing nothing:"
            " these runs have learnt less than nothing."
        )
    return out
