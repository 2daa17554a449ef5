"""Writing files so that a kill or a full disk never leaves half of one under its final name."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lib.cli import InputError

TEMPORARY = ".tmp"  # ending of a file that is being written; one that stays behind was cut off by a kill


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` only when all of it is on the disk.

    Until then what stood there stays. Raises InputError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise InputError(
            f"{path} could not be written: {cause.strerror or cause}; what stood there before is untouched"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or folder} could not be written: {error.strerror or error}") from error


def check_writable(path: str) -> None:
    """Refuse a file that could not be written later, before the work is done that it is for. Empty: none is.

    Raises InputError.
    """
    if not path:
        return
    temporary = Path(f"{path}.{os.getpid()}{TEMPORARY}")
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path} could not be written: {error.strerror or error}") from None


def check_space(folder: str | Path, needed: int, what: str) -> None:
    """Refuse work whose result will not fit: `needed` bytes below a folder that may not be there yet.

    Raises InputError that says how much is free.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"{folder}: {what} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on that disk; "
            "make room, or choose another folder"
        )


def sync_folder(folder: Path) -> None:
    """Bring a folder's new names to the disk too, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error behind another: torch.save turns a full disk into a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
