"""The command `sovit`: its commands by name, errors in one line, exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from sovit import UserError, __version__
from sovit.signals import out_of_memory, print_anywhere

COMMANDS = {  # in the order of the help -> the file of this package that has it, imported when it is run or told of
    **{"demo": "demo", "count": "train", "fit": "law", "report": "law", "status": "study", "predict": "law"},
    **dict.fromkeys(("profile", "probe", "finetune", "export"), "train"),
    **{"track": "study", "ui": "study", "data": "data", "assets": "data", "vlm": "vlm"},
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
for _rank, (_name, _file) in enumerate(COMMANDS.items()):
    app.command(f"sovit.cli.{_file}:{_name}", name=_name, sort_key=_rank)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: words after `sovit`; None takes those of this process.

    Returns:
        0 done, 1 a run failed, 2 bad input (told in one line on standard error), 130 stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_anywhere()
    for name in COMMANDS if not arguments or arguments[0] in ("-h", "--help") else ():
        app[name]  # imported: its docstring is its help
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return 2 if arguments in ([], ["vlm"]) else status or 0  # without a command: help
    except CycloptsError as error:
        print(f"sovit: {_one_line(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; run the same command again to go on'}", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(out_of_memory(error), file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as head, has left
        sys.stderr.close()
        return 0


def _one_line(error: CycloptsError) -> str:
    error.verbose = False
    text = " ".join(str(error).split())
    text = text if text.endswith("...") else text.removesuffix(".")
    return f"{text}; see {' '.join(('sovit', *(error.command_chain or ())))} --help"
