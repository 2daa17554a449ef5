"""Evaluate checkpoints on any split; scores, ranks and results can be written to files.

eval.py compare A B compares two of them on the same queries: see eval.py compare --help.
"""

import sys
from collections.abc import Sequence

from lib.cli import check_packages, program
from lib.config import CompareSettings, EvaluationSettings, parse

COMPARE = "compare"
ABOUT_COMPARE = "Compare two checkpoints or saved scores on the same queries: who is better, by how much, and where."


@program
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == [COMPARE]:
        settings = parse(CompareSettings, ABOUT_COMPARE, argv[1:], command=f"eval.py {COMPARE}")
    else:
        settings = parse(EvaluationSettings, __doc__, argv)
    check_packages()
    from lib.evaluation.compare import compare  # importing PyTorch takes seconds: not before the flags are right
    from lib.evaluation.evaluate import evaluate

    compare(settings) if isinstance(settings, CompareSettings) else evaluate(settings)


if __name__ == "__main__":
    sys.exit(main())
