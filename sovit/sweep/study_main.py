"""The command line of a file in studies/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sovit import OUTPUTS, UserError
from sovit.signals import out_of_memory, print_anywhere
from sovit.spec.any_run import AnyRun, encoder_runs, vlm_runs
from sovit.spec.config import keys, override
from sovit.sweep.launch import launch
from sovit.sweep.opening import data_lines, open_parts
from sovit.sweep.queue import Sweep


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage of every option before it; takes no abbreviated option."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:  # said of --train-flops -3e12
            message += ", which begins with - only as in --OPTION=-1"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def study_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = OneLineParser(prog=f"studies/{name}.py", description=doc)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="typed override of a field of every run that has it, such as recipe.peak_lr=0.004 or, of a"
        " vision-language model, stages.0.num_examples=4000",
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes, one thread each (default 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan with FLOPs and estimated time; train nothing"
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: the plan as JSON")
    parser.add_argument("--name", default=name, help="name of the study, its ledger and its store")
    parser.add_argument("--storage", help="Optuna storage (default: a journal file beside the runs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    parser.add_argument("--results", type=Path, default=OUTPUTS, help=f"where the ledger is kept (default {OUTPUTS})")
    parser.add_argument("--device", default="cpu")
    return parser


def main(
    doc: str,
    name: str,
    make_runs: Callable[[], Sequence[AnyRun]],
    argv: Sequence[str] | None = None,
    metric: str = "val_loss",
    next_command: str = "",
) -> int:
    """What `python studies/X.py` does. `metric`: the column of the ledger that the study is after, a trial's value.

    next_command: what is to be done with the ledger, said at the end; a law is fitted where nothing else is said, but of
    vision-language models there is none.

    Returns the exit status: 0 done, 1 a run failed, 2 bad input.
    """
    options = study_parser(doc, name).parse_intermixed_args(argv)

    def study() -> int:
        check_workers(options)
        runs = [run.replace(study=options.name) for run in overridden(make_runs(), options.overrides)]
        ledger = options.results / f"{options.name}.jsonl"
        sweep = Sweep(options.name, runs, options.runs, ledger, options.storage, metric)
        if options.dry_run:
            return dry_run(sweep, options)
        run_sweep(sweep, options.workers, options.device)
        fitted = not vlm_runs(runs)
        choice = "" if metric == "val_loss" or not (next_command or fitted) else f" --metric {metric}"
        print(f"next: {next_command or ('sovit fit' if fitted else 'sovit track')} {sweep.ledger}{choice}")
        return int(bool(sweep.pending()))

    return exit_status(study)


def exit_status(study: Callable[[], int]) -> int:
    """The exit status of a study; 2 where it raises UserError and 130 where it is stopped, which it says in one line."""
    print_anywhere()
    try:
        return study()
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(out_of_memory(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130


def check_workers(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")


def dry_run(sweep: Sweep, options: argparse.Namespace) -> int:
    """Print what a launch would train, and how long that takes."""
    from sovit.data.assets import NotFetched
    from sovit.data.hub.images import locate
    from sovit.sweep.plan import print_plan
    from sovit.train.base import check_device

    check_device(options.device)
    runs, lines = encoder_runs(list(sweep.runs.values())), []
    for data, preset in dict.fromkeys((run.data, run.preset) for run in runs):
        own = [run for run in runs if (run.data, run.preset) == (data, preset)]
        try:
            if data == "hub" and locate(preset)[0].path is None:
                raise NotFetched(f"{preset} is on the hub; the launch downloads it")
            lines += data_lines(sweep, own, options.device)
        except NotFetched as error:
            lines.append(f"{data}:{preset} is not opened here: {error}")
    print_plan(sweep, options.workers, options.device, lines, options.json)
    return 0


def run_study(
    runs: Sequence[AnyRun],
    workers: int = 2,
    results: Path | str = OUTPUTS,
    name: str = "study",
    metric: str = "val_loss",
    device: str = "cpu",
) -> list[dict]:
    """Train runs as a study and return the rows of its ledger, RESULTS/<name>.jsonl; what is done already is not repeated.

    >>> shape = sovit.Shape(8, 1, 16, head_dim=8, patch_size=4, image_size=16, pool="none")
    >>> run = sovit.Run(shape, sovit.Recipe(peak_lr=0.01, warmup_examples=16), budgets=(80,))
    >>> rows = sovit.run_study([run], workers=1)
    study: runs/results/study.jsonl has 1 rows: 1 ok, 0 diverged, 0 failed
    >>> rows[0]["run_id"], rows[0]["status"]
    ('2da54a192d-80', 'ok')

    Args:
        runs: trunks, which are kept in runs/.
        workers: processes, one thread each.
        results: folder of the ledger.
        name: of the study; another design needs another name.
        metric: column that is the value of a trial.
        device: such as cpu or cuda.

    Raises UserError as `run_sweep` does.
    """
    if workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    named = [run.replace(study=name) for run in runs]
    return run_sweep(Sweep(name, named, Path("runs"), Path(results) / f"{name}.jsonl", metric=metric), workers, device)


def overridden(runs: Sequence[AnyRun], assignments: Sequence[str]) -> list[AnyRun]:
    """`override` each run by what it has a field for. A run that begins at a branch of another, or reads that encoder, goes
    on from it as it is now.

    Raises UserError for a key that no run has, and where that branch is gone.
    """
    known = dict.fromkeys(key for run in runs for key in keys(run))
    for assignment in assignments:
        key, equals, _ = assignment.partition("=")
        if not equals or key not in known:
            raise UserError(f"unknown key in {assignment!r}; keys are {', '.join(known)}")
    owner = {run_id: run for run in runs for run_id in run.run_ids}
    changed: dict[str, AnyRun] = {}  # by trunk_id before

    def change(run: AnyRun) -> AnyRun:
        if run.trunk_id in changed:
            return changed[run.trunk_id]
        own = set(keys(run))
        new = override(run, [a for a in assignments if a.partition("=")[0] in own])
        if new.base == run.base and run.base in owner:
            num_examples = int(run.base.rpartition("-")[2])
            base = change(owner[run.base])
            if num_examples not in base.budgets:
                raise UserError(
                    f"{' '.join(assignments)} takes away {run.base}, at which other runs of this study begin;"
                    " leave budgets as they are"
                )
            new = new.on_base(base.run_id(num_examples))
        changed[run.trunk_id] = new
        return new

    return [change(run) for run in runs]


def run_sweep(sweep: Sweep, workers: int, device: str = "cpu") -> list[dict]:
    """Launch, and say in one line what came of it. Opens data and models first: bad input stops here, not in a worker.

    Raises UserError for a device, data, model or base that cannot be had, shapes that do not fit the data, and data that
    changed since a part of the study was trained.
    """
    from sovit.train.base import check_device

    check_device(device)
    refuse_missing_bases(sweep)
    pending = sweep.pending()
    if pending:
        for line in data_lines(sweep, encoder_runs(list(sweep.runs.values())), device):
            print(line, flush=True)
        open_parts(vlm_runs(pending), sweep.runs_dir, device)
    if not pending:
        print(f"{sweep.name}: all {len(sweep.runs)} trunks are done already", file=sys.stderr)
    rows = launch(sweep, workers, device)
    counts = {s: sum(row["status"] == s for row in rows) for s in ("ok", "diverged", "failed")}
    print(f"{sweep.name}: {sweep.ledger} has {len(rows)} rows: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    for row in rows:
        if row["status"] != "ok":
            print(f"  {row['run_id']} {row['status']}: {row.get('error')}", file=sys.stderr)
    if left := sweep.pending():
        log = sweep.runs_dir / f"{sweep.name}.log"
        print(
            f"{sweep.name}: {len(left)} trunks are not done; see {log}, and run the same command again", file=sys.stderr
        )
    return rows


def refuse_missing_bases(sweep: Sweep) -> None:
    """Raise UserError where a run is still to be made that begins at a branch without weights here, which gets none."""
    for run in sweep.pending():
        trunk = run.base.rpartition("-")[0]
        weights = sweep.runs_dir / trunk / f"{run.base}.safetensors"
        if not run.base or run.base.startswith("timm:") or weights.exists():
            continue
        base = sweep.runs.get(trunk)
        rows = dict(zip(base.run_ids, sweep.rows(base))) if base else {}
        row = rows.get(run.base, {"status": "missing"})
        if row and row["status"] != "diverged":  # of such a base each run on it says so, and the others go on
            what = "needs the encoder" if run.kind == "vlm" else "begins at"
            raise UserError(
                f"{run.trunk_id} {what} {run.base}, whose weights are not in {sweep.runs_dir};"
                " copy them there, or train anew with other --runs and --results"
            )
