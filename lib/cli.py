"""What every program shares: errors that end as one line on stderr, exit codes, flags, progress bars."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from lib import distributed
from lib.distributed import PeerLost

QUOTED = 200  # characters of a text from elsewhere that an error message quotes


class InputError(Exception):
    """Something given to the program is wrong. The message names the file or flag and says what to do."""

    exit_code = 2


class TrainingStopped(Exception):
    """A run that cannot go on (a loss that is not a number, say). The message says what to do."""

    exit_code = 1


class Interrupted(Exception):
    """A run that was asked to end and has saved. The message holds the command to go on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal  # as shells count it


def reason(error: Exception) -> str:
    """The first line of what a library's error says, to be quoted in ours."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """The first line of a text from elsewhere, cut to QUOTED characters, for an error message.

    What cannot be printed becomes "?": a hostile file must not write to the terminal through an error message.
    """
    line = next(iter(text.strip().splitlines()), "")
    if len(line) > QUOTED:
        line = line[: QUOTED - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in line)


Item = TypeVar("Item")


def with_bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Items on their way, counted by a bar."""
    for item in tqdm(items, desc=what, total=total, leave=False, disable=None if distributed.is_first() else True):
        distributed.give_sign_of_life()
        yield item


LESS_MEMORY = "take a smaller --batch_size, in training rather a smaller --micro_batch, or --precision bf16"


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
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n" if distributed.is_first() else None)


def program(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], int]:
    """Turn `main(argv)` into a program: returns its exit code and prints a known error as one line on stderr.

    0 done, 1 a run that had to stop, 2 wrong input, 130 or 143 interrupted by Ctrl-C or SIGTERM. Any other exception is
    a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        distributed.keep_quiet()
        try:
            main(argv)
        except (InputError, TrainingStopped) as error:
            distributed.speak(f"error: {_last_line(error)}")
            return error.exit_code
        except PeerLost as error:
            distributed.wait_for_the_end()
            distributed.speak(f"error: {error}")
            return error.exit_code
        except Interrupted as stopped:  # of all processes of a job at once
            if distributed.is_first():
                print(stopped, file=sys.stderr)
            return stopped.exit_code
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            distributed.speak(f"error: out of memory ({reason(error)}); {LESS_MEMORY}")
            return 1
        except BrokenPipeError:  # whoever read our output (`| head`) has gone; the rest goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            if distributed.is_first():
                print("interrupted", file=sys.stderr)
            return 130
        return 0

    return run


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is PyTorch's complaint, of a GPU's memory or of the CPU's."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)


def _last_line(error: Exception) -> str:
    """The message itself; an error raised in a loader's worker arrives with the worker's traceback around it."""
    line = str(error).strip().splitlines()[-1]
    return line.split(f"{type(error).__name__}: ", 1)[-1]
