"""`sovit vlm ...`: the vision-language side of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `vlm` and its subcommands to the parser's own."""
    vlm = commands.add_parser("vlm", help="vision-language models: what systems are made of, train, ask, evaluate")
    actions = vlm.add_subparsers(title="commands", metavar="")
    vlm.set_defaults(run=lambda options: vlm.print_help() or 2)

    p = actions.add_parser("show", help="what released systems are made of and weigh, from their configs alone")
    p.add_argument(
        "system", nargs="?", metavar="SYSTEM", help="one in full, such as llava-1.5-7b (default: a table of all)"
    )
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_show)


def _show(options: Any) -> None:
    from sovit.vlm import show

    found: Any = show.describe(options.system) if options.system else show.compare()
    text: Any = show.describe_text if options.system else show.compare_text
    print(json.dumps(found, indent=2) if options.json else text(found))
