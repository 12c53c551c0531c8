"""Write the README's numbers from committed files: every block between `<!-- NAME -->` and `<!-- end -->`.

python analysis/readme.py          rewrites README.md
python analysis/readme.py --check  exit status 1 if a number there is not what the files say
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

from analysis.finetune_cost.tables import table as savings_table
from analysis.flexivit.cost import sizes_table
from analysis.published.flops import table as flops_table
from analysis.published.shapes import table as shapes_table
from analysis.resolution.report import schedule_table, scratch_table, short_table
from analysis.vlm_encoders.report import short_text
from sovit.law.diagnostics import SIGNIFICANT
from sovit.ledger.ledger import read_ledger
from sovit.predict.growth_rules import PAPER
from sovit.spec.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
NAMES = {
    **{"width": "width", "depth": "depth", "mlp_dim": "MLP dim"},
    **{"patch_size": "patch size", "image_size": "image size"},
}


def published() -> str:
    lines = [
        "| model @ px | GFLOPs published | ours | difference | parameters published | ours |",
        "|---|---|---|---|---|---|",
    ]
    for r in flops_table():
        lines.append(
            f"| {r['name']} | {r['published_gflops']:,} | {r['gflops']:,.1f} | {r['gflops_difference']:+.2%} |"
            f" {r['published_params'] / 1e6:,.0f} M | {r['params']:,} |"
        )
    return "\n".join(lines)


def recipe() -> str:
    r = json.loads((RESULTS / "recipe.json").read_text())
    return (
        f"peak rate = {r['base']:.4f} x (32 / width)^{r['width_power']:.2f} x (2 / depth)^{r['depth_power']:.2f}"
        f" (s.e. of the powers {r['standard_errors']['width_power']:.2f} and {r['standard_errors']['depth_power']:.2f});"
        f" it costs {r['penalty']['median']:.2%} of the loss in the median and {r['penalty']['largest']:.2%} at most"
        f" against each of {r['penalty']['n']} shapes' own best rate."
    )


def law(study: str) -> str:
    """The exponents, fit and extrapolation of one committed law."""
    law = json.loads((RESULTS / f"{study}_law" / "law.json").read_text())
    rows = read_ledger(RESULTS / f"{study}.jsonl")
    budgets = sorted({float(f"{r['train_flops']:.1e}") for r in rows})
    billed = [r["spent_seconds"] for r in rows if r.get("spent_seconds") is not None]
    hours = f"{sum(billed) / 3600:.1f} hours of one busy thread" + (
        f" (without {len(rows) - len(billed)} rows whose time was not kept)" if len(billed) < len(rows) else ""
    )
    lines = [
        f"{law['num_rows']} measurements of {law['num_clusters']} trunks, {budgets[0]:.1e} to {budgets[-1]:.1e} training"
        f" FLOPs, {hours}. Headline form: `{law['form']}`.",
        "",
        "| dimension | best x grows as compute^s | 90 % interval | 90 % by pairs of trunks | status |",
        "|---|---|---|---|---|",
    ]
    for name, e in law["exponents"].items():
        s = "not determined" if e["estimate"] is None else f"{e['estimate']:.3f}"
        lines.append(
            f"| {NAMES[name]} | {s} | {_range(e['low'], e['high'])} | {_range(e['pairs_low'], e['pairs_high'])} |"
            f" {e['status']} |"
        )
    noise, residual = law["noise"], law["diagnostics"]["residual_rms"]
    misses = (law["diagnostics"]["lack_of_fit"]["p"] or 1) < SIGNIFICANT
    lines += [
        "",
        f"Noise between seeds {noise['sd']:.2%} ({noise['n']} degrees of freedom); the law misses by {residual:.2%}"
        + (": more than noise, so the form is not the whole truth." if misses else "."),
    ]
    e = law["extrapolation"]
    scores = ", ".join(
        f"{form} {score['rmse']:.1%} ({score['bias']:+.1%})"
        for form, score in sorted(e["forms"].items(), key=lambda item: item[1]["rmse"] or math.inf)
        if score["rmse"] is not None
    )
    lines += [f"Fitted to the {e['n_fit']} cheaper rows, error on the {e['n']} most expensive, RMSE (bias): {scores}."]
    return "\n".join(lines)


def validation(study: str) -> str:
    v = json.loads((RESULTS / study / "validation.json").read_text())
    lines = ["| arm | shape | predicted | measured: mean (s.d., n) |", "|---|---|---|---|"]
    for name, arm in v["arms"].items():
        lines.append(
            f"| {name} | {arm['label']} | {arm['predicted']:.4f} |"
            f" {arm['mean']:.4f} ({arm['sd']:.4f}, {v['difference']['n']}) |"
        )
    d, said = v["difference"], v["predicted_difference"]
    low, high = (said["low"], said["high"]) if said["low"] is not None else (said["estimate"],) * 2
    missed = " The prediction lies outside of what was measured." if high < d["low"] or low > d["high"] else ""
    lines += [
        "",
        f"At {v['train_flops']:.1e} training FLOPs each: {math.expm1(d['mean']):+.1%} loss, 90 % interval"
        f" {math.expm1(d['low']):+.1%} to {math.expm1(d['high']):+.1%}, predicted {math.expm1(said['estimate']):+.1%}."
        f" Verdict by the rule: **{v['verdict']}**." + missed,
    ]
    return "\n".join(lines)


def probe(study: str, data: str, shots: int = 10) -> str:
    """The best few-shot error of a study's branches, and how it moves with compute."""
    rows = read_ledger(RESULTS / f"{study}.jsonl")
    metric = f"val_error_{shots}shot/{data}"
    probed = [row for row in rows if row.get(metric) is not None]
    best = min(probed, key=lambda row: row[metric])
    sd, guess = best[f"val_error_{shots}shot_sd/{data}"], best[f"probe_zero_line/{data}"]
    low, high = min(row[metric] for row in probed), max(row[metric] for row in probed)
    return (
        f"{len(probed)} branches of `{study}`, {shots}-shot error on `{data}`: {low:.3f} to {high:.3f}; the best,"
        f" {best['width']}x{best['depth']}x{best['mlp_dim']} at {best['train_flops']:.1e} FLOPs, has"
        f" {best[metric]:.3f} (s.d. {sd:.3f} over {len(best[f'val_error_{shots}shot_seeds/{data}'])} support sets);"
        f" a guess {guess:.3f}."
    )


SETS = {  # data sets of results/extrapolation.json, in words
    ("stream_star", "val_loss"): "stream, loss",
    ("stream_star", "val_error"): "stream, error",
    ("icons_star", "val_loss"): "icons, loss",
    ("icons_star", "val_error"): "icons, error",
    ("gemstones hot_100b+", "loss"): "Gemstones, constant rate",
    ("gemstones cool_end", "loss"): "Gemstones, cooled down",
    ("farseer", "loss"): "Farseer",
    ("data_constrained", "loss"): "repeated data",
}
INTERVALS = {"random_effects": "parametric, the headline", "pairs": "pairs of trunks"}
BASELINES = {"chinchilla": "N-D law", "compute_only": "compute alone", "nearest": "nearest run"}


def extrapolation() -> str:
    """RMSE of the chosen form and the baselines over all cuts, and whether the N-D law is beaten."""
    found = {(e["name"], e["metric"]): e["pooled"] for e in json.loads((RESULTS / "extrapolation.json").read_text())
             if "pooled" in e}  # fmt: skip
    lines = [
        f"| RMSE, all cuts | `sovit fit` | {' | '.join(BASELINES.values())} | against the N-D law (90 %) |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in SETS.items():
        forms, against = found[key]["forms"], found[key]["against"]["headline"]["chinchilla"]
        scores = " | ".join(f"{forms[b]['rmse']:.1%}" for b in BASELINES)
        lines.append(
            f"| {name} | {forms['headline']['rmse']:.1%} | {scores} | × {against['ratio']:.2f} ({against['low']:.2f} to"
            f" {against['high']:.2f}): {against['verdict']} |"
        )
    return "\n".join(lines)


def published_fits() -> str:
    """Gemstones: our objective beside that at the authors' exponents."""
    lines = [
        "| Gemstones (2502.06857) | exponents | published | objective | at the published exponents |",
        "|---|---|---|---|---|",
    ]
    found = json.loads((RESULTS / "public_fits.json").read_text())
    for g in found["gemstones"]:
        ours, theirs = (", ".join(f"{e:.4f}" for e in x) for x in (g["exponents"], g["published"]["exponents"]))
        at = g["published"].get("objective")
        lines.append(
            f"| {g['file']}: {', '.join(g['terms'])} | {ours} | {theirs} | {g['objective']:.12f} |"
            f" {'' if at is None else f'{at:.12f}'} |"
        )
    o = found["optimum"]
    lines += [
        "",
        f"Of {o['num_fits']} fits to published data, scipy's multi-start ({o['num_starts'][0]} starts, {o['num_starts'][1]}"
        f" for learning curves) finds an objective lower by more than {o['tolerance']:g} of it in {o['num_above']}, by"
        f" {o['largest_excess']:.1g} at most.",
    ]
    return "\n".join(lines)


def coverage_range() -> str:
    """Least and largest coverage of each interval over the conditions where the form is right."""
    lines = [json.loads(line) for line in (RESULTS / "coverage.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["right"] and not line["profile"]]
    out = [
        "| interval (nominal 90 %) | growth exponents | best shape at 10 × the compute | conditions |",
        "|---|---|---|---|",
    ]
    for kind, name in INTERVALS.items():
        cells = []
        for quantity in ("exponent", "shape_10x"):
            have = [c[quantity]["mean"] for line in lines if quantity in (c := line["coverage"].get(kind, {}))]
            median = sorted(have)[len(have) // 2] if have else None
            cells.append(f"{median:.0%} (from {min(have):.0%} to {max(have):.0%})" if have else "not measured")
        out.append(f"| {name} | {cells[0]} | {cells[1]} | {sum(kind in line['coverage'] for line in lines)} |")
    return "\n".join(out)


def next_run() -> str:
    """Regret of chosen runs over that of cost-weighted random runs at equal compute, by planted truth."""
    summary = json.loads((RESULTS / "active_sweep.json").read_text())
    levels = (0.014, 0.03, 0.066, 0.22)
    lines = [
        "| planted truth | " + " | ".join(f"at {x:g} stars" for x in levels) + " |",
        "|---|" + "---|" * len(levels),
    ]
    for truth, entry in summary["truths"].items():
        at = {e["level"]: e for e in entry["same_compute"]}
        cells = [f"{at[x]['ratio']:.2f} ({at[x]['low']:.2f} to {at[x]['high']:.2f})" for x in levels]
        note = ", tuned on" if entry["tuned"] else ""
        lines.append(f"| {truth}{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hardware() -> str:
    p = json.loads((RESULTS / "hardware" / "pareto.json").read_text())
    flop, time = p["flop_optimal"], p["time_optimal"]
    every = ", ".join(p["on_every_front"]) or "none"
    return (
        f"Of {len(p['shapes'])} shapes on one core, by the stream's law at {p['train_flops']:.2g} training FLOPs: best per"
        f" FLOP {flop['label']}, which loses {flop['excess_at_seconds']:.1%} at equal time; best per second {time['label']},"
        f" which loses {time['excess_at_flops']:.1%} at equal FLOPs. Training reaches {p['rate_range'][0] / 1e9:.1f} to"
        f" {p['rate_range'][1] / 1e9:.0f} GFLOP/s. On all four fronts: {every}."
    )


def paper_shapes() -> str:
    """What the paper's exponents imply of the compute between its own shapes."""
    found = shapes_table()
    implied = "; ".join(
        f"from {row['from']} to {row['to']} " + ", ".join(f"{d['tau']:,.0f}" for d in row["dimensions"].values())
        for row in found["implied"]
    )
    is_, said = (", ".join(f"{e:.2f}" for e in x.values()) for x in (found["exponents"], PAPER))
    return (
        f"Its exponents and the shapes that it printed imply these ratios of compute, by width, depth and MLP dim:"
        f" {implied}. One step has one ratio. Turned round, its two models imply exponents {is_}, where it states {said}."
    )


def finetune_cost() -> str:
    """What a step of attention-only fine-tuning costs beside one of everything, measured, and the claim."""
    return savings_table(json.loads((RESULTS / "finetune_cost" / "savings.json").read_text()))


def trade() -> str:
    """What twice the FLOPs an image bring, by what they are spent on."""
    spend = json.loads((RESULTS / "patch_star_law" / "report.json").read_text())["trades"]["patch_size"]["spend"]
    words = dict(width="more width", mlp_dim="a larger MLP", image_size="a larger image", patch_size="smaller patches")
    gains = {
        n: [-100 * option["gain"][k] for k in ("estimate", "high", "low")] for n, option in spend["options"].items()
    }
    parts = [f"{words[n]} {x:+.1f}% ({low:+.1f} to {high:+.1f})" for n, (x, low, high) in gains.items()]
    shape, factor = Shape(**spend["shape"]), spend["factor"]
    start = f"{shape.label} in patches of {shape.patch_size} on {shape.image_size} px"
    return (
        f"By the law at {spend['train_flops'] / factor:.1e} training FLOPs, {factor:g} times the FLOPs an image for {start},"
        f" at as many images, change the loss by: {', '.join(parts)}."
    )


TOLD = (  # of the comparisons of the fine-tuning study: ours, theirs, axis
    ("attention", "full", "own_flops"),
    ("attention", "full", "examples"),
    ("attention", "mlp", "examples"),
    ("attention", "head", "examples"),
    ("full", "stay", "total_flops"),
)


def resolution(study: str) -> str:
    """What is trained at a higher resolution: verdicts and storage."""
    found = json.loads((RESULTS / f"{study}.json").read_text())
    stored = [e["share"] for e in found["storage"] if e["mode"] == "attention" and e["share"] is not None]
    share = f"{min(stored):.0%} to {max(stored):.0%}"
    compared = any(e["theirs"] == "scratch" for e in found["comparisons"])
    against = [scratch_table(found, mode) for mode in ("full", "attention") if compared]
    stored_text = f"A file with attention alone takes {share} of the bytes of full fine-tuning's."
    return "\n\n".join([short_table(found, TOLD), *against, stored_text])


def split() -> str:
    """How the law of transfer splits one budget of the shape of MLP ratio 4."""
    found = json.loads((RESULTS / "resolution_finetune.json").read_text())
    return schedule_table(found, "48x2x192", 3e11)


def flexivit() -> str:
    return sizes_table(json.loads((RESULTS / "flexivit.json").read_text()))


def eyes(study: str) -> str:
    """What the models around each encoder answer, and whether the better classifier is the better eye."""
    return short_text(json.loads((RESULTS / f"{study}.json").read_text())).rstrip()


def vlm_answer() -> str:
    return "```\n" + (RESULTS / "vlm_answer.txt").read_text().strip("\n") + "\n```"


def contrastive() -> str:
    """What learning from captions comes to: one line an arm, means over seeds."""
    arms: dict[str, list[dict]] = {}
    for row in read_ledger(RESULTS / "contrastive.jsonl"):
        arms.setdefault(f"{row['width']}x{row['depth']}x{row['mlp_dim']}", []).append(row)
    lines = [
        "| shape (n) | loss | retrieval error in a batch | zero-shot error, colour | kind | marks |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in arms.items():
        tasks = [f"val_zero_shot_error/{task}" for task in ("colour", "kind", "answer")]
        errors = " | ".join(f"{fmean(row[column] for row in rows):.1%}" for column in ("val_error", *tasks))
        loss = f"{fmean(row['val_loss'] for row in rows):.3f} ({stdev(row['val_loss'] for row in rows):.3f})"
        lines.append(f"| {name} ({len(rows)}) | {loss} | {errors} |")
    tasks = ("colour", "kind", "answer")
    majority = " | ".join(f"{row[f'zero_shot_majority/{task}']:.1%}" for task in tasks)
    lines.append(f"| *knowing nothing* | {row['zero_line']:.3f} |  | {majority} |")
    return "\n".join(lines)


def vlm_parity() -> str:
    rows = json.loads((RESULTS / "vlm_parity.json").read_text())["rows"]
    lines = ["| projector | counterpart in transformers | cases | largest difference |", "|---|---|---|---|"]
    lines += [
        f"| `{r['projector']}` | {r['system']}: `{r['oracle']}` | {r['num_cases']} | {r['max_difference']:g} |"
        for r in rows
    ]
    return "\n".join(lines)


def vlm_systems() -> str:
    rows = json.loads((RESULTS / "vlm_systems.json").read_text())["rows"]
    lines = [
        "| system | vision | projector | language model | total | counted elsewhere |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        parts = f"{r['vision']:,} | {r['projector']:,} ({r['projector'] / r['total']:.2%}) | {r['language_model']:,}"
        other = "nowhere" if r["reference"] is None else f"{r['reference']:,}, {r['reference_by']}"
        lines.append(f"| {r['title']} | {parts} | {r['total']:,} | {other} |")
    return "\n".join(lines)


def demo() -> str:
    return "```\n" + (RESULTS / "demo.txt").read_text().strip("\n") + "\n```"


def _range(low, high) -> str:
    return "unbounded" if low is None or high is None else f"{low:.3f} to {high:.3f}"


BLOCKS = {
    "published": published,
    "recipe": recipe,
    "stream law": lambda: law("stream_star"),
    "stream validation": lambda: validation("stream_validation"),
    "icons law": lambda: law("icons_star"),
    "probe": lambda: probe("stream_star", "icons:single40"),
    "paper shapes": paper_shapes,
    "two laws": lambda: validation("active_validation"),
    "extrapolation": extrapolation,
    "published fits": published_fits,
    "coverage": coverage_range,
    "next run": next_run,
    "hardware": hardware,
    "patch law": lambda: law("patch_star"),
    "patch validation": lambda: validation("patch_validation"),
    "trade": trade,
    "resolution": lambda: resolution("resolution_finetune"),
    "resolution icons": lambda: resolution("resolution_icons"),
    "split": split,
    "flexivit": flexivit,
    "finetune cost": finetune_cost,
    "vlm": lambda: eyes("vlm_transfer"),
    "vlm small": lambda: eyes("vlm_small"),
    "vlm answer": vlm_answer,
    "contrastive": contrastive,
    "vlm parity": vlm_parity,
    "vlm systems": vlm_systems,
    "demo": demo,
}


def render(text: str) -> str:
    """Fill every marked block. Raises KeyError for a block that nobody fills."""

    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- ([^\n]+?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    rendered = render(text)
    if "--check" in sys.argv:
        if rendered != text:
            print("README.md differs from the committed results; run python analysis/readme.py")
        return int(rendered != text)
    path.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
