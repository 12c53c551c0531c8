"""What the contest of strategies came to: medians, and two comparisons of `next_run` with random runs."""

from __future__ import annotations

import numpy as np

from analysis.next_run.simulated_contest import NOISE_SD, RHO, STAR_COST, TARGETS

OURS, FAIR = "next_run", "cost_random"
TUNED = ("joint", "inter .8")  # the truths on which the defaults were chosen
LEVELS_COMPARED = (0.044, 0.1, 0.22)  # of the regret that FAIR has there: what does OURS spend for the same?
DRAWS = 1000


def compute_to(levels: np.ndarray, regret: np.ndarray, goal: float, first: bool = False) -> float:
    """Compute from which on a falling-and-rising regret curve [C] stays at or under `goal`; inf where it never does.

    first: at which it is there for the first time. Between two checkpoints by a straight line in both logs.
    """
    over = regret > goal
    if not over.any() or (first and not over[0]):
        return float(levels[0])
    if first and over.all():
        return float("inf")
    i = int(np.argmin(over)) - 1 if first else int(np.flatnonzero(over)[-1])
    if i == len(levels) - 1:
        return float("inf")
    x, y = np.log(levels[i : i + 2]), np.log(np.maximum(regret[i : i + 2], 1e-12))
    return float(np.exp(x[0] + (x[1] - x[0]) * (y[0] - np.log(goal)) / max(y[0] - y[1], 1e-12)))


def summary(lines: list[dict], measure: str = "regret_10x") -> dict:
    """{truths: {truth: {strategies, same_regret, same_compute}}, measure, ...}: plain data for the table and the figure.

    strategies: by name {levels, seeds, and of each measure median, low, high (quartiles)}. same_regret: compute from which
    OURS stays at the regret that FAIR has at LEVELS_COMPARED, over that at which FAIR first has it, `fair` (null: not by the
    end of its episodes). FAIR is followed further: what OURS would do later must not count for it.
    same_compute: regret of OURS over that of FAIR, geometric mean over seeds, at each checkpoint of both. Intervals are
    90 %, by resampling seeds, which the two share.
    """
    measures = [f"{kind}regret_{m}" for kind in ("", "joint_") for m in TARGETS]
    out: dict = {}
    for truth in dict.fromkeys(line["truth"] for line in lines):
        table: dict = {}
        for strategy in dict.fromkeys(line["strategy"] for line in lines if line["truth"] == truth):
            mine = sorted(
                (e for e in lines if (e["truth"], e["strategy"]) == (truth, strategy)), key=lambda e: e["seed"]
            )
            levels = [p["level"] for p in mine[0]["curve"]]
            entry: dict = dict(levels=levels, seeds=[e["seed"] for e in mine])
            for name in measures:
                if all(name in p for e in mine for p in e["curve"]):
                    many = np.array([[p[name] for p in e["curve"]] for e in mine])
                    low, middle, high = np.quantile(many, [0.25, 0.5, 0.75], axis=0)
                    entry[name] = dict(median=middle.tolist(), low=low.tolist(), high=high.tolist())
            table[strategy] = entry
        out[truth] = dict(strategies=table, tuned=truth in TUNED)
        both = {
            s: {e["seed"]: e["curve"] for e in lines if (e["truth"], e["strategy"]) == (truth, s)} for s in (OURS, FAIR)
        }
        seeds = sorted(set(both[OURS]) & set(both[FAIR]))
        if len(seeds) > 1:
            out[truth] |= _compare(both, seeds, measure)
    return dict(
        measure=measure, unit="SoViT's star", star_train_flops=STAR_COST, noise_sd=NOISE_SD, rho=RHO, targets=TARGETS,
        truths=out,
    )  # fmt: skip


def _compare(both: dict, seeds: list, measure: str) -> dict:
    curves = {s: np.array([[p[measure] for p in both[s][seed]] for seed in seeds]) for s in both}
    levels = {s: np.array([p["level"] for p in both[s][seeds[0]]]) for s in both}
    picks = np.random.default_rng(0).integers(0, len(seeds), (DRAWS, len(seeds)))

    def ratio(pick, at: int) -> float:
        ours, fair = (np.median(curves[s][pick], 0) for s in (OURS, FAIR))
        return compute_to(levels[OURS], ours, fair[at]) / compute_to(levels[FAIR], fair, fair[at], first=True)

    same_regret = []
    for level in LEVELS_COMPARED:
        found = np.flatnonzero(np.isclose(levels[FAIR], level))
        if len(found):
            many = np.array([ratio(pick, int(found[0])) for pick in picks])
            low, high = np.quantile(many, [0.05, 0.95], method="nearest")
            middle, own = np.median(curves[FAIR], 0), ratio(np.arange(len(seeds)), int(found[0]))
            goal = float(middle[found[0]])
            fair = compute_to(levels[FAIR], middle, goal, first=True)
            entry = dict(level=level, regret=goal, fair=fair, ratio=own, low=low, high=high)
            same_regret.append({k: float(v) if np.isfinite(v) else None for k, v in entry.items()})
    same_compute = []
    for i, level in enumerate(levels[OURS]):
        found = np.flatnonzero(np.isclose(levels[FAIR], level))
        if len(found):
            logs = np.log(np.maximum(curves[OURS][:, i], 1e-6) / np.maximum(curves[FAIR][:, found[0]], 1e-6))
            low, high = np.quantile(logs[picks].mean(1), [0.05, 0.95])
            same_compute.append(
                dict(
                    level=float(level),
                    ratio=float(np.exp(logs.mean())),
                    low=float(np.exp(low)),
                    high=float(np.exp(high)),
                    share_better=float((logs < 0).mean()),
                )
            )
    return dict(num_seeds=len(seeds), same_regret=same_regret, same_compute=same_compute, ours_until=levels[OURS][-1])


def table(summary: dict) -> str:
    """The summary in words: medians by checkpoint, and what the two comparisons say."""
    lines = []
    for truth, entry in summary["truths"].items():
        lines.append(
            f"{truth}{' (tuned on)' if entry['tuned'] else ''}: median {summary['measure']}, % at compute in stars"
        )
        for name, strategy in entry["strategies"].items():
            found = strategy.get(summary["measure"])
            if found:
                cells = (f"{level:g}: {100 * m:.3f}" for level, m in zip(strategy["levels"], found["median"]))
                lines.append(f"  {name:<12}{len(strategy['seeds']):>3} seeds  " + "  ".join(cells))
        for one in entry.get("same_regret", []):
            ends = [f"over {entry['ours_until'] / one['fair']:.2f}" if one[k] is None else f"{one[k]:.2f}"
                    for k in ("ratio", "low", "high")]  # fmt: skip
            lines.append(
                f"  {FAIR}'s {100 * one['regret']:.3f} % of {one['level']:g}, which it first has at {one['fair']:.3g}:"
                f" {OURS} takes {ends[0]} [{ends[1]}, {ends[2]}] of that compute"
            )
        for one in entry.get("same_compute", []):
            lines.append(
                f"  at {one['level']:g} its regret is {one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}] of {FAIR}'s,"
                f" better in {one['share_better']:.0%} of the seeds"
            )
    return "\n".join(lines)
