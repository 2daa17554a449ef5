"""Send a trained model to the Hugging Face hub, where load("OWNER/NAME") finds it: share.py push RUN OWNER/NAME."""

import sys
from collections.abc import Sequence

from lib.cli import InputError, check_packages, program
from lib.config import ShareSettings, parse

PUSH = "push"
ABOUT = "Send weights, configuration, tokenizer and a model card from the run's record, without your paths."


@program
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] != PUSH:
        if argv and argv[0] in ("-h", "--help"):
            print(f"share.py push  {ABOUT} Its flags: share.py push --help")
            return
        raise InputError("expected share.py push RUN OWNER/NAME ... (see share.py push --help)")
    settings = parse(ShareSettings, ABOUT, argv[1:], command=f"share.py {PUSH}")
    check_packages()
    from lib.share import push  # importing PyTorch takes seconds: not before the flags are right

    push(settings)


if __name__ == "__main__":
    sys.exit(main())
