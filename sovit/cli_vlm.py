"""`sovit vlm ...`: the vision-language side of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

from typing import Any


def add_commands(commands: Any) -> None:
    """Add `vlm` and its subcommands to the parser's own."""
    vlm = commands.add_parser("vlm", help="vision-language models: what systems are made of, train, ask, evaluate")
    actions = vlm.add_subparsers(title="commands", metavar="")
    vlm.set_defaults(run=lambda options: vlm.print_help() or 2)
    del actions  # each command adds itself here
