"""Which learning rate is fair to every shape? From the rows of studies/recipe_search.py to one rule.

    python analysis/recipe_rule.py results/recipe_search.jsonl [--out results]

For each shape and budget the best rate is the minimum of a parabola in ln(rate) through the lowest loss and its two
neighbours. The rule of `sovit.spec.run.learning_rate`, base x (32 / width)^p x (2 / depth)^q, is the least-squares line
through the ln of those rates, one budget at a time; the largest budget's is the one to use. A best rate at the end of
the rates tried is only a bound: it is flagged and left out. Writes recipe.json into OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.ledger.measurements import Measurements, levels, measurements
from sovit.spec.run import learning_rate
from sovit.spec.shape import Shape
from sovit.tables import text_table

REFERENCE = dict(width=32, depth=2, mlp_dim=128)  # where the rule's base stands, as in sovit.spec.run.learning_rate
POWERS = {"width": "width_power", "depth": "depth_power"}
CHECKED = POWERS | {"mlp_dim": "mlp_dim_power"}  # the rule has no such term; its size says whether it should


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float, bool]:
    """(rate, loss, edge) at the minimum: of the parabola in ln(rate) through the lowest point and its neighbours.

    edge: the lowest point is the first or the last, which is then returned as it is. Rates rise; two or more.
    """
    i = int(np.argmin(losses))
    if i in (0, len(rates) - 1):
        return float(rates[i]), float(losses[i]), True
    x = np.log(rates[i - 1 : i + 2])
    curve = np.polyfit(x - x[1], losses[i - 1 : i + 2], 2)
    at = -curve[1] / (2 * curve[0])
    return float(np.exp(x[1] + at)), float(np.polyval(curve, at)), False


def loss_at(rate: float, rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Loss at a rate, by the parabola in ln(rate) through the three nearest rates run; None outside those run."""
    if not rates[0] <= rate <= rates[-1] or len(rates) < 3:
        return None
    x = np.log(rates)
    near = np.sort(np.argsort(np.abs(x - np.log(rate)), kind="stable")[:3])
    return float(np.polyval(np.polyfit(x[near], np.asarray(losses)[near], 2), np.log(rate)))


def fit_rule(shapes: Sequence[dict], rates: Sequence[float], powers: Mapping = POWERS) -> dict:
    """Least squares of ln(rate) on ln(32 / width) and ln(2 / depth).

    shapes: {width, depth} of each best rate. Returns {base, width_power, depth_power, standard_errors, sd, n}; a power
    whose dimension does not vary is 0 with standard error None, as are all errors where no degree of freedom is left.
    `powers`: dimension -> name of its power.
    """
    varying = [d for d in powers if len({shape[d] for shape in shapes}) > 1]
    design = np.column_stack([np.ones(len(shapes)), *(np.log([REFERENCE[d] / s[d] for s in shapes]) for d in varying)])
    if len(shapes) < design.shape[1]:
        raise UserError(
            f"{len(shapes)} shapes have a best rate inside the rates tried, too few for a rule; widen the rates"
        )
    target = np.log(rates)
    answer, _, rank, _ = np.linalg.lstsq(design, target, rcond=None)
    if rank < design.shape[1]:
        raise UserError(
            "width and depth move together in these shapes, so that their powers cannot be told apart; run more shapes"
        )
    free = len(target) - rank
    residual = target - design @ answer
    sd = float(np.sqrt(residual @ residual / free)) if free else None
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design))) * sd if free else [None] * rank
    found = dict(zip(varying, answer[1:].tolist()))
    found_errors = dict(zip(varying, [None if e is None else float(e) for e in errors[1:]]))
    return dict(
        base=float(np.exp(answer[0])),
        **{name: found.get(d, 0.0) for d, name in powers.items()},
        standard_errors=dict(
            ln_base=None if errors[0] is None else float(errors[0]),
            **{name: found_errors.get(d) for d, name in powers.items()},
        ),
        sd=sd,
        n=len(target),
    )


def best_rates(data: Measurements) -> tuple[list[dict], int]:
    """Return the best rate of each shape and budget, and how many of them had under three rates.

    Seeds of one rate are averaged. Raises UserError where the rows lack a column, or no shape has three rates.
    """
    missing = [n for n in ("width", "depth", "mlp_dim", "peak_lr", "train_flops") if n not in data.columns]
    if missing:
        raise UserError(f"the rows lack {missing[0]}; a learning-rate rule needs the shape, peak_lr and train_flops")
    group, budgets = levels(data.columns["train_flops"])
    table: dict = {}
    for row, g, loss in zip(data.rows, group, data.y):
        shape = tuple(row[n] for n in ("width", "depth", "mlp_dim"))
        table.setdefault((shape, int(g)), {}).setdefault(row["peak_lr"], []).append(loss)
    cases = []
    for (shape, g), found in sorted(table.items()):
        rates = sorted(found)
        if len(rates) < 3:
            continue
        losses = [float(np.mean(found[rate])) for rate in rates]
        rate, loss, edge = best_rate(rates, losses)
        case = dict(shape=" × ".join(map(str, shape)), width=shape[0], depth=shape[1], mlp_dim=shape[2])
        case |= dict(train_flops=float(f"{budgets[g]:.3g}"), rates=rates, losses=losses, best_rate=rate, best_loss=loss)
        cases.append(case | dict(edge=edge, num_seeds=min(map(len, found.values()))))
    if not cases:
        raise UserError("no shape was run at three learning rates or more; run studies/recipe_search.py")
    return cases, len(table) - len(cases)


def rules_of(cases: Sequence[dict]) -> list[dict]:
    """Fit the rule at each budget, best rates at an edge left out. Raises UserError where the largest budget has none."""
    rules = []
    for budget in sorted({case["train_flops"] for case in cases}):
        mine = [case for case in cases if case["train_flops"] == budget]
        inside = [case for case in mine if not case["edge"]]
        rates = [case["best_rate"] for case in inside]
        try:
            rule = fit_rule(inside, rates)
        except UserError as error:
            if budget == max(case["train_flops"] for case in cases):
                raise
            rule = dict(note=str(error), n=len(inside))
        with contextlib.suppress(UserError):
            wider = fit_rule(inside, rates, CHECKED)
            rule |= dict(mlp_dim_power=wider["mlp_dim_power"], mlp_dim_error=wider["standard_errors"]["mlp_dim_power"])
        rules.append(dict(train_flops=budget, edges=len(mine) - len(inside), **rule))
    return rules


def recipe_rule(paths: Sequence[Path], metric: str = "val_loss") -> dict:
    """Best rate of each shape and budget, the rule at each budget, and what the rule costs each shape. Plain data."""
    data = measurements(paths, metric)
    cases, thin = best_rates(data)
    rules = rules_of(cases)
    used = rules[-1]
    for case in cases:
        shape = Shape(case["width"], case["depth"], case["mlp_dim"], head_dim=case["width"])
        case["rule_rate"] = learning_rate(shape, used["base"], used["width_power"], used["depth_power"])
        at = loss_at(case["rule_rate"], case["rates"], case["losses"])
        case["penalty"] = None if at is None else max(0.0, at / case["best_loss"] - 1)
    last = [case for case in cases if case["train_flops"] == used["train_flops"]]
    known = [case["penalty"] for case in last if case["penalty"] is not None]
    return dict(
        **{name: used[name] for name in ("base", "width_power", "depth_power", "standard_errors")},
        reference={d: REFERENCE[d] for d in POWERS},
        train_flops=used["train_flops"],
        metric=metric,
        ledgers=[Path(p).name for p in paths],
        parametrisation=sorted({str(row.get("parametrisation")) for row in data.rows}),
        penalty=dict(median=float(np.median(known)) if known else None, largest=max(known, default=None), n=len(known)),
        rules=rules,
        cases=cases,
        left_out=len(data.left_out),
        thin=thin,
    )


def rule_text(rule: dict) -> str:
    """A table of the best rates, and a line on each budget's rule and on its price."""
    rows = []
    for case in rule["cases"]:
        penalty = "-" if case["penalty"] is None else f"{100 * case['penalty']:.2f} %"
        best = f"{case['best_rate']:.4g}" + (" edge" if case["edge"] else "")
        loss = f"{case['best_loss']:.4f}"
        rows.append((case["shape"], f"{case['train_flops']:.3g}", best, f"{case['rule_rate']:.4g}", loss, penalty))
    head = ("width × depth × MLP dim", "train FLOPs", "best rate", "rule", "best loss", "penalty")
    lines = [text_table(head, rows), ""]
    for at in rule["rules"]:
        if "base" not in at:
            lines.append(f"at {at['train_flops']:.3g} training FLOPs: no rule ({at['note']})")
            continue
        errors = at["standard_errors"]
        powers = ", ".join(f"{name} {at[name]:.3f}{_error(errors[name])}" for name in POWERS.values())
        lines.append(
            f"at {at['train_flops']:.3g} training FLOPs: base {at['base']:.4g}{_error(errors['ln_base'], at['base'])},"
            f" {powers} ({at['n']} shapes, {at['edges']} at an edge left out)"
        )
        if "mlp_dim_power" in at:
            lines.append(f"  a power of the MLP dim would be {at['mlp_dim_power']:.3f}{_error(at['mlp_dim_error'])}")
    p = rule["penalty"]
    if p["n"]:
        lines.append(
            f"the rule of {rule['train_flops']:.3g} costs {100 * p['median']:.2f} % of the loss in the median and"
            f" {100 * p['largest']:.2f} % at most against each shape's own best rate ({p['n']} shapes)"
        )
    lines.append(f"left out: {rule['left_out']} rows, and {rule['thin']} shapes and budgets with under three rates")
    return "\n".join(lines)


def _error(error: float | None, scale: float = 1.0) -> str:
    return " (no error: no degree of freedom)" if error is None else f" ± {error * scale:.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER")
    parser.add_argument("--metric", default="val_loss")
    parser.add_argument("--out", type=Path, default=OUTPUTS, help=f"folder (default {OUTPUTS})")
    options = parser.parse_args(argv)
    try:
        rule = recipe_rule(options.ledgers, options.metric)
        write_atomic(options.out / "recipe.json", json.dumps(rule, indent=1, allow_nan=False) + "\n")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(rule_text(rule))
    return 0


if __name__ == "__main__":
    sys.exit(main())
