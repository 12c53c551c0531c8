"""Which learning rate is fair to every shape? From the rows of studies/recipe_search.py to one rule.

    python -m analysis.recipe_rule results/recipe_search.jsonl [--out results] [--json]

For each shape and budget the best rate is the minimum of a parabola in ln(rate) through the lowest loss and its two
neighbours. The rule of `sovit.spec.run.learning_rate`, base x (32 / width)^p x (2 / depth)^q, is the least-squares line
through the ln of the best rates at the largest budget. A best rate at the end of the rates tried is only a bound: it is
flagged and left out. Writes recipe.json into OUT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.publish import Result, run
from sovit import UserError
from sovit.ledger.measurements import levels, measurements
from sovit.spec.run import learning_rate
from sovit.spec.shape import Shape
from sovit.tables import text_table

SHAPE = ("width", "depth", "mlp_dim")
REFERENCE = dict(width=32, depth=2)  # where the rule's base stands, as in sovit.spec.run.learning_rate


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
    if not rates[0] <= rate <= rates[-1]:
        return None
    x = np.log(rates)
    near = np.sort(np.argsort(np.abs(x - np.log(rate)), kind="stable")[:3])
    return float(np.polyval(np.polyfit(x[near], np.asarray(losses)[near], 2), np.log(rate)))


def fit_rule(shapes: Sequence[dict], rates: Sequence[float]) -> dict:
    """Least squares of ln(rate) on ln(32 / width) and ln(2 / depth), of the best rate of each {width, depth}.

    Returns {base, width_power, depth_power, standard_errors (None where no degree of freedom is left), n}. Raises
    UserError where the shapes cannot tell the two powers apart.
    """
    design = np.array([[1.0, *(np.log(at / shape[dim]) for dim, at in REFERENCE.items())] for shape in shapes])
    target = np.log(rates)
    if not len(shapes) or np.linalg.matrix_rank(design) < 3:
        raise UserError(
            f"width and depth cannot be told apart in the {len(shapes)} shapes whose best rate lies inside the rates tried;"
            " run more shapes, or wider rates"
        )
    answer = np.linalg.lstsq(design, target, rcond=None)[0]
    free, residual = len(target) - 3, target - design @ answer
    errors: list = [None] * 3
    if free:
        errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * (residual @ residual) / free).tolist()
    rule = dict(base=float(np.exp(answer[0])), width_power=float(answer[1]), depth_power=float(answer[2]))
    return rule | dict(standard_errors=dict(zip(("ln_base", "width_power", "depth_power"), errors)), n=len(target))


def best_rates(paths: Sequence[Path], metric: str = "val_loss") -> list[dict]:
    """The best rate of each shape and budget that was run at three rates or more; seeds of one rate are averaged."""
    data = measurements(paths, metric)
    missing = [name for name in (*SHAPE, "peak_lr", "train_flops") if name not in data.columns]
    if missing:
        raise UserError(f"the rows lack {missing[0]}; a learning-rate rule needs the shape, peak_lr and train_flops")
    group, budgets = levels(data.columns["train_flops"])
    table: dict = {}
    for row, g, loss in zip(data.rows, group, data.y):
        place = (*(row[name] for name in SHAPE), int(g))
        table.setdefault(place, {}).setdefault(row["peak_lr"], []).append(loss)
    cases = []
    for (*dims, g), found in sorted(table.items()):
        rates = sorted(found)
        if len(rates) >= 3:
            losses = [float(np.mean(found[rate])) for rate in rates]
            rate, loss, edge = best_rate(rates, losses)
            case = dict(zip(SHAPE, dims)) | dict(train_flops=float(f"{budgets[g]:.3g}"), rates=rates, losses=losses)
            cases.append(case | dict(best_rate=rate, best_loss=loss, edge=edge))
    if not cases:
        raise UserError("no shape was run at three learning rates or more; run studies/recipe_search.py")
    return cases


def recipe_rule(paths: Sequence[Path]) -> dict:
    """Best rate of each shape and budget, the rule at the largest budget, and what it costs each shape. Plain data."""
    cases = best_rates(paths)
    last = [case for case in cases if case["train_flops"] == max(c["train_flops"] for c in cases)]
    inside = [case for case in last if not case["edge"]]
    rule = fit_rule(inside, [case["best_rate"] for case in inside])
    for case in cases:
        shape = Shape(*(case[name] for name in SHAPE), head_dim=case["width"])
        case["rule_rate"] = learning_rate(shape, rule["base"], rule["width_power"], rule["depth_power"])
        at = loss_at(case["rule_rate"], case["rates"], case["losses"])
        case["penalty"] = None if at is None else max(0.0, at / case["best_loss"] - 1)
    known = [case["penalty"] for case in last if case["penalty"] is not None]
    penalty = dict(median=float(np.median(known)) if known else None, largest=max(known, default=None), n=len(known))
    return rule | dict(train_flops=last[0]["train_flops"], penalty=penalty, cases=cases)


def analyse(options: argparse.Namespace) -> Result:
    rule = recipe_rule(options.ledgers)
    head = (*SHAPE, "train FLOPs", "best rate", "rule", "penalty")
    rows = []
    for case in rule["cases"]:
        best = f"{case['best_rate']:.4g}" + (" edge" if case["edge"] else "")
        penalty = "-" if case["penalty"] is None else f"{case['penalty']:.2%}"
        shape = [str(case[name]) for name in SHAPE]
        rows.append((*shape, f"{case['train_flops']:.3g}", best, f"{case['rule_rate']:.4g}", penalty))
    powers = ", ".join(
        f"{name} {rule[name]:.3f}" + ("" if error is None else f" ± {error:.2g}")
        for name, error in list(rule["standard_errors"].items())[1:]
    )
    words = f"at {rule['train_flops']:.3g} training FLOPs: base {rule['base']:.4g}, {powers} ({rule['n']} shapes)"
    return Result(rule, text_table(head, rows) + f"\n\n{words}", "recipe.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER")
    return run(analyse, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
