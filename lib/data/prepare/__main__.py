"""Prepare a data set for training."""

import importlib
import sys
from collections.abc import Sequence

from lib.cli import Parser, program

# Each is a module beside this one, with a SUMMARY, add_flags(parser) and run(args).
COMMANDS = ("scenes",)


@program
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m lib.data.prepare", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = importlib.import_module(f"lib.data.prepare.{name}")
        flags = commands.add_parser(name, help=command.SUMMARY, description=command.__doc__)
        command.add_flags(flags)
        flags.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
