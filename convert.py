"""Convert a checkpoint to weights for use (.safetensors), or to the published form (.pth.tar)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.cli import InputError, Parser, check_packages, program

PUBLISHED_ENDINGS = (".pth.tar", ".pth", ".tar")


@program
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    check_packages()
    from lib.checkpoints.native import add_text, find_checkpoint, read_checkpoint, write_published, write_weights

    content, out = read_checkpoint(find_checkpoint(arguments.checkpoint)), Path(arguments.out)
    for note in content["notes"]:
        print(note)
    to_published = arguments.out.endswith(PUBLISHED_ENDINGS)
    if arguments.bert or "tokenizer" in content or not to_published:
        content, _ = add_text(content, arguments.bert)
    write = write_published if to_published else write_weights
    write(out, content)
    print(f"written: {out}, {len(content['model'])} weights, {out.stat().st_size:,} bytes")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags. Raises InputError where the result has no place."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint, run folder (its best) or published file")
    parser.add_argument("out", help="new file: weights for use (.safetensors), or the published form (.pth.tar)")
    parser.add_argument("--bert", default="", help="name or folder of the text model of a published checkpoint")
    arguments = parser.parse_args(argv)
    if not arguments.out.endswith((".safetensors", *PUBLISHED_ENDINGS)):
        raise InputError(f"{arguments.out}: expected a name that ends in .safetensors or .pth.tar")
    if Path(arguments.out).exists():
        raise InputError(f"{arguments.out}: is there already; name another file")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
