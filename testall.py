"""Evaluate a checkpoint on the testall split (COCO's protocol): five folds, their mean, and the full set."""

import sys
from collections.abc import Sequence

from lib.cli import check_packages, program
from lib.config import CheckpointSettings, EvaluationSettings, parse


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(CheckpointSettings, __doc__, argv)
    check_packages()
    from lib.evaluation.evaluate import evaluate  # importing PyTorch takes seconds: not before the flags are right

    evaluate(EvaluationSettings(**vars(settings), split="testall", fold5=True))


if __name__ == "__main__":
    sys.exit(main())
