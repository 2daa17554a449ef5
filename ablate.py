"""Train variants of the model with several seeds, and compare them in one table.

ablate.py [--folder FOLDER] [--variants xdim independent ...] [--seeds 0 1 2] -- FLAGS OF train.py
"""

import sys
from collections.abc import Sequence

from lib.cli import check_packages, program
from lib.config import AblationSettings, parse


@program
def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    settings = parse(AblationSettings, __doc__, own)
    check_packages()
    from lib.ablation import ablate  # importing PyTorch takes seconds: not before the flags are right

    ablate(settings, argv[len(own) + 1 :])


if __name__ == "__main__":
    sys.exit(main())
