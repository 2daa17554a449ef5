"""Train X-Dim on a data set of region features and captions; `python train.py --help` lists the flags."""

import sys
from collections.abc import Sequence

from lib.cli import check_packages, program
from lib.config import TrainSettings, parse
from lib.distributed import is_restarted


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(TrainSettings, __doc__, argv)
    check_packages()
    # Importing PyTorch takes seconds: not before the flags are right.
    from lib.training.loop import train
    from lib.training.resume import find_origin, find_own_checkpoint, refuse_changes

    origin = find_origin(settings)
    if origin:
        settings = parse(TrainSettings, __doc__, argv, origin.defaults)
    if is_restarted() and (own := find_own_checkpoint(settings)):
        origin, settings = own, parse(TrainSettings, __doc__, argv, own.defaults)
    if origin:
        refuse_changes(settings, origin)
    train(settings, origin)


if __name__ == "__main__":
    sys.exit(main())
