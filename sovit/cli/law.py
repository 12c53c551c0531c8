"""`sovit fit`, `report` and `predict`: from ledgers to a law, from a law to a shape."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sovit import UserError
from sovit.cli.common import Flat, Help, Json, Whole, given, show


@Flat
@dataclass(frozen=True)
class Rows:
    """Which rows of the ledgers a law is of."""

    metric: Annotated[str, Help("Column to fit.")] = "val_loss"
    form: Annotated[str | None, Help("A law form (default: chosen by extrapolation).")] = None
    skip_bad: Annotated[bool, Help("Leave bad rows out, each with its reason, and go on.")] = False
    map: Annotated[tuple[str, ...], Help("THEIRS=OURS,...: columns of a table that others wrote.")] = ()
    units: Annotated[tuple[str, ...], Help("OURS=FACTOR,...: multiply a column, such as num_examples=1e6.")] = ()
    loss: Annotated[str, Help("huber_log or log_squares, of ln(predicted / measured).")] = "huber_log"
    huber_delta: Annotated[float | None, Help("As in a paper, such as 1e-3 (default: from the data).")] = None


@Flat
@dataclass(frozen=True)
class FitOptions(Rows):
    """How to fit."""

    out: Annotated[Path | None, Help("Folder to write (default: runs/results/<ledger's name>_law).")] = None
    bootstrap: Annotated[Whole, Help("Draws of each interval.")] = 1000
    train_flops: Annotated[float | None, Help("Budget of the recommendation (default: beyond the largest run).")] = None


def fit(ledgers: list[Path], /, *, options: FitOptions = FitOptions(), json: Json = False) -> None:
    """Fit shape laws to ledgers: law.json, report.md and figures.

    Args:
        ledgers: JSON lines, CSV or TSV, also as .gz; --map and --units say what columns are
    """
    from sovit.report.build import fit_ledgers

    show(fit_ledgers(ledgers, **vars(options)), lambda summary: summary["text"], json)


def report(ledgers: list[Path], /, *, out: Path | None = None, law: Path | None = None, rows: Rows = Rows()) -> None:
    """Write the law of ledgers as one HTML file, figures and tables in it.

    Args:
        ledgers: JSON lines, CSV or TSV, also as .gz; --map and --units say what columns are
        out: HTML file (default: runs/results/<ledger's name>_report.html)
        law: a folder that sovit fit wrote of these rows
    """
    from sovit.report.html import write_page

    print(write_page(ledgers, law=law, out=out, **vars(rows)))


@Flat
@dataclass(frozen=True)
class RuleOptions:
    """What can be built: the fields of sovit.predict.integer_search.Rules."""

    head_dim: Annotated[Whole | None, Help("Width of one head; width is a multiple of it (default: as run).")] = None
    width_multiple: Annotated[Whole | None, Help("Width is a multiple of this as well, such as 128.")] = None
    depth_multiple: Annotated[Whole | None, Help("Depth is a multiple of this.")] = None
    mlp_multiple: Annotated[Whole | None, Help("MLP dim is a multiple of this, such as 128 (default 8).")] = None
    max_params: Annotated[float | None, Help("At most so many encoder parameters.")] = None
    max_forward_flops: Annotated[float | None, Help("At most so many forward FLOPs an image, task head apart.")] = None


@Flat
@dataclass(frozen=True)
class Question:
    """What to ask of a law."""

    train_flops: Annotated[float | None, Help("Budget: 3 x forward FLOPs x images, head included.")] = None
    by: Annotated[str | None, Help("patch_size or image_size: the best shape with each value run.")] = None
    out: Annotated[Path | None, Help("Folder for the figure of --frontier.")] = None
    frontier: Annotated[bool, Help("A table of best shapes over a ladder of budgets instead.")] = False
    first: Annotated[
        float | None, Parameter(name="--from", help="First budget of --frontier (default: the least run).")
    ] = None
    last: Annotated[
        float | None, Parameter(name="--to", help="Last budget of --frontier (default: 100 x the largest run).")
    ] = None
    points: Annotated[Whole | None, Help("How many budgets (default 9).")] = None


def predict(
    law: Path,
    /,
    *,
    question: Question = Question(),
    rules: RuleOptions = RuleOptions(),
    json: Json = False,
) -> None:
    """Name the best shape for a budget, its interval, and the shapes as good as it.

    Args:
        law: law.json of sovit fit
    """
    from sovit.law.fitted_law import read_law, read_siblings
    from sovit.predict.growth_rules import other_rules
    from sovit.predict.patch_tradeoff import trade
    from sovit.predict.recommend import best_shape
    from sovit.report.text import recommendation_text, trade_text

    if question.frontier:
        return _frontier(law, question, rules, json)
    for flag, value in {
        "from": question.first,
        "to": question.last,
        "points": question.points,
        "out": question.out,
    }.items():
        if value is not None:
            raise UserError(f"--{flag} belongs to --frontier; add that, or leave it out")
    if question.train_flops is None:
        raise UserError("name a budget with --train-flops, or ask for a --frontier")
    if question.by is not None:
        return show(trade(read_law(law), question.train_flops, question.by, **given(rules)), trade_text, json)
    fit = read_law(law)
    best = best_shape(fit, question.train_flops, **given(rules))
    beside = other_rules(fit, best, read_siblings(law, ("sovit", "chinchilla")))
    show(best.to_dict() | beside, lambda _: recommendation_text(best, beside), json)


def _frontier(law: Path, question: Question, rules: RuleOptions, as_json: bool) -> None:
    from sovit.law.fitted_law import read_law
    from sovit.predict.law_at_budget import ladder
    from sovit.predict.recommend import best_shape
    from sovit.report.text import frontier_text

    if question.by is not None:
        raise UserError("--by asks at one budget; leave out --frontier, or --by")
    if question.train_flops is not None:
        raise UserError("--frontier takes --from and --to, not --train-flops")
    fit = read_law(law)
    budgets = ladder(fit, question.first, question.last, 9 if question.points is None else question.points)
    rows = [best_shape(fit, budget, **given(rules)) for budget in budgets]
    if question.out is not None:
        from sovit.report import figures as plot

        plot.save(plot.frontier(fit, rows), question.out / "frontier")
    body = dict(law=str(law), form=fit.form, metric=rows[0].metric, level=fit.level)
    show(body | dict(rows=[row.to_dict() for row in rows]), lambda _: frontier_text(rows), as_json)
