"""Writing files so that a kill or a full disk never leaves half of one under its final name; reading lines of text."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from lib.cli import InputError, reason

TEMPORARY = ".tmp"  # ending of a file that is being written; one that stays behind was cut off by a kill


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that is moved to `path`, or to what it links to, when all of it is on the disk.

    A pipe or /dev/stdout stays, written to at the end. After an error `path` is as it was. Raises InputError.
    """
    special, path = _is_special(path), Path(path)
    final = path if special else Path(os.path.realpath(path))
    temporary = final.with_name(f"{final.name}.{os.getpid()}{TEMPORARY}")
    try:
        if special:
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                with open(path, "ab") as target:
                    shutil.copyfileobj(file, target)
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        sync_folder(final.parent)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        what = f"{path} could not be written: {reason(cause)}"
        raise InputError(f"{what}; a file that was there before is unchanged") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _is_special(path: str | Path) -> bool:
    """Whether a path names something that is no regular file, or one by its descriptor."""
    return os.path.exists(path) and (
        not os.path.isfile(path) or str(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    )


@contextmanager
def new_folder(folder: Path, flag: str) -> Iterator[Path]:
    """A temporary folder to fill, which takes the name `folder` at the end; nothing is left where the work fails.

    A kill leaves the temporary folder (.NAME.tmp), which the next try empties. flag: what names the folder, for error
    messages. Raises InputError where the name is taken, another process writes the same folder, or the disk is full.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} is already there; delete it, or choose another {flag}")
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")
    with writing_to(folder), ExitStack() as undo:
        temporary.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDONLY)
        undo.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing it; wait until it has ended") from None
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        for path in temporary.iterdir():  # of a try that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield temporary
        for path in temporary.iterdir():
            sync_folder(path)
        os.rename(temporary, folder)
        sync_folder(folder.parent)


def hold_lock(path: Path, named: str, work: str) -> FileLock:
    """Make a folder and hold a lock in it until the process ends. named, work: for the message. Raises InputError."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{named}: another process is {work}") from None
    except OSError as error:
        raise InputError(f"{named}: cannot be written ({reason(error)})") from None
    return lock


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and lines of a UTF-8 file, without \\n, \\r\\n and a byte-order mark. Raises InputError."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise InputError(f"{path}: line {number} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or folder} could not be written: {reason(error)}") from error


def check_writable(path: str) -> None:
    """Raises InputError if a file cannot be written, before the work whose result it will hold. Empty: no file."""
    if not path:
        return
    temporary = Path(f"{os.path.realpath(path)}.{os.getpid()}{TEMPORARY}")
    try:
        if Path(path).is_dir():
            raise IsADirectoryError("Is a directory")
        if _is_special(path):
            return
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path} could not be written: {reason(error)}") from None


def refuse_inputs(outputs: Iterable[str], inputs: Iterable[str | Path]) -> None:
    """Raises InputError where a file to be written is one that the same command reads."""
    there = [path for path in outputs if path and os.path.isfile(path)]
    for path in inputs if there else ():
        for output in there:
            if os.path.exists(path) and os.path.samefile(path, output):
                raise InputError(f"{output}: would replace {path}, which this command reads; name another file")


def sync_folder(folder: Path) -> None:
    """Bring a folder's new names, or a file's content, to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that caused another: torch.save raises RuntimeError for a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
