"""Convert a checkpoint to an exchange folder (safetensors weights, JSON settings), or to the published form."""

import argparse
import sys
from collections.abc import Sequence

from lib.cli import Parser, check_packages, program


@program
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    check_packages()
    from lib.checkpoints.exchange import export
    from lib.checkpoints.native import add_bert, find_checkpoint, read_checkpoint  # importing PyTorch takes seconds

    content = read_checkpoint(find_checkpoint(arguments.checkpoint))
    if arguments.bert or "bert_config" in content:
        content = add_bert(content, arguments.bert)
    files = export(content, arguments.out)
    size = sum(path.stat().st_size for path in files)
    print(f"written: {', '.join(map(str, files))}\n{len(content['model'])} weights, {size:,} bytes")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint, run folder (its best), published file or exchange folder")
    parser.add_argument("out", help="new file of the published form (.pth.tar, .pth, .tar), or new exchange folder")
    parser.add_argument(
        "--bert",
        default="",
        help="BERT's name or folder for a published checkpoint: compared with it, kept in the folder",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
