"""Send a trained model to the Hugging Face hub, where load("OWNER/NAME") finds it: share.py push RUN OWNER/NAME."""

import sys
from collections.abc import Sequence

from lib.cli import check_packages, program
from lib.config import ShareSettings, parse_command

ABOUT = "Send weights, configuration, tokenizer and a model card from the run's record, without your paths."


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_command({"push": (ShareSettings, ABOUT)}, argv)
    check_packages()
    from lib.share import push  # importing PyTorch takes seconds: not before the flags are right

    push(settings)


if __name__ == "__main__":
    sys.exit(main())
