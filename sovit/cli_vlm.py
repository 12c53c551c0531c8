"""`sovit vlm ...`: the vision-language side of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `vlm` and its subcommands to the parser's own."""
    vlm = commands.add_parser("vlm", help="vision-language models: what systems are made of, train, ask, evaluate")
    actions = vlm.add_subparsers(title="commands", metavar="")
    vlm.set_defaults(run=lambda options: vlm.print_help() or 2)

    p = actions.add_parser("eval", help="a trained model on a public benchmark, beside its blind and shuffled controls")
    p.add_argument("run_id", metavar="RUN_ID")
    p.add_argument("--benchmark", required=True, metavar="NAME", help="vqav2, textvqa, pope or mmstar")
    p.add_argument("--folder", type=Path, help="the set from here: of save_to_disk, or with .parquet or .jsonl files")
    p.add_argument("--hub", metavar="NAME[@REVISION][#CONFIG]", help="(default the benchmark's own set of the hub)")
    p.add_argument("--limit", type=int, metavar="N", help="the first N questions of a fixed permutation (default all)")
    p.add_argument("--control", default="all", choices=["all", "image", "blind", "shuffled"], help="(default all)")
    p.add_argument(
        "--route",
        default="generate",
        choices=["generate", "likelihood"],
        help="what the model writes, or the likeliest of the choices: of pope and mmstar (default generate)",
    )
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default 16)")
    p.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_eval)


def _eval(options) -> None:
    from sovit.train import check_device
    from sovit.vlm.benchmarks import benchmark, open_items
    from sovit.vlm.evaluate_benchmark import CONTROLS, compare, scores_text
    from sovit.vlm.train import open_vlm

    of = benchmark(options.benchmark)
    check_device(options.device)
    items = open_items(of, options.folder, options.hub, options.limit)
    model = open_vlm(options.run_id, options.runs, options.device)
    folder = options.runs / options.run_id.rpartition("-")[0] / "benchmarks" / options.run_id
    controls = CONTROLS if options.control == "all" else (options.control,)
    result = compare(model, items, of, options.run_id, folder, controls, options.route, options.batch_size)
    print(json.dumps(result, indent=2) if options.json else f"{scores_text(result)}\nanswers: {folder}")
