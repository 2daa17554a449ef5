"""Prepare a data set for training."""

import importlib
import sys
from collections.abc import Sequence

from lib.cli import Parser, program

# Each is a module beside this one, with add_flags(parser) and run(args).
COMMANDS = {
    "download": "fetch Flickr30K's and COCO's region features from Kaggle",
    "tsv": "bottom-up attention TSV files -> a store of region features",
    "karpathy": "Karpathy's captions and splits + features by image id -> a data set",
    "images": "a folder of pictures + captions -> a data set, its regions made by a vision model",
    "own": "your own captions + features by image id -> a data set",
    "scenes": "draw the project's own data set: pictures of shapes, their captions and region features",
    "verify": "read a data set once and say everything that is wrong with it",
    "pack": "store a data set in float16, one row an image: half the size or less",
}


@program
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m lib.prepare", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        flags = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:  # the others are not imported: some take seconds
            command = importlib.import_module(f"lib.prepare.{name}")
            flags.description = command.__doc__
            command.add_flags(flags)
            flags.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
