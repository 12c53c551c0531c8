"""The command line. Every command imports only what it uses, so that counting and help start at once.

argparse and not a larger parser: it is in the standard library, costs nothing at start-up, and no command here is deep
enough to need more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sovit import UserError, __version__, cli_vlm
from sovit.ledger import OUTPUTS, PUBLISHED

FOUND = f"where the ledger is kept (default: as launched, else {OUTPUTS}, else {PUBLISHED})"
RULES = {  # of `sovit predict`: the fields of sovit.integers.Rules
    "head_dim": "head dim; width is a multiple of it (default: as run)",
    "width_multiple": "width a multiple of N as well, such as 128",
    "depth_multiple": "depth a multiple of N",
    "mlp_multiple": "MLP dim a multiple of N, such as 128 (default 8)",
    "max_params": "at most N encoder parameters",
    "max_forward_flops": "at most N forward FLOPs an image, task head apart",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 a run failed, 2 bad input (said in one line)."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        sys.stderr.close()
        return 0


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage of every option before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _pixels(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of pixels; images are square, give one side")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sovit", description="Which Vision Transformer shape to train for a compute budget, and how sure that is."
    )
    parser.add_argument("--version", action="version", version=f"sovit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="")

    p = commands.add_parser("demo", help="the whole pipeline, small: study, law, prediction, validation, export")
    p.add_argument("--workers", type=int, default=2, help="worker processes, one thread each (default 2)")
    p.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that it makes (default demo)")
    p.set_defaults(run=_demo)

    p = commands.add_parser("count", help="parameters and FLOPs of one shape, or of several as a table")
    p.add_argument("shapes", nargs="*", metavar="SHAPE", help="such as B/16, So400m/14@378 or vit_base_patch16_224")
    for name in ("width", "depth", "mlp-dim", "head-dim", "patch-size", "image-size", "num-registers"):
        what = f"override, or say without a name, the {name.replace('-', ' ')}"
        p.add_argument(f"--{name}", type=_pixels if name.endswith("-size") else int, help=what)
    p.add_argument("--pool", help="avg, map, token or none")
    p.add_argument("--num-classes", type=int, default=0, help="count a linear task head of so many classes, apart")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_count)

    p = commands.add_parser("fit", help="fit shape laws to ledgers: law.json, report.md and figures")
    p.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER", help="JSON lines, or CSV with the same columns")
    p.add_argument("--metric", default="val_loss")
    p.add_argument("--form", help="a law form (default: chosen by extrapolation, and said)")
    p.add_argument("--out", type=Path, help=f"folder (default: {OUTPUTS}/<ledger's name>_law)")
    p.add_argument("--bootstrap", type=int, default=1000, help="draws of each interval (default 1000)")
    p.add_argument(
        "--coverage", type=int, default=0, metavar="N", help="simulate N data sets: how often would the intervals hold?"
    )
    p.add_argument("--train-flops", type=float, help="budget of the recommendation (default: beyond the largest run)")
    p.add_argument("--skip-bad", action="store_true", help="leave bad rows out, each with its reason, and go on")
    p.add_argument("--json", action="store_true", help="print the law and the recommendation as JSON")
    p.set_defaults(run=_fit)

    p = commands.add_parser("report", help="the law of ledgers as one HTML file, figures and tables in it")
    p.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER", help="JSON lines, or CSV with the same columns")
    p.add_argument("--out", type=Path, metavar="FILE.html", help=f"default: {OUTPUTS}/<ledger's name>_report.html")
    p.add_argument("--metric", default="val_loss")
    p.add_argument("--form", help="a law form (default: the fitted law's, or chosen by extrapolation)")
    p.add_argument("--law", type=Path, metavar="DIR", help="a folder that sovit fit wrote of these rows")
    p.add_argument("--skip-bad", action="store_true", help="as of sovit fit")
    p.set_defaults(run=_report)

    p = commands.add_parser("status", help="what of a study is done, running, waiting, failed, and the best so far")
    p.add_argument("study", metavar="STUDY", help="its name, which its ledger and its store bear")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    p.add_argument("--results", type=Path, help=FOUND)
    p.add_argument(
        "--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="draw anew (every 2 s) while it runs"
    )
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_status)

    p = commands.add_parser("predict", help="best shape for a budget, its interval, and the shapes as good as it")
    p.add_argument("law", type=Path, metavar="LAW.json")
    p.add_argument("--train-flops", type=float, help="budget: 3 x forward FLOPs x images, head included")
    for name, what in RULES.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=float if "max" in name else int, metavar="N", help=what)
    p.add_argument(
        "--by",
        metavar="NAME",
        help="patch_size or image_size: the best shape with each value run, and what to spend on",
    )
    p.add_argument("--frontier", action="store_true", help="a table of best shapes over a ladder of budgets instead")
    p.add_argument(
        "--from", dest="first", type=float, metavar="FLOPS", help="its first budget (default: the least run)"
    )
    p.add_argument("--to", dest="last", type=float, metavar="FLOPS", help="its last (default: 100 x the largest run)")
    p.add_argument("--points", type=int, metavar="N", help="how many (default 9)")
    p.add_argument("--out", type=Path, metavar="DIR", help="write the figure of --frontier or --by into DIR")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_predict)

    p = commands.add_parser("profile", help="seconds and memory of shapes on the device at hand, forward and training")
    p.add_argument("shapes", nargs="*", metavar="SHAPE", help="such as B/16, a timm name, or 32x2x256[xHEAD_DIM]")
    p.add_argument("--grid", nargs="+", default=[], metavar="NAME=N,N", help="such as width=16,32 depth=1,2 mlp_dim=64")
    p.add_argument("--law", type=Path, metavar="LAW.json", help="patch, image, pool, head dim and classes are its own")
    p.add_argument("--train-flops", type=float, help="with --law: also its best shape for this budget, and the usual")
    for name in ("head-dim", "patch-size", "image-size"):
        p.add_argument(f"--{name}", type=_pixels if name.endswith("-size") else int)
    p.add_argument("--pool", help="avg, map, token or none")
    p.add_argument("--num-classes", type=int, help="of the task head (default: the law's, else 1000)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", help="float32, or bfloat16 by autocast")
    p.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    p.add_argument(
        "--trained",
        nargs="+",
        metavar="PART",
        help="steps of fine-tuning instead, side by side: of attention, mlp, head, full",
    )
    p.add_argument("--batch-sizes", type=int, nargs="+", help="1 = latency (default 1 32; with --trained 2)")
    p.add_argument("--repeats", type=int, default=9, help="rounds in which all take turns (default 9)")
    p.add_argument(
        "--out", type=Path, help=f"(default {OUTPUTS}/hardware.jsonl; with --trained {OUTPUTS}/finetune_cost.jsonl)"
    )
    p.add_argument("--again", action="store_true", help="measure what the file holds already, too")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_profile)

    p = commands.add_parser(
        "probe", help="few-shot error of encoders on labelled images: a linear probe, SoViT's metric"
    )
    p.add_argument(
        "encoders", nargs="*", metavar="ENCODER", help="RUN_ID, random:RUN_ID, timm:NAME, hf:NAME, pixels:SIZE"
    )
    p.add_argument("--data", required=True, metavar="SOURCE:PRESET", help="such as icons:single40 or hub:FOLDER")
    p.add_argument("--study", metavar="NAME", help="probe every branch of a study instead, into its ledger")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    p.add_argument("--results", type=Path, default=OUTPUTS, help=f"where the ledger is kept (default {OUTPUTS})")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_probe)

    p = commands.add_parser(
        "finetune", help="move a trained run or a timm model to another resolution or patch size, its attention alone"
    )
    p.add_argument("base", metavar="RUN_ID|timm:NAME", help="where the weights start")
    p.add_argument("--image-size", type=_pixels, help="pixels a side (default: as the base's)")
    p.add_argument("--patch-size", type=_pixels, help="pixels a side (default: as the base's)")
    p.add_argument("--train", default="attention", help="attention, full, mlp or head (default attention)")
    p.add_argument("--data", metavar="SOURCE:PRESET", default="", help="what to train on (default: as the base)")
    p.add_argument(
        "--examples", type=int, nargs="+", default=[], metavar="N", help="images (default: a fifth of the base's)"
    )
    p.add_argument("--peak-lr", type=float, help="peak learning rate (default: the base's; of a part twice that)")
    p.add_argument("--batch-size", type=int, help="images a step (default: as the base)")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    p.add_argument("--results", type=Path, default=OUTPUTS, help=f"where the ledger is kept (default {OUTPUTS})")
    p.add_argument("--name", default="finetune", help="name of the ledger (default finetune)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dry-run", action="store_true", help="say what it costs; train nothing")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_finetune)

    p = commands.add_parser(
        "export", help="a trained run as a folder for timm, transformers or nanoVLM, or a law's best shape as a config"
    )
    p.add_argument("source", metavar="RUN_ID|LAW.json")
    p.add_argument(
        "--format", default="timm", help="timm (default), siglip, vit, nanovlm or sovit, which says any shape"
    )
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    p.add_argument("--image-size", type=_pixels, help="resize the trained weights to read images of this side")
    p.add_argument("--patch-size", type=_pixels, help="resize the trained weights to patches of this side")
    p.add_argument("--config-only", action="store_true", help="SOURCE is a law; write the config of its best shape")
    p.add_argument("--train-flops", type=float, help="budget of --config-only")
    p.add_argument("--json", action="store_true", help="what the reload measured, as JSON")
    p.set_defaults(run=_export)

    for name, what in (
        ("track", "fill MLflow's store with a study, from its ledger and its training curves"),
        ("ui", "open a study in MLflow and, where there is one, its queue in Optuna's dashboard"),
    ):
        p = commands.add_parser(name, help=what)
        p.add_argument("study", metavar="STUDY", help="a study's name, or the path of a ledger")
        p.add_argument("--results", type=Path, help=FOUND)
        p.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
        p.add_argument("--store", type=Path, help="the SQLite file, made again if deleted (default RUNS/mlflow.db)")
        if name == "track":
            p.add_argument("--json", action="store_true")
            p.set_defaults(run=_track)
        else:
            p.add_argument(
                "--port", type=int, help="of MLflow; the dashboard takes the next (default 5000, or next free)"
            )
            p.set_defaults(run=_ui)

    p = commands.add_parser("data", help="look at a data source, or build its cache")
    p.add_argument("action", choices=("show", "cache", "list"))
    p.add_argument(
        "source", nargs="?", metavar="SOURCE[:PRESET]", help="such as stream:cpu, icons:mosaic or hub:FOLDER"
    )
    p.add_argument("--image-size", type=_pixels)
    p.add_argument("--patch-size", type=_pixels, default=4)
    p.add_argument("--out", type=Path, help=f"PNG of the contact sheet (default {OUTPUTS}/SOURCE-PRESET.png)")
    p.set_defaults(run=_data)

    cli_vlm.add_commands(commands)

    p = commands.add_parser("assets", help="pinned outside data: fetch it, list it")
    p.add_argument("action", choices=("fetch", "list"))
    p.add_argument("name", nargs="?")
    p.set_defaults(run=_assets)
    return parser


# commands ------------------------------------------------------------------------------------------------------------


def _demo(options) -> int:
    from sovit.demo import demo

    if options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")
    return demo(options.out, options.workers)


def _count(options) -> None:
    from sovit.shape import Shape, named_shape

    if options.num_classes < 0:
        raise UserError(f"--num-classes {options.num_classes} is negative; give 0 for no head")
    names = ("width", "depth", "mlp_dim", "head_dim", "patch_size", "image_size", "num_registers", "pool")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.shapes:
        shapes = {name: named_shape(name, **given) for name in options.shapes}
    else:
        missing = [name for name in ("width", "depth", "mlp_dim") if name not in given]
        if missing:
            raise UserError(f"name a shape, such as B/16, or give --{missing[0].replace('_', '-')}")
        shape = Shape(**given)
        shapes = {shape.label: shape}
    counts = {name: {**shape.to_dict(), **_counts(shape, options.num_classes)} for name, shape in shapes.items()}
    if options.json:
        print(json.dumps(counts if len(counts) > 1 else next(iter(counts.values())), indent=2))
    else:
        _print_counts(counts)


def _counts(shape, num_classes: int) -> dict:
    return {
        "num_heads": shape.num_heads,
        "num_tokens": shape.num_tokens,
        "num_params": shape.num_params,
        "head_params": shape.head_params(num_classes) if num_classes else 0,
        "forward_flops": shape.forward_flops,
        "head_flops": shape.head_flops(num_classes),
        "train_flops_per_image": shape.train_flops_per_image(num_classes),
    }


def _print_counts(counts: dict[str, dict]) -> None:
    fields = (
        ("width", "{:,}"), ("depth", "{:,}"), ("mlp_dim", "{:,}"), ("num_heads", "{:,}"), ("patch_size", "{:,}"),
        ("image_size", "{:,}"), ("pool", "{}"), ("num_tokens", "{:,}"), ("num_params", "{:,}"), ("head_params", "{:,}"),
        ("forward_flops", "{:,}"), ("head_flops", "{:,}"), ("train_flops_per_image", "{:,}"),
    )  # fmt: skip
    rows = [["", *counts]] + [[name, *(form.format(c[name]) for c in counts.values())] for name, form in fields]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), sep="  ")
    print("\nFLOPs: matrix products of one image's forward pass, 2 per multiply-add; training is 3 x that.")


def _fit(options) -> None:
    from sovit.report import fit_ledgers

    summary = fit_ledgers(
        options.ledgers,
        metric=options.metric,
        form=options.form,
        out=options.out,
        bootstrap=options.bootstrap,
        coverage=options.coverage,
        train_flops=options.train_flops,
        skip_bad=options.skip_bad,
    )
    print(json.dumps(summary, indent=2) if options.json else summary["text"])


def _report(options) -> None:
    from sovit.html import write_page

    chosen = dict(metric=options.metric, form=options.form, law=options.law, out=options.out)
    print(write_page(options.ledgers, **chosen, skip_bad=options.skip_bad))


def _status(options) -> None:
    from sovit.status import status_text, study_status, watch

    place = (options.study, options.runs, options.results)
    if options.watch is not None:
        if options.json:
            raise UserError("--watch draws on a terminal; leave out --json")
        if not options.watch > 0:
            raise UserError(f"--watch {options.watch:g} must be above 0 seconds")
        watch(*place, options.watch)
        return
    status = study_status(*place)
    print(json.dumps(status.to_dict(), indent=2) if options.json else status_text(status))


def _predict(options) -> None:
    from sovit import growth
    from sovit.law import read_law
    from sovit.predict import best_shape
    from sovit.predict_words import recommendation_text

    if options.frontier:
        return _frontier(options)
    for flag, value in (("from", options.first), ("to", options.last), ("points", options.points)):
        if value is not None:
            raise UserError(f"--{flag} belongs to --frontier; add that, or leave it out")
    if options.train_flops is None:
        raise UserError("name a budget with --train-flops, or ask for a --frontier")
    if options.by is not None:
        return _trade(options)
    if options.out is not None:
        raise UserError("--out belongs to --frontier or --by; add one of them, or leave it out")
    fit = read_law(options.law)
    best = best_shape(fit, options.train_flops, **_rules(options))
    others = {form: path for form in ("sovit", "chinchilla") if (path := _sibling(options.law, form)).is_file()}
    beside: dict = {"paper_rule": None, "size_rule": None}
    if {"width", "depth", "mlp_dim"} & set(fit.model["dims"]):
        marginal = read_law(others["sovit"]) if "sovit" in others else None
        beside["paper_rule"] = growth.paper_rule(fit, options.train_flops, marginal, best)
    if "chinchilla" in others:
        beside["size_rule"] = growth.size_rule(fit, options.train_flops, read_law(others["chinchilla"]), best)
    beside["closed_form"] = growth.closed_form(fit, options.train_flops)
    print(json.dumps(best.to_dict() | beside, indent=2) if options.json else recommendation_text(best, beside))


def _sibling(law: Path, form: str) -> Path:
    """Where `sovit fit` keeps the law of another form of the same rows."""
    return law.parent / f"{form}.json" if law.parent.name == "forms" else law.parent / "forms" / f"{form}.json"


def _rules(options) -> dict:
    return {name: getattr(options, name) for name in RULES if getattr(options, name) is not None}


def _frontier(options) -> None:
    from sovit.frontier import frontier, ladder
    from sovit.law import read_law
    from sovit.predict_words import frontier_text

    if options.by is not None:
        raise UserError("--by asks at one budget; leave out --frontier, or --by")
    if options.train_flops is not None:
        raise UserError("--train-flops is one budget; of a --frontier name the ends, --from and --to")
    fit = read_law(options.law)
    budgets = ladder(fit, options.first, options.last, 9 if options.points is None else options.points)
    rows = frontier(fit, budgets, **_rules(options))
    metric = fit.data.get("metric", "loss")
    if options.out is not None:
        from sovit import plot

        plot.save(plot.frontier(fit, rows, _rows_of(options.law)), options.out / "frontier")
    body = dict(law=str(options.law), form=fit.form, metric=metric, level=fit.level, rows=rows)
    print(json.dumps(body, indent=2) if options.json else frontier_text(rows, metric, fit.level))


def _trade(options) -> None:
    from sovit.law import read_law
    from sovit.predict_words import trade_text
    from sovit.trade import trade

    fit = read_law(options.law)
    found = trade(fit, options.train_flops, options.by, **_rules(options))
    if options.out is not None:
        from sovit import plot

        plot.save(plot.trade(found, _rows_of(options.law)), options.out / f"trade_{options.by}")
    print(json.dumps(found, indent=2) if options.json else trade_text(found))


def _rows_of(law: Path):
    """The measurements that a law was fitted to, where its ledgers stand as it says beside its folder or among the
    published ones; else None."""
    from sovit.measurements import measurements

    try:
        made_of = json.loads((law.parent / "inputs.json").read_text())
        names, metric = made_of["ledgers"], made_of["metric"]
        for folder in (law.parent.parent, PUBLISHED):
            if all((folder / name).is_file() for name in names):
                data = measurements([folder / name for name in names], metric)
                if data.identity == made_of:
                    return data
    except (OSError, ValueError, KeyError, TypeError, UserError):
        pass
    return None


def _profile(options) -> None:
    import torch

    from sovit.finetune_cost import finetune_cost
    from sovit.hardware import profile, profile_text, shapes_for
    from sovit.savings import savings, savings_text

    if options.threads < 1:
        raise UserError(f"--threads {options.threads} must be at least 1")
    torch.set_num_threads(options.threads)
    fields = {name: getattr(options, name) for name in ("head_dim", "patch_size", "image_size", "pool")}
    shapes, num_classes = shapes_for(options.shapes, options.grid, options.law, options.train_flops, **fields)
    live = sys.stderr.isatty()
    common = dict(
        device=options.device,
        dtype=options.dtype,
        num_classes=options.num_classes or num_classes or 1000,
        repeats=options.repeats,
        again=options.again,
        on_progress=lambda line: print(f"\r\033[K{line}" if live else line, end="" if live else "\n", file=sys.stderr),
    )
    if options.trained is None:
        out = options.out or OUTPUTS / "hardware.jsonl"
        rows = profile(shapes, batch_sizes=options.batch_sizes or (1, 32), out=out, **common)
        text = profile_text(rows)
    else:
        out, parts = options.out or OUTPUTS / "finetune_cost.jsonl", [*options.trained]
        parts += ["full"] * ("full" not in parts)  # what the others are compared with
        rows = finetune_cost(shapes, trained=parts, batch_sizes=options.batch_sizes or (2,), out=out, **common)
        text = savings_text(savings(rows))
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    print(json.dumps(rows, indent=2) if options.json else text)


def _probe(options) -> None:
    from sovit.fewshot import column
    from sovit.probe import compare, comparison_text, probe_ledger
    from sovit.train import check_device

    if bool(options.study) == bool(options.encoders):
        raise UserError("name encoders to probe, or one --study (not both)")
    check_device(options.device)
    if options.encoders:
        result = compare(options.encoders, options.data, options.runs, options.device)
        print(json.dumps(result, indent=2) if options.json else comparison_text(result))
        return
    ledger = options.results / f"{options.study}.jsonl"
    result = probe_ledger(ledger, options.runs, options.data, options.device)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{ledger}: {result['probed']} branches probed on {options.data}, {result['probed_before']} were before,"
        f" {result['without_weights']} have no weights in {options.runs}"
    )
    print(f"next: sovit fit {ledger} --metric {column(10, options.data)}")


def _finetune(options) -> int:
    from sovit.loop import OutOfMemory
    from sovit.tuning import fine_tune, result_text

    names = ("image_size", "patch_size", "data", "peak_lr", "batch_size")
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    ledger = options.results / f"{options.name}.jsonl"
    try:
        result = fine_tune(
            options.base,
            options.runs,
            ledger,
            options.device,
            options.dry_run,
            trained=options.train,
            budgets=options.examples,
            **said,
        )
    except OutOfMemory as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else result_text(result))
    return int(any(row["status"] != "ok" for row in result["rows"]))


def _export(options) -> int:
    from sovit.export import export_encoder, report_text, write_config

    if options.config_only:
        from sovit.law import read_law
        from sovit.predict import best_shape
        from sovit.shape import Shape

        if options.train_flops is None:
            raise UserError("--config-only needs --train-flops, the budget that the shape is for")
        for name in ("image_size", "patch_size"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} resizes a trained run, a law's best shape has its own; leave {flag} out")
        shape = Shape(**best_shape(read_law(Path(options.source)), options.train_flops).shape)
        print(f"{write_config(shape, options.format, options.out)}: {shape.label}, {shape.num_params:,} parameters")
        return 0
    sizes = options.image_size, options.patch_size
    try:
        report = export_encoder(options.source, options.runs, options.out, *sizes, options.format)
    except RuntimeError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if options.json else report_text(report))
    return 0


def _track(options) -> None:
    from sovit.track import fill, fill_text

    done = fill(options.study, options.results, options.runs, options.store)
    print(json.dumps(done, indent=2) if options.json else fill_text(done))


def _ui(options) -> int:
    from sovit.ui import serve

    return serve(options.study, options.results, options.runs, options.store, options.port)


def _data(options) -> None:
    from sovit.data import NORMALISATION, PRESETS, baselines, open_data

    if options.action == "list":
        for name, presets in PRESETS.items():
            for preset, (image_size, what) in presets.items():
                print(f"{name}:{preset:<12} {image_size:>3} px  {what}")
        return
    if not options.source:
        raise UserError("name a source, such as stream:cpu; `sovit data list` shows them")
    data, _, preset = options.source.partition(":")
    preset = preset or next(iter(PRESETS.get(data, ())), "")
    image_size = options.image_size or PRESETS.get(data, {}).get(preset, (64, ""))[0]
    patch_size = options.patch_size
    source = open_data(data, preset, image_size, patch_size, data_seed=0)
    print(f"{data}:{preset} at {image_size} px: {source.num_classes} classes, labels {source.readout},", end=" ")
    print(f"{source.num_val:,} validation images")
    print(baselines(source))
    if options.action == "show":
        from sovit.plot import contact_sheet

        for line in getattr(source, "notes", list)():  # what a source has to say of itself
            print(line)
        out = options.out or OUTPUTS / f"{data}-{Path(preset).name}.png"
        batch = source.train(0, 24)
        mean, std = NORMALISATION[data]
        images = (batch.images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # [B, H, W, 3]
        contact_sheet(images, captions(batch.labels, source), out, title=f"{data}:{preset}, {image_size} px")
        print(out)


def captions(labels, source) -> list[str]:
    """The names of an image's labels, one line for each row of cells. labels: [B], or [B, N] in raster order."""
    from sovit.evaluate import cells

    if labels.ndim == 1:
        return [source.class_names[i] for i in labels]
    grid = source.label_grid
    by_cell = cells(labels[..., None], grid)[:, :, 0, 0].view(-1, grid, grid)  # [B, grid, grid]
    return ["\n".join(" ".join(source.class_names[i] for i in row) for row in image) for image in by_cell.tolist()]


def _assets(options) -> None:
    from sovit.data import assets

    if options.action == "list":
        for row in assets.listing():
            print("  ".join(str(v) for v in row.values()))
        return
    if not options.name:
        raise UserError("name what to fetch; `sovit assets list` shows what there is")
    print(assets.fetch(options.name, progress=lambda line: print(line, file=sys.stderr)))


if __name__ == "__main__":
    sys.exit(main())
