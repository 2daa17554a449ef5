"""Evaluate a checkpoint on any split; scores and results can be written to files."""

import sys
from collections.abc import Sequence

from lib.cli import program
from lib.config import EvaluationSettings, parse
from lib.environment import check_packages


@program
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(EvaluationSettings, __doc__, argv)
    check_packages()
    from lib.evaluation.evaluate import evaluate  # importing PyTorch takes seconds: not before the flags are right

    evaluate(settings)


if __name__ == "__main__":
    sys.exit(main())
