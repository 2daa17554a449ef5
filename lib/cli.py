"""What every program shares: errors that end as one line on stderr, exit codes, flags, progress bars."""

import argparse
import atexit
import errno
import functools
import multiprocessing.util
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from lib import distributed
from lib.distributed import CannotMeet, PeerLost

QUOTED = 200  # characters of a foreign text that an error message quotes
# Our own messages say what is fetched and what is wrong; the libraries' would come beside them, of unused weights too.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# Errors of the system that no check foresees everywhere, and what to do.
NO_FILES = "; raise the limit (ulimit -n 1024), or give --workers 0"
OF_THE_SYSTEM = {getattr(errno, name): "" for name in ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "ENAMETOOLONG"]}
OF_THE_SYSTEM |= {errno.EMFILE: NO_FILES}
LEAST_FILES = 256  # that a process may open, as macOS lets it
LINE_INTERVAL = 30.0  # seconds between two lines of progress where stderr is no terminal

Item = TypeVar("Item")


class InputError(Exception):
    """Something given to the program is wrong. The message names the file or flag and says what to do."""

    exit_code = 2


class TrainingStopped(Exception):
    """A run that cannot go on (its loss is NaN, say). The message says what to do."""

    exit_code = 1


class Interrupted(Exception):
    """A run that was asked to end and has saved. The message holds the command that resumes it."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal  # the shells' convention


def reason(error: BaseException) -> str:
    """The first line of a library's error message, or the system's word for what failed, for a message of ours."""
    return one_line(str(getattr(error, "strerror", None) or error)) or type(error).__name__


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turn whatever a library raises for damaged bytes or wrong names into InputError: the message, and why."""
    try:
        yield
    except Exception as error:
        why = reason(error).split(". ")[0]  # PyTorch goes on to advise loading without restriction
        raise InputError(f"{message} ({why})") from None


def one_line(text: str) -> str:
    """The first line of a foreign text, cut to QUOTED characters, with "?" for what is not printable."""
    line = next(iter(text.strip().splitlines()), "")
    if len(line) > QUOTED:
        line = line[: QUOTED - 3] + "..."
    return printable(line)


def printable(text: str) -> str:
    """A foreign text with "?" for what a terminal might take for a command."""
    return "".join(character if character.isprintable() else "?" for character in text)


def check_packages() -> None:
    """Raises InputError where PyTorch or transformers is missing, or torchvision was built for another torch."""
    for name in ("torch", "torchvision", "transformers"):  # transformers imports torchvision
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(f"{error}: activate .venv, or run: pip install -r requirements.txt") from None
        except (ImportError, RuntimeError, OSError) as error:
            versions = " and ".join(f"{one} {metadata.version(one)}" for one in ("torch", "torchvision"))
            mend = "reinstall both from one place: pip install --force-reinstall torch torchvision"
            raise InputError(
                f"{name} cannot be imported ({reason(error)}): {versions} do not fit each other; {mend}"
            ) from None


def optional(name: str, what: str) -> Any:
    """A module that only some commands need. what: that needs it. Raises InputError where its package is missing."""
    package = name.partition(".")[0]
    with refusing(f"{what} needs {package}: pip install {package}"):
        return import_module(name)


# Progress


def with_bar(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield items behind a progress bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    for item in progress_bar(what, total, items=items):
        distributed.heartbeat()
        yield item


def progress_bar(what: str, total: int | None = None, unit: str = "", items: Iterable | None = None) -> tqdm:
    """A progress bar of the first process, or a line now and then where stderr is no terminal. unit: "B" for bytes."""
    options: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "leave": False}
    if not sys.stderr.isatty():
        options.update(dict.fromkeys(("delay", "mininterval", "maxinterval"), LINE_INTERVAL), file=_Lines())
        options["bar_format"] = "{desc}: {n_fmt}{unit} in {elapsed}"
        if total:
            options["bar_format"] = "{desc}: {n_fmt} of {total_fmt}{unit} in {elapsed}, {remaining} left"
    return tqdm(items, what, total, disable=not distributed.is_first(), **options)


class _Lines:
    """A file that writes tqdm's redrawn bars as lines."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


# Programs


class Lasting:
    """A stream for output that becomes silent where it cannot be written: its reader has gone, its disk is full."""

    def __init__(self, stream: Any, say: Callable[[str], None]):
        """say: gets the reason, once."""
        self._stream, self._say = stream, say

    def write(self, text: str) -> int:
        """Write at once: what waits in a buffer would fail later, elsewhere."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            silence(self._stream)
            self._say(reason(error))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: Any) -> None:
    """Let what is written to a stream, and what still waits in its buffer, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a flag's help unless it is off or empty, or the help says what is taken then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is False or action.default in (None, "", argparse.SUPPRESS)
        said = silent or not action.option_strings or "(default:" in (action.help or "")
        return action.help if said else f"{action.help} (default: %(default)s)"


# Beginnings of flags of the published programs and of PyTorch's old launcher, and what to do instead.
FOREIGN_FLAGS = {
    "--backbone_": "--image_encoder torchvision:NAME trains from pixels (docs/training.md)",
    "--local": "torch.distributed.launch is not supported, start the processes with torchrun",
    "--optim": "not needed, the optimiser is AdamW, as published",
    "--reset_start_epoch": "--init_from starts a new run from a checkpoint's weights",
    "--val_step": "not needed, dev is evaluated after each epoch",
    "--vocab_path": "not needed, the vocabulary is that of --bert",
    "--word_dim": "not needed, --bert says the size of a word",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose flags cannot be abbreviated."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        for given in message.removeprefix("unrecognized arguments: ").split():
            for flag in filter(given.startswith, FOREIGN_FLAGS):
                message += f"; {given.partition('=')[0]}: {FOREIGN_FLAGS[flag]}"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n" if distributed.is_first() else None)


def program(main: Callable[..., None]) -> Callable[..., int]:
    """Turn `main(argv)` into a program: returns its exit code and prints a known error as one line on stderr.

    0 done, 1 a run that had to stop, 2 wrong input, 130 or 143 interrupted by Ctrl-C or SIGTERM. Any other exception is
    a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        problem, limit = "", resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if 0 <= limit < LEAST_FILES:  # PyTorch's loaders may wait forever where they cannot open more
            problem = f"this shell lets a program open {limit} files, {LEAST_FILES} are needed: ulimit -n 1024"
        if problem := problem or distributed.misdescribed():
            print(f"error: {problem}", file=sys.stderr)
            return 2
        distributed.keep_quiet()
        os.environ.update({**QUIET, **os.environ})
        atexit.register(_end_workers)  # runs before the handler of multiprocessing.util, which was registered earlier
        try:
            main(argv)
            sys.stdout.flush()
        except (InputError, TrainingStopped, CannotMeet, PeerLost) as error:
            if isinstance(error, PeerLost):
                time.sleep(distributed.EXIT_WAIT)  # torchrun ends this process, and names the one that failed
            # A loader's worker sends its traceback before the message
            line = str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ", 1)[-1]
            distributed.print_error(f"error: {line}")
            return error.exit_code
        except Interrupted as stopped:  # in all processes of a job at once
            if distributed.is_first():
                print(stopped, file=sys.stderr)
            return stopped.exit_code
        except RuntimeError as error:
            if not (advice := _advise(error)):
                raise
            distributed.print_error(f"error: {advice}")
            return 1
        except BrokenPipeError:  # the reader of our output (`| head`) has gone
            silence(sys.stdout)
            return 1
        except OSError as error:
            if error.errno not in OF_THE_SYSTEM:
                raise
            silence(sys.stdout)
            what = error.filename or ("the output" if error.errno == errno.ENOSPC else "the system")
            with suppress(OSError):  # stderr may be full too
                distributed.print_error(f"error: {what}: {reason(error)}{OF_THE_SYSTEM[error.errno]}")
            return 2
        except KeyboardInterrupt:
            if distributed.is_first():
                print("interrupted", file=sys.stderr)
            return 130
        return 0

    return run


def _end_workers() -> None:
    """Kill a loader's workers: multiprocessing would send them SIGTERM, which they ignore, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would complain of each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _advise(error: RuntimeError) -> str:
    """What has happened and what to do, where PyTorch says that the machine has come to a limit; else empty."""
    said = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in said:
        advice = "take a smaller --batch_size, in training rather a smaller --micro_batch, or --precision bf16"
        return f"out of memory ({reason(error)}); {advice}"
    if "Too many open files" in said:
        return f"too many open files{NO_FILES}"
    if "DataLoader worker" in said:
        return f"a process that reads data has ended ({reason(error)}); where memory is short, take fewer --workers"
    return ""
