"""Train X-Dim on a data set of region features and captions; `python train.py --help` lists the flags."""

import sys
from collections.abc import Sequence

from lib.cli import program
from lib.config import TrainSettings, parse
from lib.environment import check_packages


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(TrainSettings, __doc__, argv)
    check_packages()
    from lib.training.origin import find_origin, refuse_changes  # importing PyTorch takes seconds: not before the
    from lib.training.train import train  # flags are right

    origin = find_origin(settings)
    if origin:
        settings = parse(TrainSettings, __doc__, argv, origin.defaults)
        refuse_changes(settings, origin)
    train(settings, origin)


if __name__ == "__main__":
    sys.exit(main())
