"""The command `sovit`: its commands by name, errors in one line, exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from sovit import UserError, __version__

COMMANDS = {  # name -> file of this package, imported when the command runs; one line of help
    "demo": ("demo", "Run the whole pipeline, small: study, law, prediction, validation, export."),
    "count": ("train", "Count parameters and FLOPs of one shape, or of several as a table."),
    "fit": ("law", "Fit shape laws to ledgers: law.json, report.md and figures."),
    "report": ("law", "Write the law of ledgers as one HTML file, figures and tables in it."),
    "status": ("study", "Tell what of a study is done, running, waiting, failed, and the best so far."),
    "predict": ("law", "Name the best shape for a budget, its interval, and the shapes as good as it."),
    "profile": ("train", "Measure seconds and memory of shapes on this device, forward and training."),
    "probe": ("train", "Measure the few-shot error of encoders on labelled images, by a linear probe."),
    "finetune": ("train", "Move a trained run or a timm model to another resolution or patch size."),
    "export": ("train", "Write a trained run for timm, transformers or nanoVLM, or a law's best shape as a config."),
    "track": ("study", "Fill MLflow's store with a study, from its ledger and its training curves."),
    "ui": ("study", "Open a study in MLflow and, where there is one, its queue in Optuna's dashboard."),
    "data": ("data", "Look at a data source, or build its cache."),
    "assets": ("data", "Fetch pinned outside data, or list it."),
    "vlm": ("vlm", "Vision-language models: what systems are made of, train, ask."),
}

app = App(
    name="sovit",
    help="Which Vision Transformer shape to train for a compute budget, and how sure that is.",
    version=f"sovit {__version__}",
    help_format="plaintext",
    default_parameter=Parameter(
        negative=(), consume_multiple=True, allow_repeating=True, show_default=lambda value: value or None
    ),
    suppress_keyboard_interrupt=False,
)
for _rank, (_name, (_file, _help)) in enumerate(COMMANDS.items()):
    app.command(f"sovit.cli.{_file}:{_name}", name=_name, help=_help, sort_key=_rank)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: words after `sovit`; None takes those of this process.

    Returns:
        0 done, 1 a run failed, 2 bad input (told in one line on standard error), 130 stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return 2 if not arguments else status or 0  # without a command: help
    except CycloptsError as error:
        print(f"sovit: {_one_line(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        sys.stderr.close()
        return 0


def _one_line(error: CycloptsError) -> str:
    error.verbose = False
    text = " ".join(str(error).split())
    text = text if text.endswith("...") else text.removesuffix(".")
    return f"{text}; see {' '.join(('sovit', *(error.command_chain or ())))} --help"
