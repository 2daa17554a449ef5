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
    from lib.training import train as training  # importing PyTorch takes seconds: not before the flags are right

    checkpoint = None
    if settings.resume:
        checkpoint, defaults = training.resume(settings.resume)
        settings = parse(TrainSettings, __doc__, argv, defaults)
        training.refuse_changes(settings, defaults)
    training.train(settings, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
