"""What every program at the top of the tree shares: one-line errors, exit codes, flags."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence

from lib.errors import InputError, Interrupted, TrainingStopped


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, "", argparse.SUPPRESS)
        return action.help if silent else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line and whose flags are never guessed from prefixes."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def program(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], int]:
    """Turn `main(argv)` into a program: returns its exit code and prints a known error as one line on stderr.

    0 done, 1 a run that had to stop, 2 wrong input, 130 or 143 interrupted by Ctrl-C or SIGTERM. Any other exception is
    a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except (InputError, TrainingStopped) as error:
            print(f"error: {_last_line(error)}", file=sys.stderr)
            return error.exit_code
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            return stopped.exit_code
        except BrokenPipeError:  # whoever read our output (`| head`) has gone; the rest goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    return run


def _last_line(error: Exception) -> str:
    """The message itself; an error raised in a loader's worker arrives with the worker's traceback around it."""
    line = str(error).strip().splitlines()[-1]
    return line.split(f"{type(error).__name__}: ", 1)[-1]
